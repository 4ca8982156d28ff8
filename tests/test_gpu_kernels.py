"""The GPU kernels against the definition in float64, interpreted, and their lowering without a GPU."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as mosaic
from jax.sharding import AbstractDevice, AbstractMesh
from numerics import ATTENTION, GRADIENT, assert_close, assert_close_relative

from jina_jax import rope
from jina_jax.kernels import gpu, hopper, triton
from jina_jax.kernels.common import NO_KEYS, Inputs
from jina_jax.kernels.dropout import keep, words_from_key
from jina_jax.kernels.triton import Size

MASKS = ("none", "lengths", "packed", "holes", "odd")
WORDS = words_from_key(jax.random.key(7)) + np.array([0, 0, 1, 2, 3, 4], np.uint32)


@pytest.fixture(scope="module", autouse=True)
def _small_blocks():
    """Blocks of 32 and 16, so that short inputs have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "SIZES", {key: Size(32, 16, 4, 2) for key in gpu.SIZES})
        yield


def draw_segments(rng, B, length, masks):
    """One row of the batch is all padding in every kind but "none"."""
    if masks == "none":
        return None
    segments = {
        "lengths": np.arange(length)[None] < rng.integers(0, length + 1, (B, 1)),
        "packed": np.sort(rng.integers(0, 4, (B, length)), axis=1)[:, ::-1],
        "holes": rng.integers(0, 2, (B, length)),
        "odd": rng.choice([-3, 0, 7, 2**31 - 1], (B, length)),
    }[masks].astype(np.int32)
    segments[0] *= B == 1
    return np.ascontiguousarray(segments)


def definition(q, k, v, q_segments, k_segments, tables, heads, rate):
    """Attention and logsumexp in the precision of the inputs, all scores at once."""
    q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
    if tables is not None:
        q, k = (turn(x, *tables) for x in (q, k))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    visible = jnp.ones((q.shape[0], 1, q.shape[1], k.shape[1]), bool)
    if q_segments is not None:
        visible = ((q_segments[:, :, None] == k_segments[:, None]) & (k_segments != 0)[:, None])[:, None]
    weights = jnp.where(visible, jnp.exp(scores), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights / jnp.maximum(total, 1e-300)
    if rate:
        index = jnp.ix_(*(jnp.arange(size, dtype=jnp.int32) for size in weights.shape))
        weights = jnp.where(keep(jnp.asarray(WORDS), rate, *index), weights / (1 - rate), 0.0)
    out = jnp.einsum("bnts,bsnh->btnh", weights, v)
    logsumexp = jnp.where(total > 0, jnp.log(jnp.maximum(total, 1e-300)), float(np.float32(NO_KEYS)))[..., 0]
    return out.reshape(*out.shape[:2], -1), logsumexp


def turn(x, cos, sin):
    """Rotate the two halves of each head."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def run(q, k, v, d_out, q_segments=None, k_segments=None, tables=None, heads=1, rate=0.0, dtype=jnp.float32):
    """Output, logsumexp and gradients of the kernels, interpreted."""
    q_segments, k_segments = (None if x is None else jnp.asarray(x) for x in (q_segments, k_segments))

    @jax.jit
    def both(q, k, v, d_out):
        inputs = Inputs(q, k, v, q_segments, k_segments, tables, jnp.asarray(WORDS), heads, rate)
        out, logsumexp = gpu.forward(inputs, dtype, interpret=True)
        return out, logsumexp, *gpu.backward(inputs, out, logsumexp, d_out, dtype, interpret=True)

    return both(q, k, v, d_out)


def expect(q, k, v, d_out, q_segments=None, k_segments=None, tables=None, heads=1, rate=0.0):
    """The same from the definition in float64."""
    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64) for x in (q, k, v, d_out)]
        tables = None if tables is None else [np.asarray(table, np.float64) for table in tables]

        @jax.jit
        def both(q, k, v, d_out):
            call = lambda *x: definition(*x, q_segments, k_segments, tables, heads, rate)  # noqa: E731
            (out, logsumexp), pull = jax.vjp(call, q, k, v)
            return out, logsumexp, *pull((d_out, jnp.zeros_like(logsumexp)))

        return jax.tree.map(np.asarray, both(*wide))


@settings(max_examples=8)
@given(
    seed=st.integers(0, 10_000),
    B=st.integers(1, 2),
    T=st.one_of(st.integers(1, 20), st.integers(60, 120)),
    S=st.one_of(st.none(), st.integers(1, 100)),
    N=st.integers(1, 2),
    H=st.sampled_from([32, 64, 128]),
    masks=st.sampled_from(MASKS),
    rotary=st.booleans(),
    rate=st.sampled_from([0.0, 0.3]),
)
def test_forward_and_gradients_equal_the_definition(seed, B, T, S, N, H, masks, rotary, rate):
    rng = np.random.default_rng(seed)
    S = T if S is None or rotary else S
    shapes = [(B, length, N * H) for length in (T, S, S, T)]
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    q_segments = draw_segments(rng, B, T, masks)
    k_segments = q_segments if S == T else draw_segments(rng, B, S, masks)
    tables = tuple(jnp.asarray(table)[None] for table in rope.tables(T, H, 20_000.0)) if rotary else None
    where = {"q_segments": q_segments, "k_segments": k_segments, "tables": tables, "heads": N, "rate": rate}
    out, logsumexp, *gradients = run(*map(jnp.asarray, arrays), **where)
    expected, expected_logsumexp, *expected_gradients = expect(*arrays, **where)
    assert_close(out, expected, ATTENTION / (1 - rate))
    assert_close(logsumexp, expected_logsumexp, ATTENTION)
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        assert_close_relative(actual, wanted, GRADIENT, floor=0.1)  # of one key alone it is 0
    if q_segments is not None:
        np.testing.assert_array_equal(np.asarray(out)[q_segments == 0], 0)
        np.testing.assert_array_equal(np.asarray(gradients[1])[k_segments == 0], 0)


def draw(seed, B, T, N, H, masks, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    arrays = [jnp.asarray(rng.normal(size=(B, T, N * H)), dtype) for _ in range(4)]
    return arrays, draw_segments(rng, B, T, masks)


@pytest.mark.parametrize("masks", ["lengths", "packed", "odd"])
def test_what_stands_in_padding_reaches_neither_result_nor_gradient(masks):
    arrays, segments = draw(0, 2, 100, 2, 32, masks)
    valid = (segments != 0)[:, :, None]
    results = [
        run(*(jnp.where(valid, x, filler) for x in arrays), segments, segments, heads=2, rate=0.2)
        for filler in (0.0, np.nan)
    ]
    for clean, dirty in zip(*results, strict=True):
        np.testing.assert_array_equal(dirty, clean)


def test_bfloat16_is_as_good_as_its_inputs():
    arrays, segments = draw(0, 2, 150, 2, 64, "packed", jnp.bfloat16)
    tables = tuple(jnp.asarray(table)[None] for table in rope.tables(150, 64, 20_000.0))
    where = {"q_segments": segments, "k_segments": segments, "tables": tables, "heads": 2}
    out, logsumexp, *gradients = run(*arrays, **where, dtype=jnp.bfloat16)
    assert {x.dtype for x in (out, *gradients)} == {jnp.dtype(jnp.bfloat16)}
    expected, expected_logsumexp, *expected_gradients = expect(*arrays, **where)
    # Weights and values are rounded to 8 bits each; values reach 4. Rotated queries and keys are rounded too.
    assert_close(out, expected, 4 * 2**-8)
    assert_close(logsumexp, expected_logsumexp, 4 * 2**-8)
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        assert_close_relative(actual, wanted, 4 * 2**-8)


def test_parts_of_the_keys_add_up():
    (q, k, v, d_out), segments = draw(0, 2, 90, 1, 32, "packed", jnp.bfloat16)
    segments = jnp.asarray(segments)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def part(start, stop, q, k, v, d_out, whole=None):
        keys = slice(start, stop)
        inputs = Inputs(q, k[:, keys], v[:, keys], segments, segments[:, keys], None, jnp.asarray(WORDS), 1, 0.0)
        out, logsumexp = gpu.forward(inputs, jnp.float32, interpret=True)
        given = *(whole or (out, logsumexp)), d_out
        return out, logsumexp, *gpu.backward(inputs, *given, jnp.float32, interpret=True)

    out, logsumexp, *gradients = part(0, 90, q, k, v, d_out)
    assert out.dtype == jnp.float32
    parts = [part(start, stop, q, k, v, d_out, (out, logsumexp)) for start, stop in ((0, 40), (40, 90))]
    merged = sum(x * jnp.exp(share - logsumexp)[:, 0, :, None] for x, share, *_ in parts)
    assert_close(merged, out, 2**-8)
    assert_close_relative(parts[0][2] + parts[1][2], gradients[0], 2**-8)
    for i in (1, 2):
        assert_close_relative(np.concatenate([x[2 + i] for x in parts], axis=1), gradients[i], 2**-8)


@pytest.mark.parametrize("masks", MASKS[1:])
def test_every_block_that_is_seen_is_visited_once(masks):
    rng, size = np.random.default_rng(0), Size(32, 16, 4, 2)
    held, other = draw_segments(rng, 3, 150, masks), draw_segments(rng, 3, 200, masks)
    visits = np.asarray(triton.visits(jnp.asarray(held), jnp.asarray(other), size))
    seen = (held[:, :, None] == other[:, None]) & (held != 0)[:, :, None]
    for b, i in np.ndindex(visits.shape[:2]):
        rows = slice(i * 32, i * 32 + 32)
        first, last, end = visits[b, i, :3]
        listed = visits[b, i, 3:end].tolist()
        clear = list(range(first, last))
        assert len({*listed, *clear}) == len(listed) + len(clear)
        for j in range(-(-200 // 16)):
            columns = slice(j * 16, j * 16 + 16)
            pairs = seen[b, rows, columns]
            assert not pairs.any() or j in listed or j in clear
            if j in clear:
                assert columns.stop <= 200
                assert pairs[held[b, rows] != 0].all()


def test_packed_texts_cost_what_they_cost_alone():
    size, texts = Size(128, 64, 8, 3), 16
    segments = jnp.repeat(jnp.arange(1, texts + 1), 512)[None]
    first, last, end = np.asarray(triton.visits(segments, segments, size))[0, :, :3].T
    assert (last - first).sum() == (8192 // 128) * (8192 // 64) // texts
    np.testing.assert_array_equal(end, 3)


@pytest.mark.skipif(not hasattr(mosaic, "InterpretGPUParams"), reason="needs the interpreter of JAX 0.12")
@pytest.mark.parametrize(
    ("masks", "T", "S", "H", "dtype"),
    [
        ("none", 256, 128, 64, jnp.bfloat16),
        ("none", 136, 512, 128, jnp.bfloat16),
        ("packed", 304, 304, 64, jnp.float32),
        ("lengths", 304, 304, 64, jnp.bfloat16),
        ("holes", 264, 264, 128, jnp.bfloat16),
    ],
)
def test_hopper_equals_the_definition(masks, T, S, H, dtype):
    rng = np.random.default_rng(0)
    q, k, v, d_out = (jnp.asarray(rng.normal(size=(2, length, H)), jnp.bfloat16) for length in (T, S, S, T))
    segments = draw_segments(rng, 2, T, masks)
    expected, expected_logsumexp, *_ = expect(q, k, v, d_out, segments, segments)
    if segments is not None:
        segments = jnp.asarray(segments)
        q, k, v = (jnp.where((segments != 0)[:, :, None], x, jnp.nan).astype(x.dtype) for x in (q, k, v))
    interpret = mosaic.InterpretGPUParams(detect_races=True)
    inputs = Inputs(q, k, v, segments, segments, None, jnp.asarray(WORDS), 1, 0.0)
    out, logsumexp = hopper.forward(inputs, dtype, interpret=interpret)
    assert out.dtype == dtype
    assert_close(out, expected, 4 * 2**-8)
    assert_close(logsumexp, expected_logsumexp, 2 * ATTENTION)


@pytest.mark.skipif(not hasattr(mosaic, "InterpretGPUParams"), reason="needs the interpreter of JAX 0.12")
def test_the_interpreter_finds_races(monkeypatch):
    fetch = inspect.getsource(hopper._fetch)
    waits = "pl.when(i >= slots)(functools.partial(mosaic.barrier_wait"
    assert waits in fetch
    broken = fetch.replace(waits, "pl.when(i < 0)(functools.partial(mosaic.barrier_wait")
    names = dict(vars(hopper))
    exec(broken, names)
    monkeypatch.setattr(hopper, "_fetch", names["_fetch"])
    x = jnp.ones((1, 640, 64), jnp.bfloat16)
    interpret = mosaic.InterpretGPUParams(detect_races=True)
    inputs = Inputs(x, x, x, None, None, None, jnp.asarray(WORDS), 1, 0.0)
    with pytest.raises(Exception, match="race"):
        jax.block_until_ready(hopper.forward(inputs, x.dtype, interpret=interpret))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize(
    ("platform", "kind"), [("cuda", "NVIDIA H100 80GB HBM3"), ("cuda", "NVIDIA A100-SXM4-80GB"), ("rocm", "gfx942")]
)
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_lowers_without_a_gpu(platform, kind, rate, monkeypatch):
    monkeypatch.setattr(gpu, "HOPPER", ("H100",))
    x, segments = jax.ShapeDtypeStruct((2, 304, 128), jnp.bfloat16), jax.ShapeDtypeStruct((2, 304), jnp.int32)
    table, words = jax.ShapeDtypeStruct((1, 304, 32), jnp.float32), jax.ShapeDtypeStruct((6,), jnp.uint32)

    @jax.jit
    def both(q, segments, tables, words):
        inputs = Inputs(q, q, q, segments, segments, tables, words, 2, rate)
        out, logsumexp = gpu.forward(inputs, q.dtype)
        return gpu.backward(inputs, out, logsumexp, out, q.dtype)

    device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        text = both.trace(x, segments, (table, table), words).lower(lowering_platforms=(platform,)).as_text()
    for_hopper = "H100" in kind and not rate
    assert text.count("@mosaic_gpu") == (1 if for_hopper else 0)
    assert text.count("@__gpu$xla.gpu.triton") == (2 if for_hopper else 3)
    # The two instructions of a power are written for NVIDIA only.
    assert ("ex2.approx" in text) == (platform == "cuda")
