"""What the benchmark of whole programs reads off them, on programs whose numbers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jina_jax
from tests.benchmarks import aot, hlo


def test_operations_are_counted_in_loops_and_backwards():
    def loss(w, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)
        return x.sum()

    w, x = jnp.ones((5, 16, 16)), jnp.ones((3, 16))
    once = 2 * 3 * 16 * 16
    assert hlo.flops(jax.jit(loss).trace(w, x).jaxpr) == 5 * once
    assert hlo.flops(jax.jit(jax.grad(loss)).trace(w, x).jaxpr) == 5 * 3 * once - 0 * once
    again = jax.grad(jax.checkpoint(loss))
    assert hlo.flops(jax.jit(again).trace(w, x).jaxpr) == 5 * 4 * once


def test_the_model_has_the_operations_that_its_sizes_say():
    config = jina_jax.Config(vocab_size=100, num_hidden_layers=2, attention="blockwise", pooler=False)
    model = jina_jax.Model(config)
    variables = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8), np.int32))
    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    found = hlo.flops(jax.jit(lambda v, x: model.apply(v, x).embeddings).trace(variables, tokens).jaxpr)
    dense = 2 * 256 * 2 * (4 * 1024**2 + 2 * 1024 * 4096)
    assert dense <= found <= 1.05 * dense


def test_bytes_of_collectives_are_counted_in_loops():
    mesh = jina_jax.make_mesh(fsdp=8, data=1)
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())

    def run(w, x):
        def step(x, w):
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, whole)), None

        return jax.lax.scan(step, x, w)[0]

    w = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=split)
    x = jax.ShapeDtypeStruct((3, 64), jnp.float32, sharding=whole)
    text = jax.jit(run, out_shardings=whole).lower(w, x).compile().as_text()
    assert hlo.collective_bytes(text) == 5 * 64 * 64 * 4


@pytest.mark.parametrize("program", aot.PROGRAMS)
def test_every_program_is_one_for_a_mesh(program):
    mesh = jina_jax.make_mesh(data=2, fsdp=2, tensor=2)
    rows, tokens, parts = aot.PREPARE[program](mesh)
    assert rows % 4 == tokens % 64 == 0
    # optax mixes types.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), jax.numpy_dtype_promotion("standard"):
        shapes = [part.fn.eval_shape(*part.args) for part in parts]
    if program == "pairs":
        forward, (loss, shares), total, state = shapes
        assert forward.shape == (4 * 64, 1024)
        assert shares.shape == (rows, 1024)
        assert loss.shape == ()
        assert parts[0].times * forward.shape[0] == rows
        assert jax.tree.map(lambda x: x.shape, (state, total)) == jax.tree.map(lambda x: x.shape, parts[3].args)
    elif program not in ("embed", "long"):
        [(state, loss)] = shapes
        assert jax.tree.map(lambda x: x.shape, state) == jax.tree.map(lambda x: x.shape, parts[0].args[0])
    else:
        assert shapes[0].shape == (rows, 1024)
