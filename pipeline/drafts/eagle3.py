"""EAGLE-3: one layer over fused hidden states of the target, unrolled on its own outputs.

At anchor j and step k = 0 … S−1 (draft_training.md §3.1, arXiv:2503.01840):

    f = fc(g_j) at step 0, then its own output at the same j      g: L captured layers, concatenated
    e = RMS_in(E x_{j+1+k}),  h = RMS_hid(f),  q, k, v from [e; h]
    r = (h if norm_before_residual else f) + Attn,  out = r + SwiGLU(RMS_post r)
    logits = W_head RMS(out), drafting x_{j+2+k};  state passed on: out, or RMS(out) if norm_output

Step k attends causally to the **step-0** keys of indices ≤ j and to its own steps 1 … k at j, the
diagonal: what serving sees, where only tokens that were verified keep their K/V (training-time
test). No [S·T, S·T] mask is built: the diagonal is one extra key a step. Queries, MLP and head run
at supervised anchors only.

Options: `norm_before_fc` norms g before fc; `train_head` trains a copy of the target's head, which
else stays frozen, as the embedding always does. `depth` S is what training unrolls; replay and
decoding may go deeper.

Dims as in `pipeline.draft`; A anchors of a row (padded), H heads, C channels of a head, Q tokens
fed at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import torch.nn.functional as F  # noqa: N812  the name that torch's users know
from pydantic import Field
from torch import Tensor, nn

from pipeline.batch import Batch
from pipeline.blocks import (
    Attention,
    KVCache,
    Linear,
    RMSNorm,
    SwiGLU,
    attend,
    attend_diagonal,
    draw,
    rope_table,
    span,
    take_rows,
    visible,
)
from pipeline.draft import Choose, Context, Draft, DraftConfig, Needs, require_interface
from pipeline.interface import Interface, Shape
from pipeline.seeds import generator
from pipeline.vocab import require_d2t
from storage.errors import DraftError


class Config(DraftConfig):
    """Section `drafts.<name>` of kind `eagle3`."""

    kind: Literal["eagle3"]
    depth: Annotated[int, Field(gt=0)]
    num_heads: Annotated[int, Field(gt=0)]
    intermediate_size: Annotated[int, Field(gt=0)]
    norm_before_residual: bool
    norm_before_fc: bool
    norm_output: bool
    fused_layers: Annotated[int, Field(gt=0)] = 3
    """L: how many captured layers `fc` fuses."""
    train_head: bool = False
    draft_vocab_size: Annotated[int, Field(gt=0)] | None = None


@dataclass
class State:
    """K/V of step 0 alone: those of own-output steps are dropped at the end of a round."""

    cache: KVCache
    filled: Tensor
    """[B] int64: indices 0 … filled−1 are in the cache."""

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in that order."""
        self.cache.select(rows)
        self.filled = self.filled[rows]


@dataclass
class Steps:
    """What the queries of a pass attend to: step-0 keys under a mask, and their own later steps."""

    base: tuple[Tensor, Tensor]
    """k, v of step 0: [B, W, H, C] each."""
    mask: Tensor
    """[B, 1, A, W] bool: the indices up to a query's own."""
    index: Tensor
    """[B, A] int64: the index j of each query."""
    keys: list[Tensor] = field(default_factory=list)
    """Of steps 1, 2, …: [B, A, H, C] each."""
    values: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Anchors:
    """The anchors of all depths as a padded [B, A], and where each lies in it."""

    index: Tensor
    """[B, A] int64: j, ascending; padding repeats indices that nobody asks for."""
    slot: Tensor
    """[B · T] int64: b · A + a of the anchor b · T + j."""

    @classmethod
    def of(cls, anchors: list[Tensor], tokens_BT: Tensor) -> "Anchors":
        """Gather the flat anchors of all depths."""
        num_rows, num_tokens = tokens_BT.shape
        asked = torch.zeros(num_rows * num_tokens, dtype=torch.bool, device=tokens_BT.device)
        for anchor in anchors:
            asked[anchor] = True
        asked_BT = asked.view(num_rows, num_tokens)
        width = max(int(asked_BT.sum(1).max()), 1)
        index = torch.sort(asked_BT.to(torch.uint8), dim=1, descending=True, stable=True).indices
        first = torch.arange(num_rows, device=tokens_BT.device)[:, None] * width
        return cls(index[:, :width], (first + asked_BT.cumsum(1) - 1).flatten())


class Model(Draft):
    """fc, one layer on [embedding; feature], norm and head."""

    def __init__(
        self, config: Config, embed: Tensor, *, head: Tensor, d2t: Tensor | None = None
    ) -> None:
        super().__init__(d2t)
        self.config = config
        size = embed.shape[1]
        fused = config.fused_layers * size
        self.embed = nn.Parameter(embed, requires_grad=False)
        self.fc_norm = RMSNorm(fused) if config.norm_before_fc else None
        self.fc = Linear(fused, size)
        self.input_norm = RMSNorm(size)
        self.hidden_norm = RMSNorm(size)
        self.attention = Attention(size, config.num_heads, in_size=2 * size)
        self.post_norm = RMSNorm(size)
        self.mlp = SwiGLU(size, config.intermediate_size)
        self.norm = RMSNorm(size)
        head = head.clone() if config.train_head else head
        self.head = nn.Parameter(head, requires_grad=config.train_head)

    @staticmethod
    def needs(config: Config) -> Needs:
        """L captured layers at every token, the embedding and the head."""
        return Needs(num_layers=config.fused_layers, interface=True)

    @staticmethod
    def max_depth(config: Config) -> int | None:
        """No limit: it runs on its own output."""
        return None

    @staticmethod
    def loss_depth(config: Config) -> int:
        """S."""
        return config.depth

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
        """A fresh layer from `seed` between the target's embedding and head."""
        target = require_interface("eagle3", shape, interface)
        if shape.hidden_size % (2 * config.num_heads):
            raise DraftError(
                found=f"num_heads {config.num_heads} on a target of width {shape.hidden_size}",
                expected="heads of an even number of channels that fill the width",
                todo="correct drafts.*.num_heads in params.yaml",
            )
        d2t = require_d2t(d2t, config.draft_vocab_size, shape.vocab_size)
        head = target.lm_head if d2t is None else target.lm_head[d2t]
        model = cls(config, target.embed, head=head, d2t=d2t)
        stream = generator(seed, "draft", "eagle3")
        for part in (model.fc, model.attention, model.mlp):
            draw(part, stream)
        return model

    def _fuse(self, hidden: Tensor | None) -> Tensor:
        """Fuse captured layers [..., L, D] into f [..., D]."""
        layers = 0 if hidden is None else hidden.shape[-2]
        if hidden is None or layers != self.config.fused_layers:
            raise DraftError(
                found=f"a cache with {layers} hidden layers for a draft of kind eagle3",
                expected=f"the {self.config.fused_layers} that it fuses",
                todo="set capture.hidden_layers to as many and run dvc repro capture",
            )
        g = hidden.flatten(-2).to(self.fc.weight.dtype)
        fused: Tensor = self.fc(g if self.fc_norm is None else self.fc_norm(g))
        return fused

    def _inputs(self, token: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        """[e; h] [..., 2D], and what the residual stream starts from [..., D]."""
        h = self.hidden_norm(f)
        e = self.input_norm(take_rows(self.embed, token))
        return torch.cat([e, h], dim=-1), h if self.config.norm_before_residual else f

    def _table(self, position: Tensor) -> tuple[Tensor, Tensor]:
        return rope_table(position, self.attention.head_size, dtype=self.fc.weight.dtype)

    def _state(self, residual: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer: the state that is passed on, [B, A, D]."""
        r = residual + self.attention.out(attended)
        out = r + self.mlp(self.post_norm(r))
        return self.norm(out) if self.config.norm_output else out

    def _logits(self, state: Tensor) -> Tensor:
        return F.linear(state if self.config.norm_output else self.norm(state), self.head)

    def _own_step(self, k: int, token_BA: Tensor, *, state: Tensor, steps: Steps) -> Tensor:
        """Step k ≥ 1 on the state of step k−1: [B, A, D]; adds its key and value to `steps`."""
        x, residual = self._inputs(token_BA, state)
        q, key, value = self.attention.project(x, self._table(steps.index + k))
        steps.keys.append(key)
        steps.values.append(value)
        own = (steps.keys, steps.values)
        return self._state(residual, attend_diagonal(q, steps.base, steps.mask, own=own))

    def training_logits(self, batch: Batch, depth: int) -> Iterator[Tensor]:
        """Unroll `depth` steps from every supervised anchor, tokens teacher forced."""
        anchors = [batch.pairs(k).anchor for k in range(depth)]
        where = Anchors.of(anchors, batch.tokens)
        num_rows, num_tokens = batch.tokens.shape
        # x_{j+1}; the last index has none, and nobody that is supervised attends to it
        after = batch.tokens.roll(-1, dims=1)
        x, residual = self._inputs(after, self._fuse(batch.hidden))
        position = torch.arange(num_tokens, device=x.device)
        row = torch.arange(num_rows, device=x.device)[:, None] * num_tokens
        flat = row + where.index
        steps = Steps(
            base=self.attention.keys_values(x, self._table(position)),
            mask=visible(where.index, num_tokens),
            index=where.index,
        )
        asked = take_rows(x.flatten(0, 1), flat)
        q = self.attention.queries(asked, self._table(where.index))
        attended = attend(q, *steps.base, steps.mask)
        state = self._state(take_rows(residual.flatten(0, 1), flat), attended)
        for k in range(depth):
            if k > 0:
                token = batch.tokens.gather(1, (where.index + 1 + k).clamp(max=num_tokens - 1))
                state = self._own_step(k, token, state=state, steps=steps)
            yield self._logits(take_rows(state.flatten(0, 1), where.slot[anchors[k]]))

    def open(self, num_rows: int, width: int) -> State:
        """An empty cache for B rows of `width` tokens."""
        heads = (self.attention.num_heads, self.attention.head_size)
        return State(
            cache=KVCache.empty(num_rows, width, heads=heads, like=self.fc.weight.data),
            filled=torch.zeros(num_rows, dtype=torch.int64, device=self.fc.weight.device),
        )

    def _catch_up(self, state: State, context: Context) -> tuple[Tensor, Steps]:
        """Step 0 over the indices that became committed; the state at the anchor [B, 1, D]."""
        end = context.length - 1  # indices 0 … anchor: the anchor's token is the last committed
        # the anchor is run again at least: its output is what depth 0 needs
        start = torch.minimum(state.filled, end - 1)
        position = span(start, end, spare=state.cache.width)
        row = torch.arange(len(end), device=end.device)[:, None]
        source = position.clamp(max=context.tokens.shape[1] - 2)
        hidden = None if context.hidden is None else context.hidden[row, source]
        x, residual = self._inputs(context.tokens[row, source + 1], self._fuse(hidden))
        q, key, value = self.attention.project(x, self._table(position))
        state.cache.write(position, key, value)
        state.filled = end
        width, last = int(end.max()), (end - 1 - start)[:, None]
        anchor = (end - 1)[:, None]
        steps = Steps(
            base=(state.cache.k[:, :width], state.cache.v[:, :width]),
            mask=visible(anchor, width),
            index=anchor,
        )
        attended = attend(q[row, last], *steps.base, steps.mask)
        return self._state(residual[row, last], attended), steps

    @torch.no_grad()
    def propose(self, state: State, context: Context, gamma: int, choose: Choose) -> Tensor:
        """Step 0 over what is newly committed, then γ − 1 steps on its own outputs."""
        hidden, steps = self._catch_up(state, context)
        logits = [self._logits(hidden[:, 0])]
        token = choose(0, logits[0])
        for k in range(1, gamma):
            hidden = self._own_step(k, token[:, None], state=hidden, steps=steps)
            logits.append(self._logits(hidden[:, 0]))
            token = choose(k, logits[-1])
        return torch.stack(logits, dim=1)
