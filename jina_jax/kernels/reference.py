"""Attention in its shortest form: the definition that every other implementation is tested against."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from jina_jax import rope as rotary
from jina_jax.kernels.dropout import keep


def reference(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    segments: Int[Array, "B T"] | None,
    rope: tuple[Float[Array, "#B T half"], Float[Array, "#B T half"]] | None,
    words: UInt32[Array, "6"],
    rate: float,
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v within each segment (Vaswani et al., 2017, equation 1).

    Holds all B N T^2 scores at once; can be differentiated in any mode, any number of times.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        segments: 0 for padding; tokens see those of the same segment. None means one segment.
        rope: Cosines and sines that rotate queries and keys.
        words: Seed and origin for dropout.
        rate: Share of probabilities to drop.

    Returns:
        Weighted values in the type of `v`; zeros for padding.
    """
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    dot = lambda pattern, x, y: jnp.einsum(  # noqa: E731
        pattern, x, y, precision=precision, preferred_element_type=jnp.float32
    )
    segments = jnp.ones(q.shape[:2], jnp.int32) if segments is None else segments
    # Whatever stands in padding, 0 times it must be 0.
    q, k, v = (jnp.where((segments > 0)[:, :, None, None], x, jnp.zeros((), x.dtype)) for x in (q, k, v))
    if rope is not None:
        q, k = rotary.apply(q, *rope), rotary.apply(k, *rope)
    scores = dot("BTNH,BSNH->BNTS", q, k) * q.shape[-1] ** -0.5
    visible = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None, :]
    visible = visible[:, None]
    # Masked before the exponential too: a row without keys would otherwise overflow, and its gradient be NaN.
    scores = jnp.where(visible, scores, -1e30)
    top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.where(visible, jnp.exp(scores - top), 0.0)
    weights = weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)
    if rate:
        index = jnp.ix_(*(jnp.arange(size) for size in weights.shape))
        weights = jnp.where(keep(words, rate, *index), weights / (1 - rate), 0.0)
    out = dot("BNTS,BSNH->BTNH", weights.astype(v.dtype), v).astype(v.dtype)
    return jnp.where((segments > 0)[:, :, None, None], out, jnp.zeros((), v.dtype))  # for what d_out holds there
