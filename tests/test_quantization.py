import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_close

from jina_jax.quantization import PRECISIONS, calibrate, quantize

BITS = ("binary", "ubinary")
LEVELS = ("int8", "uint8")

rows, sizes, seeds = st.integers(0, 6), st.integers(1, 70), st.integers(0, 10_000)


def draw(rows, size, seed):
    """Unit vectors of uneven dimensions: one far from zero, one nearly constant, one with negative zeros."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, size)) * rng.uniform(0.01, 1, size)
    x[:, size // 3] = np.where(rng.random(rows) < 0.3, -0.0, x[:, size // 3])
    x[:, size // 2] = 0.25
    x[:, 0] += 3
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def narrow_ranges(size):
    """Ranges that many values of `draw` lie beyond, one dimension without extent."""
    least = np.linspace(-0.1, 0.05, size, dtype=np.float32)
    extent = np.linspace(0.2, 0.0, size, dtype=np.float32)
    return np.stack([least, least + extent])


def reference(x, precision, ranges):
    """What sentence-transformers' documentation and 6.2's results say, in the order of operations they imply."""
    if precision in LEVELS:
        width = (ranges[1] - ranges[0]) / np.float32(255)
        width[width == 0] = 1
        level = np.minimum(np.maximum(np.floor((x - ranges[0]) / width), 0), 255).astype(np.int64)
        return level if precision == "uint8" else level - 128
    if precision in BITS:
        bits = np.pad(x > 0, [(0, 0), (0, -x.shape[1] % 8)]).reshape(len(x), -(-x.shape[1] // 8), 8)
        byte = (bits * 2 ** np.arange(7, -1, -1)).sum(axis=-1)
        return byte if precision == "ubinary" else byte - 128
    return x.astype(precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@given(rows=rows, size=sizes, seed=seeds)
def test_values_shapes_and_types_are_those_of_the_definition(precision, rows, size, seed):
    x, ranges = draw(rows, size, seed), narrow_ranges(size)
    y = quantize(x, precision, ranges)
    np.testing.assert_array_equal(y, reference(x, precision, ranges))
    assert y.shape == (rows, -(-size // 8) if precision in BITS else size)
    assert y.dtype == {"binary": np.int8, "ubinary": np.uint8}.get(precision, precision)
    assert quantize(x, precision).dtype == y.dtype
    assert quantize(x, precision).shape == y.shape


def test_same_as_sentence_transformers():
    quantize_embeddings = pytest.importorskip("sentence_transformers").quantize_embeddings
    for size in (1, 9, 64):
        x = draw(200, size, 0)
        for precision in ("float32", *LEVELS, *BITS):
            for ranges in (narrow_ranges(size), calibrate(x)):
                theirs = quantize_embeddings(x, precision, ranges=ranges)
                np.testing.assert_array_equal(quantize(x, precision, ranges), theirs, strict=True)
        for precision in LEVELS:
            theirs = quantize_embeddings(x, precision, calibration_embeddings=x[:100])
            np.testing.assert_array_equal(quantize(x, precision, calibrate(x[:100])), theirs, strict=True)


@pytest.mark.parametrize("precision", PRECISIONS)
@given(size=sizes, seed=seeds, calibrated=st.booleans())
def test_neighbours_and_leading_axes_change_nothing(precision, size, seed, calibrated):
    x = draw(6, size, seed)
    ranges = narrow_ranges(size) if calibrated else None
    y = quantize(x, precision, ranges)
    for one, alone in zip(y, x, strict=True):
        np.testing.assert_array_equal(one, quantize(alone, precision, ranges), strict=True)
    np.testing.assert_array_equal(quantize(x.reshape(2, 3, size), precision, ranges), y.reshape(2, 3, -1), strict=True)


@given(size=sizes, seed=seeds, exponent=st.integers(-100, 100))
def test_int8_without_ranges_keeps_values_to_half_a_step_and_angles(size, seed, exponent):
    x = draw(6, size, seed)
    y = quantize(x, "int8")
    peak = np.abs(x).max(axis=-1, keepdims=True).astype(np.float64)
    slack = 1 + 127 * 2.0**-22  # two roundings in float32, of values of up to 127 half steps
    assert (np.abs(x - y * peak / 127) <= peak / 254 * slack).all()
    np.testing.assert_array_equal(np.abs(y.astype(int)).max(axis=-1), 127)
    np.testing.assert_array_equal(quantize(np.ldexp(x, exponent), "int8"), y)
    np.testing.assert_array_equal(quantize(-x, "int8"), -y)

    x, y = (z / np.linalg.norm(z, axis=-1, keepdims=True) for z in (x.astype(np.float64), y.astype(np.float64)))
    kept = np.sqrt(1 - size * peak**2 / 254**2)[:, 0]
    assert ((x * y).sum(axis=-1) >= kept - 1e-6).all()
    # Each of two vectors turns by no more than its own bound, so their angle changes by no more than the sum.
    turn = np.arccos(kept)
    before, after = (np.arccos(np.clip(z @ z.T, -1, 1)) for z in (x, y))
    assert (np.abs(after - before) <= turn[:, None] + turn[None, :] + 1e-6).all()


def test_int8_without_ranges_keeps_the_cosines_of_a_thousand_dimensions():
    x = np.random.default_rng(0).normal(size=(64, 1024)).astype(np.float32)
    x, y = (z / np.linalg.norm(z, axis=-1, keepdims=True) for z in (x, quantize(x, "int8").astype(np.float32)))
    assert_close(y @ y.T, x @ x.T, 2e-3)
    assert (x * y).sum(axis=-1).min() > 0.9999


@given(rows=st.integers(2, 9), size=sizes, seed=seeds)
def test_int8_with_own_ranges_keeps_values_to_half_a_step(rows, size, seed):
    x = draw(rows, size, seed)
    ranges = calibrate(x)
    np.testing.assert_array_equal(ranges, [x.min(axis=0), x.max(axis=0)])
    least, largest = ranges.astype(np.float64)
    step = (largest - least) / 255
    middle = least + (quantize(x, "int8", ranges) + 128.5) * step
    assert (np.abs(x - middle) <= step * 0.501).all()


@given(size=sizes, seed=seeds)
def test_unsigned_is_signed_plus_128(size, seed):
    x = draw(4, size, seed)
    for signed, unsigned in (("int8", "uint8"), ("binary", "ubinary")):
        for ranges in (None, narrow_ranges(size)):
            np.testing.assert_array_equal(
                quantize(x, signed, ranges).astype(int) + 128, quantize(x, unsigned, ranges).astype(int)
            )


@pytest.mark.parametrize("precision", BITS)
@given(size=sizes, seed=seeds)
def test_neighbours_by_hamming_distance_are_neighbours_by_signs(precision, size, seed):
    x = draw(20, size, seed)
    codes = quantize(x, precision).view(np.uint8)
    hamming = np.bitwise_count(codes[:, None] ^ codes[None]).sum(axis=-1)
    by_signs = ((x > 0)[:, None] != (x > 0)[None]).sum(axis=-1)
    np.testing.assert_array_equal(hamming, by_signs)
    np.testing.assert_array_equal(np.argsort(hamming, kind="stable"), np.argsort(by_signs, kind="stable"))


def test_bits_in_their_order():
    x = np.array([1, -1, 0, -0.0, 1, 1, -1, 1, 2], np.float32)
    np.testing.assert_array_equal(quantize(x, "ubinary"), [0b10001101, 0b10000000])
    np.testing.assert_array_equal(quantize(x, "binary"), [0b10001101 - 128, 0])


@pytest.mark.parametrize("precision", LEVELS)
def test_zero_and_extreme_vectors(precision):
    offset = 0 if precision == "int8" else 128
    x = np.array([[0, -0.0, 0], [1e-45, 0, -1e-45], [3e38, -3e38, 0]], np.float32)
    levels = [[0, 0, 0], [127, 0, -127], [127, -127, 0]]
    np.testing.assert_array_equal(quantize(x, precision), np.array(levels) + offset)
    point = np.full((2, 3), 0.5, np.float32)  # no extent: a step of 1 from the point on
    y = quantize(np.array([0.25, 0.5, 2.75], np.float32), precision, point)
    np.testing.assert_array_equal(y, np.array([0, 0, 2]) - 128 + offset)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_finite_number_is_refused_by_row(precision, value):
    x = draw(4, 9, 0)
    x[2, 5] = value
    for ranges in (None, narrow_ranges(9)):
        with pytest.raises(ValueError, match="row 2 "):
            quantize(x, precision, ranges)
    with pytest.raises(ValueError, match="row 0 "):
        quantize(x[2], precision)
    with pytest.raises(ValueError, match="row 2 "):
        calibrate(x)


def test_what_float16_cannot_hold_is_refused_by_row():
    x = np.array([[65504.0], [-65520.0]], np.float32)
    np.testing.assert_array_equal(quantize(x[:1], "float16"), x[:1])
    with pytest.raises(ValueError, match=r"row 1 .*float16"):
        quantize(x, "float16")


@pytest.mark.parametrize("precision", ["int4", "", "INT8", "base64"])
def test_unknown_precision_names_the_choices(precision):
    with pytest.raises(ValueError, match=", ".join(PRECISIONS)):
        quantize(draw(2, 8, 0), precision)


@pytest.mark.parametrize("shape", [(2, 7), (2, 9), (8,), (1, 8), (2, 2, 8), (8, 2)])
def test_ranges_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"not \(2, 8\)"):
        quantize(draw(2, 8, 0), "int8", np.zeros(shape, np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2.0])
def test_ranges_that_are_none_are_refused(value):
    ranges = np.stack([np.zeros(8), np.ones(8)]).astype(np.float32)
    ranges[0, 3] = value
    with pytest.raises(ValueError, match="ranges must be finite"):
        quantize(draw(2, 8, 0), "int8", ranges)


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_to_calibrate(rows):
    with pytest.raises(ValueError, match="at least two"):
        calibrate(draw(rows, 8, 0))
