"""Hidden states as the cache keeps them, on any device: bfloat16 bits, or 8-bit codes and scales.

The torch side of `storage.codecs`, bit for bit; capture encodes with it, training decodes, and
decoding passes the target's own states through it. Knows no file and no draft.

Dims: D width, G groups of 128 of D; leading dims are free.
"""

import torch
from torch import Tensor

from storage.codecs import LEAST_SCALE, MAX_CODE
from storage.layout import GROUP


def encode_bf16(x: Tensor) -> Tensor:
    """Bfloat16 bits as int16; rounds to nearest even, copies nothing that is bfloat16 already."""
    return x.bfloat16().view(torch.int16)


def encode_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [..., D] and scales float32 [..., G] (`storage.codecs.encode_int8`)."""
    size = x.shape[-1]
    wide = torch.nn.functional.pad(x.float(), (0, -size % GROUP))
    groups = wide.unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1)
    # by a tensor: CUDA multiplies by the reciprocal of a number
    bits = (largest / largest.new_full((), MAX_CODE)).view(torch.int32)
    # up to the next float32 whose lower half is empty
    scale = ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32).clamp(min=float(LEAST_SCALE))
    code = (groups / scale[..., None]).round().to(torch.int8)
    return code.flatten(-2)[..., :size], scale


def decode_int8(code: Tensor, scale: Tensor) -> Tensor:
    """Values code · scale, float32, [..., D]."""
    return code.float() * scale.repeat_interleave(GROUP, -1)[..., : code.shape[-1]]


def stored(x: Tensor, dtype: str) -> Tensor:
    """`x` in float32 as a cache of that `hidden_dtype` gives it back."""
    if dtype == "int8":
        return decode_int8(*encode_int8(x))
    return x.bfloat16().float()
