"""Attention in its shortest form: the definition that every other implementation is tested against."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jina_jax.kernels.common import Inputs, clean, dot, join, split
from jina_jax.kernels.dropout import keep


def reference(inputs: Inputs) -> Float[Array, "B T D"]:
    """softmax(q k^T / sqrt(H)) v within each segment (Vaswani et al., 2017, equation 1).

    Holds all B N T^2 scores at once; can be differentiated in any mode, any number of times.

    Args:
        inputs: What to compute it from; queries and keys are of one length and have the same segments.

    Returns:
        Weighted values in the type of `v`; zeros for padding.
    """
    segments, rate = inputs.q_segments, inputs.rate
    segments = jnp.ones(inputs.q.shape[:2], jnp.int32) if segments is None else segments
    inputs = inputs.rotated()
    q, k, v = (clean(split(x, inputs.heads), segments) for x in (inputs.q, inputs.k, inputs.v))
    scores = dot("BTNH,BSNH->BNTS", q, k) * inputs.head_dim**-0.5
    visible = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None, :]
    visible = visible[:, None]
    # Masked before the exponential too: a row without keys would otherwise overflow, and its gradient be NaN.
    scores = jnp.where(visible, scores, -1e30)
    top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.where(visible, jnp.exp(scores - top), 0.0)
    weights = weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)
    if rate:
        index = jnp.ix_(*(jnp.arange(size) for size in weights.shape))
        weights = jnp.where(keep(inputs.words, rate, *index), weights / (1 - rate), 0.0)
    out = dot("BNTS,BSNH->BTNH", weights.astype(v.dtype), v).astype(v.dtype)
    return join(clean(out, segments))  # once more, for what the gradient of the output holds at padding
