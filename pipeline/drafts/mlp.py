"""MLP speculator: a small recurrence over the target's last hidden state, one stage a depth.

    s_{-1} = y_j (scale_input: y_j / (rms(y_j) √2)),  c_s = 0.5^{0.5/n},  c_e = √((1 − c_s²) I/2)
    s_k = GELU(LN_k(P_k s_{k-1} + (c_e/c_s) Emb_k(x_{j+1+k}))),   logits = Head_k s_k

Stage k at anchor j drafts x_{j+2+k} (draft_training.md §3.3, arXiv:2404.19124): teacher forced in
the tokens, recurrent in the state, no attention. LN divides by the root mean square and has a
weight and a bias. `tie_weights` shares embedding, norm and head among the stages, and the
projections of all but the first. Every table is the draft's own: it needs of the target only y.

Dims as in `pipeline.draft`; n heads, I inner width.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Literal

import torch
import torch.nn.functional as F  # noqa: N812  the name that torch's users know
from pydantic import Field
from torch import Tensor, nn

from pipeline.batch import Batch
from pipeline.blocks import NORM_EPS, take_rows
from pipeline.config import Gamma
from pipeline.draft import (
    Choose,
    Context,
    Draft,
    DraftConfig,
    Needs,
    require_depth,
    require_last_hidden,
)
from pipeline.interface import Interface, Shape
from pipeline.seeds import generator
from pipeline.vocab import require_d2t


class Config(DraftConfig):
    """Section `drafts.<name>` of kind `mlp`."""

    kind: Literal["mlp"]
    num_heads: Gamma
    """n: stages, one token each."""
    inner_size: Annotated[int, Field(gt=0)]
    tie_weights: bool
    scale_input: bool
    draft_vocab_size: Annotated[int, Field(gt=0)] | None = None


class State:
    """Nothing: every round starts from the target's own hidden state."""

    def select(self, rows: Tensor) -> None:
        """Nothing to keep."""


def unit_rms(x: Tensor) -> Tensor:
    """X / rms(x) over the last dim, in float32 or wider."""
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS)
    return (wide * scale).to(x.dtype)


class Model(Draft):
    """n stages; tensors [1, …] instead of [n, …] where the stages share them."""

    def __init__(self, config: Config, shape: Shape, *, d2t: Tensor | None = None) -> None:
        super().__init__(d2t)
        self.config = config
        inner, stages = config.inner_size, 1 if config.tie_weights else config.num_heads
        later = min(stages, config.num_heads - 1) if config.tie_weights else stages - 1
        self.embed = nn.Parameter(torch.empty(stages, shape.vocab_size, inner))
        self.first = nn.Parameter(torch.empty(inner, shape.hidden_size))
        self.later = nn.Parameter(torch.empty(later, inner, inner))
        self.norm_weight = nn.Parameter(torch.ones(stages, inner))
        self.norm_bias = nn.Parameter(torch.zeros(stages, inner))
        draft_size = shape.vocab_size if d2t is None else len(d2t)
        self.head = nn.Parameter(torch.empty(stages, draft_size, inner))
        state_weight = 0.5 ** (0.5 / config.num_heads)
        self.token_weight = math.sqrt((1 - state_weight**2) * inner / 2) / state_weight

    @staticmethod
    def needs(config: Config) -> Needs:
        """The last hidden state at the anchor."""
        return Needs(last_hidden=True)

    @staticmethod
    def max_depth(config: Config) -> int | None:
        """n: one token a stage."""
        return config.num_heads

    @staticmethod
    def loss_depth(config: Config) -> int:
        """N."""
        return config.num_heads

    @classmethod
    def build(
        cls,
        config: Config,
        shape: Shape,
        interface: Interface | None,
        seed: int,
        *,
        d2t: Tensor | None = None,
    ) -> "Model":
        """A fresh draft from `seed`; a pruned head is the kept rows of the whole one."""
        d2t = require_d2t(d2t, config.draft_vocab_size, shape.vocab_size)
        model = cls(config, shape, d2t=d2t)
        stream = generator(seed, "draft", "mlp")
        for stack in (model.embed, model.first, model.later):
            _draw(stack.data, stream)
        stages, _, inner = model.head.shape
        whole = _draw(torch.empty(stages, shape.vocab_size, inner), stream)
        model.head.data = whole if d2t is None else whole[:, d2t]
        return model

    def _start(self, last_hidden: Tensor | None, row: Tensor) -> Tensor:
        """s_{-1} [N, D] at rows of the flattened features."""
        features = require_last_hidden("mlp", last_hidden).flatten(0, 1)
        y = take_rows(features, row).to(self.head.dtype)
        return unit_rms(y) / 2**0.5 if self.config.scale_input else y

    def _step(self, k: int, state: Tensor, token: Tensor) -> Tensor:
        """s_k [N, I] from s_{k-1} and the token of stage k [N]."""
        tied = self.config.tie_weights
        stage = 0 if tied else k
        matrix = self.first if k == 0 else self.later[0 if tied else k - 1]
        mixed = F.linear(state, matrix) + self.token_weight * take_rows(self.embed[stage], token)
        return F.gelu(self.norm_weight[stage] * unit_rms(mixed) + self.norm_bias[stage])

    def _head(self, k: int) -> Tensor:
        """[Vd, I]"""
        return self.head[0 if self.config.tie_weights else k]

    def training_states(self, batch: Batch, depth: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Stages 0 … depth−1 at every supervised anchor, tokens teacher forced."""
        require_depth("mlp", depth, self.config.num_heads)
        anchors = [batch.pairs(k).anchor for k in range(depth)]
        every = torch.unique(torch.cat(anchors))  # ascending
        state = self._start(batch.last_hidden, every)
        tokens = batch.tokens.flatten()
        for k in range(depth):
            # an anchor that depth k does not ask for may run over the end; nobody reads it
            state = self._step(k, state, tokens[(every + 1 + k).clamp(max=len(tokens) - 1)])
            yield take_rows(state, torch.searchsorted(every, anchors[k])), self._head(k)

    def open(self, num_rows: int, width: int) -> State:
        """No state."""
        return State()

    @torch.no_grad()
    def propose(self, state: State, context: Context, gamma: int, choose: Choose) -> Tensor:
        """γ stages from y at the anchor, `length` − 2, on its own tokens."""
        require_depth("mlp", gamma, self.config.num_heads)
        num_tokens = context.tokens.shape[1]
        row = torch.arange(len(context.length), device=context.length.device)
        here = self._start(context.last_hidden, row * num_tokens + context.length - 2)
        token = context.tokens[row, context.length - 1]
        logits = []
        for k in range(gamma):
            here = self._step(k, here, token)
            logits.append(F.linear(here, self._head(k)))
            token = choose(k, logits[-1])
        return torch.stack(logits, dim=1)


def _draw(stack: Tensor, stream: torch.Generator) -> Tensor:
    """Fill matrices [..., out, in] with N(0, 1/in), as `pipeline.blocks.draw` does."""
    return stack.normal_(0.0, stack.shape[-1] ** -0.5, generator=stream)
