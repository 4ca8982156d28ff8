"""Attention over several devices: heads and batch by `shard_map`, long sequences by passing keys round a ring."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jina_jax.kernels.common import Inputs, Rope, join, split
from jina_jax.kernels.dropout import shift, words_from_key
from jina_jax.kernels.fused import attend, default, passes
from jina_jax.sharding import AnyMesh, size_over

Axes = str | Sequence[str] | None


def sharded_attention(
    q: Float[Array, "B T D"],
    k: Float[Array, "B T D"],
    v: Float[Array, "B T D"],
    *,
    heads: int,
    mesh: AnyMesh,
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
        sequence: Its axis over which tokens are split, after padding if they are too few.
        segments: As in `attention`.
        rope: As in `attention`.
        dropout_rate: As in `attention`.
        dropout_key: As in `attention`.
        implementation: As in `attention`; with a sequence axis "blockwise" or "flash".

    Returns:
        As `attention`, sharded like the queries.

    Raises:
        ValueError: If rows or heads cannot be split evenly.
    """
    words = words_from_key(dropout_key, dropout_rate)
    inputs = Inputs(q, k, v, segments, segments, rope, words, heads, dropout_rate)
    implementation = implementation or default(inputs.head_dim)
    return attend_sharded(inputs, implementation, mesh, batch, head, sequence)


def attend_sharded(
    inputs: Inputs, implementation: str, mesh: AnyMesh, batch: Axes, head: Axes, sequence: str | None
) -> Float[Array, "B T D"]:
    """`attend` on a mesh; `sharded_attention` has the arguments."""
    B, T, _ = inputs.q.shape
    over = {"rows": (B, batch), "heads": (inputs.heads, head)}
    for what, (count, axes) in over.items():
        if count % size_over(mesh, _names(axes)):
            devices = f"mesh axes {axes} of {size_over(mesh, _names(axes))} devices"
            raise ValueError(f"{count} {what} cannot be split evenly over {devices}")
    if sequence is not None and implementation == "reference":
        raise ValueError("'reference' holds all scores at once and has no ring; use 'blockwise' or 'flash'")

    inputs = _with_padding(inputs, -T % size_over(mesh, _names(sequence)))
    rope = inputs.rope
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
        local = inputs.heads // size_over(mesh, _names(head))
        words = shift(words, batch=_index(mesh, batch) * q.shape[0], head=_index(mesh, head) * local)
        here = Inputs(q, k, v, segments, segments, rope, words, local, inputs.rate)
        return attend(here, implementation) if sequence is None else ring_attention(here, implementation, sequence)

    return run(inputs.q, inputs.k, inputs.v, inputs.q_segments, rope, inputs.words)[:, :T]


def _with_padding(inputs: Inputs, count: int) -> Inputs:
    """So many tokens more, which nobody sees."""
    if not count:
        return inputs
    segments = jnp.ones(inputs.q.shape[:2], jnp.int32) if inputs.q_segments is None else inputs.q_segments

    def longer(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, count), *((0, 0),) * (x.ndim - 2)))

    rope = None if inputs.rope is None else (longer(inputs.rope[0]), longer(inputs.rope[1]))
    q, k, v, segments = map(longer, (inputs.q, inputs.k, inputs.v, segments))
    return Inputs(q, k, v, segments, segments, rope, inputs.words, inputs.heads, inputs.rate)


def ring_attention(inputs: Inputs, implementation: str, axis: str) -> Float[Array, "B T D"]:
    """Attention of the queries here to the keys of all devices along a mesh axis. Runs inside `shard_map`.

    Args:
        inputs: This device's part; the same text has the same segment on all devices.
        implementation: "blockwise" or "flash".
        axis: Name of the mesh axis.

    Returns:
        This device's part of the output.
    """
    inputs = inputs.rotated()  # keys travel rotated
    arrays = (inputs.q, inputs.k, inputs.v, inputs.q_segments, inputs.words)
    return _ring(arrays, implementation, axis, inputs.heads, inputs.rate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _ring(arrays: tuple, implementation: str, axis: str, heads: int, rate: float) -> Float[Array, "B T D"]:
    """`ring_attention` with the backward pass written by hand."""
    return _ring_forward(arrays, implementation, axis, heads, rate)[0]


def _ring_forward(arrays: tuple, implementation: str, axis: str, heads: int, rate: float) -> tuple[Array, tuple]:
    forward, _ = passes(implementation)
    q, k, v, segments, words = arrays

    def visit(step: Array, keys: tuple) -> tuple[Array, Array]:
        """Output and logsumexp with the keys that have come after so many steps."""
        return forward(_visit(q, segments, words, keys, step, axis, heads, rate), jnp.float32)

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
    return out, (arrays, out, logsumexp)


def _ring_backward(implementation: str, axis: str, heads: int, rate: float, residuals: tuple, d_out: Array) -> tuple:
    """Keys, values and the gradients so far travel together, all the way round."""
    _, backward = passes(implementation)
    (q, k, v, segments, words), out, logsumexp = residuals

    def body(carry: tuple, step: Array) -> tuple[tuple, None]:
        dq, dk, dv, keys = carry
        inputs = _visit(q, segments, words, keys, step, axis, heads, rate)
        shares = backward(inputs, out, logsumexp, d_out, jnp.float32)
        dq, dk, dv = (total + share for total, share in zip((dq, dk, dv), shares, strict=True))
        return (dq, *_pass_on((dk, dv, keys), axis)), None

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    steps = jnp.arange(jax.lax.axis_size(axis), dtype=jnp.int32)
    (*gradients, _), _ = jax.lax.scan(body, (*zeros, (k, v, segments)), steps)
    dq, dk, dv = (jnp.asarray(x).astype(v.dtype) for x in gradients)
    return ((dq, dk, dv, None, None),)


_ring.defvjp(_ring_forward, _ring_backward)


def _visit(
    q: Array, segments: Array | None, words: Array, keys: tuple, step: Array, axis: str, heads: int, rate: float
) -> Inputs:
    """This device's queries and the keys that have come after so many steps."""
    here, count, T = jax.lax.axis_index(axis), jax.lax.axis_size(axis), q.shape[1]
    k, v, k_segments = keys
    words = shift(words, row=here * T, column=(here - step) % count * T)  # they started out `step` devices back
    return Inputs(q, k, v, segments, k_segments, None, words, heads, rate)


def _pass_on(tree: Any, axis: str) -> Any:
    """Send to the next device along the axis."""
    size = jax.lax.axis_size(axis)
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, [(i, (i + 1) % size) for i in range(size)]), tree)


def _scale(x: Array, factor: Array, heads: int) -> Array:
    """[B, T, D] times [B, N, T], head by head."""
    return join(split(x, heads) * jnp.swapaxes(factor, 1, 2)[..., None])


def _index(mesh: AnyMesh, axes: Axes) -> Array:
    """This device's place along some axes, counted as `PartitionSpec` does."""
    index = jnp.int32(0)
    for name in _names(axes):
        index = index * mesh.shape[name] + jax.lax.axis_index(name)
    return index


def _names(axes: Axes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
