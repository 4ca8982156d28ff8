"""Dropout decided by position, so that every implementation, block size and sharding drops the same probabilities."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

# One index or many: a Python number, or an array of 32-bit integers of any shape.
Index = int | Int[Array, "..."] | UInt32[Array, "..."]


def words_from_key(key: Array | None, rate: float = 0.0) -> UInt32[Array, "6"]:
    """Two words of seed from a `jax.random` key, typed or raw, and the origin (batch, head, row, column) = 0.

    Args:
        key: The key, or None if nothing is dropped.
        rate: Share of probabilities that is to be dropped.

    Returns:
        The words.

    Raises:
        ValueError: If something is to be dropped without a key.
    """
    if rate and key is None:
        raise ValueError(f"dropout_rate={rate} needs a dropout_key")
    if key is None:
        return jnp.zeros(6, jnp.uint32)
    return jnp.concatenate([jax.random.bits(key, (2,), jnp.uint32), jnp.zeros(4, jnp.uint32)])


def shift(words: UInt32[Array, "6"], batch: Index = 0, head: Index = 0, row: Index = 0, column: Index = 0) -> Array:
    """The words for a part of a larger array whose first entry stands at the given indices there."""
    offsets = [jnp.asarray(x).astype(jnp.uint32) for x in (0, 0, batch, head, row, column)]
    return words + jnp.stack(offsets)


def keep(
    words: UInt32[Array, "6"] | Any, rate: float, batch: Index, head: Index, row: Index, column: Index
) -> Bool[Array, "..."]:
    """Which attention probabilities survive.

    A counter-based generator: each bit depends on the seed and on its own (batch, head, query, key) index alone.
    The mixer is the 32-bit finaliser of MurmurHash3. Elementwise, so it runs inside kernels.

    Args:
        words: Two words of seed, and the indices at which this part of the array starts; in a kernel, a reference.
        rate: Share of probabilities to drop, 0 to 1, in steps of 2^-24.
        batch: Index into the batch, counted from the origin; the four broadcast against each other.
        head: Index of the head.
        row: Index of the query.
        column: Index of the key.

    Returns:
        True where the probability is kept, in the shape of the indices broadcast.
    """
    # One word per (batch, head), per query and per key: cheap next to the last mix, one for every probability.
    return survives(lines(words, batch, head, row), columns(words, column), rate)


def lines(words: UInt32[Array, "6"] | Any, batch: Index, head: Index, row: Index) -> UInt32[Array, "..."]:
    """The part of `keep` that belongs to a query."""
    batch, head, row = (_from(words, i, index) for i, index in ((2, batch), (3, head), (4, row)))
    return _mix(_mix(_mix(batch ^ words[0]) + head) + row)


def columns(words: UInt32[Array, "6"] | Any, column: Index) -> UInt32[Array, "..."]:
    """The part of `keep` that belongs to a key."""
    return _mix(_from(words, 5, column) + words[1])


def survives(lines: UInt32[Array, "..."], columns: UInt32[Array, "..."], rate: float) -> Bool[Array, "..."]:
    """The part of `keep` that belongs to a pair."""
    return _mix(lines ^ columns) >= jnp.uint32(min(int(rate * 2**24) << 8, 2**32 - 1))


def _from(words: UInt32[Array, "6"] | Any, i: int, index: Index) -> Array:
    """An index counted from the origin."""
    return jnp.asarray(index).astype(jnp.uint32) + words[i]


def _mix(x: Array) -> Array:
    """Spread every input bit over the word."""
    x = x ^ (x >> jnp.uint32(16))
    x = x * jnp.uint32(0x85EBCA6B)
    x = x ^ (x >> jnp.uint32(13))
    x = x * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))
