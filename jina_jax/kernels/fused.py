"""Attention with everything decided: which implementation runs, forward and backward."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, Int, UInt32

from jina_jax.kernels import blockwise, gpu, tpu
from jina_jax.kernels.reference import reference

FLASH_HEAD_DIMS = (32, 64, 128)

Rope = tuple[Float[Array, "#B T half"], Float[Array, "#B T half"]]


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

    On CPUs blockwise is the faster one at every length (tests/benchmarks/attention.py).

    Args:
        head_dim: Size H of a head.

    Returns:
        A name in `IMPLEMENTATIONS`.
    """
    return "flash" if _platform() in ("tpu", "gpu") and head_dim in FLASH_HEAD_DIMS else "blockwise"


def _platform() -> str:
    """That of the mesh in context (`jax.sharding.use_abstract_mesh`, to compile ahead of time), or the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


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
    platform = _platform()
    if platform == "gpu":
        return gpu.forward, gpu.backward
    interpret = platform != "tpu"
    return functools.partial(tpu.forward, interpret=interpret), functools.partial(tpu.backward, interpret=interpret)
