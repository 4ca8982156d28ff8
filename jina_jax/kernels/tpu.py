"""Launches the attention kernels on TPUs: says what they are given, and what they hold in the chip's fast memory."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from jina_jax.kernels import flash_backward, flash_forward, tiles
from jina_jax.kernels.common import Inputs
from jina_jax.kernels.dropout import shift
from jina_jax.kernels.launch import Launch, Tensor, lay_out
from jina_jax.kernels.tiles import LANES, Sizes

Scratch = dict[str, tuple[tuple[int, ...], Any]]


def forward(
    inputs: Inputs, dtype: Any, *, interpret: Any = False, sizes: Sizes | None = None
) -> tuple[Float[Array, "B T D"], Float[Array, "B N T"]]:
    """Attention, as `Inputs` describes it.

    Args:
        inputs: What to compute it from.
        dtype: Type of the output.
        interpret: Whether, or with which `pltpu.InterpretParams`, to interpret the kernel instead of compiling it.
        sizes: Sizes of the tiles; None takes those for the device.

    Returns:
        Output and logsumexp.
    """
    q = inputs.q
    launch = lay_out(inputs, inputs.rope, sizes or tiles.choose("forward", inputs.head_dim, q.dtype))
    shape = launch.shape
    arrays = {"q": launch.fold("q", q), "k": launch.fold("k", inputs.k), "v": launch.fold("k", inputs.v)}
    outputs = {"out": launch.vectors("q", dtype), "logsumexp": launch.rows()}
    by_query = shape.queries // shape.query
    scratch = _scratch(launch, q.dtype) | {
        "transposed_v": ((shape.keys // shape.key, LANES, shape.key), q.dtype),
        "sum": ((by_query, LANES, shape.query), jnp.float32),
        **dict.fromkeys(("top", "total"), ((by_query, 8, shape.query), jnp.float32)),
        **dict.fromkeys(("tops", "shrink"), ((shape.turn, 8, shape.query), jnp.float32)),
    }
    out, logsumexp = _call(flash_forward.body, launch, inputs.words, arrays, outputs, scratch, interpret)
    return launch.unfold(out, q), launch.unfold_rows(logsumexp, inputs.heads, q.shape[1])


def backward(
    inputs: Inputs,
    out: Float[Array, "B T D"],
    logsumexp: Float[Array, "B N T"],
    d_out: Float[Array, "B T D"],
    dtype: Any,
    *,
    interpret: Any = False,
    sizes: Sizes | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B S D"], Float[Array, "B S D"]]:
    """Gradients of `forward`'s output, as `Inputs` describes it.

    Args:
        inputs: As in `forward`.
        out: What `forward` gave.
        logsumexp: What `forward` gave.
        d_out: Gradient with respect to `out`.
        dtype: Type of the gradients.
        interpret: As in `forward`.
        sizes: As in `forward`.

    Returns:
        Gradients of q, k and v.
    """
    sizes = sizes or tiles.choose("backward", inputs.head_dim, inputs.q.dtype)
    run = functools.partial(_backward, given=(out, logsumexp, d_out), interpret=interpret, sizes=sizes)
    S = inputs.k.shape[1]
    spans = tiles.cut(S, sizes.key, sizes.keys).spans
    if spans == 1:
        return run(inputs, inputs.rope, (dtype, dtype))

    # Keys that do not fit at once: one launch for each span, whose shares of dq are added up.
    size = -(-S // spans)
    missing = spans * size - S
    if missing and inputs.k_segments is None:
        q_segments, k_segments = (jnp.ones(x.shape[:2], jnp.int32) for x in (inputs.q, inputs.k))
        inputs = dataclasses.replace(inputs, q_segments=q_segments, k_segments=k_segments)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], spans, size, *x.shape[2:]), 1, 0)

    def part(dq: Array, part: tuple) -> tuple[Array, tuple[Array, ...]]:
        # The barriers keep XLA from merging the kernel with the slices, which would undo its claim to fast memory.
        start, k, v, k_segments, k_rope = jax.lax.optimization_barrier(part)
        words = shift(inputs.words, column=start)
        here = dataclasses.replace(inputs, k=k, v=v, k_segments=k_segments, words=words)
        share, *gradients = jax.lax.optimization_barrier(run(here, k_rope, (jnp.float32, dtype)))
        return dq + share, tuple(gradients)

    starts = jnp.arange(spans, dtype=jnp.uint32) * jnp.uint32(size)
    parts = (starts, *jax.tree.map(cut, (inputs.k, inputs.v, inputs.k_segments, inputs.rope)))
    dq, gradients = jax.lax.scan(part, jnp.zeros(inputs.q.shape, jnp.float32), parts)
    dk, dv = (jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, x.shape[3])[:, :S] for x in gradients)
    return dq.astype(dtype), dk, dv


def _backward(
    inputs: Inputs,
    k_rope: tuple[Array, Array] | None,
    dtypes: tuple[Any, Any],
    given: tuple[Array, Array, Array],
    interpret: Any,
    sizes: Sizes,
) -> tuple[Array, Array, Array]:
    """One launch of the backward kernel, from output, logsumexp and d_out; types are that of dq and of dk and dv."""
    out, logsumexp, d_out = given
    q, k = inputs.q, inputs.k
    launch = lay_out(inputs, k_rope, sizes)
    shape = launch.shape
    arrays = {"q": launch.fold("q", q), "k": launch.fold("k", k), "v": launch.fold("k", inputs.v)}
    arrays |= {"out": launch.fold("q", out), "d_out": launch.fold("q", d_out.astype(q.dtype))}
    arrays |= {"logsumexp": launch.fold_rows(logsumexp)}
    outputs = {"dq": launch.vectors("q", dtypes[0]), **dict.fromkeys(("dk", "dv"), launch.vectors("k", dtypes[1]))}
    by_query, by_key = (shape.queries // shape.query, shape.query), (shape.keys // shape.key, shape.key)
    scratch = _scratch(launch, q.dtype)
    scratch |= {
        "masked_d_out": scratch["masked_q"],
        "d_weights": scratch["scores"],
        "d_scores": scratch["weights"],
        **dict.fromkeys(("transposed_q", "transposed_d_out"), ((by_query[0], LANES, by_query[1]), q.dtype)),
        "transposed_k": ((by_key[0], LANES, by_key[1]), q.dtype),
        **dict.fromkeys(("log2sumexp", "delta"), ((by_query[0], 8, by_query[1]), jnp.float32)),
        "sum_dq": ((by_query[0], LANES, by_query[1]), jnp.float32),
        **dict.fromkeys(("sum_dk", "sum_dv"), ((by_key[0], LANES, by_key[1]), jnp.float32)),
    }
    dq, dk, dv = _call(flash_backward.body, launch, inputs.words, arrays, outputs, scratch, interpret)
    return launch.unfold(dq, q), launch.unfold(dk, k), launch.unfold(dv, k)


def _scratch(launch: Launch, dtype: Any) -> Scratch:
    """Shapes and types of the fast memory that both kernels hold."""
    shape = launch.shape
    chunks = (shape.turn, shape.heads, shape.key, shape.query)
    scratch: Scratch = {
        "masked_q": ((shape.heads, shape.queries, LANES), dtype),
        "scores": (chunks, jnp.float32),
        "weights": (chunks, dtype),
    }
    if "k_table" in launch.inputs:
        scratch["rotated_k"] = ((shape.keys, LANES), dtype)
    if shape.masked:
        scratch["key_column"] = ((shape.turn, shape.key, LANES), jnp.int32)
    return scratch


def _call(
    body: Callable,
    launch: Launch,
    words: Array,
    arrays: dict[str, Tensor],
    outputs: dict[str, Tensor],
    scratch: Scratch,
    interpret: Any,
) -> tuple[Array, ...]:
    """Run a body, which gets its references by name."""
    inputs = {"words": (words, pl.BlockSpec(memory_space=pltpu.SMEM)), **launch.inputs, **arrays}
    names = [*inputs, *outputs, *scratch]
    size = lambda shape, dtype: math.prod(shape) * jnp.dtype(dtype).itemsize  # noqa: E731
    blocks: Any = [(x, spec) for x, spec in (inputs | outputs).values() if spec.block_shape]
    held = sum(2 * size(spec.block_shape, x.dtype) for x, spec in blocks)  # the next block arrives meanwhile
    held += sum(size(*x) for x in scratch.values())

    def kernel(*refs: Any) -> None:
        body(launch.shape, dict(zip(names, refs, strict=True)))

    results = pl.pallas_call(
        kernel,
        grid=launch.grid,
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=[spec for _, spec in outputs.values()],
        out_shape=[struct for struct, _ in outputs.values()],
        scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=max(16 * 2**20, int(1.1 * held) + 2 * 2**20),
        ),
        interpret=interpret,
        name=body.__module__.rpartition(".")[2],
    )(*(x for x, _ in inputs.values()))
    return tuple(results)
