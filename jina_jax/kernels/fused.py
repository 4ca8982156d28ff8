"""Attention with everything decided: which implementation runs, forward and backward."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from jina_jax.kernels import blockwise, gpu, tpu
from jina_jax.kernels.common import Inputs, target
from jina_jax.kernels.reference import reference

FLASH_HEAD_DIMS = (32, 64, 128)


def attend(inputs: Inputs, implementation: str) -> Float[Array, "B T D"]:
    """Attention of queries and keys with the same segments.

    Args:
        inputs: What to compute it from.
        implementation: A name in `IMPLEMENTATIONS`.

    Returns:
        Output in the type of the values.
    """
    if implementation == "reference":
        return reference(inputs)
    arrays = (inputs.q, inputs.k, inputs.v, inputs.q_segments, inputs.rope, inputs.words)
    return _fused(arrays, implementation, inputs.heads, inputs.rate)


def default(head_dim: int) -> str:
    """The best implementation for the device that programs are traced for.

    On CPUs blockwise is the faster one at every length (tests/benchmarks/attention.py).

    Args:
        head_dim: Size H of a head.

    Returns:
        A name in `IMPLEMENTATIONS`.
    """
    return "flash" if target().platform in ("tpu", "gpu") and head_dim in FLASH_HEAD_DIMS else "blockwise"


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _fused(arrays: tuple, implementation: str, heads: int, rate: float) -> Float[Array, "B T D"]:
    """Attention with the backward pass written by hand, from the saved logsumexp."""
    return _forward(arrays, implementation, heads, rate)[0]


def _forward(arrays: tuple, implementation: str, heads: int, rate: float) -> tuple[Array, tuple]:
    forward, _ = passes(implementation)
    inputs = _inputs(arrays, heads, rate)
    out, logsumexp = forward(inputs, inputs.v.dtype)
    return out, (arrays, out, logsumexp)


def _backward(implementation: str, heads: int, rate: float, residuals: tuple, d_out: Array) -> tuple[tuple]:
    _, backward = passes(implementation)
    arrays, out, logsumexp = residuals
    return ((*backward(_inputs(arrays, heads, rate), out, logsumexp, d_out, d_out.dtype), None, None, None),)


_fused.defvjp(_forward, _backward)


def _inputs(arrays: tuple, heads: int, rate: float) -> Inputs:
    q, k, v, segments, rope, words = arrays
    return Inputs(q, k, v, segments, segments, rope, words, heads, rate)


def passes(implementation: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward pass of "blockwise" or "flash", as `Inputs` describes them."""
    if implementation == "blockwise":
        return blockwise.forward, blockwise.backward
    platform = target().platform
    if platform == "gpu":
        return gpu.forward, gpu.backward
    interpret = platform != "tpu"
    return functools.partial(tpu.forward, interpret=interpret), functools.partial(tpu.backward, interpret=interpret)
