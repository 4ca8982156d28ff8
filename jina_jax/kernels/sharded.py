"""Attention over several devices: heads and batch by `shard_map`, long sequences by passing keys round a ring."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, UInt32

from jina_jax import rope as rotary
from jina_jax.kernels.dropout import shift, words_from_key
from jina_jax.kernels.fused import attend, default, passes

Axes = str | Sequence[str] | None
Rope = tuple[Float[Array, "#B T half"], Float[Array, "#B T half"]]


def sharded_attention(
    q: Float[Array, "B T D"],
    k: Float[Array, "B T D"],
    v: Float[Array, "B T D"],
    *,
    heads: int,
    mesh: Mesh | jax.sharding.AbstractMesh,
    batch: Axes = None,
    head: Axes = None,
    sequence: str | None = None,
    segments: Int[Array, "B T"] | None = None,
    rope: Rope | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T D"]:
    """`attention` with rows of the batch, heads and parts of the sequence on different devices of a mesh.

    The compiler cannot split a kernel by itself; this says how. Rows and heads need no communication. Parts of the
    sequence pass their keys and values round a ring (Liu et al., 2023), while each device keeps its queries: every
    device holds 1/n of the sequence, and the result is exact. Dropout is that of the unsharded call.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        heads: Number N of heads in all.
        mesh: The mesh.
        batch: Its axes over which rows are split.
        head: Its axes over which heads are split; their product divides N.
        sequence: Its axis over which tokens are split; its size divides T.
        segments: As in `attention`.
        rope: As in `attention`.
        dropout_rate: As in `attention`.
        dropout_key: As in `attention`.
        implementation: As in `attention`; with a sequence axis "blockwise" or "flash".

    Returns:
        As `attention`, sharded like the queries.

    Raises:
        ValueError: If heads or tokens cannot be split evenly.
    """
    B, T, D = q.shape
    over = {"rows": (B, batch), "heads": (heads, head), "tokens": (T, sequence)}
    for what, (count, axes) in over.items():
        if count % _size(mesh, axes):
            devices = f"mesh axes {axes} of {_size(mesh, axes)} devices"
            raise ValueError(f"{count} {what} cannot be split evenly over {devices}")
    if dropout_rate and dropout_key is None:
        raise ValueError(f"{dropout_rate=} needs a dropout_key")
    implementation = implementation or default(D // heads)
    if sequence is not None and implementation == "reference":
        raise ValueError("'reference' holds all scores at once and has no ring; use 'blockwise' or 'flash'")
    words = words_from_key(dropout_key)

    vectors, ids = PartitionSpec(batch, sequence, head), PartitionSpec(batch, sequence)
    table = None if rope is None else PartitionSpec(batch if rope[0].shape[0] == B and B > 1 else None, sequence)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(vectors, vectors, vectors, ids, table, PartitionSpec()),
        out_specs=vectors,
        check_vma=False,
    )
    def run(q: Array, k: Array, v: Array, segments: Array | None, rope: Rope | None, words: Array) -> Array:
        local = heads // _size(mesh, head)
        words = shift(words, batch=_index(mesh, batch) * q.shape[0], head=_index(mesh, head) * local)
        if sequence is None:
            return attend(q, k, v, segments, rope, words, implementation, local, dropout_rate)
        if rope is not None:  # keys travel rotated
            q, k = (rotary.apply(x.reshape(*x.shape[:2], local, -1), *rope).reshape(x.shape) for x in (q, k))
        return ring_attention(q, k, v, segments, words, sequence, implementation, local, dropout_rate)

    return run(q, k, v, segments, rope, words)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def ring_attention(
    q: Float[Array, "B T D"],
    k: Float[Array, "B T D"],
    v: Float[Array, "B T D"],
    segments: Int[Array, "B T"] | None,
    words: UInt32[Array, "6"],
    axis: str,
    implementation: str,
    heads: int,
    rate: float,
) -> Float[Array, "B T D"]:
    """Attention of the queries here to the keys of all devices along a mesh axis. Runs inside `shard_map`.

    Args:
        q: This device's queries, rotated.
        k: Its keys, rotated.
        v: Its values.
        segments: Segments of its tokens; the same text has the same number on all devices.
        words: Seed and origin for dropout.
        axis: Name of the mesh axis.
        implementation: "blockwise" or "flash".
        heads: Number of heads here.
        rate: Dropout rate.

    Returns:
        This device's part of the output.
    """
    return _ring_forward(q, k, v, segments, words, axis, implementation, heads, rate)[0]


def _ring_forward(
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None,
    words: Array,
    axis: str,
    implementation: str,
    heads: int,
    rate: float,
) -> tuple[Array, tuple]:
    forward, _ = passes(implementation)
    here, T = jax.lax.axis_index(axis), q.shape[1]

    def visit(step: Array, keys: tuple) -> tuple[Array, Array]:
        """Output and logsumexp with the keys that have come after so many steps."""
        k, v, k_segments = keys
        part = shift(words, row=here * T, column=_origin(axis, step) * T)
        return forward(q, k, v, segments, k_segments, None, part, heads=heads, rate=rate, dtype=jnp.float32)

    def body(carry: tuple, step: Array) -> tuple[tuple, None]:
        out, logsumexp, keys = carry
        keys = _pass_on(keys, axis)
        part, part_lse = visit(step, keys)
        both = jnp.logaddexp(logsumexp, part_lse)
        out = _scale(out, jnp.exp(logsumexp - both), heads) + _scale(part, jnp.exp(part_lse - both), heads)
        return (out, both, keys), None

    keys = (k, v, segments)
    start = (*visit(jnp.int32(0), keys), keys)
    (out, logsumexp, _), _ = jax.lax.scan(body, start, jnp.arange(1, jax.lax.axis_size(axis), dtype=jnp.int32))
    out = out.astype(v.dtype)
    return out, (q, k, v, segments, words, out, logsumexp)


def _ring_backward(axis: str, implementation: str, heads: int, rate: float, residuals: tuple, d_out: Array) -> tuple:
    """Keys, values and the gradients so far travel together, all the way round."""
    _, backward = passes(implementation)
    q, k, v, segments, words, out, logsumexp = residuals
    here, T = jax.lax.axis_index(axis), q.shape[1]

    def body(carry: tuple, step: Array) -> tuple[tuple, None]:
        dq, dk, dv, (k, v, k_segments) = carry
        part = shift(words, row=here * T, column=_origin(axis, step) * T)
        inputs = (q, k, v, segments, k_segments, None, part, out, logsumexp, d_out)
        shares = backward(*inputs, heads=heads, rate=rate, dtype=jnp.float32)
        dq, dk, dv = (total + share for total, share in zip((dq, dk, dv), shares, strict=True))
        return (dq, *_pass_on((dk, dv, (k, v, k_segments)), axis)), None

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    steps = jnp.arange(jax.lax.axis_size(axis), dtype=jnp.int32)
    (*gradients, _), _ = jax.lax.scan(body, (*zeros, (k, v, segments)), steps)
    dq, dk, dv = (jnp.asarray(x).astype(v.dtype) for x in gradients)
    return dq, dk, dv, None, None


ring_attention.defvjp(_ring_forward, _ring_backward)


def _pass_on(tree: Any, axis: str) -> Any:
    """Send to the next device along the axis."""
    size = jax.lax.axis_size(axis)
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, [(i, (i + 1) % size) for i in range(size)]), tree)


def _origin(axis: str, step: Array) -> Array:
    """Index of the device whose keys are here after so many steps."""
    return (jax.lax.axis_index(axis) - step) % jax.lax.axis_size(axis)


def _scale(x: Array, factor: Array, heads: int) -> Array:
    """[B, T, D] times [B, N, T], head by head."""
    split = x.reshape(*x.shape[:2], heads, -1)
    return (split * jnp.swapaxes(factor, 1, 2)[..., None]).reshape(x.shape)


def _size(mesh: Mesh | jax.sharding.AbstractMesh, axes: Axes) -> int:
    """Number of devices along some axes."""
    size = 1
    for name in _names(axes):
        size *= mesh.shape[name]
    return size


def _index(mesh: Mesh | jax.sharding.AbstractMesh, axes: Axes) -> Array:
    """This device's place along some axes, counted as `PartitionSpec` does."""
    index = jnp.int32(0)
    for name in _names(axes):
        index = index * mesh.shape[name] + jax.lax.axis_index(name)
    return index


def _names(axes: Axes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
