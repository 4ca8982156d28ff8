"""Dropout decided by position, so that every implementation and every block size drops the same probabilities."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, UInt32


def seed_from_key(key: Array) -> UInt32[Array, "2"]:
    """Two words of seed from a `jax.random` key, typed or raw."""
    return jax.random.bits(key, (2,), jnp.uint32)


def keep(
    seed: UInt32[Array, "2"],
    shape: tuple[int, ...],
    rate: float,
    row: Array | int,
    column: Array | int,
) -> Bool[Array, "B N T S"]:
    """Which attention probabilities survive.

    A counter-based generator: each bit depends on the seed and on its own (batch, head, query, key) index alone.
    The mixer is the 32-bit finaliser of MurmurHash3.

    Args:
        seed: Two words.
        shape: (B, N, T, S) of the block asked for.
        rate: Share of probabilities to drop, 0 to 1.
        row: Index of the block's first query.
        column: Index of the block's first key.

    Returns:
        True where the probability is kept.
    """
    B, N, T, S = shape
    heads = jnp.arange(B * N, dtype=jnp.uint32).reshape(B, N, 1, 1)
    rows = jnp.arange(T, dtype=jnp.uint32).reshape(1, 1, T, 1) + jnp.uint32(row)
    columns = jnp.arange(S, dtype=jnp.uint32).reshape(1, 1, 1, S) + jnp.uint32(column)
    lines = _mix(_mix(heads ^ seed[0]) + rows)  # one word per query row; cheap next to the last mix
    bits = _mix(lines ^ _mix(columns + seed[1]))
    return bits >= jnp.uint32(rate * 2**32)


def _mix(x: Array) -> Array:
    """Spread every input bit over the word."""
    x = x ^ (x >> jnp.uint32(16))
    x = x * jnp.uint32(0x85EBCA6B)
    x = x ^ (x >> jnp.uint32(13))
    x = x * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))
