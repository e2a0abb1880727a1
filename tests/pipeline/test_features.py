"""The torch side of the cache's hidden states equals the numpy side, bit for bit."""

import numpy as np
import torch

from pipeline.features import decode_int8, encode_bf16, encode_int8, stored
from storage import codecs


def wild() -> np.ndarray:
    """Numbers of all magnitudes: zeros, subnormals, outliers; 300 is no multiple of a group."""
    rng = np.random.default_rng(0)
    value = rng.standard_normal((40, 3, 300)) * np.exp(4 * rng.normal(size=(40, 3, 300)))
    value[3], value[4], value[6] = 0, value[4] * 1e-38, value[6] * 1e30
    value[5, 0] = 1e-45
    return value.astype(np.float32)


def test_eight_bit_codes_and_scales_are_those_of_storage() -> None:
    value = wild()
    wanted, found = codecs.encode_int8(value), encode_int8(torch.from_numpy(value))
    for one, other in zip(wanted, found, strict=True):
        assert other.numpy().dtype == one.dtype
        assert one.tobytes() == other.numpy().tobytes()
    decoded = codecs.decode_int8(*wanted)
    np.testing.assert_array_equal(decode_int8(*found), decoded)
    np.testing.assert_array_equal(stored(torch.from_numpy(value), "int8"), decoded)


def test_bfloat16_bits_are_those_of_storage() -> None:
    value = wild()
    bits = encode_bf16(torch.from_numpy(value)).numpy().view(np.uint16)
    np.testing.assert_array_equal(bits, codecs.bf16_bits(value))
    back = stored(torch.from_numpy(value), "bfloat16")
    np.testing.assert_array_equal(back, codecs.from_bf16_bits(bits))


def test_what_is_not_finite_has_no_finite_scale() -> None:
    """So that a record of it is refused (storage/record.py)."""
    value = torch.ones(2, 128)
    value[0, 3], value[1, 5] = torch.nan, torch.inf
    assert not encode_int8(value)[1].isfinite().any()
