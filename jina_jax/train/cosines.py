"""Cosines in at least float32: what losses are made of.

Vectors may have any length. Over a mesh the rows of a matrix of cosines are split; its columns are whole everywhere.

Axes: K and N rows, D width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jina_jax.sharding import constrain


def cosine(one: Float[Array, "N D"], other: Float[Array, "N D"]) -> Float[Array, "N"]:
    """Cosine of each row with the same row of another array.

    Args:
        one: Vectors of any length.
        other: As many.

    Returns:
        Float32, or float64 for such vectors.
    """
    return jnp.sum(unit(one) * unit(other), axis=1)


def product(pattern: str, x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """Einsum of operands of one type, accumulated in at least float32, that keeps all bits of float32 ones.

    Args:
        pattern: As for einsum.
        x: First operand.
        y: Second one.

    Returns:
        Float32, or float64 for such operands.
    """
    dtype = np.promote_types(x.dtype, jnp.float32)
    precision = jax.lax.Precision.HIGHEST if x.dtype == dtype else None
    return jnp.einsum(pattern, x, y, precision=precision, preferred_element_type=dtype)


def unit(vectors: Float[Array, "*K D"]) -> Float[Array, "*K D"]:
    """Scale vectors to unit length.

    Args:
        vectors: Any leading axes.

    Returns:
        Float32, or float64 for such vectors. Zeros stay zeros, and their gradient is finite.
    """
    x = vectors.astype(np.promote_types(vectors.dtype, jnp.float32))
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def all_pairs(vectors: Float[Array, "K D"]) -> tuple[Float[Array, "K K"], Int[Array, "K K"]]:
    """Cosines of all pairs of rows.

    Args:
        vectors: Of any length.

    Returns:
        The cosines, and for each the number of its column less that of its row: 0 for a vector with itself.
    """
    x = unit(vectors)
    cosines = constrain(product("KD,ND->KN", constrain(x, "B _"), constrain(x, "_ _")), "B _")
    index = jnp.arange(len(x), dtype=jnp.int32)
    return cosines, index[None] - index[:, None]
