"""Every implementation of attention against the definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import ATTENTION, GRADIENT, assert_close, assert_close_relative

from jina_jax import rope
from jina_jax.kernels import IMPLEMENTATIONS, attention
from jina_jax.kernels import blockwise as blockwise_module

every_implementation = pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Blocks of 64, so that short inputs have several."""
    monkeypatch.setattr(blockwise_module, "BLOCK", 64)


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
    }[masks]
    return q, k, v, np.ascontiguousarray(segments)


@every_implementation
@settings(max_examples=20)
@given(
    seed=st.integers(0, 10_000),
    B=st.integers(1, 3),
    T=st.one_of(st.integers(1, 20), st.integers(60, 200)),
    N=st.integers(1, 3),
    H=st.sampled_from([8, 32, 64]),
    masks=st.sampled_from(["none", "lengths", "packed", "holes"]),
    rotary=st.booleans(),
)
def test_forward_and_gradients_equal_the_definition(implementation, seed, B, T, N, H, masks, rotary):
    q, k, v, segments = draw_inputs(seed, B, T, N, H, masks)
    tables = [table[None] for table in rope.tables(T, H, 20_000.0)] if rotary else None
    traced = None if tables is None else tuple(map(jnp.asarray, tables))

    probe = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)

    # One program per example: compiling is what takes the time here.
    @jax.jit
    def run(*qkv):
        call = lambda *x: attention(*x, segments=jnp.asarray(segments), rope=traced, implementation=implementation)  # noqa: E731
        out, pull = jax.vjp(call, *qkv)
        return out, pull(jnp.asarray(probe))

    out, gradients = run(q, k, v)
    with jax.enable_x64(True):
        wide_tables = None if tables is None else [np.asarray(table, np.float64) for table in tables]
        call = lambda *x: definition(*x, segments, wide_tables)  # noqa: E731
        wide = jax.jit(lambda *x: (call(*x), jax.vjp(call, *x)[1](probe.astype(np.float64))))
        expected, expected_gradients = jax.tree.map(np.asarray, wide(*(x.astype(np.float64) for x in (q, k, v))))
    assert_close(out, expected, ATTENTION)
    np.testing.assert_array_equal(np.asarray(out)[segments == 0], 0)
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        assert_close_relative(actual, wanted, GRADIENT)


def definition(q, k, v, segments, tables):
    """The definition once more, for JAX to differentiate in float64."""
    if tables is not None:
        cos, sin = (table[:, :, None] for table in tables)
        q, k = turn(jnp, q, cos, sin), turn(jnp, k, cos, sin)
    segments = jnp.asarray(segments)
    visible = (segments[:, :, None] == segments[:, None]) & (segments > 0)[:, None]
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    weights = jnp.where(visible[:, None], jnp.exp(scores), 0.0)
    weights = weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


@every_implementation
def test_what_stands_in_padding_reaches_neither_result_nor_gradient(implementation):
    q, k, v, segments = draw_inputs(0, 2, 100, 2, 16, "holes")
    dirty = [np.where(segments[:, :, None, None] > 0, x, np.nan).astype(np.float32) for x in (q, k, v)]

    def run(q, k, v):
        return attention(q, k, v, segments=jnp.asarray(segments), implementation=implementation)

    clean = [np.where(segments[:, :, None, None] > 0, x, 0).astype(np.float32) for x in (q, k, v)]
    np.testing.assert_array_equal(run(*map(jnp.asarray, dirty)), run(*map(jnp.asarray, clean)))
    gradients = jax.grad(lambda *x: run(*x).sum(), argnums=(0, 1, 2))
    for actual, expected in zip(gradients(*map(jnp.asarray, dirty)), gradients(*map(jnp.asarray, clean)), strict=True):
        assert_close(actual, expected, 0)


@every_implementation
def test_bfloat16_is_as_good_as_its_inputs(implementation):
    q, k, v, segments = draw_inputs(0, 2, 150, 2, 64, "lengths")
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    out = attention(*narrow, segments=jnp.asarray(segments), implementation=implementation)
    assert out.dtype == jnp.bfloat16
    expected = exact(*(np.asarray(x, np.float32) for x in narrow), segments)
    # Weights and values are rounded to 8 bits each; values reach 4.
    assert_close(out, expected, 4 * 2**-8)


def test_dropout_drops_the_same_probabilities_everywhere():
    q, k, v, segments = (jnp.asarray(x) for x in draw_inputs(0, 2, 150, 3, 16, "packed"))

    def run(implementation, key, q=q, k=k, v=v, rate=0.3):
        return attention(q, k, v, segments=segments, dropout_rate=rate, dropout_key=key, implementation=implementation)

    key = jax.random.key(0)
    assert_close(run("blockwise", key), run("reference", key), 2 * ATTENTION)
    assert np.abs(np.asarray(run("reference", key)) - np.asarray(run("reference", jax.random.key(1)))).max() > 0.1
    wanted = jax.grad(lambda *x: jnp.square(run("reference", key, *x)).sum(), argnums=(0, 1, 2))(q, k, v)
    actual = jax.grad(lambda *x: jnp.square(run("blockwise", key, *x)).sum(), argnums=(0, 1, 2))(q, k, v)
    for x, y in zip(actual, wanted, strict=True):
        assert_close_relative(x, y, GRADIENT)


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


@every_implementation
def test_runs_under_vmap_and_jit_with_the_same_result(implementation):
    q, k, v, segments = (jnp.asarray(x) for x in draw_inputs(0, 4, 70, 2, 16, "packed"))

    def run(q, k, v, segments):
        return attention(q, k, v, segments=segments, implementation=implementation)

    single = jax.vmap(lambda *x: run(*(a[None] for a in x))[0])(q, k, v, segments)
    assert_close(single, run(q, k, v, segments), ATTENTION)
    first = jax.jit(run)(q, k, v, segments)
    np.testing.assert_array_equal(first, jax.jit(run)(q, k, v, segments))


def test_bad_arguments():
    x = jnp.zeros((1, 4, 1, 8))
    with pytest.raises(ValueError, match="implementation='fast'; choose from"):
        attention(x, x, x, implementation="fast")
    with pytest.raises(ValueError, match="needs a dropout_key"):
        attention(x, x, x, dropout_rate=0.1)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 8192])
def test_the_default_always_works(length):
    x = jax.random.normal(jax.random.key(0), (1, length, 1, 8))
    out = attention(x, x, x)
    assert np.isfinite(np.asarray(out)).all()
    if length < 100:
        assert_close(out, exact(x, x, x, np.ones((1, length), np.int32)), ATTENTION)
