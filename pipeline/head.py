"""`head_terms`: the terms straight from hidden states and an LM head; logits never stored whole.

The same numbers as `terms(hidden @ weight.T, law)`, MATHS (56), block after block of the
vocabulary: forward keeps a running log-sum-exp and the logits of the entries; backward, which comes
once all depths' terms are in and the loss is known, makes each block of logits again, turns it into
its gradient and multiplies that into both. So the head's weight is read twice and its gradient
written once, in one product a block, and what exists beside them is a block of [N, columns].

Dims: N rows, D hidden width, V draft vocabulary, C columns of a block, E entries of all rows.
For sparse laws; a dense law is itself as large as the logits.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.law import SparseLaw
from pipeline.terms import (
    Entries,
    Seen,
    draft_entries,
    entry_pulls,
    entry_terms,
    fold,
    partition,
)

BLOCK = {"cpu": 1 << 20, "cuda": 1 << 25}
"""Logits of a block: 4 MiB of float32 stay near a core; on a GPU a block fills all of it."""


def head_terms(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    law: SparseLaw,
    *,
    d2t: Tensor | None = None,
    columns: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(kl, alpha), [N] float64, of logits hidden @ weightᵀ; `pipeline.terms.terms` says of what.

    Logits have the dtype of `hidden_ND`, to which blocks of the weight are cast; sums over the
    vocabulary are float32 at least. columns: C, chosen by device where None. Gradients flow to
    both where they are asked for; a frozen head costs no product.
    """
    assert isinstance(law, SparseLaw), "a dense law is as large as the logits"
    assert len(hidden_ND) == law.num_rows, (hidden_ND.shape, law.num_rows)
    assert d2t is None or len(d2t) == len(weight_VD), (weight_VD.shape, d2t)
    vocab_size = len(weight_VD)
    device = hidden_ND.device.type
    if columns is None:
        columns = max(64, BLOCK.get(device, BLOCK["cuda"]) // max(1, len(hidden_ND)))
    entries = draft_entries(law, vocab_size, d2t)
    blocks = Blocks.of(entries, vocab_size, min(vocab_size, columns))
    if torch.is_autocast_enabled(device):
        hidden_ND = hidden_ND.to(torch.get_autocast_dtype(device))
    kl: Tensor
    alpha: Tensor
    with torch.autocast(device, enabled=False):  # forward and backward make the same logits
        kl, alpha = _Head.apply(hidden_ND, weight_VD, blocks)
    return kl, alpha


@dataclass(frozen=True)
class Blocks:
    """A law's entries by block of columns."""

    entries: Entries
    columns: int
    """C."""
    order: Tensor
    """[E] int64: the entries, by block."""
    bounds: list[int]
    """Block b owns order[bounds[b] : bounds[b + 1]]."""
    column: Tensor
    """[E] int64."""
    bucket_rows: Tensor
    """[Nb] int64: the rows with a bucket."""

    @classmethod
    def of(cls, e: Entries, vocab_size: int, columns: int) -> "Blocks":
        """Sort the entries by block."""
        column = e.index - e.row * vocab_size
        block = column // columns
        order = block.argsort(stable=True)
        count = -(-vocab_size // columns)
        edges = torch.arange(count + 1, device=block.device)
        bounds = torch.searchsorted(block.index_select(0, order), edges).tolist()
        return cls(e, columns, order, bounds, column, (e.bucket > 0).nonzero().squeeze(1))

    def own(self, b: int) -> tuple[Tensor, Tensor, Tensor]:
        """The entries of block b, their rows and their columns within it."""
        own = self.order[self.bounds[b] : self.bounds[b + 1]]
        return own, self.entries.row[own], self.column[own] - b * self.columns


class _LogSumExp:
    """Running over blocks: the largest logit of each row, and Σ exp(z − largest)."""

    def __init__(self, num_rows: int, like: Tensor) -> None:
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.peak = torch.full((num_rows,), -torch.inf, dtype=wide, device=like.device)
        self.total = torch.zeros(num_rows, dtype=torch.float64, device=like.device)

    def add(self, z_NC: Tensor) -> None:
        """Take in another block; one of −inf alone adds nothing."""
        peak, total = partition(z_NC)
        total = torch.where(peak == -torch.inf, 0.0, total)
        top = torch.maximum(self.peak, peak)
        base = torch.where(top == -torch.inf, 0.0, top)
        self.total = (
            self.total * (self.peak - base).double().exp() + total * (peak - base).double().exp()
        )
        self.peak = top

    @property
    def value(self) -> Tensor:
        """[N] float64."""
        return self.peak.double() + self.total.log()


class _Head(torch.autograd.Function):
    """MATHS (56)."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, blocks: Blocks
    ) -> tuple[Tensor, ...]:
        e, buckets = blocks.entries, blocks.bucket_rows
        sums = _LogSumExp(len(hidden_ND), hidden_ND)
        rest = _LogSumExp(len(buckets), hidden_ND)
        z_E = torch.empty_like(e.p)
        for b in range(len(blocks.bounds) - 1):
            z_NC = hidden_ND @ _rows(weight_VD, blocks, b).to(hidden_ND.dtype).T
            own, row, column = blocks.own(b)
            place = row * z_NC.shape[1] + column
            z_E[own] = z_NC.view(-1)[place].double()
            sums.add(z_NC)
            if len(buckets):  # q outside the entries, summed in the same pass: nothing cancels
                z_NC.view(-1)[place] = -torch.inf
                rest.add(z_NC[buckets])
        log_rest = None
        if len(buckets):
            log_rest = torch.zeros_like(e.bucket)
            log_rest[buckets] = rest.value - sums.value[buckets]
        values, seen = entry_terms(e, z_E - e.spread(sums.value), log_rest)
        ctx.blocks = blocks
        ctx.save_for_backward(
            hidden_ND,
            weight_VD,
            sums.peak,
            sums.total,
            seen.logq,
            seen.mass,
            seen.bucket,
            seen.log_rest,
        )
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden_ND, weight_VD, peak, total, *seen = ctx.saved_tensors
        blocks: Blocks = ctx.blocks
        scale, base, value = entry_pulls(blocks.entries, Seen(*seen), *g)
        peak, scale = fold(peak, scale / total)
        value = value.to(peak.dtype)
        of_hidden = torch.zeros_like(hidden_ND, dtype=peak.dtype)
        of_weight = torch.empty_like(weight_VD) if ctx.needs_input_grad[1] else None
        for b in range(len(blocks.bounds) - 1):
            weight = _rows(weight_VD, blocks, b).to(hidden_ND.dtype)
            z_NC = (hidden_ND @ weight.T).to(peak.dtype)
            z_NC.sub_(peak[:, None]).exp_().mul_(scale[:, None])
            own, row, column = blocks.own(b)
            place = row * z_NC.shape[1] + column
            if base is not None:
                z_NC.view(-1)[place] = base[own].to(z_NC.dtype)
            z_NC.view(-1).index_add_(0, place, value[own])
            pull_NC = z_NC.to(hidden_ND.dtype)
            if ctx.needs_input_grad[0]:
                of_hidden += pull_NC @ weight
            if of_weight is not None:
                _rows(of_weight, blocks, b).copy_(pull_NC.T @ hidden_ND)
        own_hidden = of_hidden.to(hidden_ND.dtype) if ctx.needs_input_grad[0] else None
        return own_hidden, of_weight, None


def _rows(weight_VD: Tensor, blocks: Blocks, b: int) -> Tensor:
    """The rows of the head that make block b."""
    return weight_VD[b * blocks.columns : (b + 1) * blocks.columns]
