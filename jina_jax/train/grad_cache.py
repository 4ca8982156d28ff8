"""A large batch in parts, one after the other, with the gradient of the whole (Gao et al., 2021, GradCache).

A contrastive loss needs the vectors of all texts at once, but not the activations that they came from. Each part is
embedded without keeping any; the backward pass embeds it again, with the same key and so with the same dropout.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jina_jax.sharding import constrain


def in_chunks(encode: Callable[[Any, Any], Any], rows: Any, parts: int, key: Array | None = None) -> Any:
    """Apply a function to rows, a part of them at a time; its gradient needs the memory of one part.

    Args:
        encode: Function of some rows and a key to an array (or a tree of them) with as many rows. It must treat rows
            alike, wherever they stand.
        rows: Tree of arrays [N, ...].
        parts: Number of parts, which divides N. With one, `encode` is called as it is.
        key: For dropout; each part gets its own of `jax.random.split(key, parts)`, and part c has the rows c,
            c + parts, c + 2 * parts and so on. None is passed on.

    Returns:
        What `encode` gives for all rows, in their order.

    Raises:
        ValueError: If the rows cannot be divided evenly.
    """
    rows = jax.tree.map(jnp.asarray, rows)
    counts = {leaf.shape[0] for leaf in jax.tree.leaves(rows)}
    if len(counts) != 1 or parts < 1 or counts.copy().pop() % parts:
        raise ValueError(f"arrays of {sorted(counts)} rows cannot be embedded in {parts} equal parts")
    keys = None if key is None else jax.random.split(key, parts)
    if parts == 1:
        return encode(rows, None if keys is None else keys[0])

    # Neighbours go to different parts. Parts of neighbours would each lie on a few devices, and the compiler then has
    # every device embed everything.
    def split(x: Array) -> Array:
        return _spread(x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), 1)

    def join(x: Array) -> Array:
        return _spread(_spread(x, 1).swapaxes(0, 1).reshape(-1, *x.shape[2:]), 0)

    again = jax.checkpoint(encode, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)
    _, out = jax.lax.scan(lambda _, part: (None, again(*part)), None, (jax.tree.map(split, rows), keys))
    return jax.tree.map(join, out)


def parts_of(count: int, most: int | None) -> int:
    """Into how few equal parts so many rows can be divided.

    Args:
        count: Number of rows.
        most: Rows of a part at most; None takes any number.

    Returns:
        The number of parts.
    """
    fewest = 1 if most is None else math.ceil(count / most)
    return next(parts for parts in range(fewest, count + 1) if count % parts == 0)


def _spread(x: Array, axis: int) -> Array:
    """Split an axis as rows of a batch are."""
    return constrain(x, " ".join("B" if at == axis else "_" for at in range(x.ndim)))
