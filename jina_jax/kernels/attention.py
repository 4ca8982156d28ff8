"""The one entry to attention. The rest of this folder is how it is computed."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jina_jax.kernels.common import Inputs, Rope
from jina_jax.kernels.dropout import words_from_key
from jina_jax.kernels.fused import FLASH_HEAD_DIMS, attend, default
from jina_jax.kernels.sharded import attend_sharded
from jina_jax.sharding import RULES, fitting, free_axes

IMPLEMENTATIONS = ("reference", "blockwise", "flash")


def attention(
    q: Float[Array, "B T *N D"],
    k: Float[Array, "B T *N D"],
    v: Float[Array, "B T *N D"],
    *,
    heads: int | None = None,
    segments: Int[Array, "B T"] | None = None,
    lengths: Int[Array, "B"] | None = None,
    rope: Rope | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T *N D"]:
    """Bidirectional multi-head attention within segments, softmax(q k^T / sqrt(H)) v.

    Scores, softmax and sums are float32 whatever the inputs are. Whatever stands in padding, NaN included, reaches
    neither a result nor a gradient. "reference" can be differentiated in any mode and any number of times, the
    others once, in reverse mode.

    Args:
        q: Queries, float32 or bfloat16: [B, T, N, H], or [B, T, N*H] with `heads`, which the kernels read as it is.
        k: Keys, same type.
        v: Values, same type.
        heads: Number N of heads, if the arrays have no axis for them.
        segments: 0 for padding, a positive number for a text: tokens see the tokens of their own text. None means
            one text without padding in every row.
        lengths: Instead of segments, the number of tokens of each row; the rest is padding.
        rope: Cosines and sines that rotate queries and keys first, see `rope.tables`.
        dropout_rate: Share of attention probabilities to drop, in steps of 2^-24.
        dropout_key: A `jax.random` key, needed if the rate is not zero. The same key drops the same probabilities
            in every implementation.
        implementation: "reference" (all scores at once), "blockwise" (plain XLA, memory linear in T) or "flash" (the
            kernel of the TPU or GPU; elsewhere interpreted, which is slow); None takes the best for the device.
            With a mesh in context (`jax.set_mesh`) the kernel runs where the shards are: rows are split over its
            axes "data" and "fsdp", heads over "tensor", and a ring runs over "sequence".

    Returns:
        Weighted values in the shape and type of `v`; zeros at padding.

    Raises:
        ValueError: If the implementation is unknown or cannot do this head size, dropout has no key, `heads` is
            missing, or both segments and lengths are given.
    """
    heads, head_dim = _heads(q, heads)
    implementation = implementation or default(head_dim)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown attention {implementation=}; choose from: {', '.join(IMPLEMENTATIONS)}")
    if implementation == "flash" and head_dim not in FLASH_HEAD_DIMS:
        raise ValueError(f"the flash kernel takes head sizes {FLASH_HEAD_DIMS}, not {head_dim}; use 'blockwise'")
    words = words_from_key(dropout_key, dropout_rate)
    if lengths is not None:
        if segments is not None:
            raise ValueError("give segments or lengths, not both")
        segments = (jnp.arange(q.shape[1])[None] < lengths[:, None]).astype(jnp.int32)

    q, k, v, shape = *(x.reshape(*x.shape[:2], -1) for x in (q, k, v)), v.shape
    inputs = Inputs(q, k, v, segments, segments, rope, words, heads, dropout_rate)
    if split := _split(implementation, q.shape[0], heads):
        return attend_sharded(inputs, implementation, **split).reshape(shape)
    return attend(inputs, implementation).reshape(shape)


def _split(implementation: str, rows: int, heads: int) -> dict[str, Any]:
    """How to split a call over the mesh in context; empty if the compiler can do so by itself, or nothing is split.

    It can for plain XLA, but not for kernels, and not into a ring.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = free_axes(mesh)
    batch, head, tokens = (tuple(name for name in RULES[letter] if name in free) for letter in "BNT")
    batch, head = fitting(mesh, batch, rows), fitting(mesh, head, heads)
    sequence = tokens[0] if tokens and implementation != "reference" else None
    if sequence is None and (implementation != "flash" or not batch + head):
        return {}
    return {"mesh": mesh, "batch": batch or None, "head": head or None, "sequence": sequence}


def _heads(q: Array, heads: int | None) -> tuple[int, int]:
    """Number and size of the heads."""
    if q.ndim == 4:
        if heads not in (None, q.shape[2]):
            raise ValueError(f"{heads=}, but the arrays have {q.shape[2]} heads")
        return q.shape[2], q.shape[3]
    if not heads or q.shape[2] % heads:
        raise ValueError(f"arrays of width {q.shape[2]} need a number of heads that divides it, not {heads=}")
    return heads, q.shape[2] // heads
