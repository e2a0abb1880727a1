"""MEDUSA: heads over the target's last hidden state, each for a token further ahead.

    z ← z + SiLU(W z + b), L times from z₀ = y_j;  logits = U z          (arXiv:2401.10774)

Head k at anchor j reads y_j = `last_hidden` alone and drafts x_{j+2+k}: it does not see the tokens
drafted between, so q of a depth is a function of the anchor (draft_training.md §3.2). W and b start
at zero, so every head starts as the target's own LM head.

`train_heads: true` is the paper's form: a matrix U_k [Vd, D] a head, trained, initialised from the
target's LM head. `false`, the default, shares the target's head, frozen: K·V·D parameters and their
gradients less, which the embedded run cannot afford and its differences between losses do not need.

Dims as in `pipeline.draft`; K heads.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
import torch.nn.functional as F  # noqa: N812  the name that torch's users know
from pydantic import Field
from torch import Tensor, nn

from pipeline.batch import Batch
from pipeline.blocks import take_rows
from pipeline.config import Gamma
from pipeline.draft import (
    Choose,
    Context,
    Draft,
    DraftConfig,
    Needs,
    require_depth,
    require_interface,
    require_last_hidden,
)
from pipeline.interface import Interface, Shape
from pipeline.vocab import require_d2t


class Config(DraftConfig):
    """Section `drafts.<name>` of kind `medusa`."""

    kind: Literal["medusa"]
    num_heads: Gamma
    num_layers: Annotated[int, Field(gt=0)]
    train_heads: bool = False
    draft_vocab_size: Annotated[int, Field(gt=0)] | None = None


class State:
    """Nothing: every round starts from the target's own hidden state."""

    def select(self, rows: Tensor) -> None:
        """Nothing to keep."""


class Model(Draft):
    """K heads of L residual layers each, on one output matrix or on one each."""

    def __init__(self, config: Config, head: Tensor, *, d2t: Tensor | None) -> None:
        super().__init__(d2t)
        self.config = config
        size = head.shape[1]
        shape = (config.num_heads, config.num_layers, size)
        self.weight = nn.Parameter(torch.zeros(*shape, size))
        self.bias = nn.Parameter(torch.zeros(shape))
        heads = head.expand(config.num_heads, -1, -1).clone() if config.train_heads else head[None]
        self.head = nn.Parameter(heads, requires_grad=config.train_heads)

    @staticmethod
    def needs(config: Config) -> Needs:
        """The last hidden state at the anchor, and the target's LM head to start from."""
        return Needs(last_hidden=True, interface=True)

    @staticmethod
    def max_depth(config: Config) -> int | None:
        """K: one token a head."""
        return config.num_heads

    @staticmethod
    def loss_depth(config: Config) -> int:
        """K."""
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
        """The same model for every seed: it starts as the target's head, nothing is drawn."""
        target = require_interface("medusa", shape, interface)
        d2t = require_d2t(d2t, config.draft_vocab_size, shape.vocab_size)
        head = target.lm_head if d2t is None else target.lm_head[d2t]
        return cls(config, head, d2t=d2t)

    def _features(self, last_hidden: Tensor | None) -> Tensor:
        last_hidden = require_last_hidden("medusa", last_hidden)
        return last_hidden.flatten(0, 1).to(self.weight.dtype)

    def _depth_state(self, depth: int, z: Tensor) -> tuple[Tensor, Tensor]:
        """What head `depth` makes of features [N, D], and its output matrix [Vd, D]."""
        for weight, bias in zip(self.weight[depth], self.bias[depth], strict=True):
            z = z + F.silu(F.linear(z, weight, bias))
        return z, self.head[depth if self.config.train_heads else 0]

    def training_states(self, batch: Batch, depth: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Head k at the supervised anchors of depth k."""
        require_depth("medusa", depth, self.config.num_heads)
        features = self._features(batch.last_hidden)
        for k in range(depth):
            yield self._depth_state(k, take_rows(features, batch.pairs(k).anchor))

    def open(self, num_rows: int, width: int) -> State:
        """No state."""
        return State()

    @torch.no_grad()
    def propose(self, state: State, context: Context, gamma: int, choose: Choose) -> Tensor:
        """All γ depths from y at the anchor, `length` − 2."""
        require_depth("medusa", gamma, self.config.num_heads)
        features, num_tokens = self._features(context.last_hidden), context.tokens.shape[1]
        row = torch.arange(len(context.length), device=context.length.device)
        anchor = features[row * num_tokens + context.length - 2]
        logits = []
        for k in range(gamma):
            logits.append(F.linear(*self._depth_state(k, anchor)))
            choose(k, logits[-1])
        return torch.stack(logits, dim=1)
