"""Stored numbers and the values they stand for: probabilities in 10 bits, bfloat16, 8-bit groups.

Pure, numpy to numpy; what compresses the numbers (zarr's codecs) is the writer's.

A probability is stored as `code = round(1023 · sqrt(p))`: uniform steps in sqrt(p) give every entry
the same share of the KL error and beat logarithmic steps at equal width
(reference/offline_caches.md §4.3). In uint16 the six empty planes cost next to nothing after
shuffle and zstd.

A hidden state in 8 bits is `code · scale`, one scale for every 128 numbers: half of bfloat16's
bytes, and no further off than half a scale.
"""

import numpy as np
from numpy.typing import NDArray

from storage.layout import GROUP

LEVELS = 1023
"""Largest code; p = 1."""
BFLOAT_STEP = 2.0**-8
"""bfloat16 keeps 8 bits: the largest error of a number as a share of itself."""
HALF_STEP = 2.0**-11
"""float16 keeps 11 bits: the same of a tail sample's log p."""


def encode_p(p: NDArray[np.floating]) -> NDArray[np.uint16]:
    """Codes of probabilities, any shape, in float64; values must lie in [0, 1] up to 1e-5."""
    wide = np.asarray(p, dtype=np.float64)
    # a float32 softmax may exceed 1 by a few ulp; anything beyond, or NaN, is the caller's bug
    if wide.size and not (wide.min() >= 0.0 and wide.max() <= 1.0 + 1e-5):
        raise ValueError(f"probabilities in [{wide.min()}, {wide.max()}]; expected [0, 1]")
    return np.rint(LEVELS * np.sqrt(np.minimum(wide, 1.0))).astype(np.uint16)


_VALUES = ((np.arange(LEVELS + 1, dtype=np.float64) / LEVELS) ** 2).astype(np.float32)
_EDGES = np.clip((np.arange(LEVELS + 2, dtype=np.float64) - 0.5) / LEVELS, 0.0, 1.0) ** 2
_ERRORS = np.maximum(_VALUES - _EDGES[:-1], _EDGES[1:] - _VALUES)


def decode_p(code: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Probabilities (code / 1023)², float32, any shape; `IndexError` for codes above 1023."""
    return _VALUES[code]


def p_cell(code: NDArray[np.uint16]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lowest and highest p that a code stands for, float64 (DESIGN §5, certified truncation)."""
    return _EDGES[:-1][code], _EDGES[1:][code]


def p_error(code: NDArray[np.uint16]) -> NDArray[np.float64]:
    """Largest |p − decode_p(code)| over the code's cell, float64, any shape."""
    return _ERRORS[code]


def bf16_bits(value: NDArray[np.floating]) -> NDArray[np.uint16]:
    """Bits of the nearest bfloat16 (ties to even) of float32 values; NaN stays NaN, any shape."""
    bits = np.ascontiguousarray(value, dtype=np.float32).view(np.uint32)
    # adding half of the dropped part, less one unless the kept part is odd, rounds ties to even
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x0040)
    return np.where(np.isnan(value), quiet, rounded).astype(np.uint16)


def from_bf16_bits(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Exact float32 values of bfloat16 bits, any shape."""
    return (np.asarray(bits, dtype=np.uint32) << np.uint32(16)).view(np.float32)


MAX_CODE = 127
LEAST_SCALE = np.float32(2.0**-126)
"""Of a group of zeros: the smallest normal float32, so that no scale is 0."""


def encode_int8(value: NDArray[np.floating]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Codes [..., D] and scales [..., G] of finite float32 values [..., D].

    A scale is the group's largest value over 127, rounded up to 8 bits of mantissa: `code · scale`
    is exact in float32, and shuffle gathers the scale's empty planes. `pipeline.features` computes
    the same on a device, bit for bit.
    """
    wide = np.asarray(value, dtype=np.float32)
    size = wide.shape[-1]
    groups = _grouped(wide)
    largest = np.abs(groups).max(-1) / np.float32(MAX_CODE)
    rounded = (largest.view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)
    scale = np.maximum(rounded.view(np.float32), LEAST_SCALE)
    code = np.rint(groups / scale[..., None]).astype(np.int8)
    return code.reshape(*wide.shape[:-1], -1)[..., :size], scale


def decode_int8(code: NDArray[np.int8], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Values code · scale, float32, [..., D]."""
    return code.astype(np.float32) * _spread(scale, code.shape[-1])


def int8_error(scale: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """[..., D] largest |x − decoded x| of each of `size` numbers: half a scale of its group.

    And a little, since the quotient is rounded to float32 before it is rounded to a code.
    """
    return _spread(scale, size) * np.float32(0.5 + 2.0**-17)


def _grouped(value: NDArray[np.float32]) -> NDArray[np.float32]:
    """[..., G, 128], the last group filled up with zeros."""
    size = value.shape[-1]
    filled = np.zeros((*value.shape[:-1], -(-size // GROUP) * GROUP), dtype=np.float32)
    filled[..., :size] = value
    return filled.reshape(*value.shape[:-1], -1, GROUP)


def _spread(scale: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """[..., D]: the scale of each number's group."""
    return np.repeat(scale, GROUP, axis=-1)[..., :size]
