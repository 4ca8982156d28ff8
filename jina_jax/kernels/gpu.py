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
from jaxtyping import Array, Float, Int, UInt32

from jina_jax import rope as rotary
from jina_jax.kernels import triton
from jina_jax.kernels.dropout import _mix
from jina_jax.kernels.triton import Size

Rope = tuple[Float[Array, "#B T half"], Float[Array, "#B T half"]]

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
    q: Float[Array, "B T D"],
    k: Float[Array, "B S D"],
    v: Float[Array, "B S D"],
    q_segments: Int[Array, "B T"] | None,
    k_segments: Int[Array, "B S"] | None,
    rope: Rope | None,
    words: UInt32[Array, "6"],
    *,
    heads: int,
    rate: float,
    dtype: Any,
    interpret: bool = False,
) -> tuple[Float[Array, "B T D"], Float[Array, "B N T"]]:
    """Attention, and the logsumexp of the scaled scores.

    Args:
        q: Queries; heads of 32, 64 or 128 lie side by side.
        k: Keys.
        v: Values.
        q_segments: Segments of the queries, or None together with `k_segments`.
        k_segments: Segments of the keys.
        rope: Cosines and sines, if queries and keys are to be rotated.
        words: Seed and origin for dropout.
        heads: Number N of heads.
        rate: Dropout rate.
        dtype: Type of the output.
        interpret: Whether to interpret the kernel instead of compiling it.

    Returns:
        Output and logsumexp.
    """
    (B, T, D), S = q.shape, k.shape[1]
    q, k = _rotate(q, rope, heads), _rotate(k, rope, heads)
    if not interpret and not rate and _for_hopper(q, k, D // heads, dtype):
        from jina_jax.kernels import hopper  # only where it runs: not every jaxlib has the compiler

        return hopper.forward(q, k, v, q_segments, k_segments, heads=heads, dtype=dtype)
    size = _size("forward", q.dtype, D // heads, T, S)
    inputs = {"q": q, "k": k, "v": v, **_segments(size, q=q_segments, k=k_segments)}
    inputs |= _dropout(words, rate, (B, heads, T, S))
    outputs = {
        "out": jax.ShapeDtypeStruct(q.shape, dtype),
        "logsumexp": jax.ShapeDtypeStruct((B, heads, T), jnp.float32),
    }
    results = _launch(triton.forward_kernel, size, inputs, outputs, heads, (T, S), rate, interpret)
    return results["out"], results["logsumexp"]


def backward(
    q: Float[Array, "B T D"],
    k: Float[Array, "B S D"],
    v: Float[Array, "B S D"],
    q_segments: Int[Array, "B T"] | None,
    k_segments: Int[Array, "B S"] | None,
    rope: Rope | None,
    words: UInt32[Array, "6"],
    out: Float[Array, "B T D"],
    logsumexp: Float[Array, "B N T"],
    d_out: Float[Array, "B T D"],
    *,
    heads: int,
    rate: float,
    dtype: Any,
    interpret: bool = False,
) -> tuple[Float[Array, "B T D"], Float[Array, "B S D"], Float[Array, "B S D"]]:
    """Gradients of `forward`'s output with respect to queries, keys and values.

    Args:
        q: As in `forward`.
        k: As in `forward`; maybe only a part of the keys that `out` and `logsumexp` stem from.
        v: As in `forward`.
        q_segments: As in `forward`.
        k_segments: As in `forward`.
        rope: As in `forward`.
        words: As in `forward`.
        out: What `forward` gave.
        logsumexp: What `forward` gave.
        d_out: Gradient with respect to `out`.
        heads: Number N of heads.
        rate: Dropout rate.
        dtype: Type of the gradients.
        interpret: Whether to interpret the kernels instead of compiling them.

    Returns:
        Gradients of q, k and v.
    """
    (B, T, D), S = q.shape, k.shape[1]
    shared = {"q": _rotate(q, rope, heads), "k": _rotate(k, rope, heads), "v": v, "logsumexp": logsumexp}
    shared |= {"d_out": d_out.astype(q.dtype), **_dropout(words, rate, (B, heads, T, S))}
    shared |= {} if rope is None else {"cos": rope[0], "sin": rope[1]}

    size = _size("queries", q.dtype, D // heads, T, S)
    inputs = {**shared, "out": out, **_segments(size, q=q_segments, k=k_segments)}
    outputs = {
        "dq": jax.ShapeDtypeStruct(q.shape, dtype),
        "delta": jax.ShapeDtypeStruct(logsumexp.shape, jnp.float32),
    }
    of_queries = _launch(triton.queries_kernel, size, inputs, outputs, heads, (T, S), rate, interpret)

    size = _size("keys", q.dtype, D // heads, S, T)
    inputs = {**shared, "delta": of_queries["delta"], **_segments(size, k=k_segments, q=q_segments)}
    outputs = {name: jax.ShapeDtypeStruct(k.shape, dtype) for name in ("dk", "dv")}
    of_keys = _launch(triton.keys_kernel, size, inputs, outputs, heads, (S, T), rate, interpret)
    return of_queries["dq"], of_keys["dk"], of_keys["dv"]


def _for_hopper(q: Array, k: Array, head_dim: int, dtype: Any) -> bool:
    """Whether the program is traced for a Hopper GPU, and its kernel can do this."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None and jax.default_backend() == "gpu":
        device = jax.devices()[0]
    able = q.dtype == jnp.bfloat16 and (head_dim == 64 or (head_dim == 128 and dtype == jnp.bfloat16))
    able &= all(x.shape[1] >= 128 and x.shape[1] % 8 == 0 for x in (q, k))
    return device is not None and able and any(name in device.device_kind for name in HOPPER)


def _size(kernel: str, dtype: Any, head_dim: int, held: int, other: int) -> Size:
    """The tuned size, with smaller blocks for shorter rows."""
    tuned = SIZES[kernel, jnp.dtype(dtype).itemsize, head_dim]
    held, step = (
        min(block, max(16, pl.next_power_of_2(length))) for block, length in ((tuned.held, held), (tuned.step, other))
    )
    return tuned._replace(held=held, step=step)


def _rotate(x: Float[Array, "B L D"], rope: Rope | None, heads: int) -> Float[Array, "B L D"]:
    """Rotated by XLA, which can do so along with whatever computes `x`, and not in the kernels.

    There, every program would rotate every block that it walks over: the forward loop then issues a third more
    instructions on H100 and three times as many on A100, and reads twice as much.
    """
    if rope is None:
        return x
    return rotary.apply(x.reshape(*x.shape[:2], heads, -1), *rope).reshape(x.shape)


def _segments(size: Size, **segments: Array | None) -> dict[str, Array]:
    """Segments, and the blocks to visit, as inputs of a kernel; of the two sides the one held comes first."""
    held, other = segments.values()
    if held is None or other is None:
        return {}
    names = [f"{name}_segments" for name in segments]
    return {names[0]: held, names[1]: other, "visits": triton.visits(held, other, size)}


def _dropout(words: UInt32[Array, "6"], rate: float, sizes: tuple[int, int, int, int]) -> dict[str, Array]:
    """The parts of `dropout.keep` that belong to one query or one key alone, as inputs of a kernel."""
    if not rate:
        return {}
    indices = (jax.lax.iota(jnp.uint32, size) + words[2 + i] for i, size in enumerate(sizes))
    batch, head, row, column = indices
    lines = _mix(_mix(batch ^ words[0])[:, None] + head[None])
    lines = _mix(lines[:, :, None] + row[None, None])
    return {"lines": lines, "columns": _mix(column + words[1])[None]}


def _launch(
    kernel: Callable,
    size: Size,
    inputs: dict[str, Array],
    outputs: dict[str, jax.ShapeDtypeStruct],
    heads: int,
    lengths: tuple[int, int],
    rate: float,
    interpret: bool,
) -> dict[str, Array]:
    """Run a kernel for every block held, every head and every row of the batch; arrays go by their names."""
    specs = [{name: _spec(name, x, heads) for name, x in group.items()} for group in (inputs, outputs)]

    def run(inputs: dict[str, Array], ptx: bool) -> dict[str, Array]:
        call = pl.pallas_call(
            functools.partial(kernel, size=size, lengths=lengths, rate=rate, ptx=ptx),
            grid=(pl.cdiv(lengths[0], size.held), heads, inputs["q"].shape[0]),
            in_specs=specs[:1],
            out_specs=specs[1],
            out_shape=outputs,
            compiler_params=pltriton.CompilerParams(num_warps=size.warps, num_stages=size.stages),
            interpret=interpret,
            name=kernel.__name__,
        )
        return call(inputs)

    plain = functools.partial(run, ptx=False)
    if interpret:
        return plain(inputs)
    return jax.lax.platform_dependent(inputs, cuda=functools.partial(run, ptx=True), default=plain)


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
