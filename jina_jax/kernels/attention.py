"""The one entry to attention. The rest of this folder is how it is computed."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jina_jax import rope as rotary
from jina_jax.kernels.blockwise import blockwise
from jina_jax.kernels.dropout import seed_from_key
from jina_jax.kernels.reference import reference

IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {"reference": reference, "blockwise": blockwise}

# On CPUs it is the faster one at every length, short ones included (tests/benchmarks/attention.py).
DEFAULT = "blockwise"


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    *,
    segments: Int[Array, "B T"] | None = None,
    rope: tuple[Float[Array, "#B T half"], Float[Array, "#B T half"]] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Bidirectional multi-head attention within segments, softmax(q k^T / sqrt(H)) v.

    Scores, softmax and sums are float32 whatever the inputs are. Whatever stands in padding, NaN included, reaches
    neither a result nor a gradient. "blockwise" can be differentiated once, in reverse mode; "reference" in any mode
    and any number of times.

    Args:
        q: Queries, float32 or bfloat16.
        k: Keys, same type.
        v: Values, same type.
        segments: 0 for padding, any other number for a text: tokens see the tokens of their own text. None means
            one text without padding in every row.
        rope: Cosines and sines that rotate queries and keys first, see `rope.tables`.
        dropout_rate: Share of attention probabilities to drop.
        dropout_key: A `jax.random` key, needed if the rate is not zero. The same key drops the same probabilities
            in every implementation.
        implementation: "reference" (all scores at once) or "blockwise" (memory linear in T); None takes the best.

    Returns:
        Weighted values in the type of `v`; zeros at padding.

    Raises:
        ValueError: If the implementation is unknown, or dropout has no key.
    """
    implementation = implementation or DEFAULT
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown attention {implementation=}; choose from: {', '.join(IMPLEMENTATIONS)}")
    if dropout_rate and dropout_key is None:
        raise ValueError(f"{dropout_rate=} needs a dropout_key")

    if rope is not None:
        q, k = rotary.apply(q, *rope), rotary.apply(k, *rope)
    if segments is None:
        segments = jnp.ones(q.shape[:2], jnp.int32)
    else:
        valid = (segments > 0)[:, :, None, None]
        q, k, v = (jnp.where(valid, x, jnp.zeros((), x.dtype)) for x in (q, k, v))
    seed = jnp.zeros(2, jnp.uint32) if dropout_key is None else seed_from_key(dropout_key)
    return IMPLEMENTATIONS[implementation](q, k, v, segments, seed, dropout_rate)
