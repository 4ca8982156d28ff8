"""Attention in memory linear in the length, in plain XLA: online softmax over blocks of keys.

Forward follows Rabe and Staats (2021) and Dao (2023, algorithm 1); the backward pass recomputes the probabilities
from the saved logsumexp (Dao 2023, algorithm 2), so it needs no more memory than the forward pass. Texts packed in a
row stand side by side, so a block of queries sees one range of keys, and nothing beyond it is computed.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jina_jax import rope as rotary
from jina_jax.kernels import tiles
from jina_jax.kernels.common import NO_KEYS, Inputs, clean, dot, join, split
from jina_jax.kernels.dropout import keep, shift

# Tokens in a block. Small ones skip more, large ones have less to carry from one to the next: a pair of blocks of 128
# takes a CPU as long as 3.5 pairs of 64 (tests/benchmarks/attention.py).
SMALL_BLOCK, BLOCK, LONG_BLOCK, LONG = 64, 128, 256, 1024


def forward(inputs: Inputs, dtype: Any) -> tuple[Float[Array, "B T D"], Float[Array, "B N T"]]:
    """Attention, a block of queries and a block of keys at a time, as `Inputs` describes it.

    Args:
        inputs: What to compute it from.
        dtype: Type of the output.

    Returns:
        Output and logsumexp.
    """
    inputs, T = inputs.rotated(), inputs.q.shape[1]
    if not SMALL_BLOCK < T <= LONG or inputs.q_segments is None or inputs.k.shape[1] != T:
        return _forward(inputs, dtype, _block_limit(max(T, inputs.k.shape[1])))

    def pairs(limit: int) -> Array:
        """Pairs of blocks that would be computed."""
        *_, q_segments, k_segments = _prepare(inputs, limit)
        size = _block_size(T, limit)
        first, last = _ranges(q_segments, k_segments, size, size)
        return jnp.sum(last - first)

    small = 2 * pairs(SMALL_BLOCK) < 7 * pairs(BLOCK)
    run = lambda limit: lambda arrays: _forward(dataclasses.replace(inputs, **arrays), dtype, limit)  # noqa: E731
    names = ("q", "k", "v", "q_segments", "k_segments", "words")
    arrays = {name: getattr(inputs, name) for name in names}
    return jax.lax.cond(small, run(SMALL_BLOCK), run(BLOCK), arrays)


def _forward(inputs: Inputs, dtype: Any, limit: int) -> tuple[Float[Array, "B T D"], Float[Array, "B N T"]]:
    """`forward` with blocks of at most so many tokens."""
    q, k, v, q_segments, k_segments = _prepare(inputs, limit)
    (B, N, _, H), T, rate = q.shape, inputs.q.shape[1], inputs.rate
    query, key = _block_size(T, limit), _block_size(inputs.k.shape[1], limit)
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
        out = jnp.where(seen[..., None], out / total[..., None], 0.0).astype(dtype)
        return jnp.swapaxes(out, 1, 2), jnp.where(seen, top + jnp.log(total), NO_KEYS)

    out, logsumexp = jax.lax.map(query_block, jnp.arange(len(first)))
    out = jnp.moveaxis(out, 0, 1).reshape(B, -1, N, H)[:, :T]
    return join(out), jnp.moveaxis(logsumexp, 0, 2).reshape(B, N, -1)[:, :, :T]


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
    limit = _block_limit(max(T, S))
    q, k, v, q_segments, k_segments = _prepare(inputs, limit)
    H, query, key = q.shape[3], _block_size(T, limit), _block_size(S, limit)
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


def _prepare(inputs: Inputs, limit: int) -> tuple[Array, Array, Array, Array, Array]:
    """Queries, keys and values [B, N, T, H], rotated, with clean padding, in whole blocks; and the segments."""
    inputs = inputs.rotated()
    q_segments, k_segments = (
        jnp.ones(x.shape[:2], jnp.int32) if segments is None else segments
        for x, segments in ((inputs.q, inputs.q_segments), (inputs.k, inputs.k_segments))
    )
    query, key = (_block_size(x.shape[1], limit) for x in (inputs.q, inputs.k))
    q = _fill(_by_head(inputs.q, inputs.heads, inputs.q_segments), query)
    k, v = (_fill(_by_head(x, inputs.heads, inputs.k_segments), key) for x in (inputs.k, inputs.v))
    return q, k, v, _fill(q_segments, query, axis=1), _fill(k_segments, key, axis=1)


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


def _block_limit(length: int) -> int:
    """Most tokens in a block, where nothing is known of the texts."""
    return BLOCK if length <= LONG else LONG_BLOCK


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
