"""The forward pass on Hopper GPUs (H100, H200), in Pallas-Mosaic: bfloat16, heads of 64 or 128, no dropout.

A program has three groups of four warps. One fetches blocks of keys and values into a ring of slots, by the copy
engine; the two others hold 64 queries each and compute, each at its own pace, so that one's exponentials overlap with
the other's products (Shah et al., 2024). Probabilities go from registers straight into the second product.
"""

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mosaic
from jaxtyping import Array, Float

from jina_jax.kernels.common import LOG2_E, NO_KEYS, Inputs
from jina_jax.kernels.triton import Size, visits

HELD, GROUP = 128, 64  # queries of a program, and of each of the two groups that compute
STEP = 128  # keys of a block
SLOTS = {64: 3, 128: 2}  # blocks in the ring, by head size

Matrix = mosaic.Layout.WGMMA
Row, Column = Matrix.reduce(1), Matrix.reduce(0)  # a number for every row of a matrix, for every column


def forward(
    inputs: Inputs, dtype: Any, *, interpret: Any = None
) -> tuple[Float[Array, "B T D"], Float[Array, "B N T"]]:
    """Attention, as `Inputs` describes it.

    Args:
        inputs: What to compute it from: rotated, without dropout, heads of 64 or 128; numbers of queries and keys are
            multiples of 8, and 128 at least.
        dtype: Type of the output.
        interpret: `InterpretGPUParams` to interpret the kernel instead of compiling it. The second product then takes
            the probabilities from shared memory, since the interpreter knows no other way.

    Returns:
        Output and logsumexp.
    """
    q, k, v, heads, H = inputs.q, inputs.k, inputs.v, inputs.heads, inputs.head_dim
    q_segments, k_segments = inputs.q_segments, inputs.k_segments
    (B, T, _), S, blocks = q.shape, k.shape[1], pl.cdiv(q.shape[1], HELD)
    arrays = {"q": q, "k": k, "v": v}
    if S % STEP and (q_segments is None or k_segments is None):
        q_segments, k_segments = (jnp.ones((B, length), jnp.int32) for length in (T, S))
    if q_segments is not None and k_segments is not None:
        # Padding among keys is masked in the scores, but 0 times a value must be 0 too.
        arrays["v"] = jnp.where((k_segments != 0)[:, :, None], v, jnp.zeros((), v.dtype))
        arrays["visits"] = visits(q_segments, k_segments, Size(HELD, STEP, 12, SLOTS[H]))
        for name, ids, block in (("q_ids", q_segments, HELD), ("k_ids", k_segments, STEP)):
            arrays[name] = jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % block)))
    outputs = {
        "out": jax.ShapeDtypeStruct(q.shape, dtype),
        "logsumexp": jax.ShapeDtypeStruct((B, heads, blocks * HELD), jnp.float32),
    }

    tiled = lambda columns: (mosaic.TilingTransform((8, columns)), mosaic.SwizzleTransform(128))  # noqa: E731
    memory = {
        "q": mosaic.SMEM((2, GROUP, H), q.dtype, transforms=tiled(64)),
        "k": mosaic.SMEM((SLOTS[H], STEP, H), q.dtype, transforms=tiled(64)),
        "v": mosaic.SMEM((SLOTS[H], STEP, H), q.dtype, transforms=tiled(64)),
        "logsumexp": mosaic.SMEM((2, GROUP), jnp.float32),
    }
    if dtype != q.dtype:
        memory["out"] = mosaic.SMEM((2, GROUP, H), dtype, transforms=tiled(32))
    if interpret is not None:
        memory["weights"] = mosaic.SMEM((2, GROUP, STEP), q.dtype, transforms=tiled(64))
    barriers = {
        "q": mosaic.Barrier(num_barriers=2),
        **{name: mosaic.Barrier(num_barriers=SLOTS[H]) for name in "kv"},
        **{f"{name} free": mosaic.Barrier(num_arrivals=2, num_barriers=SLOTS[H]) for name in "kv"},
    }

    def hopper_forward(*refs: Any) -> None:
        named = dict(zip([*arrays, *outputs], refs, strict=True))
        pl.run_scoped(functools.partial(_program, named), memory, barriers, collective_axes="group")

    call = mosaic.kernel(
        hopper_forward,
        out_type=list(outputs.values()),
        grid=(B, heads, blocks),
        grid_names=("row", "head", "block"),
        num_threads=3,
        thread_name="group",
        compiler_params=mosaic.CompilerParams(approx_math=True),
        **({} if interpret is None else {"interpret": interpret}),
    )
    out, logsumexp = call(*arrays.values())
    return out, logsumexp[:, :, :T]


class _Work(NamedTuple):
    """What a program has: arrays in the GPU's memory, its own memory and barriers, and the blocks of keys to visit."""

    arrays: dict[str, Any]
    memory: dict[str, Any]
    barriers: dict[str, Any]
    row: Array
    head: Array
    block: Array
    clear: Array  # number of blocks that need no mask, which come first
    total: Array  # number of all blocks

    def columns(self) -> Any:
        """Where the head stands in D."""
        H = self.memory["q"].shape[2]
        return pl.ds(self.head * H, H)

    def keys(self, i: Array) -> Any:
        """Where the i-th block of keys stands in S."""
        if "visits" not in self.arrays:
            return pl.ds(i * STEP, STEP)
        visits = self.arrays["visits"]
        listed = visits[self.row, self.block, 3 + jnp.maximum(i - self.clear, 0)]
        return pl.ds(jnp.where(i < self.clear, visits[self.row, self.block, 0] + i, listed) * STEP, STEP)


def _program(arrays: dict, memory: dict, barriers: dict) -> None:
    """Give each group its part."""
    row, head, block, group = (jax.lax.axis_index(name) for name in ("row", "head", "block", "group"))
    if "visits" in arrays:
        first, last, end = (arrays["visits"][row, block, i] for i in range(3))
    else:
        first, last, end = jnp.int32(0), jnp.int32(arrays["k"].shape[1] // STEP), jnp.int32(3)
    work = _Work(arrays, memory, barriers, row, head, block, last - first, last - first + end - 3)

    @pl.when(group == 2)
    def _() -> None:
        mosaic.set_max_registers(40, action="decrease")
        _fetch(work)

    @pl.when(group < 2)
    def _() -> None:
        mosaic.set_max_registers(232, action="increase")
        _compute(work, group)


def _fetch(work: _Work) -> None:
    """Fetch every block into its slot, once both groups are done with what was there before."""
    slots = work.memory["k"].shape[0]

    def turn(i: Array, nothing: None) -> None:
        slot, keys = jax.lax.rem(i, jnp.int32(slots)), work.keys(i)
        for name in "kv":
            pl.when(i >= slots)(functools.partial(mosaic.barrier_wait, work.barriers[f"{name} free"].at[slot]))
            source, target = work.arrays[name].at[work.row, keys, work.columns()], work.memory[name].at[slot]
            mosaic.copy_gmem_to_smem(source, target, work.barriers[name].at[slot])

    jax.lax.fori_loop(0, work.total, turn, None)


def _compute(work: _Work, group: Array) -> None:
    """Online softmax of a group's queries over all blocks."""
    arrays, memory, barriers = work.arrays, work.memory, work.barriers
    H, q = memory["q"].shape[2], memory["q"].at[group]
    queries = pl.ds(work.block * HELD + group * GROUP, GROUP)
    mosaic.copy_gmem_to_smem(arrays["q"].at[work.row, queries, work.columns()], q, barriers["q"].at[group])
    q_ids = _load(arrays["q_ids"], (work.row, queries), Row) if "q_ids" in arrays else None
    mosaic.barrier_wait(barriers["q"].at[group])
    scale = H**-0.5 * LOG2_E  # of scores that become exponents of two

    def turn(i: Array, carry: tuple, masked: bool) -> tuple:
        (top, total, out), slot = carry, jax.lax.rem(i, jnp.int32(SLOTS[H]))
        mosaic.barrier_wait(barriers["k"].at[slot])
        scores = _product(q, memory["k"].at[slot].T, (GROUP, STEP))
        mosaic.barrier_arrive(barriers["k free"].at[slot])
        if masked and q_ids is not None:
            k_ids = _load(arrays["k_ids"], (work.row, work.keys(i)), Column)
            scores = jnp.where(_spread(q_ids, scores, 0) == _spread(k_ids, scores, 1), scores, NO_KEYS)
        top, before = jnp.maximum(top, scores.max(axis=1)), top
        # A query that has seen no key yet takes nothing off, so that NO_KEYS stays the exponent of zero.
        shift = jnp.where(top == NO_KEYS, 0.0, top * scale) if masked else top * scale
        weights, shrink = jnp.exp2(scores * scale - _spread(shift, scores, 0)), jnp.exp2(before * scale - shift)
        total = total * shrink + weights.sum(axis=1)
        weights = weights.astype(q.dtype)
        if "weights" in memory:  # for the interpreter
            memory["weights"][group, :, :] = weights
            mosaic.commit_smem()
            weights = memory["weights"].at[group]
        mosaic.barrier_wait(barriers["v"].at[slot])
        more = _product(weights, memory["v"].at[slot], (GROUP, H))
        mosaic.barrier_arrive(barriers["v free"].at[slot])
        return top, total, out * _spread(shrink, out, 0) + more

    nothing = [jnp.full((GROUP,), x, jnp.float32) for x in (NO_KEYS, 0.0)]
    carry = *(mosaic.layout_cast(x, Row) for x in nothing), mosaic.layout_cast(jnp.zeros((GROUP, H)), Matrix)
    carry = jax.lax.fori_loop(0, work.clear, functools.partial(turn, masked=False), carry)
    if q_ids is not None:
        carry = jax.lax.fori_loop(work.clear, work.total, functools.partial(turn, masked=True), carry)
    top, total, out = carry

    seen = top != NO_KEYS if q_ids is None else (top != NO_KEYS) & (q_ids != 0)
    out = jnp.where(_spread(seen, out, 0), out * _spread(1 / total, out, 0), 0.0)
    target = memory["out" if "out" in memory else "q"].at[group]  # the queries have been used
    target[...] = out.astype(target.dtype)
    memory["logsumexp"].at[group][...] = jnp.where(seen, top * H**-0.5 + jnp.log(total), NO_KEYS)
    mosaic.commit_smem()
    mosaic.copy_smem_to_gmem(target, arrays["out"].at[work.row, queries, work.columns()])
    mosaic.copy_smem_to_gmem(memory["logsumexp"].at[group], arrays["logsumexp"].at[work.row, work.head, queries])
    mosaic.wait_smem_to_gmem(0)


def _product(x: Any, y: Any, shape: tuple[int, int]) -> Array:
    """Product of two matrices, the second one in shared memory, in float32."""

    def multiply(accumulator: Any) -> Array:
        mosaic.wgmma(accumulator, x, y)
        return accumulator[...]

    return pl.run_scoped(multiply, mosaic.ACC(shape, jnp.float32))


def _spread(x: Array, like: Array, axis: int) -> Array:
    """A number for every row (axis 0) or column (axis 1), as a matrix."""
    return jax.lax.broadcast_in_dim(x, like.shape, (axis,))


def _load(ref: Any, at: tuple, layout: Any) -> Array:
    """Read from the GPU's memory into registers."""
    load: Any = mosaic.load
    if "idx" in inspect.signature(load).parameters:  # JAX before 0.12
        return load(ref, at, layout=layout, optimized=False)
    return load(ref.at[at], layout=layout, optimized=False)
