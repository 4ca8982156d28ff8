"""Attention in memory linear in the length, in plain XLA: online softmax over blocks of keys.

Forward follows Rabe and Staats (2021) and Dao (2023, algorithm 1); the backward pass recomputes the probabilities
from the saved logsumexp (Dao 2023, algorithm 2), so it needs no more memory than the forward pass.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jina_jax import rope as rotary
from jina_jax.kernels.common import NO_KEYS, Inputs, clean, dot, join, split
from jina_jax.kernels.dropout import keep, shift

BLOCK = 512


def forward(inputs: Inputs, dtype: Any) -> tuple[Float[Array, "B T D"], Float[Array, "B N T"]]:
    """Attention, a block of queries and a block of keys at a time, as `Inputs` describes it.

    Args:
        inputs: What to compute it from.
        dtype: Type of the output.

    Returns:
        Output and logsumexp.
    """
    q, k, v, q_segments, k_segments = _prepare(inputs)
    words, rate = inputs.words, inputs.rate
    B, T, N, H = q.shape
    size = _block_size(T)
    queries, keys = _blocks(size, q, q_segments), _blocks(_block_size(k.shape[1]), k, v, k_segments)

    def query_block(query: tuple) -> tuple[Array, Array]:
        row, q_block, q_segments = query

        def key_block(carry: tuple, key: tuple) -> tuple[tuple, None]:
            top, total, out = carry
            column, k_block, v_block, k_segments = key
            scores, visible = _scores(q_block, k_block, q_segments, k_segments)
            new_top = jnp.maximum(top, jnp.max(jnp.where(visible, scores, -1e30), axis=-1))
            weights = jnp.where(visible, jnp.exp(scores - new_top[..., None]), 0.0)
            shrink = jnp.exp(top - new_top)
            total = total * shrink + weights.sum(axis=-1)
            if rate:
                weights = jnp.where(_keep(words, rate, weights.shape, row, column), weights / (1 - rate), 0.0)
            out = out * shrink[..., None] + dot("BNTS,BSNH->BNTH", weights.astype(v.dtype), v_block)
            return (new_top, total, out), None

        start = (jnp.full((B, N, size), NO_KEYS), jnp.zeros((B, N, size)), jnp.zeros((B, N, size, H)))
        (top, total, out), _ = jax.lax.scan(key_block, start, keys)
        total = jnp.maximum(total, 1e-30)
        out = (out / total[..., None]).astype(dtype)
        return jnp.swapaxes(out, 1, 2), jnp.swapaxes(top + jnp.log(total), 1, 2)

    out, logsumexp = jax.lax.map(query_block, queries)
    return join(_whole(out, T)), jnp.swapaxes(_whole(logsumexp, T), 1, 2)


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
    q, k, v, q_segments, k_segments = _prepare(inputs)
    words, rate, rope = inputs.words, inputs.rate, inputs.rope
    (_, T, _, H), S = q.shape, k.shape[1]
    out, d_out = (clean(split(x, inputs.heads), q_segments) for x in (out, d_out))
    # The softmax's Jacobian needs sum_s p_s dp_s for every query, which equals out . d_out, dropout included.
    delta = jnp.einsum("BTNH,BTNH->BTN", out.astype(jnp.float32), d_out.astype(jnp.float32))
    logsumexp = jnp.swapaxes(logsumexp, 1, 2)
    queries = _blocks(_block_size(T), q, q_segments, d_out.astype(q.dtype), delta, logsumexp)
    keys = _blocks(_block_size(S), k, v, k_segments)

    def key_block(dq_blocks: Array, key: tuple) -> tuple[Array, tuple[Array, Array]]:
        column, k_block, v_block, k_segments = key

        def query_block(carry: tuple, query: tuple) -> tuple[tuple, Array]:
            dk, dv = carry
            row, q_block, q_segments, d_out_block, delta_block, lse_block = query
            scores, visible = _scores(q_block, k_block, q_segments, k_segments)
            weights = jnp.where(visible, jnp.exp(scores - jnp.swapaxes(lse_block, 1, 2)[..., None]), 0.0)
            d_weights = dot("BTNH,BSNH->BNTS", d_out_block, v_block)
            dropped = weights
            if rate:
                kept = _keep(words, rate, weights.shape, row, column)
                dropped = jnp.where(kept, weights / (1 - rate), 0.0)
                d_weights = jnp.where(kept, d_weights / (1 - rate), 0.0)
            dv = dv + dot("BNTS,BTNH->BSNH", dropped.astype(v.dtype), d_out_block)
            d_scores = weights * (d_weights - jnp.swapaxes(delta_block, 1, 2)[..., None])
            d_scores = d_scores.astype(q.dtype)
            dk = dk + dot("BNTS,BTNH->BSNH", d_scores, q_block)
            return (dk, dv), dot("BNTS,BSNH->BTNH", d_scores, k_block)

        zeros = jnp.zeros(k_block.shape, jnp.float32)
        d_keys_values, d_queries = jax.lax.scan(query_block, (zeros, zeros), queries)
        return dq_blocks + d_queries, d_keys_values

    dq, (dk, dv) = jax.lax.scan(key_block, jnp.zeros(queries[1].shape, jnp.float32), keys)
    dq, dk, dv = _whole(dq, T) * H**-0.5, _whole(dk, S) * H**-0.5, _whole(dv, S)
    if rope is not None:  # the transpose of a rotation is the rotation back
        dq, dk = (rotary.apply(x, rope[0], -rope[1]) for x in (dq, dk))
    dq, dk, dv = (join(x.astype(dtype)) for x in (dq, dk, dv))
    return dq, dk, dv


def _prepare(inputs: Inputs) -> tuple[Array, Array, Array, Array, Array]:
    """Queries, keys and values [B, T, N, H], rotated and with clean padding, and the segments."""
    inputs = inputs.rotated()
    q, k, v = (split(x, inputs.heads) for x in (inputs.q, inputs.k, inputs.v))
    if inputs.q_segments is None or inputs.k_segments is None:
        return q, k, v, jnp.ones(q.shape[:2], jnp.int32), jnp.ones(k.shape[:2], jnp.int32)
    q_segments, k_segments = inputs.q_segments, inputs.k_segments
    return clean(q, q_segments), clean(k, k_segments), clean(v, k_segments), q_segments, k_segments


def _scores(q: Array, k: Array, q_segments: Array, k_segments: Array) -> tuple[Array, Array]:
    """Scaled scores of one block, float32 [B, N, T, S], and which of them count, [B, 1, T, S]."""
    scores = dot("BTNH,BSNH->BNTS", q, k) * q.shape[-1] ** -0.5
    visible = (q_segments[:, :, None] == k_segments[:, None, :]) & (k_segments > 0)[:, None, :]
    return scores, visible[:, None]


def _keep(words: Array, rate: float, shape: tuple[int, ...], row: Array, column: Array) -> Array:
    """Which probabilities of a block [B, N, T, S] survive dropout."""
    return keep(shift(words, row=row, column=column), rate, *jnp.ix_(*(jnp.arange(size) for size in shape)))


def _block_size(length: int) -> int:
    """Tokens per block: the length itself when short, else the fewest equal blocks of at most BLOCK."""
    count = -(-length // BLOCK)
    return -(-length // count)


def _blocks(size: int, *arrays: Array) -> tuple[Array, ...]:
    """Where each block starts, and each array [B, T, ...] as [blocks, B, size, ...], filled up with zeros."""
    count = -(-arrays[0].shape[1] // size)

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, count * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

    return jnp.arange(count, dtype=jnp.uint32) * jnp.uint32(size), *map(split, arrays)


def _whole(blocks: Array, length: int) -> Array:
    """[blocks, B, size, ...] back to [B, T, ...]."""
    x = jnp.moveaxis(blocks, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
