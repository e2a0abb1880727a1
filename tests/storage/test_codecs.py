import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from storage.codecs import (
    bf16_bits,
    decode_int8,
    decode_p,
    encode_int8,
    encode_p,
    from_bf16_bits,
    int8_error,
    p_cell,
    p_error,
)

probabilities = arrays(np.float64, st.integers(0, 50), elements=st.floats(0, 1))
floats = arrays(np.float32, 20, elements=st.floats(width=32, allow_nan=False))


@given(probabilities)
def test_a_stored_probability_lies_in_its_cell_and_within_the_stated_error(p: np.ndarray) -> None:
    code = encode_p(p)
    low, high = p_cell(code)
    # sqrt and its square are each correctly rounded: a value on an edge may fall one ulp outside
    assert ((low <= p * (1 + 1e-15)) & (p <= high * (1 + 1e-15))).all()
    assert (np.abs(decode_p(code) - p) <= p_error(code) * (1 + 1e-9)).all()


def test_every_code_decodes_to_a_value_that_encodes_to_it() -> None:
    codes = np.arange(1024, dtype=np.uint16)
    np.testing.assert_array_equal(encode_p(decode_p(codes)), codes)
    assert decode_p(codes)[[0, -1]].tolist() == [0.0, 1.0]
    # the extra TV of a law of K entries is at most the sum of these: 5e-4 at the top of the scale
    assert p_error(codes).max() < 1e-3


@pytest.mark.parametrize("bad", [-1e-6, 1.01, float("nan")])
def test_what_is_no_probability_is_not_stored(bad: float) -> None:
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        encode_p(np.array([0.5, bad]))


def test_rounding_of_a_softmax_may_exceed_one() -> None:
    assert encode_p(np.array([1.0000005], dtype=np.float32)).tolist() == [1023]


@given(floats)
def test_bfloat16_is_the_nearest_one_and_survives_a_round_trip(value: np.ndarray) -> None:
    bits = bf16_bits(value)
    stored = from_bf16_bits(bits)
    np.testing.assert_array_equal(bf16_bits(stored), bits)
    finite = np.isfinite(stored)
    for step in (-1, 1):
        other = from_bf16_bits((bits.astype(np.int64) + step).clip(0, 65535).astype(np.uint16))
        both = finite & np.isfinite(other)
        exact, near, far = (x[both].astype(np.float64) for x in (value, stored, other))
        assert (np.abs(near - exact) <= np.abs(far - exact)).all()


def test_bfloat16_rounds_ties_to_even_and_keeps_nan_and_infinity() -> None:
    value = np.array([1 + 2**-8, 1 + 3 * 2**-8, np.inf, -np.inf, np.nan], dtype=np.float32)
    stored = from_bf16_bits(bf16_bits(value))
    np.testing.assert_array_equal(stored[:4], [1.0, 1 + 2**-6, np.inf, -np.inf])
    assert np.isnan(stored[4])


wide = arrays(np.float32, (3, 300), elements=st.floats(-(2.0**120), 2.0**120, width=32))


@given(wide, st.sampled_from([1.0, 2.0**-130, 1e-3]))
def test_eight_bits_are_within_the_stated_error(value: np.ndarray, shrink: float) -> None:
    value = (value * shrink).astype(np.float32)
    code, scale = encode_int8(value)
    decoded = decode_int8(code, scale)
    assert (code.dtype, scale.dtype) == (np.int8, np.float32)
    assert scale.shape == (3, 3)
    assert np.abs(code.astype(int)).max() <= 127
    assert (np.abs(decoded.astype(np.float64) - value) <= int8_error(scale, 300)).all()
    # what any client computes from the two arrays, exactly
    exact = code.astype(np.float64) * np.repeat(scale.astype(np.float64), 128, -1)[:, :300]
    np.testing.assert_array_equal(decoded, exact)
    assert not (scale.view(np.uint32) & 0xFFFF).any()  # planes that cost nothing on disk


def test_an_outlier_coarsens_its_own_group_only() -> None:
    value = np.linspace(-1, 1, 256, dtype=np.float32)
    value[7] = 1000.0
    error = np.abs(decode_int8(*encode_int8(value)) - value)
    assert error[:128].max() > 0.5
    assert error[128:].max() < 1 / 250
