"""A batch in parts has the values and the gradient of the whole, on one device and on eight, and needs less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_variables
from numerics import assert_close, assert_close_relative

import jina_jax
from jina_jax.sharding import constrain
from jina_jax.train import grad_cache, losses

# For programs that run once: they compile in half the time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
# The same sums in another order, in float32, relative to the largest component of all gradients.
FLOAT32 = 1e-6
ROWS, LENGTH = 64, 16
MESHES = [{"data": 8}, {"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}]


@pytest.fixture(scope="module")
def small():
    """A model of two layers, with dropout between them."""
    config = jina_jax.Config(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=66,
        matryoshka_dimensions=(32,),
        tasks=(),
        prompts=(),
        attention_probs_dropout_prob=0.0,
        pooler=False,
    )
    model = jina_jax.Model(config)
    return model, random_variables(model)


def tokens():
    """Rows of tokens, queries before passages, and how many of them count."""
    rng = np.random.default_rng(0)
    return rng.integers(3, 96, (ROWS, LENGTH)).astype(np.int32), rng.integers(4, LENGTH + 1, ROWS).astype(np.int32)


def encoder(model, variables, train=False):
    def encode(rows, key):
        tokens, lengths = rows
        mask = jnp.arange(LENGTH)[None] < lengths[:, None]
        rngs = {"dropout": key} if train else None
        return model.apply(variables, tokens, mask, train=train, rngs=rngs).pooled

    return encode


def contrast(vectors):
    return losses.info_nce(vectors[: ROWS // 2], vectors[ROWS // 2 :], tau=0.1)


def at_once(encode, rows, parts, key):
    """All parts side by side, with the keys that they have one after the other."""
    split = jax.tree.map(lambda x: x.reshape(ROWS // parts, parts, *x.shape[1:]).swapaxes(0, 1), rows)
    return jax.vmap(encode)(split, jax.random.split(key, parts)).swapaxes(0, 1).reshape(ROWS, -1)


def close(actual, expected, tolerance=FLOAT32):
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: assert_close(a, b, tolerance * max(largest, 1.0)), actual, expected)


# ---- One device ------------------------------------------------------------------------------------------------------


def test_dropout_and_gradient_are_those_of_the_parts(small):
    """T8: the same keys, the same loss and gradient, in a quarter of the memory at most."""
    model, variables = small
    key, parts = jax.random.key(3), 8

    def loss(embed, variables, rows):
        return contrast(embed(encoder(model, variables, train=True), rows, parts, key))

    rows = jax.tree.map(jnp.asarray, tokens())
    compiled = [
        jit(jax.value_and_grad(functools.partial(loss, embed))).lower(variables, rows).compile()
        for embed in (at_once, grad_cache.in_chunks)
    ]
    (whole, wanted), (cached, found) = (one(variables, rows) for one in compiled)
    assert_close_relative(cached, whole, FLOAT32)
    close(found, wanted)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted)) > 0.01
    without, with_ = (one.memory_analysis().temp_size_in_bytes for one in compiled)
    assert with_ <= without / 4, (with_, without)


def test_rows_keep_their_order_and_trees_their_shape():
    rows = {"x": np.arange(12.0, dtype=np.float32)[:, None], "task": np.arange(12, dtype=np.int32)}

    def encode(rows, key):
        assert key is None
        return {"sum": rows["x"][:, 0] + rows["task"].astype(np.float32), "pair": jnp.tile(rows["x"], (1, 2))}

    for parts in (1, 3, 12):
        out = grad_cache.in_chunks(encode, rows, parts)
        np.testing.assert_array_equal(out["sum"], 2 * np.arange(12))
        np.testing.assert_array_equal(out["pair"], np.stack([np.arange(12)] * 2, axis=1))


def test_each_part_has_a_key_of_its_own_and_one_part_has_one_too():
    key, rows = jax.random.key(0), jnp.zeros((8, 3))

    def encode(rows, key):
        return rows + jax.random.normal(key, rows.shape)

    for parts in (1, 4):
        keys = jax.random.split(key, parts)
        wanted = np.stack([jax.random.normal(one, (8 // parts, 3)) for one in keys], axis=1).reshape(8, 3)
        np.testing.assert_array_equal(grad_cache.in_chunks(encode, rows, parts, key), wanted)


@pytest.mark.parametrize("parts", [0, 5])
def test_parts_that_are_not_equal_are_refused(parts):
    with pytest.raises(ValueError, match=rf"arrays of \[8\] rows cannot be embedded in {parts} equal parts"):
        grad_cache.in_chunks(lambda rows, _: rows, jnp.zeros((8, 2)), parts)
    with pytest.raises(ValueError, match=r"arrays of \[4, 8\] rows"):
        grad_cache.in_chunks(lambda rows, _: rows[0], (jnp.zeros((8, 2)), jnp.zeros((4, 2))), 4)


def test_parts_of():
    assert [grad_cache.parts_of(12, most) for most in (None, 12, 20, 6, 5, 4, 1)] == [1, 1, 1, 2, 3, 3, 12]
    assert grad_cache.parts_of(250_002, 16_384) == 17


# ---- Eight devices ---------------------------------------------------------------------------------------------------


def on_mesh(mesh, loss, *given):
    """Value and gradient on a mesh, and the operations of one device.

    XLA counts the body of a loop once, however often it runs. All programs that are compared have the same two loops
    (forward, and backward with what it computes again) of as many parts, so that their bodies are what is compared: one
    part of the batch on every device.
    """
    with jina_jax.use(mesh):
        compiled = jit(jax.value_and_grad(loss)).lower(*given).compile()
    return compiled(*given), compiled.cost_analysis()["flops"]


def put(mesh, rows):
    return jax.tree.map(lambda x: jina_jax.sharding.put(mesh, x, "B" + " _" * (x.ndim - 1)), rows)


def one_device():
    return jina_jax.make_mesh(devices=jax.devices()[:1])


def layers(weights, axes):
    """An encoder that says how it is split between its layers, or nothing."""

    def encode(x, _):
        x = jnp.tanh(x @ weights[0])
        return jnp.tanh((constrain(x, axes) if axes else x) @ weights[1])

    return encode


def neighbours(encode, rows, parts):
    """Parts of neighbouring rows: what one would write first."""
    again = jax.checkpoint(encode, prevent_cse=False)
    _, out = jax.lax.scan(lambda _, part: (None, again(part, None)), None, rows.reshape(parts, -1, rows.shape[1]))
    return out.reshape(ROWS, -1)


def test_eight_devices_do_an_eighth_of_the_work():
    """T7: loss and gradient are those of one device, at 1.2 times an eighth of its operations at most."""
    rng = np.random.default_rng(0)
    x, *weights = (rng.normal(size=shape).astype(np.float32) / 8 for shape in [(ROWS, 64), (64, 512), (512, 64)])

    def step(embed, mesh, axes=None):
        loss = lambda weights, x: contrast(embed(layers(weights, axes), x, 4))  # noqa: E731
        return on_mesh(mesh, loss, weights, put(mesh, x))

    (wanted, gradient), whole = step(grad_cache.in_chunks, one_device())
    for sizes in MESHES:
        (loss, found), each = step(
            grad_cache.in_chunks, jina_jax.make_mesh(**sizes), "B F" if "tensor" in sizes else None
        )
        assert_close_relative(loss, wanted, FLOAT32)
        close(found, gradient)
        assert each <= 1.2 * whole / 8, (sizes, each / whole * 8)
    # The bar tells: with parts as one would write them first, devices embed rows of others, to the same result.
    (loss, found), each = step(neighbours, jina_jax.make_mesh(**MESHES[0]))
    assert_close_relative(loss, wanted, FLOAT32)
    close(found, gradient)
    assert each > 2 * whole / 8, each / whole * 8
