"""Stored numbers and the values they stand for: probabilities in 10 bits, bfloat16 in numpy.

Pure, numpy to numpy; what compresses the numbers (zarr's codecs) is the writer's.

A probability is stored as `code = round(1023 · sqrt(p))`: uniform steps in sqrt(p) give every
entry the same share of the KL error and beat logarithmic steps at equal width
(reference/offline_caches.md §4.3). In uint16 the six empty planes cost nothing after bitshuffle.
"""

import numpy as np
from numpy.typing import NDArray

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
