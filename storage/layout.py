"""The table of arrays of a cache: one row an array, read by writer, reader, verify and FORMAT.md.

Dims: token, entry (Σ kept), sample (Σ tail_kept), row (supervised token), sequence, byte; and
the fixed V (vocabulary), L (captured layers), D (target width), G (groups of 128 of D). Ragged dims
are local to a part.

Knows names, shapes and types, not how they are filled or compressed beyond the chunk length.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

VERSION = 1
MODES = ("topk", "full", "rebuild")
HIDDEN_DTYPES = ("bfloat16", "int8")
MAX_VOCAB = 2**32 - 1  # ids are uint32
TOKEN_CHUNK = 4096
ENTRY_CHUNK = 65_536
# Wide rows (hidden states, logits) get chunks of about this size: sixteen rows of a 32k vocabulary
# measured best (reference/ecosystem.md §3.3), and smaller ones pay zarr's fixed cost per chunk.
WIDE_CHUNK_BYTES = 1 << 20
# Measured on real caches: ids are noise below their empty high planes, which bitshuffle drops; byte
# shuffle gathers what the other numbers have in common, exponents above all, for zstd's entropy
# coder (states 0.78 of their bytes in place of 0.90 to 0.97, codes 0.35 in place of 0.40). 8-bit
# states gain 6 % from an entropy coder and decode eight times slower.
BITSHUFFLED = frozenset({"turn", "topk_ids", "tail_ids", "hidden_int8", "last_hidden_int8"})
# zstd 3 shrinks wide rows by 5 % more and takes almost three times as long, which a GPU would wait
# for; of narrow arrays 9 gains 1 % over 3 (reference/ecosystem.md §3.1), but of the codes of p, a
# third of a law's bytes, 6 gains 3 % and still packs several times what a device passes.
WIDE_LEVEL, NARROW_LEVEL, CODE_LEVEL = 1, 3, 6
# Numbers of a hidden state that share one scale in 8 bits: an outlier channel of a language model
# coarsens its group and no other, and the scales cost 1.6 % beside the codes.
GROUP = 128

BFLOAT16 = "bfloat16 bits"
INT8 = "value = code * scale of its group"
PROBABILITY = "p = (code / 1023)^2"
UTF8 = "UTF-8, all strings joined"


@dataclass(frozen=True)
class Array:
    """One array of a part."""

    name: str
    dims: tuple[str, ...]
    dtype: str
    meaning: str
    encoding: str = ""
    """How stored numbers stand for values, written as the array's attribute `encoding`."""


TABLE = (
    Array("tokens", ("token",), "uint32", "x_t"),
    Array("turn", ("token",), "int32", "assistant turn that x_t belongs to, -1 outside"),
    Array("token_logp", ("token",), "float32", "log p_t(x_{t+1}), exact; 0 where not supervised"),
    Array("kept", ("token",), "uint16", "entries of token t"),
    Array("topk_ids", ("entry",), "uint32", "kept ids, token after token"),
    Array("topk_p", ("entry",), "uint16", "their probabilities, never renormalised", PROBABILITY),
    Array("tail_logp_mass", ("token",), "float32", "log(1 - sum of kept p); -inf for no tail"),
    Array("tail_kept", ("token",), "uint8", "samples of token t"),
    Array("tail_ids", ("sample",), "uint32", "ids drawn from p outside the kept set"),
    Array("tail_logp", ("sample",), "float16", "their log p"),
    Array(
        "logits", ("row", "V"), "uint16", "full log-probabilities of supervised tokens", BFLOAT16
    ),
    Array("hidden", ("token", "L", "D"), "uint16", "captured hidden states", BFLOAT16),
    Array("hidden_int8", ("token", "L", "D"), "int8", "the same in 8 bits", INT8),
    Array("hidden_scale", ("token", "L", "G"), "float32", "scales of `hidden_int8`"),
    Array("last_hidden", ("token", "D"), "uint16", "hidden state after the final norm", BFLOAT16),
    Array("last_hidden_int8", ("token", "D"), "int8", "the same in 8 bits", INT8),
    Array("last_hidden_scale", ("token", "G"), "float32", "scales of `last_hidden_int8`"),
    Array("row_start", ("sequence",), "int64", "first token of the sequence"),
    Array("length", ("sequence",), "int64", "tokens of the sequence"),
    Array("id", ("byte",), "uint8", "the sequences' ids", UTF8),
    Array("id_end", ("sequence",), "int64", "end of each id in `id`"),
    Array("domain", ("byte",), "uint8", "the sequences' domains", UTF8),
    Array("domain_end", ("sequence",), "int64", "end of each domain in `domain`"),
)
ARRAYS: Mapping[str, Array] = {array.name: array for array in TABLE}
SEQUENCE_ARRAYS = ("row_start", "length", "id", "id_end", "domain", "domain_end")
"""Read when a cache is indexed; every other array only where it is asked for."""


@dataclass(frozen=True)
class Layout:
    """What one cache stores of every token."""

    mode: str
    """`topk` (ragged entries and tail samples), `full` (logits of supervised rows) or `rebuild`
    (`last_hidden`, from which the LM head makes the logits again)."""
    vocab_size: int
    hidden_size: int
    hidden_layers: tuple[int, ...]
    """Indices into transformers' `hidden_states`: 0 is the embedding's output."""
    last_hidden: bool
    hidden_dtype: str = "bfloat16"
    """`bfloat16` or `int8`, of `hidden` and `last_hidden`."""

    def __post_init__(self) -> None:
        """A layout that cannot be written is the caller's mistake."""
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r}; expected one of {', '.join(MODES)}")
        if not 0 < self.vocab_size <= MAX_VOCAB:
            raise ValueError(f"vocabulary of {self.vocab_size}; expected 1 to {MAX_VOCAB}")
        if self.hidden_size < 1:
            raise ValueError(f"hidden_size {self.hidden_size}; expected at least 1")
        if self.hidden_dtype not in HIDDEN_DTYPES:
            raise ValueError(
                f"hidden_dtype {self.hidden_dtype!r}; expected one of {', '.join(HIDDEN_DTYPES)}"
            )
        if self.mode == "rebuild" and not self.last_hidden:
            raise ValueError("mode rebuild without last_hidden; expected last_hidden")

    @property
    def dense(self) -> bool:
        """Whether the whole law of a row is kept, or all that it takes to make it again."""
        return self.mode != "topk"

    @property
    def last_hidden_dtype(self) -> str:
        """`hidden_dtype`, but the law of mode `rebuild` hangs on every bit of this one."""
        return "bfloat16" if self.mode == "rebuild" else self.hidden_dtype

    def arrays(self) -> tuple[Array, ...]:
        """The arrays that every part of this cache holds, in the table's order."""
        eight, last_eight = self.hidden_dtype == "int8", self.last_hidden_dtype == "int8"
        layers = bool(self.hidden_layers)
        stored = {
            "logits": self.mode == "full",
            "hidden": layers and not eight,
            "hidden_int8": layers and eight,
            "hidden_scale": layers and eight,
            "last_hidden": self.last_hidden and not last_eight,
            "last_hidden_int8": self.last_hidden and last_eight,
            "last_hidden_scale": self.last_hidden and last_eight,
        }
        return tuple(array for array in TABLE if stored.get(array.name, True))

    def width(self, array: Array) -> tuple[int, ...]:
        """Sizes of the dims after the first."""
        fixed = {
            "V": self.vocab_size,
            "L": len(self.hidden_layers),
            "D": self.hidden_size,
            "G": -(-self.hidden_size // GROUP),
        }
        return tuple(fixed[dim] for dim in array.dims[1:])

    def as_dict(self) -> dict[str, Any]:
        """JSON form, kept in the manifest; `hidden_dtype` only where it is not the default."""
        value = {**asdict(self), "hidden_layers": list(self.hidden_layers)}
        if self.hidden_dtype == "bfloat16":
            del value["hidden_dtype"]
        return value

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "Layout":
        """The layout of a manifest; `KeyError` or `TypeError` where it is none."""
        return cls(
            mode=value["mode"],
            vocab_size=value["vocab_size"],
            hidden_size=value["hidden_size"],
            hidden_layers=tuple(value["hidden_layers"]),
            last_hidden=value["last_hidden"],
            hidden_dtype=value.get("hidden_dtype", "bfloat16"),
        )


def chunk_length(array: Array, length: int, *, row_bytes: int) -> int:
    """Inner chunk of an array of `length` rows of `row_bytes` bytes; at least 1."""
    limit = TOKEN_CHUNK if array.dims[0] in ("token", "row") else ENTRY_CHUNK
    if len(array.dims) > 1:
        limit = min(limit, max(1, WIDE_CHUNK_BYTES // row_bytes))
    return max(1, min(limit, length))
