"""Attention on 8 simulated devices equals attention on one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from numerics import ATTENTION, GRADIENT, assert_close, assert_close_relative

from jina_jax import rope
from jina_jax.kernels import attention, tiles
from jina_jax.kernels.sharded import sharded_attention

B, T, N, H = 4, 256, 4, 32
# Sizes of the axes batch, head, sequence.
MESHES = [(8, 1, 1), (2, 4, 1), (1, 1, 8), (2, 2, 2)]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    sizes = tiles.Sizes(query=128, key=128, chunk=128, part=128, turn=1, queries=128, keys=128)
    monkeypatch.setattr(tiles, "choose", lambda *_: sizes)


def inputs(batch=B):
    rng = np.random.default_rng(0)
    q, k, v, probe = (jnp.asarray(rng.normal(size=(batch, T, N * H)), jnp.float32) for _ in range(4))
    segments = np.sort(rng.integers(0, 5, (batch, T)), axis=1)[:, ::-1].astype(np.int32)
    tables = tuple(jnp.asarray(table)[None] for table in rope.tables(T, H, 20_000.0))
    return (q, k, v), probe, jnp.asarray(np.ascontiguousarray(segments)), tables


def make_mesh(sizes):
    devices = jax.devices()[: np.prod(sizes)]
    return jax.make_mesh(sizes, ("batch", "head", "sequence"), axis_types=(AxisType.Auto,) * 3, devices=devices)


def with_gradients(call, probe):
    def run(*qkv):
        out, pull = jax.vjp(call, *qkv)
        return out, pull(probe)

    return jax.jit(run)


# The interpreted kernel is slow: a part of the cases for it.
CASES = [("blockwise", sizes, rate) for sizes in MESHES for rate in (0.0, 0.2)]
CASES += [("flash", (2, 4, 1), 0.0), ("flash", (1, 1, 2), 0.2), ("flash", (2, 2, 2), 0.0)]


@pytest.mark.parametrize(("implementation", "sizes", "rate"), CASES, ids=str)
def test_sharded_equals_unsharded(implementation, sizes, rate):
    qkv, probe, segments, tables = inputs(8 if sizes[0] == 8 else B)
    options = {"segments": segments, "rope": tables, "dropout_rate": rate}
    options |= {"dropout_key": jax.random.key(5), "implementation": implementation}
    whole = functools.partial(attention, heads=N, **options | {"implementation": "blockwise"})
    expected, expected_gradients = with_gradients(whole, probe)(*qkv)

    mesh, sequence = make_mesh(sizes), "sequence" if sizes[2] > 1 else None
    call = functools.partial(sharded_attention, heads=N, mesh=mesh, batch="batch", head="head", sequence=sequence)
    sharding = NamedSharding(mesh, PartitionSpec("batch", sequence, "head"))
    run = with_gradients(functools.partial(call, **options), jax.device_put(probe, sharding))
    out, gradients = run(*(jax.device_put(x, sharding) for x in qkv))
    assert out.sharding.is_equivalent_to(sharding, 3)
    assert_close(out, expected, 2 * ATTENTION)
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        assert_close_relative(actual, wanted, GRADIENT)


@pytest.mark.parametrize(("axes", "implementation"), [(("data", "tensor"), "flash"), (("fsdp", "sequence"), None)])
def test_a_mesh_in_context_is_enough(axes, implementation):
    qkv, _, segments, tables = inputs()
    options = {"heads": N, "segments": segments, "rope": tables}
    expected = attention(*qkv, **options)
    mesh = jax.make_mesh((2, 2), axes, axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        run = jax.jit(functools.partial(attention, **options, implementation=implementation))
        out = run(*(jax.device_put(x, NamedSharding(mesh, PartitionSpec(axes[0]))) for x in qkv))
    assert_close(out, expected, 2 * ATTENTION)
    assert len(out.sharding.device_set) == 4


def collectives(sizes):
    """Names of the collective operations of a training step's attention, with how often each is in the program."""
    qkv, probe, segments, tables = inputs(8 if sizes[0] == 8 else B)
    mesh, sequence = make_mesh(sizes), "sequence" if sizes[2] > 1 else None
    call = functools.partial(sharded_attention, heads=N, mesh=mesh, batch="batch", head="head", sequence=sequence)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
    ids, tables = put(segments, "batch", sequence), tuple(put(x, None, sequence) for x in tables)
    vectors = [put(x, "batch", sequence, "head") for x in (*qkv, probe)]

    def step(q, k, v, probe, ids, tables):
        attend = functools.partial(call, segments=ids, rope=tables, implementation="blockwise")
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(probe)

    text = jax.jit(step).lower(*vectors, ids, tables).compile().as_text()
    found = re.findall(r"= \S+ (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(", text)
    return {name: found.count(name) for name in found}


def test_rows_and_heads_need_no_communication():
    assert collectives((2, 4, 1)) == {}


def test_the_ring_passes_keys_on_and_gathers_nothing():
    # Forward: keys, values, segments. Backward: these and the two gradients. Each stands once, in a loop.
    assert collectives((1, 1, 8)) == {"collective-permute": 3 + 5}


def test_what_cannot_be_split_is_refused():
    (q, k, v), *_ = inputs()
    call = functools.partial(sharded_attention, q, k, v, heads=N)
    with pytest.raises(ValueError, match=r"4 heads cannot be split evenly over mesh axes head of 8 devices"):
        call(mesh=make_mesh((1, 8, 1)), head="head")
    with pytest.raises(ValueError, match="has no ring"):
        call(mesh=make_mesh((1, 1, 8)), sequence="sequence", implementation="reference")
    with pytest.raises(ValueError, match="needs a dropout_key"):
        call(mesh=make_mesh((1, 1, 8)), dropout_rate=0.1)
