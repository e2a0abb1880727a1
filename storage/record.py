"""One cached sequence in memory: the currency of writer, reader, capture and training.

Dims: T tokens, R supervised rows, E = Σ kept entries, M = Σ tail_kept samples, V vocabulary,
L captured layers, D target width, G groups of 128 of D. numpy only; names are those of the zarr
arrays (storage/layout).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import CacheError
from storage.layout import TABLE, Layout

OPTIONAL = tuple(array.name for array in TABLE if len(array.dims) > 1)
"""Arrays that a layout may do without, and a record then holds as None."""


def supervised(turn: NDArray[np.int32]) -> NDArray[np.bool_]:
    """[T] bool: x_t and x_{t+1} lie in the same assistant turn, so row t has a law to learn."""
    rows = np.zeros(len(turn), dtype=np.bool_)
    rows[:-1] = (turn[:-1] >= 0) & (turn[1:] == turn[:-1])
    return rows


@dataclass(frozen=True, eq=False)
class Record:
    """One sequence; rows that are not supervised carry zeros and own no entries."""

    id: str
    domain: str
    tokens: NDArray[np.uint32]
    """[T]"""
    turn: NDArray[np.int32]
    """[T], -1 outside assistant turns"""
    token_logp: NDArray[np.float32]
    """[T] nats: log p_t(x_{t+1}), exact whatever the cache keeps"""
    kept: NDArray[np.uint16]
    """[T] entries of each token; all 0 in the modes that keep whole laws"""
    topk_ids: NDArray[np.uint32]
    """[E]"""
    topk_p: NDArray[np.uint16]
    """[E] codes, p = (code / 1023)² under the full softmax (storage/codecs)"""
    tail_logp_mass: NDArray[np.float32]
    """[T] nats: log(1 − Σ kept p); −inf where nothing is left"""
    tail_kept: NDArray[np.uint8]
    """[T] tail samples of each token"""
    tail_ids: NDArray[np.uint32]
    """[M]"""
    tail_logp: NDArray[np.float16]
    """[M] nats"""
    logits: NDArray[np.uint16] | None = None
    """[R, V] bfloat16 bits of supervised rows, in order; mode `full` only"""
    hidden: NDArray[np.uint16] | None = None
    """[T, L, D] bfloat16 bits"""
    hidden_int8: NDArray[np.int8] | None = None
    """[T, L, D] codes, where the layout keeps 8 bits"""
    hidden_scale: NDArray[np.float32] | None = None
    """[T, L, G]"""
    last_hidden: NDArray[np.uint16] | None = None
    """[T, D] bfloat16 bits, after the final norm"""
    last_hidden_int8: NDArray[np.int8] | None = None
    """[T, D] codes, where the layout keeps 8 bits"""
    last_hidden_scale: NDArray[np.float32] | None = None
    """[T, G]"""

    def check(self, layout: Layout) -> None:
        """Raise `CacheError` naming the sequence where the record cannot be written so."""
        problem = _shape_problem(self, layout) or _value_problem(self, layout)
        if problem:
            raise CacheError(
                found=f"sequence {self.id!r}: {problem}",
                expected="a record that fits the cache's layout (storage/FORMAT.md)",
                todo="mend the target or the sequences it comes from and run capture again",
            )


def _shape_problem(record: Record, layout: Layout) -> str:
    """The first array that is absent, surplus, misshapen or mistyped."""
    num_tokens = len(record.tokens)
    sizes = {
        "token": num_tokens,
        "row": int(supervised(record.turn).sum()) if len(record.turn) == num_tokens else -1,
        "entry": int(record.kept.sum(dtype=np.int64)),
        "sample": int(record.tail_kept.sum(dtype=np.int64)),
    }
    wanted = {array.name for array in layout.arrays()}
    if num_tokens == 0:
        return "no tokens"
    for name in OPTIONAL:
        if getattr(record, name) is not None and name not in wanted:
            return f"{name} that the layout does not store"
    for array in layout.arrays():
        if array.dims[0] not in sizes:
            continue  # sequence arrays come from id, domain and length
        value: Any = getattr(record, array.name)
        if value is None:
            return f"no {array.name}"
        shape = (sizes[array.dims[0]], *layout.width(array))
        if value.shape != shape or value.dtype != array.dtype:
            return f"{array.name} {value.shape} {value.dtype}, not {shape} {array.dtype}"
    return ""


def _value_problem(record: Record, layout: Layout) -> str:
    """The first value that no sound capture writes: foreign ids, NaN, data in unsupervised rows."""
    for name in ("tokens", "topk_ids", "tail_ids"):
        ids = getattr(record, name)
        if ids.size and int(ids.max()) >= layout.vocab_size:
            return f"{name} hold {int(ids.max())}, vocabulary {layout.vocab_size}"
    if record.topk_p.size and int(record.topk_p.max()) > 1023:
        return f"topk_p holds the code {int(record.topk_p.max())}, largest 1023"
    rows = supervised(record.turn)
    for name in ("token_logp", "tail_logp_mass", "kept", "tail_kept"):
        value = getattr(record, name)
        if np.isnan(value).any():
            return f"{name} is NaN at position {int(np.isnan(value).argmax())}"
        if np.any(value[~rows] != 0):
            return f"{name} is not 0 at an unsupervised position"
    if not np.isfinite(record.token_logp).all():
        return (
            f"token_logp is infinite at position {int((~np.isfinite(record.token_logp)).argmax())}"
        )
    if not np.isfinite(record.tail_logp.astype(np.float32)).all():
        return "tail_logp is not finite"
    for name in ("logits", "hidden", "last_hidden"):
        bits = getattr(record, name)
        # an exponent of all ones is infinity or NaN
        if bits is not None and ((bits & 0x7F80) == 0x7F80).any():
            return f"{name} is not finite"
    for name in ("hidden_scale", "last_hidden_scale"):
        scale = getattr(record, name)
        if scale is not None and not ((scale > 0) & (scale < np.inf)).all():
            return f"{name} is not positive and finite"
    return ""
