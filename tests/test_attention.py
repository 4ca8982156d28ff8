"""Every implementation of attention against the definition in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import ATTENTION, BFLOAT16_FACTOR, GRADIENT, assert_close, assert_close_relative

from jina_jax import rope
from jina_jax.kernels import IMPLEMENTATIONS, attention, blockwise, dropout, tiles

every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Small blocks, and tiles of 128, the smallest there are, so that short inputs have several, and several spans."""
    plans = {"SMALL": (32, 32), "MEDIUM": (64, 64), "LARGE": (80, 160, True)}
    for name, plan in plans.items():
        monkeypatch.setattr(blockwise, name, blockwise.Plan(*plan))
    monkeypatch.setattr(blockwise, "LONG", 400)
    sizes = tiles.Sizes(query=128, key=128, chunk=128, part=128, turn=1, queries=256, keys=256)
    monkeypatch.setattr(tiles, "choose", lambda *_: sizes)


def turn(numpy, x, cos, sin):
    """Rotate the two halves of each head."""
    first, second = numpy.split(x, 2, axis=-1)
    return numpy.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def exact(q, k, v, segments, tables=None):
    """The definition in float64, one row and head at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    if tables is not None:
        cos, sin = (np.asarray(table, np.float64)[:, :, None] for table in tables)
        q, k = turn(np, q, cos, sin), turn(np, k, cos, sin)
    out = np.zeros_like(v)
    for b in range(q.shape[0]):
        for segment in set(segments[b].tolist()) - {0}:
            at = np.flatnonzero(segments[b] == segment)
            for n in range(q.shape[2]):
                scores = q[b, at, n] @ k[b, at, n].T / np.sqrt(q.shape[-1])
                weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
                out[b, at, n] = weights / weights.sum(axis=-1, keepdims=True) @ v[b, at, n]
    return out


def draw_inputs(seed, B, T, N, H, masks):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(B, T, N, H)).astype(np.float32) for _ in range(3))
    segments = {
        "none": np.ones((B, T), np.int32),
        "lengths": (np.arange(T)[None] < rng.integers(0, T + 1, (B, 1))).astype(np.int32),
        "packed": np.sort(rng.integers(0, 5, (B, T)), axis=1)[:, ::-1].astype(np.int32),
        "holes": rng.integers(0, 2, (B, T)).astype(np.int32),
        "some rows empty": np.repeat(rng.integers(0, 2, (B, 1)), T, axis=1).astype(np.int32),
    }[masks]
    return q, k, v, np.ascontiguousarray(segments)


def kept(seed, rate, shape):
    """The dropout mask that every implementation must use, scaled."""
    words = dropout.words_from_key(jax.random.key(seed))
    index = jnp.ix_(*(jnp.arange(size) for size in shape))
    return np.asarray(dropout.keep(words, rate, *index)) / (1 - rate)


class TestEveryImplementation:
    """The same demands on all: "flash" runs as the TPU kernel, interpreted."""

    @every_implementation
    @settings(max_examples=6)
    @given(
        seed=st.integers(0, 10_000),
        B=st.integers(1, 3),
        T=st.one_of(st.integers(1, 20), st.integers(60, 300), st.integers(300, 600)),
        N=st.integers(1, 3),
        H=st.sampled_from([32, 64, 128]),
        masks=st.sampled_from(["none", "lengths", "packed", "holes", "some rows empty"]),
        rotary=st.booleans(),
        rate=st.sampled_from([0.0, 0.0, 0.3]),
    )
    def test_forward_and_gradients_equal_the_definition(self, implementation, seed, B, T, N, H, masks, rotary, rate):
        q, k, v, segments = draw_inputs(seed, B, T, N, H, masks)
        tables = [table[None] for table in rope.tables(T, H, 20_000.0)] if rotary else None
        traced = None if tables is None else tuple(map(jnp.asarray, tables))
        given_segments = None if masks == "none" else jnp.asarray(segments)
        probe = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
        key = jax.random.key(seed) if rate else None

        # One program per example: compiling is what takes the time here, so it is told not to optimise.
        @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
        def run(*qkv):
            call = lambda *x: attention(  # noqa: E731
                *x,
                segments=given_segments,
                rope=traced,
                dropout_rate=rate,
                dropout_key=key,
                implementation=implementation,
            )
            out, pull = jax.vjp(call, *qkv)
            return out, pull(jnp.asarray(probe))

        out, gradients = run(q, k, v)
        factor = kept(seed, rate, (B, N, T, T)) if rate else np.ones((1, 1, 1, 1))
        with jax.enable_x64(True):
            wide_tables = None if tables is None else [np.asarray(table, np.float64) for table in tables]
            call = lambda *x: definition(*x, segments, wide_tables, jnp.asarray(factor))  # noqa: E731
            wide = jax.jit(lambda *x: (call(*x), jax.vjp(call, *x)[1](probe.astype(np.float64))))
            expected, expected_gradients = jax.tree.map(np.asarray, wide(*(x.astype(np.float64) for x in (q, k, v))))
        # Dropout scales what is kept, and its error with it.
        assert_close(out, expected, ATTENTION / (1 - rate))
        np.testing.assert_array_equal(np.asarray(out)[segments == 0], 0)
        # The gradients of q and k are differences that cancel where there are few keys (for one key exactly): the
        # smallest scale for their error is a tenth of the largest gradient's.
        floor = 0.1 * max(np.abs(wanted).max() for wanted in expected_gradients)
        for actual, wanted in zip(gradients, expected_gradients, strict=True):
            assert_close_relative(actual, wanted, GRADIENT, floor)

    @every_implementation
    @pytest.mark.parametrize("masks", ["holes", "lengths"])
    def test_what_stands_in_padding_reaches_neither_result_nor_gradient(self, implementation, masks):
        q, k, v, segments = draw_inputs(0, 2, 200, 2, 32, masks)
        valid = segments[:, :, None, None] > 0
        dirty = [jnp.asarray(np.where(valid, x, np.nan).astype(np.float32)) for x in (q, k, v)]
        clean = [jnp.asarray(np.where(valid, x, 0).astype(np.float32)) for x in (q, k, v)]
        tables = tuple(jnp.asarray(table)[None] for table in rope.tables(200, 32, 20_000.0))

        @jax.jit
        def run(d_out, *qkv):
            call = lambda *x: attention(  # noqa: E731
                *x, segments=jnp.asarray(segments), rope=tables, implementation=implementation
            )
            out, pull = jax.vjp(call, *qkv)
            return out, pull(d_out)

        out, gradients = run(dirty[0], *dirty)
        expected, expected_gradients = run(clean[0], *clean)
        np.testing.assert_array_equal(out, expected)
        for actual, wanted in zip(gradients, expected_gradients, strict=True):
            assert_close(actual, wanted, 0)

    @every_implementation
    @pytest.mark.parametrize("masks", ["none", "lengths", "packed"])
    def test_bfloat16_is_as_good_as_the_definitions(self, implementation, masks):
        q, k, v, segments = draw_inputs(0, 2, 300, 2, 64, masks)
        narrow = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]

        def error(implementation):
            run = jax.jit(lambda *x: attention(*x, segments=jnp.asarray(segments), implementation=implementation))
            out = run(*narrow)
            assert out.dtype == jnp.bfloat16
            return np.asarray(out, np.float64) - expected

        expected = exact(*(np.asarray(x, np.float32) for x in narrow), segments)
        actual, reference = error(implementation), error("reference")
        assert np.sqrt(np.square(actual).mean()) <= BFLOAT16_FACTOR * np.sqrt(np.square(reference).mean())
        assert np.abs(actual).max() <= BFLOAT16_FACTOR * np.abs(reference).max()

    @every_implementation
    def test_runs_under_vmap_and_jit_with_the_same_result(self, implementation):
        q, k, v, segments = (jnp.asarray(x) for x in draw_inputs(0, 4, 70, 2, 32, "packed"))

        def run(q, k, v, segments):
            return attention(q, k, v, segments=segments, implementation=implementation)

        single = jax.jit(jax.vmap(lambda *x: run(*(a[None] for a in x))[0]))(q, k, v, segments)
        first = jax.jit(run)(q, k, v, segments)
        assert_close(single, first, ATTENTION)
        np.testing.assert_array_equal(first, jax.jit(run)(q, k, v, segments))

    @every_implementation
    def test_takes_heads_side_by_side_and_lengths(self, implementation):
        q, k, v, segments = (jnp.asarray(x) for x in draw_inputs(0, 2, 70, 2, 32, "lengths"))
        options = {"implementation": implementation}
        wanted = jax.jit(lambda *x: attention(*x, segments=segments, **options))(q, k, v)
        lengths = segments.sum(axis=1)
        flat = [x.reshape(2, 70, 64) for x in (q, k, v)]
        out = jax.jit(lambda *x: attention(*x, heads=2, lengths=lengths, **options))(*flat)
        np.testing.assert_array_equal(out, wanted.reshape(2, 70, 64))


def definition(q, k, v, segments, tables, factor):
    """The definition once more, for JAX to differentiate in float64; `factor` is the dropout mask, scaled."""
    if tables is not None:
        cos, sin = (table[:, :, None] for table in tables)
        q, k = turn(jnp, q, cos, sin), turn(jnp, k, cos, sin)
    segments = jnp.asarray(segments)
    visible = (segments[:, :, None] == segments[:, None]) & (segments > 0)[:, None]
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    weights = jnp.where(visible[:, None], jnp.exp(scores), 0.0)
    weights = factor * weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


def test_another_key_drops_other_probabilities():
    q, k, v, segments = (jnp.asarray(x) for x in draw_inputs(0, 2, 150, 3, 16, "packed"))
    run = lambda key: attention(q, k, v, segments=segments, dropout_rate=0.3, dropout_key=jax.random.key(key))  # noqa: E731
    assert np.abs(np.asarray(run(0)) - np.asarray(run(1))).max() > 0.1


def test_dropout_has_the_rate_and_the_mean_it_should():
    # With equal scores and values of one, each output is the share of keys that survive over (1 - rate).
    T, rate = 400, 0.25
    flat = jnp.zeros((4, T, 4, 8))
    out = attention(flat, flat, flat + 1, dropout_rate=rate, dropout_key=jax.random.key(3), implementation="reference")
    kept = np.asarray(out)[..., 0] * (1 - rate)
    total = kept.size * T
    assert abs(kept.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / total)
    # Rows, heads and batch entries are independent: the spread over rows is the binomial one.
    assert abs(kept.std() / np.sqrt(rate * (1 - rate) / T) - 1) < 0.05


def test_bad_arguments():
    x = jnp.zeros((1, 4, 1, 8))
    with pytest.raises(ValueError, match="implementation='fast'; choose from"):
        attention(x, x, x, implementation="fast")
    with pytest.raises(ValueError, match="needs a dropout_key"):
        attention(x, x, x, dropout_rate=0.1)
    with pytest.raises(ValueError, match=r"head sizes .* not 8; use 'blockwise'"):
        attention(x, x, x, implementation="flash")
    with pytest.raises(ValueError, match="heads=2, but the arrays have 1 heads"):
        attention(x, x, x, heads=2)
    with pytest.raises(ValueError, match="width 8 need a number of heads that divides it, not heads=None"):
        attention(x[:, :, 0], x[:, :, 0], x[:, :, 0])
    with pytest.raises(ValueError, match="segments or lengths, not both"):
        attention(x, x, x, segments=jnp.ones((1, 4), int), lengths=jnp.ones(1, int))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 8192])
def test_the_default_always_works(length):
    x = jax.random.normal(jax.random.key(0), (1, length, 1, 8))
    out = attention(x, x, x)
    assert np.isfinite(np.asarray(out)).all()
    if length < 100:
        assert_close(out, exact(x, x, x, np.ones((1, length), np.int32)), ATTENTION)
