"""The one entry to attention. The rest of this folder is how it is computed."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from jina_jax.kernels import blockwise, tpu
from jina_jax.kernels.dropout import words_from_key
from jina_jax.kernels.reference import reference

IMPLEMENTATIONS = ("reference", "blockwise", "flash")
FLASH_HEAD_DIMS = (32, 64, 128)

Rope = tuple[Float[Array, "#B T half"], Float[Array, "#B T half"]]


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
    if dropout_rate and dropout_key is None:
        raise ValueError(f"{dropout_rate=} needs a dropout_key")
    if lengths is not None:
        if segments is not None:
            raise ValueError("give segments or lengths, not both")
        segments = (jnp.arange(q.shape[1])[None] < lengths[:, None]).astype(jnp.int32)

    words = words_from_key(dropout_key)
    q, k, v, shape = *(x.reshape(*x.shape[:2], -1) for x in (q, k, v)), v.shape
    return attend(q, k, v, segments, rope, words, implementation, heads, dropout_rate).reshape(shape)


def attend(
    q: Float[Array, "B T D"],
    k: Float[Array, "B T D"],
    v: Float[Array, "B T D"],
    segments: Int[Array, "B T"] | None,
    rope: Rope | None,
    words: UInt32[Array, "6"],
    implementation: str,
    heads: int,
    rate: float,
) -> Float[Array, "B T D"]:
    """`attention` with everything decided: heads side by side, dropout as words (see `dropout.keep`)."""
    if implementation == "reference":
        q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
        return reference(q, k, v, segments, rope, words, rate).reshape(*q.shape[:2], -1)
    return _fused(q, k, v, segments, rope, words, implementation, heads, rate)


def default(head_dim: int) -> str:
    """The best implementation for the device that programs are traced for.

    That is the device of the mesh in context (`jax.sharding.use_abstract_mesh`, for compiling ahead of time), or
    the default device. On CPUs blockwise is the faster one at every length (tests/benchmarks/attention.py).

    Args:
        head_dim: Size H of a head.

    Returns:
        A name in `IMPLEMENTATIONS`.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return "flash" if platform in ("tpu", "gpu") and head_dim in FLASH_HEAD_DIMS else "blockwise"


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _fused(
    q: Float[Array, "B T D"],
    k: Float[Array, "B T D"],
    v: Float[Array, "B T D"],
    segments: Int[Array, "B T"] | None,
    rope: Rope | None,
    words: UInt32[Array, "6"],
    implementation: str,
    heads: int,
    rate: float,
) -> Float[Array, "B T D"]:
    """Attention with the backward pass written by hand, from the saved logsumexp."""
    return __fused_forward(q, k, v, segments, rope, words, implementation, heads, rate)[0]


def __fused_forward(
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None,
    rope: Rope | None,
    words: Array,
    implementation: str,
    heads: int,
    rate: float,
) -> tuple[Array, tuple]:
    forward, _ = passes(implementation)
    inputs = (q, k, v, segments, segments, rope, words)
    out, logsumexp = forward(*inputs, heads=heads, rate=rate, dtype=v.dtype)
    return out, (*inputs, out, logsumexp)


def __fused_backward(implementation: str, heads: int, rate: float, residuals: tuple, d_out: Array) -> tuple:
    _, backward = passes(implementation)
    return *backward(*residuals, d_out, heads=heads, rate=rate, dtype=d_out.dtype), None, None, None


_fused.defvjp(__fused_forward, __fused_backward)


def passes(implementation: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward pass of "blockwise" or "flash"; `blockwise.forward` documents the arguments."""
    if implementation == "blockwise":
        return blockwise.forward, blockwise.backward
    return functools.partial(_by_platform, "forward"), functools.partial(_by_platform, "backward")


def _by_platform(name: str, *arrays: Any, **options: Any) -> Any:
    """Run the kernel of the platform that the program is compiled for."""
    run = functools.partial(getattr(tpu, name), **options)
    return jax.lax.platform_dependent(*arrays, tpu=run, default=functools.partial(run, interpret=True))


def _heads(q: Array, heads: int | None) -> tuple[int, int]:
    """Number and size of the heads."""
    if q.ndim == 4:
        if heads not in (None, q.shape[2]):
            raise ValueError(f"{heads=}, but the arrays have {q.shape[2]} heads")
        return q.shape[2], q.shape[3]
    if not heads or q.shape[2] % heads:
        raise ValueError(f"arrays of width {q.shape[2]} need a number of heads that divides it, not {heads=}")
    return heads, q.shape[2] // heads
