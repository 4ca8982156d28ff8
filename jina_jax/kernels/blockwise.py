"""Attention in memory linear in the length, in plain XLA: online softmax over blocks of keys.

Forward follows Rabe and Staats (2021) and Dao (2023, algorithm 1); the backward pass recomputes the probabilities
from the saved logsumexp (Dao 2023, algorithm 2), so it needs no more memory than the forward pass. Texts packed in a
row stand side by side, so a block of queries sees one range of keys, and nothing beyond it is computed.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jina_jax import rope as rotary
from jina_jax.kernels import tiles
from jina_jax.kernels.common import NO_KEYS, Inputs, clean, dot, join, split
from jina_jax.kernels.dropout import keep, shift


class Plan(NamedTuple):
    """How attention is cut into blocks.

    Attributes:
        query: Queries in a block, at most.
        key: Keys in a block, at most.
        by_head: Whether heads follow each other, rather than being computed together.
    """

    query: int
    key: int
    by_head: bool = False


# XLA on CPUs runs a batch of small products on one core, and a large product on all of them. So short texts are best
# computed with all heads together, in blocks that skip much, and long ones head by head (`python -m
# tests.benchmarks.attention blocks`). A pair of blocks of 128 takes as long as 3.5 pairs of 64, and a row of 1024
# head by head as long as 32 pairs of 128.
SMALL, MEDIUM, LARGE = Plan(64, 64), Plan(128, 128), Plan(512, 1024, by_head=True)
LONG = 1024


def forward(inputs: Inputs, dtype: Any) -> tuple[Float[Array, "B T D"], Float[Array, "B N T"]]:
    """Attention, a block of queries and a block of keys at a time, as `Inputs` describes it.

    Args:
        inputs: What to compute it from.
        dtype: Type of the output.

    Returns:
        Output and logsumexp.
    """
    inputs, T, S = inputs.rotated(), inputs.q.shape[1], inputs.k.shape[1]
    if inputs.rate or max(T, S) <= SMALL.query:
        return _forward(inputs, dtype, MEDIUM)
    if inputs.q_segments is None or max(T, S) > LONG:
        return _forward(inputs, dtype, LARGE if max(T, S) > LONG // 2 else MEDIUM)

    small, medium = (_pairs(inputs, plan) for plan in (SMALL, MEDIUM))
    rows = inputs.q.shape[0] * T / LONG  # of 1024 tokens
    best = jnp.where(2 * small < 7 * medium, 0, jnp.where(medium * inputs.q.shape[0] < int(32 * rows), 1, 2))
    arrays = {name: getattr(inputs, name) for name in ("q", "k", "v", "q_segments", "k_segments", "words")}

    def branch(plan: Plan) -> Callable[[dict], tuple[Array, Array]]:
        return lambda arrays: _forward(dataclasses.replace(inputs, **arrays), dtype, plan)

    return jax.lax.switch(best, [branch(plan) for plan in (SMALL, MEDIUM, LARGE)], arrays)


def _pairs(inputs: Inputs, plan: Plan) -> Array:
    """Pairs of blocks that would be computed for each row."""
    first, last = _ranges(*_segments(inputs, plan), *_sizes(inputs, plan))
    return jnp.sum(last - first)


def _forward(inputs: Inputs, dtype: Any, plan: Plan) -> tuple[Float[Array, "B T D"], Float[Array, "B N T"]]:
    """`forward` with one plan."""
    q, k, v, q_segments, k_segments = _prepare(inputs, plan)
    (B, N, _, H), T = q.shape, inputs.q.shape[1]
    sizes = _sizes(inputs, plan)
    if not plan.by_head:
        out, logsumexp = _blocks(inputs, (q, k, v), q_segments, k_segments, sizes)
    else:

        def head(one: tuple) -> tuple[Array, Array]:
            row, *vectors = one
            q_ids, k_ids = (jax.lax.dynamic_slice_in_dim(x, row, 1) for x in (q_segments, k_segments))
            return _blocks(inputs, vectors, q_ids, k_ids, sizes)

        rows = jnp.repeat(jnp.arange(B), N)
        out, logsumexp = jax.lax.map(head, (rows, *(x.reshape(B * N, 1, 1, -1, H) for x in (q, k, v))))
        out, logsumexp = out.reshape(B, N, -1, H), logsumexp.reshape(B, N, -1)
    return join(jnp.swapaxes(out[:, :, :T].astype(dtype), 1, 2)), logsumexp[:, :, :T]


def _blocks(
    inputs: Inputs, vectors: Sequence[Array], q_segments: Array, k_segments: Array, sizes: tuple[int, int]
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N T"]]:
    """Output, float32, and logsumexp of whole blocks."""
    (q, k, v), (query, key), rate = vectors, sizes, inputs.rate
    B, N, _, H = q.shape
    first, last = _ranges(q_segments, k_segments, query, key)

    def query_block(i: Array) -> tuple[Array, Array]:
        q_block, q_ids = _block(q, i, query), _block(q_segments, i, query, axis=1)

        def key_block(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, out = carry
            scores = _scores(q_block, _block(k, j, key), q_ids, _block(k_segments, j, key, axis=1))
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
            # Of a query that has seen no key yet these are ones, which the first key it sees shrinks to zero.
            weights = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            total = total * shrink + weights.sum(axis=-1)
            if rate:
                kept = _keep(inputs, weights.shape, i * query, j * key)
                weights = jnp.where(kept, weights / (1 - rate), 0.0)
            out = out * shrink[..., None] + dot("BNTS,BNSH->BNTH", weights.astype(v.dtype), _block(v, j, key))
            return new_top, total, out

        start = (jnp.full((B, N, query), NO_KEYS), jnp.zeros((B, N, query)), jnp.zeros((B, N, query, H)))
        top, total, out = jax.lax.fori_loop(first[i], last[i], key_block, start)
        seen = top > NO_KEYS
        total = jnp.where(seen, total, 1.0)
        out = jnp.where(seen[..., None], out / total[..., None], 0.0)
        return out, jnp.where(seen, top + jnp.log(total), NO_KEYS)

    out, logsumexp = jax.lax.map(query_block, jnp.arange(len(first)))
    return jnp.moveaxis(out, 0, 2).reshape(B, N, -1, H), jnp.moveaxis(logsumexp, 0, 2).reshape(B, N, -1)


def backward(
    inputs: Inputs,
    out: Float[Array, "B T D"],
    logsumexp: Float[Array, "B N T"],
    d_out: Float[Array, "B T D"],
    dtype: Any,
) -> tuple[Float[Array, "B T D"], Float[Array, "B S D"], Float[Array, "B S D"]]:
    """Gradients of `forward`'s output, as `Inputs` describes it.

    Args:
        inputs: As in `forward`.
        out: What `forward` gave.
        logsumexp: What `forward` gave.
        d_out: Gradient with respect to `out`.
        dtype: Type of the gradients.

    Returns:
        Gradients of q, k and v.
    """
    T, S, rope, rate = inputs.q.shape[1], inputs.k.shape[1], inputs.rope, inputs.rate
    plan = MEDIUM if max(T, S) <= LONG else Plan(256, 256)
    q, k, v, q_segments, k_segments = _prepare(inputs, plan)
    H, (query, key) = q.shape[3], _sizes(inputs, plan)
    first, last = _ranges(k_segments, q_segments, key, query)
    out, d_out = (_fill(_by_head(x, inputs.heads, inputs.q_segments), query) for x in (out, d_out))
    # The softmax's Jacobian needs sum_s p_s dp_s for every query, which equals out . d_out, dropout included.
    delta = jnp.einsum("BNTH,BNTH->BNT", out.astype(jnp.float32), d_out.astype(jnp.float32))
    d_out, logsumexp = d_out.astype(q.dtype), _fill(logsumexp, query)

    def key_block(dq: Array, j: Array) -> tuple[Array, tuple[Array, Array]]:
        k_block, v_block, k_ids = _block(k, j, key), _block(v, j, key), _block(k_segments, j, key, axis=1)

        def query_block(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = carry
            q_block, d_out_block = _block(q, i, query), _block(d_out, i, query)
            scores = _scores(q_block, k_block, _block(q_segments, i, query, axis=1), k_ids)
            # A logsumexp of NO_KEYS would turn masked scores to ones.
            weights = jnp.where(scores > NO_KEYS, jnp.exp(scores - _block(logsumexp, i, query)[..., None]), 0.0)
            d_weights = dot("BNTH,BNSH->BNTS", d_out_block, v_block)
            dropped = weights
            if rate:
                kept = _keep(inputs, weights.shape, i * query, j * key)
                dropped = jnp.where(kept, weights / (1 - rate), 0.0)
                d_weights = jnp.where(kept, d_weights / (1 - rate), 0.0)
            dv = dv + dot("BNTS,BNTH->BNSH", dropped.astype(v.dtype), d_out_block)
            d_scores = (weights * (d_weights - _block(delta, i, query)[..., None])).astype(q.dtype)
            dk = dk + dot("BNTS,BNTH->BNSH", d_scores, q_block)
            share = _block(dq, i, query) + dot("BNTS,BNSH->BNTH", d_scores, k_block)
            return jax.lax.dynamic_update_slice_in_dim(dq, share, i * query, axis=2), dk, dv

        zeros = jnp.zeros(k_block.shape, jnp.float32)
        dq, dk, dv = jax.lax.fori_loop(first[j], last[j], query_block, (dq, zeros, zeros))
        return dq, (dk, dv)

    dq, d_keys_values = jax.lax.scan(key_block, jnp.zeros(q.shape, jnp.float32), jnp.arange(len(first)))
    dk, dv = (jnp.moveaxis(x, 0, 2).reshape(k.shape) for x in d_keys_values)
    dq, dk, dv = (jnp.swapaxes(x, 1, 2) for x in (dq[:, :, :T], dk[:, :, :S], dv[:, :, :S]))
    dq, dk = dq * H**-0.5, dk * H**-0.5
    if rope is not None:  # the transpose of a rotation is the rotation back
        dq, dk = (rotary.apply(x, rope[0], -rope[1]) for x in (dq, dk))
    dq, dk, dv = (join(x.astype(dtype)) for x in (dq, dk, dv))
    return dq, dk, dv


def _prepare(inputs: Inputs, plan: Plan) -> tuple[Array, Array, Array, Array, Array]:
    """Queries, keys and values [B, N, T, H], rotated, with clean padding, in whole blocks; and the segments."""
    inputs, (query, key) = inputs.rotated(), _sizes(inputs, plan)
    q = _fill(_by_head(inputs.q, inputs.heads, inputs.q_segments), query)
    k, v = (_fill(_by_head(x, inputs.heads, inputs.k_segments), key) for x in (inputs.k, inputs.v))
    return q, k, v, *_segments(inputs, plan)


def _segments(inputs: Inputs, plan: Plan) -> tuple[Int[Array, "B T"], Int[Array, "B S"]]:
    """Segments of queries and keys, in whole blocks."""
    sides = ((inputs.q, inputs.q_segments), (inputs.k, inputs.k_segments))
    found = (jnp.ones(x.shape[:2], jnp.int32) if segments is None else segments for x, segments in sides)
    query, key = (_fill(x, size, axis=1) for x, size in zip(found, _sizes(inputs, plan), strict=True))
    return query, key


def _sizes(inputs: Inputs, plan: Plan) -> tuple[int, int]:
    """Queries and keys in a block."""
    return _block_size(inputs.q.shape[1], plan.query), _block_size(inputs.k.shape[1], plan.key)


def _by_head(x: Array, heads: int, segments: Array | None) -> Float[Array, "B N T H"]:
    """[B, T, D] with heads in front of tokens, zeros in padding."""
    x = split(x, heads)
    return jnp.swapaxes(x if segments is None else clean(x, segments), 1, 2)


def _ranges(q_segments: Array, k_segments: Array, query: int, key: int) -> tuple[Int[Array, "n"], Int[Array, "n"]]:
    """First block of keys that each block of queries sees in any row, and the one after the last."""
    visit = tiles.compare(q_segments, k_segments, query, key)[0].any(axis=0)
    last = visit.shape[1] - jnp.argmax(visit[:, ::-1], axis=1)
    return jnp.argmax(visit, axis=1), jnp.where(visit.any(axis=1), last, 0)


def _scores(q: Array, k: Array, q_segments: Array, k_segments: Array) -> Float[Array, "B N T S"]:
    """Scaled scores of one block, float32, NO_KEYS where they do not count."""
    scores = dot("BNTH,BNSH->BNTS", q, k) * q.shape[-1] ** -0.5
    visible = (q_segments[:, :, None] == k_segments[:, None, :]) & (k_segments > 0)[:, None, :]
    return jnp.where(visible[:, None], scores, NO_KEYS)


def _keep(inputs: Inputs, shape: tuple[int, ...], row: Array, column: Array) -> Array:
    """Which probabilities of a block [B, N, T, S] survive dropout."""
    words = shift(inputs.words, row=row.astype(jnp.uint32), column=column.astype(jnp.uint32))
    return keep(words, inputs.rate, *jnp.ix_(*(jnp.arange(size) for size in shape)))


def _block_size(length: int, limit: int) -> int:
    """Tokens per block: the length itself when short, else the fewest equal blocks of at most so many."""
    return -(-length // -(-length // limit))


def _block(x: Array, index: Array, size: int, axis: int = 2) -> Array:
    """Tokens of one block."""
    return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _fill(x: Array, size: int, axis: int = 2) -> Array:
    """Zeros at the end of the tokens, up to a whole block."""
    missing = -x.shape[axis] % size
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x
