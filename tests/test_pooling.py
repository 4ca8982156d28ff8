import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_close

from jina_jax import normalize, truncate
from jina_jax.pooling import mean_pool, mean_pool_packed


def test_mean_over_valid_tokens_whatever_stands_elsewhere():
    hidden = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    mask = np.array([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0]], bool)
    hidden[0, 1] = np.nan
    pooled = mean_pool(jnp.asarray(hidden), jnp.asarray(mask))
    assert_close(pooled[0], hidden[0, [0, 2, 3]].mean(axis=0), 1e-6)
    assert_close(pooled[1], np.zeros(8), 0)


def test_packed_mean_equals_the_mean_of_each():
    hidden = np.random.default_rng(0).normal(size=(1, 6, 8)).astype(np.float32)
    hidden[0, 5] = np.nan
    segments = jnp.asarray([[1, 1, 2, 2, 2, 0]])
    pooled = mean_pool_packed(jnp.asarray(hidden), segments, 3)
    assert_close(pooled[0, 0], hidden[0, :2].mean(axis=0), 1e-6)
    assert_close(pooled[0, 1], hidden[0, 2:5].mean(axis=0), 1e-6)
    assert_close(pooled[0, 2], np.zeros(8), 0)


def test_bfloat16_is_summed_in_float32():
    hidden = jnp.ones((1, 4096, 2), jnp.bfloat16)  # a bfloat16 sum of ones stops at 256
    assert_close(mean_pool(hidden, jnp.ones((1, 4096), bool)), np.ones((1, 2)), 0)


@given(dimensions=st.integers(1, 64), seed=st.integers(0, 1000))
def test_truncation_is_a_cut_then_unit_length_and_idempotent(dimensions, seed):
    x = np.random.default_rng(seed).normal(size=(3, 64)).astype(np.float32)
    z = truncate(jnp.asarray(x), dimensions)
    cut = x[:, :dimensions].astype(np.float64)
    assert_close(z, cut / np.linalg.norm(cut, axis=-1, keepdims=True), 1e-6)
    assert_close(np.linalg.norm(np.asarray(z, np.float64), axis=-1), np.ones(3), 1e-6)
    assert_close(truncate(z, dimensions), z, 1.2e-7)  # one ulp at most
    assert_close(truncate(truncate(jnp.asarray(x), 64), dimensions), z, 2.4e-7)


@pytest.mark.parametrize("dimensions", [0, -1, 65, True, 2.0])
def test_impossible_dimensions(dimensions):
    with pytest.raises(Exception, match="dimensions") as error:
        truncate(jnp.ones((1, 64)), dimensions)
    assert isinstance(error.value, ValueError | TypeError)


def test_zero_stays_zero_and_has_a_finite_gradient():
    zero = jnp.zeros((1, 8))
    assert_close(normalize(zero), zero, 0)
    assert np.isfinite(np.asarray(jax.grad(lambda x: normalize(x).sum())(zero))).all()
