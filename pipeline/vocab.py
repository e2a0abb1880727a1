"""A draft vocabulary smaller than the target's: which ids it keeps, and the way back.

`d2t` [Vd] int64 holds the target id of each draft id, ascending: draft ids follow target ids.
Inside the project these are absolute ids; the engines' offset form (`id − index`) is made at the
edge, in `pipeline.exports`. α and every metric stay on the full vocabulary: a pruned token has
q = 0, a forced rejection.

Dims: V target vocabulary, Vd draft vocabulary.
"""

import torch
from torch import Tensor

from storage.errors import DraftError


def _check_size(size: int, vocab_size: int) -> None:
    if not 0 < size <= vocab_size:
        raise DraftError(
            found=f"a draft vocabulary of {size} ids",
            expected=f"from 1 to the target's {vocab_size}",
            todo="correct draft_vocab_size in params.yaml",
        )


def draft_vocabulary(counts_V: Tensor, size: int) -> Tensor:
    """The `size` most frequent supervised tokens, ascending: d2t [Vd] int64.

    `counts_V` [V] counts supervised tokens. Ties, and what tops up a vocabulary larger than the
    number of tokens seen, go to the lowest ids. `DraftError` where `size` is larger than V.
    """
    _check_size(size, len(counts_V))
    by_count = torch.sort(counts_V, descending=True, stable=True).indices
    return by_count[:size].sort().values.to(torch.int64)


def require_d2t(d2t: Tensor | None, size: int | None, vocab_size: int) -> Tensor | None:
    """`d2t` as a draft of `draft_vocab_size` may use it; None for the whole vocabulary.

    `DraftError` where the parameter and the map disagree, or the map is no draft vocabulary.
    """
    size = vocab_size if size is None else size
    _check_size(size, vocab_size)
    if d2t is None and size == vocab_size:
        return None
    given = 0 if d2t is None else len(d2t)
    if d2t is None or given != size:
        raise DraftError(
            found=f"a map of {given} draft ids" if given else "no map of draft ids",
            expected=f"one for each of the {size} that draft_vocab_size says",
            todo="run dvc repro, so that the vocabulary is counted anew",
        )
    if int(d2t[0]) < 0 or int(d2t[-1]) >= vocab_size or bool((d2t.diff() <= 0).any()):
        raise DraftError(
            found="a map of draft ids that is not ascending within the target's vocabulary",
            expected=f"distinct ids below {vocab_size}",
            todo="run dvc repro, so that the vocabulary is counted anew",
        )
    return d2t.to(torch.int64)


def target_to_draft(d2t: Tensor, vocab_size: int) -> Tensor:
    """[V] int64: the draft id of each target id, −1 where it has none."""
    draft_id = torch.full((vocab_size,), -1, dtype=torch.int64, device=d2t.device)
    draft_id[d2t] = torch.arange(len(d2t), device=d2t.device)
    return draft_id


def expand(q_draft: Tensor, d2t: Tensor | None, vocab_size: int) -> Tensor:
    """Probabilities [..., Vd] on the target's ids [..., V]; 0 on those that were pruned."""
    if d2t is None:
        return q_draft
    q_V = q_draft.new_zeros(*q_draft.shape[:-1], vocab_size)
    q_V[..., d2t] = q_draft
    return q_V


def coverage(counts_V: Tensor, d2t: Tensor) -> float:
    """Share of the supervised tokens that the draft vocabulary holds, 0 … 1."""
    return float(counts_V[d2t].sum() / counts_V.sum().clamp(min=1))


def to_offsets(d2t: Tensor) -> Tensor:
    """The engines' form of `d2t` [Vd] int64: what is added to a draft id to give a target id."""
    return d2t - torch.arange(len(d2t), device=d2t.device)


def from_offsets(offset: Tensor) -> Tensor:
    """`d2t` from the engines' form."""
    return offset.to(torch.int64) + torch.arange(len(offset), device=offset.device)


def kept(d2t: Tensor, vocab_size: int) -> Tensor:
    """The engines' `t2d` [V] bool: whether the draft vocabulary holds a target id."""
    return target_to_draft(d2t, vocab_size) >= 0
