"""One layer unrolled on its own outputs: the recurrence that `eagle3` and `mtp` share.

At anchor j, step k = 0 … S−1 reads the token x_{j+1+k} (teacher forced in training) and a feature:
what the target gave for j at step 0, its own output at the same j afterwards. Step k attends
causally to the **step-0** keys of indices ≤ j and to its own steps 1 … k at j, the diagonal: what
serving sees, where only tokens that were verified keep their K/V (training-time test,
draft_training.md §3.1). No [S·T, S·T] mask is built: the diagonal is one extra key a step. Queries,
MLP and head run at supervised anchors only.

A kind gives four small functions (`Unrolled`); training and decoding are here, once for both. With
`recompute` a step's activations are made again in backward, and kept are its state, its key and its
value (arXiv:1604.06174).

Dims as in `pipeline.draft`; A anchors of a row (padded), H heads, G key/value heads, C channels of
a head, Q tokens fed at once.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the name that torch's users know
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipeline.batch import Batch
from pipeline.blocks import (
    Attention,
    KVCache,
    RopeTable,
    Rotary,
    attend,
    attend_diagonal,
    rope_table,
    span,
    take_rows,
    visible,
)
from pipeline.deepseek import LatentAttention
from pipeline.draft import Choose, Context, Draft
from storage.errors import DraftError


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
    """k, v of step 0: [B, W, G, C] each."""
    mask: Tensor
    """[B, 1, A, W] bool: the indices up to a query's own."""
    position: Tensor
    """[B, A] int64: the place of each query in its sequence."""
    keys: list[Tensor] = field(default_factory=list)
    """Of steps 1, 2, …: [B, A, G, C] each."""
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


class Unrolled(Draft):
    """A draft of one layer that runs on its own output."""

    attention: Attention | LatentAttention
    rope_theta: float
    rotary: Rotary | None = None
    """Angles in place of those of `rope_theta`."""

    @abstractmethod
    def _start(self, hidden: Tensor | None, last_hidden: Tensor | None) -> Tensor:
        """The feature of step 0 [..., D] from the target's, [..., L, D] and [..., D].

        `DraftError` where the one that it reads is absent.
        """

    @abstractmethod
    def _inputs(self, token: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
        """What attention reads, and what the residual stream starts from [..., D]."""

    @abstractmethod
    def _state(self, residual: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer: the state that is passed on, [B, A, D]."""

    @abstractmethod
    def _read(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """What the head reads of a state, [..., D], and the head [Vd, D]."""

    def _logits(self, state: Tensor) -> Tensor:
        return F.linear(*self._read(state))

    def _run(self, step: Callable[..., Any], *inputs: Any) -> Any:
        """The result of a pure step; its activations are kept, or made again in backward."""
        if self.recompute and torch.is_grad_enabled():
            # nothing here draws a random number
            return checkpoint(step, *inputs, use_reentrant=False, preserve_rng_state=False)
        return step(*inputs)

    def _table(self, position: Tensor) -> tuple[Tensor, Tensor]:
        dtype, size = self.attention.like.dtype, self.attention.rotary_size
        return rope_table(position, size, dtype=dtype, theta=self.rope_theta, rotary=self.rotary)

    def _own_step(self, k: int, token_BA: Tensor, *, state: Tensor, steps: Steps) -> Tensor:
        """Step k ≥ 1 on the state of step k−1: [B, A, D]; adds its key and value to `steps`."""
        table = self._table(steps.position + k)
        step = partial(self._diagonal, base=steps.base, mask=steps.mask, table=table)
        state, key, value = self._run(step, token_BA, state, [*steps.keys], [*steps.values])
        steps.keys.append(key)
        steps.values.append(value)
        return state

    def _diagonal(
        self,
        token_BA: Tensor,
        state: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        *,
        base: tuple[Tensor, Tensor],
        mask: Tensor,
        table: RopeTable,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The state of a step, its key and its value, from those of the steps before."""
        x, residual = self._inputs(token_BA, state)
        q, key, value = self.attention.project(x, table)
        own = ([*keys, key], [*values, value])
        return self._state(residual, attend_diagonal(q, base, mask, own=own)), key, value

    def training_states(self, batch: Batch, depth: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Unroll `depth` steps from every supervised anchor, tokens teacher forced."""
        anchors = [batch.pairs(k).anchor for k in range(depth)]
        where = Anchors.of(anchors, batch.tokens)
        num_rows, num_tokens = batch.tokens.shape
        # x_{j+1}; the last index has none, and nobody that is supervised attends to it
        after = batch.tokens.roll(-1, dims=1)
        x, residual = self._inputs(after, self._start(batch.hidden, batch.last_hidden))
        row = torch.arange(num_rows, device=x.device)[:, None] * num_tokens
        flat = row + where.index
        first = None if batch.first is None else batch.first.gather(1, where.index)
        steps = Steps(
            base=self.attention.keys_values(x, self._table(batch.position)),
            mask=visible(where.index, num_tokens, first),
            position=where.index if first is None else where.index - first,
        )
        table = self._table(steps.position)

        def begin(asked: Tensor, residual: Tensor) -> Tensor:
            attended = attend(self.attention.queries(asked, table), *steps.base, steps.mask)
            return self._state(residual, attended)

        state = self._run(begin, *(take_rows(y.flatten(0, 1), flat) for y in (x, residual)))
        for k in range(depth):
            if k > 0:
                token = batch.tokens.gather(1, (where.index + 1 + k).clamp(max=num_tokens - 1))
                state = self._own_step(k, token, state=state, steps=steps)
            yield self._read(take_rows(state.flatten(0, 1), where.slot[anchors[k]]))

    def open(self, num_rows: int, width: int) -> State:
        """An empty cache for B rows of `width` tokens."""
        like, values = self.attention.like, self.attention.value_size
        heads = (self.attention.num_kv_heads, self.attention.head_size)
        return State(
            cache=KVCache.empty(num_rows, width, heads=heads, like=like, value_size=values),
            filled=torch.zeros(num_rows, dtype=torch.int64, device=like.device),
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
        last_hidden = None if context.last_hidden is None else context.last_hidden[row, source]
        feature = self._start(hidden, last_hidden)
        x, residual = self._inputs(context.tokens[row, source + 1], feature)
        q, key, value = self.attention.project(x, self._table(position))
        state.cache.write(position, key, value)
        state.filled = end
        width, last = int(end.max()), (end - 1 - start)[:, None]
        anchor = (end - 1)[:, None]
        steps = Steps(
            base=(state.cache.k[:, :width], state.cache.v[:, :width]),
            mask=visible(anchor, width),
            position=anchor,
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


def require_heads(
    width: int, num_heads: int, *, num_kv_heads: int | None, head_size: int | None
) -> None:
    """`DraftError` unless the heads make an attention on a target of this width."""
    channels = head_size or width // num_heads
    if channels % 2 or (head_size is None and width % num_heads):
        raise DraftError(
            found=f"num_heads {num_heads} on a target of width {width}"
            if head_size is None
            else f"head_size {head_size}",
            expected="heads of an even number of channels"
            + (" that fill the width" if head_size is None else ""),
            todo="correct drafts.*.num_heads or head_size in params.yaml",
        )
    if num_kv_heads is not None and num_heads % num_kv_heads:
        raise DraftError(
            found=f"num_kv_heads {num_kv_heads} for num_heads {num_heads}",
            expected="a divisor, so that each key serves as many queries",
            todo="correct drafts.*.num_kv_heads in params.yaml",
        )
