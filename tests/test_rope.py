import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numerics import assert_close

from jina_jax import rope


def test_tables_equal_the_goldens_bit_for_bit(data):
    goldens = np.load(data / "rope_goldens.npz")
    np.testing.assert_array_equal(rope.frequencies(64, 20_000.0), goldens["inv_freq_torch_f32"])
    cos, sin = rope.tables(8194, 64, 20_000.0)
    assert cos.dtype == sin.dtype == np.float32
    assert 8191 in goldens["positions"]
    np.testing.assert_array_equal(cos[goldens["positions"]], goldens["cos"])
    np.testing.assert_array_equal(sin[goldens["positions"]], goldens["sin"])


@pytest.mark.parametrize(("head_dim", "base"), [(64, 20_000.0), (64, 10_000.0), (32, 20_000.0)])
def test_tables_are_torchs_to_the_last_place(head_dim, base):
    # torch's own bits depend on the vector library it was built with, so one ulp is allowed here.
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    angles = torch.outer(torch.arange(8192, dtype=torch.float32), 1.0 / (base**exponents))
    cos, sin = rope.tables(8192, head_dim, base)
    assert_close(cos, torch.cos(angles).numpy(), 6e-8)
    assert_close(sin, torch.sin(angles).numpy(), 6e-8)


def test_scores_depend_on_the_distance_alone():
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 2, 16)) for i in range(2))
    cos, sin = map(jnp.asarray, rope.tables(64, 16, 20_000.0))

    def score(i: int, j: int) -> np.ndarray:
        turned = [rope.apply(x, cos[None, p : p + 1], sin[None, p : p + 1]) for x, p in ((q, i), (k, j))]
        return np.asarray((turned[0] * turned[1]).sum(axis=-1))

    assert_close(score(3, 10), score(43, 50), 2e-6)
    assert np.abs(score(3, 10) - score(3, 11)).max() > 1e-2


def test_pairs_are_halves_not_neighbours():
    cos, sin = map(jnp.asarray, rope.tables(2, 4, 20_000.0))
    x = jnp.asarray([1.0, 0.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
    turned = rope.apply(x, cos[None, 1:2], sin[None, 1:2])[0, 0, 0]
    assert_close(turned, [np.cos(1.0), 0, np.sin(1.0), 0], 1e-6)
