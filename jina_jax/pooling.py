"""From token vectors to embeddings: the mean over a text's tokens, the cut to fewer dimensions, the unit norm."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def mean_pool(hidden: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B D"]:
    """Mean over the valid tokens of each row, `<s>`, `</s>` and the prompt included, in float32.

    Args:
        hidden: Token vectors, any float type.
        mask: True for valid tokens.

    Returns:
        Float32 [B, D]; zeros where a row has no valid token.
    """
    total = jnp.sum(jnp.where(mask[:, :, None], hidden.astype(jnp.float32), 0.0), axis=1)
    count = jnp.sum(mask, axis=1, dtype=jnp.float32)[:, None]
    return total / jnp.maximum(count, 1.0)


def mean_pool_packed(
    hidden: Float[Array, "B T D"], segments: Int[Array, "B T"], num_texts: int
) -> Float[Array, "B P D"]:
    """Mean over the tokens of each packed text, in float32.

    Args:
        hidden: Token vectors, any float type.
        segments: 0 for padding, p for the tokens of a row's p-th text (1 to P).
        num_texts: Places P for texts in every row.

    Returns:
        Float32 [B, P, D]; zeros for texts that are not there.
    """
    member = segments[:, :, None] == jnp.arange(1, num_texts + 1, dtype=segments.dtype)[None, None, :]
    valid = jnp.where((segments > 0)[:, :, None], hidden.astype(jnp.float32), 0.0)
    weights = member.astype(jnp.float32)
    total = jnp.einsum("BTP,BTD->BPD", weights, valid, precision=jax.lax.Precision.HIGHEST)
    return total / jnp.maximum(weights.sum(axis=1), 1.0)[:, :, None]


def mean_pool_spans(hidden: Float[Array, "B T D"], spans: Int[Array, "B P 2"]) -> Float[Array, "B P D"]:
    """Mean over spans of tokens, which may overlap, in float32: late chunking (Günther et al., 2024).

    Args:
        hidden: Token vectors, any float type, finite.
        spans: First token and the one after the last of each mean; equal ones for none.

    Returns:
        Float32 [B, P, D]; zeros for empty spans.
    """
    index = jnp.arange(hidden.shape[1], dtype=spans.dtype)[None, None]
    member = (index >= spans[:, :, :1]) & (index < spans[:, :, 1:])
    # 0 and 1 are exact in any type, and float32 ones must not be rounded to fewer bits.
    precision = jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None
    total = jnp.einsum(
        "BPT,BTD->BPD", member.astype(hidden.dtype), hidden, precision=precision, preferred_element_type=jnp.float32
    )
    count = (spans[:, :, 1] - spans[:, :, 0]).astype(jnp.float32)
    return total / jnp.maximum(count, 1.0)[:, :, None]


def normalize(vectors: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Scale vectors to unit Euclidean length.

    Args:
        vectors: Any leading axes.

    Returns:
        Unit vectors of the same type. A zero vector stays zero, and its gradient is finite.
    """
    square = jnp.sum(jnp.square(vectors.astype(jnp.float32)), axis=-1, keepdims=True)
    # The floor is the square of the 1e-12 that torch.nn.functional.normalize uses.
    return (vectors * jax.lax.rsqrt(jnp.maximum(square, 1e-24))).astype(vectors.dtype)


def truncate(embeddings: Float[Array, "*B D"], dimensions: int) -> Float[Array, "*B E"]:
    """Keep the first `dimensions` and renormalise (Kusupati et al., 2022, Matryoshka representations).

    Args:
        embeddings: Embeddings or unnormalised means, any leading axes.
        dimensions: Size E to keep, 1 to D.

    Returns:
        Unit vectors [..., E].

    Raises:
        ValueError: If `dimensions` is out of range.
    """
    check_dimensions(dimensions, embeddings.shape[-1])
    return normalize(embeddings[..., :dimensions])


def check_dimensions(dimensions: int, size: int) -> None:
    """Raise a ValueError unless `dimensions` is a whole number from 1 to `size`."""
    if isinstance(dimensions, bool) or not isinstance(dimensions, int) or not 1 <= dimensions <= size:
        raise ValueError(f"{dimensions=} must be a whole number from 1 to {size}, the model's own size")
