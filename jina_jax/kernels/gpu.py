"""Launches the attention kernels on GPUs (NVIDIA from Ampere on, and AMD): lists which blocks see each other.

The kernels in `triton.py` do everything on all of them; the one in `hopper.py` does the common forward pass of H100s
and H200s.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float

from jina_jax.kernels import dropout, triton
from jina_jax.kernels.common import Inputs, target
from jina_jax.kernels.triton import Size

# By kernel, bytes per number, and head size. Chosen from what the compiler makes of them for A100 and H100
# (tests/benchmarks/kernels_gpu.py): nothing spilled (but 12 bytes by "keys" of size 128 with dropout, on A100), two
# programs per multiprocessor or more where that can be had, and 128 queries per block of keys in the bfloat16 forward
# pass, since smaller blocks would ask more of the L2 cache than it gives.
SIZES = {
    ("forward", 2, 32): Size(128, 64, 8, 3),
    ("forward", 2, 64): Size(128, 64, 8, 3),
    ("forward", 2, 128): Size(128, 64, 8, 3),
    ("forward", 4, 32): Size(64, 16, 4, 1),
    ("forward", 4, 64): Size(64, 16, 4, 2),
    ("forward", 4, 128): Size(64, 16, 8, 2),
    ("queries", 2, 32): Size(64, 64, 4, 2),
    ("queries", 2, 64): Size(64, 64, 4, 2),
    ("queries", 2, 128): Size(64, 64, 4, 2),
    ("queries", 4, 32): Size(64, 16, 4, 2),
    ("queries", 4, 64): Size(64, 16, 8, 2),
    ("queries", 4, 128): Size(64, 16, 8, 2),
    ("keys", 2, 32): Size(64, 64, 4, 2),
    ("keys", 2, 64): Size(64, 32, 4, 2),
    ("keys", 2, 128): Size(64, 32, 4, 2),
    ("keys", 4, 32): Size(64, 16, 4, 2),
    ("keys", 4, 64): Size(64, 16, 8, 2),
    ("keys", 4, 128): Size(64, 16, 8, 2),
}

# Names of the GPUs on which `hopper.py` takes the forward pass, such as ("H100", "H200"). Empty: it compiles without
# spills and is right when interpreted, but has not run on a GPU yet. Triton's kernels, the default, are simpler.
HOPPER: tuple[str, ...] = ()


def forward(
    inputs: Inputs, dtype: Any, *, interpret: bool = False
) -> tuple[Float[Array, "B T D"], Float[Array, "B N T"]]:
    """Attention, as `Inputs` describes it.

    Queries and keys are rotated by XLA, which can do so along with whatever computes them, and not in the kernels.
    There, every program would rotate every block that it walks over: the forward loop then issues a third more
    instructions on H100 and three times as many on A100, and reads twice as much.

    Args:
        inputs: What to compute it from; heads of 32, 64 or 128.
        dtype: Type of the output.
        interpret: Whether to interpret the kernel instead of compiling it.

    Returns:
        Output and logsumexp.
    """
    inputs = inputs.rotated()
    if not interpret and _for_hopper(inputs, dtype):
        from jina_jax.kernels import hopper  # only where it runs: not every jaxlib has the compiler

        return hopper.forward(inputs, dtype)
    (B, T, _), S = inputs.q.shape, inputs.k.shape[1]
    size = _size("forward", inputs.q.dtype, inputs.head_dim, T, S)
    arrays = {"q": inputs.q, "k": inputs.k, "v": inputs.v} | _dropout(inputs)
    arrays |= _segments(size, q=inputs.q_segments, k=inputs.k_segments)
    outputs = {
        "out": jax.ShapeDtypeStruct(inputs.q.shape, dtype),
        "logsumexp": jax.ShapeDtypeStruct((B, inputs.heads, T), jnp.float32),
    }
    results = _launch(triton.forward_kernel, size, arrays, outputs, inputs, (T, S), interpret)
    return results["out"], results["logsumexp"]


def backward(
    inputs: Inputs,
    out: Float[Array, "B T D"],
    logsumexp: Float[Array, "B N T"],
    d_out: Float[Array, "B T D"],
    dtype: Any,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B T D"], Float[Array, "B S D"], Float[Array, "B S D"]]:
    """Gradients of `forward`'s output, as `Inputs` describes it.

    Args:
        inputs: As in `forward`.
        out: What `forward` gave.
        logsumexp: What `forward` gave.
        d_out: Gradient with respect to `out`.
        dtype: Type of the gradients.
        interpret: Whether to interpret the kernels instead of compiling them.

    Returns:
        Gradients of q, k and v.
    """
    rope, inputs = inputs.rope, inputs.rotated()
    q, k, T, S = inputs.q, inputs.k, inputs.q.shape[1], inputs.k.shape[1]
    shared = {"q": q, "k": k, "v": inputs.v, "logsumexp": logsumexp, "d_out": d_out.astype(q.dtype)}
    shared |= _dropout(inputs) | ({} if rope is None else {"cos": rope[0], "sin": rope[1]})

    size = _size("queries", q.dtype, inputs.head_dim, T, S)
    arrays = shared | {"out": out} | _segments(size, q=inputs.q_segments, k=inputs.k_segments)
    outputs = {
        "dq": jax.ShapeDtypeStruct(q.shape, dtype),
        "delta": jax.ShapeDtypeStruct(logsumexp.shape, jnp.float32),
    }
    of_queries = _launch(triton.queries_kernel, size, arrays, outputs, inputs, (T, S), interpret)

    size = _size("keys", q.dtype, inputs.head_dim, S, T)
    arrays = shared | {"delta": of_queries["delta"]} | _segments(size, k=inputs.k_segments, q=inputs.q_segments)
    outputs = {name: jax.ShapeDtypeStruct(k.shape, dtype) for name in ("dk", "dv")}
    of_keys = _launch(triton.keys_kernel, size, arrays, outputs, inputs, (S, T), interpret)
    return of_queries["dq"], of_keys["dk"], of_keys["dv"]


def _for_hopper(inputs: Inputs, dtype: Any) -> bool:
    """Whether the program is traced for a Hopper GPU, and its kernel can do this."""
    q, k, H = inputs.q, inputs.k, inputs.head_dim
    able = q.dtype == jnp.bfloat16 and (H == 64 or (H == 128 and dtype == jnp.bfloat16)) and not inputs.rate
    able = able and all(x.shape[1] >= 128 and x.shape[1] % 8 == 0 for x in (q, k))
    return able and any(name in target().device_kind for name in HOPPER)


def _size(kernel: str, dtype: Any, head_dim: int, held: int, other: int) -> Size:
    """The tuned size, with smaller blocks for shorter rows."""
    tuned = SIZES[kernel, jnp.dtype(dtype).itemsize, head_dim]
    held, step = (
        min(block, max(16, pl.next_power_of_2(length))) for block, length in ((tuned.held, held), (tuned.step, other))
    )
    return tuned._replace(held=held, step=step)


def _segments(size: Size, **segments: Array | None) -> dict[str, Array]:
    """Segments, and the blocks to visit, as inputs of a kernel; of the two sides the one held comes first."""
    held, other = segments.values()
    if held is None or other is None:
        return {}
    names = [f"{name}_segments" for name in segments]
    return {names[0]: held, names[1]: other, "visits": triton.visits(held, other, size)}


def _dropout(inputs: Inputs) -> dict[str, Array]:
    """The parts of `dropout.keep` that belong to one query or one key alone, as inputs of a kernel."""
    if not inputs.rate:
        return {}
    (B, T, _), S = inputs.q.shape, inputs.k.shape[1]
    batch, head, row = jnp.ix_(*(jnp.arange(size) for size in (B, inputs.heads, T)))
    columns = dropout.columns(inputs.words, jnp.arange(S))
    return {"lines": dropout.lines(inputs.words, batch, head, row), "columns": columns[None]}


def _launch(
    kernel: Callable,
    size: Size,
    arrays: dict[str, Array],
    outputs: dict[str, jax.ShapeDtypeStruct],
    inputs: Inputs,
    lengths: tuple[int, int],
    interpret: bool,
) -> dict[str, Array]:
    """Run a kernel for every block held, every head and every row of the batch; arrays go by their names."""
    specs = [{name: _spec(name, x, inputs.heads) for name, x in group.items()} for group in (arrays, outputs)]

    def run(arrays: dict[str, Array], ptx: bool) -> dict[str, Array]:
        call = pl.pallas_call(
            functools.partial(kernel, size=size, lengths=lengths, rate=inputs.rate, ptx=ptx),
            grid=(pl.cdiv(lengths[0], size.held), inputs.heads, inputs.q.shape[0]),
            in_specs=specs[:1],
            out_specs=specs[1],
            out_shape=outputs,
            compiler_params=pltriton.CompilerParams(num_warps=size.warps, num_stages=size.stages),
            interpret=interpret,
            name=kernel.__name__,
        )
        return call(arrays)

    plain = functools.partial(run, ptx=False)
    if interpret:
        return plain(arrays)
    return jax.lax.platform_dependent(arrays, cuda=functools.partial(run, ptx=True), default=plain)


def _spec(name: str, x: Any, heads: int) -> pl.BlockSpec:
    """What a program sees of an array: all tokens of its row and head, or what its block visits."""
    if name == "visits":
        return pl.BlockSpec((None, None, x.shape[2]), lambda i, n, b: (b, i, 0))
    if name.endswith("segments"):
        return pl.BlockSpec((None, x.shape[1]), lambda i, n, b: (b, 0))
    if name == "columns":
        return pl.BlockSpec((None, x.shape[1]), lambda i, n, b: (0, 0))
    if name in ("cos", "sin"):
        return pl.BlockSpec((None, *x.shape[1:]), lambda i, n, b: (b if x.shape[0] > 1 else 0, 0, 0))
    if name in ("logsumexp", "delta", "lines"):
        return pl.BlockSpec((None, None, x.shape[2]), lambda i, n, b: (b, n, 0))
    return pl.BlockSpec((None, x.shape[1], x.shape[2] // heads), lambda i, n, b: (b, 0, n))
