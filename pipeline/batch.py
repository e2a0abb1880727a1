"""A padded batch of cached sequences, and which (anchor, depth) pairs it supervises.

Dims: B rows of a sequence each, or of several where they are packed (`first`); T tokens (padded),
R law rows, L captured layers, D target width, S depths.

One index everywhere (DESIGN §6): anchor j has x_{j+1} known; depth k = 0 … S−1 predicts x_{j+2+k},
whose law is the row at position j+1+k. A pair (j, k) is supervised when x_{j+1} and x_{j+2+k} lie
in the same assistant turn, for every architecture alike.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.law import Law


@dataclass(frozen=True)
class Pairs:
    """The supervised anchors of one depth, flattened over the batch."""

    anchor: Tensor
    """[N] int64: b · T + j."""
    row: Tensor
    """[N] int64: the law row of position j+1+k."""
    token: Tensor
    """[N] int64: x_{j+2+k}, the token that was really emitted."""
    logp: Tensor
    """[N] float32: log p of that token, exact whatever the cache keeps."""


@dataclass(frozen=True)
class Batch:
    """Sequences as drafts consume them; absent features are None."""

    ids: tuple[str, ...]
    """Of the sequences, row after row."""
    domains: tuple[str, ...]
    tokens: Tensor
    """[B, T] int64, 0 beyond `length`."""
    length: Tensor
    """[B] int64."""
    turn: Tensor
    """[B, T] int64, −1 outside assistant turns and beyond `length`; no two turns of a row alike."""
    token_logp: Tensor
    """[B, T] float32: log p_t(x_{t+1}), 0 where row t is not supervised."""
    law_row: Tensor
    """[B, T] int64: the row of `law` at position t, −1 where there is none."""
    law: Law | None
    hidden: Tensor | None
    """[B, T, L, D] float32: captured layers, in the order of the cache's layer ids."""
    last_hidden: Tensor | None
    """[B, T, D] float32: after the target's final norm."""
    first: Tensor | None = None
    """[B, T] int64: the index in its row at which a token's sequence begins; None: always 0.

    Padding begins at itself: it is nobody's.
    """

    @property
    def position(self) -> Tensor:
        """[T] or [B, T] int64: the place of each token in its own sequence."""
        index = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return index if self.first is None else index - self.first

    def pairs(self, depth: int) -> Pairs:
        """The supervised pairs (j, depth), by sequence and then by j."""
        shift = depth + 1
        num_tokens = self.tokens.shape[1]
        last = num_tokens - shift - 1  # anchors 0 … last−1: x_{j+2+depth} must exist
        if last <= 0:
            none = torch.zeros(0, dtype=torch.int64, device=self.tokens.device)
            return Pairs(none, none, none, torch.zeros(0, device=self.tokens.device))
        first, final = self.turn[:, 1 : 1 + last], self.turn[:, shift + 1 :]
        mask = (first >= 0) & (first == final)
        if self.first is not None:  # the anchor itself may end the sequence before
            mask &= self.first[:, :last] == self.first[:, 1 : 1 + last]
        b, j = mask.nonzero(as_tuple=True)
        position = j + shift
        return Pairs(
            anchor=b * num_tokens + j,
            row=self.law_row[b, position],
            token=self.tokens[b, position + 1],
            logp=self.token_logp[b, position],
        )
