"""The TPU kernels under JAX's TPU interpreter: memory and copies as on the chip, two cores, any order, races found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from numerics import ATTENTION, GRADIENT, assert_close, assert_close_relative

from jina_jax import rope
from jina_jax.kernels import blockwise, dropout, tiles, tpu
from jina_jax.kernels.common import Inputs

# Uninitialised memory reads as NaN, reading or writing out of bounds raises, and the grid runs in random order
# wherever the kernel says that the order does not matter.
STRICT = {
    "detect_races": True,
    "num_cores_or_threads": 2,
    "uninitialized_memory": "nan",
    "out_of_bounds_reads": "raise",
}
SIZES = tiles.Sizes(query=128, key=128, chunk=128, part=128, turn=1, queries=128, keys=128)


def races_found() -> bool:
    """Whether the last kernel had any; the interpreter prints them, and this is how JAX's own tests ask."""
    return interpreter.races.races_found


def inputs(masks, T=256, heads=2, H=64):
    rng = np.random.default_rng(0)
    q, k, v, d_out = (jnp.asarray(rng.normal(size=(2, T, heads * H)), jnp.float32) for _ in range(4))
    segments = {
        "none": None,
        "packed": jnp.asarray(np.sort(rng.integers(0, 4, (2, T)), axis=1)[:, ::-1].astype(np.int32)),
    }[masks]
    tables = tuple(jnp.asarray(table)[None] for table in rope.tables(T, H, 20_000.0))
    words = dropout.words_from_key(jax.random.key(0))
    return Inputs(q, k, v, segments, segments, tables, words, heads, 0.0), d_out


@pytest.mark.parametrize(("masks", "seed"), [("none", 1), ("packed", 2)])
def test_kernels_are_clean(masks, seed):
    arguments, d_out = inputs(masks)
    interpret = pltpu.InterpretParams(**STRICT, random_seed=seed)
    expected, logsumexp = blockwise.forward(arguments, jnp.float32)
    out, lse = tpu.forward(arguments, jnp.float32, interpret=interpret, sizes=SIZES)
    assert not races_found()
    assert_close(out, expected, ATTENTION)
    assert_close_relative(lse, logsumexp, ATTENTION)

    gradients = tpu.backward(arguments, out, lse, d_out, jnp.float32, interpret=interpret, sizes=SIZES)
    assert not races_found()
    for actual, wanted in zip(
        gradients, blockwise.backward(arguments, expected, logsumexp, d_out, jnp.float32), strict=True
    ):
        assert_close_relative(actual, wanted, GRADIENT)


def test_a_planted_race_is_found():
    """Gradients summed over a grid axis that is declared parallel: what the backward kernel must not do."""

    def body(x_ref, out_ref):
        @pl.when(pl.program_id(0) == 0)
        def _():
            out_ref[...] = jnp.zeros_like(out_ref)

        out_ref[...] += x_ref[...]

    x = jnp.ones((1024, 128), jnp.float32)
    pl.pallas_call(
        body,
        grid=(8,),
        in_specs=[pl.BlockSpec((128, 128), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((128, 128), lambda i: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((128, 128), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=pltpu.InterpretParams(**STRICT, random_seed=1),
    )(x)
    assert races_found()
