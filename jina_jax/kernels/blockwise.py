"""Attention in memory linear in the length, in plain XLA: online softmax over blocks of keys.

Forward follows Rabe and Staats (2021) and Dao (2023, algorithm 1); the backward pass recomputes the probabilities
from the saved logsumexp (Dao 2023, algorithm 2), so it needs no more memory than the forward pass.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from jina_jax.kernels.dropout import keep

BLOCK = 512


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def blockwise(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    segments: Int[Array, "B T"],
    seed: UInt32[Array, "2"],
    rate: float,
) -> Float[Array, "B T N H"]:
    """The same function as `reference`, a block of queries and a block of keys at a time.

    Args:
        q: Queries, already rotated.
        k: Keys, already rotated.
        v: Values.
        segments: 0 for padding; tokens see those of the same segment.
        seed: Two words for dropout.
        rate: Share of probabilities to drop.

    Returns:
        Weighted values in the type of `v`; zeros for padding.
    """
    return _forward(q, k, v, segments, seed, rate)[0]


def _forward(q: Array, k: Array, v: Array, segments: Array, seed: Array, rate: float) -> tuple[Array, tuple]:
    T, H, size = q.shape[1], q.shape[-1], _block_size(q.shape[1])
    blocks = [_split(x, size) for x in (q, k, v, segments)]
    starts = jnp.arange(blocks[0].shape[0], dtype=jnp.uint32) * jnp.uint32(size)

    def query_block(query: tuple) -> tuple[Array, Array]:
        q_block, q_segments, row = query
        B, S, N, _ = q_block.shape

        def key_block(carry: tuple, key: tuple) -> tuple[tuple, None]:
            top, total, out = carry
            k_block, v_block, k_segments, column = key
            scores, visible = _scores(q_block, k_block, q_segments, k_segments)
            new_top = jnp.maximum(top, jnp.max(jnp.where(visible, scores, -1e30), axis=-1))
            weights = jnp.where(visible, jnp.exp(scores - new_top[..., None]), 0.0)
            shrink = jnp.exp(top - new_top)
            total = total * shrink + weights.sum(axis=-1)
            if rate:
                weights = jnp.where(keep(seed, weights.shape, rate, row, column), weights / (1 - rate), 0.0)
            out = out * shrink[..., None] + _dot("BNTS,BSNH->BNTH", weights.astype(v.dtype), v_block)
            return (new_top, total, out), None

        start = (jnp.full((B, N, S), -1e30), jnp.zeros((B, N, S)), jnp.zeros((B, N, S, H)))
        (top, total, out), _ = jax.lax.scan(key_block, start, (*blocks[1:], starts))
        total = jnp.maximum(total, 1e-30)
        out = (out / total[..., None]).astype(v.dtype)
        return jnp.swapaxes(out, 1, 2), top + jnp.log(total)

    out, logsumexp = jax.lax.map(query_block, (blocks[0], blocks[3], starts))
    out = _join(out, T)
    return out, (q, k, v, segments, seed, out, logsumexp)


def _backward(rate: float, residuals: tuple, d_out: Array) -> tuple[Array | None, ...]:
    q, k, v, segments, seed, out, logsumexp = residuals
    T, scale, size = q.shape[1], q.shape[-1] ** -0.5, _block_size(q.shape[1])
    # The softmax's Jacobian needs sum_s p_s dp_s for every query, which equals out . d_out, dropout included.
    delta = jnp.einsum("BTNH,BTNH->BTN", out.astype(jnp.float32), d_out.astype(jnp.float32))
    blocks = [_split(x, size) for x in (q, k, v, segments, d_out, delta)]
    q_blocks, k_blocks, v_blocks, segment_blocks, d_out_blocks, delta_blocks = blocks
    starts = jnp.arange(q_blocks.shape[0], dtype=jnp.uint32) * jnp.uint32(size)

    def key_block(dq_blocks: Array, key: tuple) -> tuple[Array, tuple[Array, Array]]:
        k_block, v_block, k_segments, column = key

        def query_block(carry: tuple, query: tuple) -> tuple[tuple, Array]:
            dk, dv = carry
            q_block, q_segments, d_out_block, delta_block, lse_block, row = query
            scores, visible = _scores(q_block, k_block, q_segments, k_segments)
            weights = jnp.where(visible, jnp.exp(scores - lse_block[..., None]), 0.0)
            d_weights = _dot("BTNH,BSNH->BNTS", d_out_block, v_block)
            dropped = weights
            if rate:
                kept = keep(seed, weights.shape, rate, row, column)
                dropped = jnp.where(kept, weights / (1 - rate), 0.0)
                d_weights = jnp.where(kept, d_weights / (1 - rate), 0.0)
            dv = dv + _dot("BNTS,BTNH->BSNH", dropped.astype(v.dtype), d_out_block)
            d_scores = weights * (d_weights - jnp.swapaxes(delta_block, 1, 2)[..., None])
            d_scores = d_scores.astype(q.dtype)
            dk = dk + _dot("BNTS,BTNH->BSNH", d_scores, q_block)
            return (dk, dv), _dot("BNTS,BSNH->BTNH", d_scores, k_block)

        zeros = jnp.zeros(k_block.shape, jnp.float32)
        queries = (q_blocks, segment_blocks, d_out_blocks, delta_blocks, logsumexp, starts)
        d_keys_values, d_queries = jax.lax.scan(query_block, (zeros, zeros), queries)
        return dq_blocks + d_queries, d_keys_values

    dq, (dk, dv) = jax.lax.scan(
        key_block, jnp.zeros(q_blocks.shape, jnp.float32), (k_blocks, v_blocks, segment_blocks, starts)
    )
    dq, dk = _join(dq, T) * scale, _join(dk, T) * scale
    return dq.astype(q.dtype), dk.astype(k.dtype), _join(dv, T).astype(v.dtype), None, None


blockwise.defvjp(_forward, _backward)


def _scores(q: Array, k: Array, q_segments: Array, k_segments: Array) -> tuple[Array, Array]:
    """Scaled scores of one block, float32 [B, N, T, S], and which of them count, [B, 1, T, S]."""
    scores = _dot("BTNH,BSNH->BNTS", q, k) * q.shape[-1] ** -0.5
    visible = (q_segments[:, :, None] == k_segments[:, None, :]) & (k_segments > 0)[:, None, :]
    return scores, visible[:, None]


def _dot(pattern: str, x: Array, y: Array) -> Float[Array, "..."]:
    """Product accumulated in float32; float32 operands are never rounded to fewer bits."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(pattern, x, y, precision=precision, preferred_element_type=jnp.float32)


def _block_size(length: int) -> int:
    """Tokens per block: the length itself when short, else the fewest equal blocks of at most BLOCK."""
    count = -(-length // BLOCK)
    return -(-length // count)


def _split(x: Array, size: int) -> Array:
    """[B, T, ...] to [blocks, B, size, ...]; the last block is filled up with zeros, so with padding."""
    count = -(-x.shape[1] // size)
    x = jnp.pad(x, [(0, 0), (0, count * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)


def _join(blocks: Array, length: int) -> Array:
    """[blocks, B, size, ...] back to [B, T, ...]."""
    x = jnp.moveaxis(blocks, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
