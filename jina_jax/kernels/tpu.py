"""Launches the attention kernels on TPUs: pads, lists the items, and says what stands where in memory."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, UInt32

from jina_jax.kernels import flash_backward, flash_forward, tiles
from jina_jax.kernels.dropout import shift
from jina_jax.kernels.flash import LANES, Shape
from jina_jax.kernels.tiles import Side, Sizes

Rope = tuple[Float[Array, "#B T half"], Float[Array, "#B T half"]]


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
    interpret: Any = False,
    sizes: Sizes | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B N T"]]:
    """Attention, and the logsumexp of the scaled scores.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        q_segments: Segments of the queries, or None together with `k_segments`.
        k_segments: Segments of the keys.
        rope: Cosines and sines, if queries and keys are to be rotated.
        words: Seed and origin for dropout.
        heads: Number N of heads.
        rate: Dropout rate.
        dtype: Type of the output.
        interpret: Whether, or with which `pltpu.InterpretParams`, to interpret the kernel instead of compiling it.
        sizes: Sizes of the tiles; None takes those for the device.

    Returns:
        Output and logsumexp.
    """
    sizes = sizes or tiles.choose("forward", q.shape[2] // heads, q.dtype)
    launch = _launch(q, k, q_segments, k_segments, rope, rope, heads, rate, sizes)
    shape = launch.shape
    inputs = launch.inputs | {"q": launch.queries(q), "k": launch.keys(k), "v": launch.keys(v)}
    outputs = {"out": launch.like_queries(dtype), "logsumexp": launch.per_head()}
    tiles_, slots = shape.queries // shape.query, shape.turn
    scratch = {
        "masked_q": ((shape.heads, shape.queries, LANES), q.dtype),
        "transposed_v": ((shape.keys // shape.key, LANES, shape.key), q.dtype),
        "scores": ((slots, shape.heads, shape.key, shape.query), jnp.float32),
        "weights": ((slots, shape.heads, shape.key, shape.query), q.dtype),
        "sum": ((tiles_, LANES, shape.query), jnp.float32),
        **dict.fromkeys(("top", "total"), ((tiles_, 8, shape.query), jnp.float32)),
        **dict.fromkeys(("tops", "shrink"), ((slots, 8, shape.query), jnp.float32)),
    }
    if rope is not None:
        scratch["rotated_k"] = ((shape.keys, LANES), q.dtype)
    if shape.masked:
        scratch["key_column"] = ((slots, shape.key, LANES), jnp.int32)
    out, logsumexp = _call(flash_forward.body, launch, words, inputs, outputs, scratch, interpret)
    return launch.unfold(out, q.shape), launch.unfold_rows(logsumexp, heads, q.shape[1])


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
    interpret: Any = False,
    sizes: Sizes | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B S D"], Float[Array, "B S D"]]:
    """Gradients of `forward`'s output with respect to queries, keys and values.

    Args:
        q: Queries.
        k: Keys; they may be a part of those that `out` and `logsumexp` stem from.
        v: Values.
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
        interpret: As in `forward`.
        sizes: As in `forward`.

    Returns:
        Gradients of q, k and v.
    """
    sizes = sizes or tiles.choose("backward", q.shape[2] // heads, q.dtype)
    ends = (q, q_segments, rope, out, logsumexp, d_out)
    run: Any = functools.partial(_backward, heads=heads, rate=rate, interpret=interpret, sizes=sizes)
    spans = tiles.cut(k.shape[1], sizes.key, sizes.keys).spans
    if spans == 1:
        return run(*ends, k, v, k_segments, rope, words, dtype=(dtype, dtype))

    # Keys that do not fit at once: one launch for each span, whose shares of dq are added up.
    size = -(-k.shape[1] // spans)
    missing = spans * size - k.shape[1]
    if missing and (q_segments is None or k_segments is None):
        q_segments, k_segments = jnp.ones(q.shape[:2], jnp.int32), jnp.ones(k.shape[:2], jnp.int32)

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], spans, size, *x.shape[2:]), 1, 0)

    def part(dq: Array, part: tuple) -> tuple[Array, tuple[Array, Array]]:
        start, k, v, k_segments, k_rope = part
        words_here = shift(words, column=start)
        share, dk, dv = run(*ends, k, v, k_segments, k_rope, words_here, dtype=(jnp.float32, dtype))
        return dq + share, (dk, dv)

    ends = (q, q_segments, rope, out, logsumexp, d_out)
    starts = jnp.arange(spans, dtype=jnp.uint32) * jnp.uint32(size)
    parts = (starts, *jax.tree.map(split, (k, v, k_segments, rope)))
    dq, gradients = jax.lax.scan(part, jnp.zeros(q.shape, jnp.float32), parts)
    dk, dv = (jnp.moveaxis(x, 0, 1).reshape(k.shape[0], -1, k.shape[2])[:, : k.shape[1]] for x in gradients)
    return dq.astype(dtype), dk, dv


def _backward(
    q: Array,
    q_segments: Array | None,
    q_rope: tuple[Array, Array] | None,
    out: Array,
    logsumexp: Array,
    d_out: Array,
    k: Array,
    v: Array,
    k_segments: Array | None,
    k_rope: tuple[Array, Array] | None,
    words: Array,
    *,
    heads: int,
    rate: float,
    dtype: tuple[Any, Any],
    interpret: Any,
    sizes: Sizes,
) -> tuple[Array, Array, Array]:
    """One launch of the backward kernel. `dtype` is the type of dq, and that of dk and dv."""
    launch = _launch(q, k, q_segments, k_segments, q_rope, k_rope, heads, rate, sizes)
    shape, slots = launch.shape, launch.shape.turn
    inputs = launch.inputs | {"q": launch.queries(q), "k": launch.keys(k), "v": launch.keys(v)}
    inputs |= {"out": launch.queries(out), "d_out": launch.queries(d_out.astype(q.dtype))}
    inputs |= {"logsumexp": launch.fold_rows(logsumexp)}
    outputs = {
        "dq": launch.like_queries(dtype[0]),
        "dk": launch.like_keys(dtype[1]),
        "dv": launch.like_keys(dtype[1]),
    }
    by_query, by_key = (shape.queries // shape.query, shape.query), (shape.keys // shape.key, shape.key)
    chunk = (slots, shape.heads, shape.key, shape.query)
    scratch = {
        **dict.fromkeys(("masked_q", "masked_d_out"), ((shape.heads, shape.queries, LANES), q.dtype)),
        **dict.fromkeys(("transposed_q", "transposed_d_out"), ((by_query[0], LANES, by_query[1]), q.dtype)),
        "transposed_k": ((by_key[0], LANES, by_key[1]), q.dtype),
        **dict.fromkeys(("scores", "d_weights"), (chunk, jnp.float32)),
        **dict.fromkeys(("weights", "d_scores"), (chunk, q.dtype)),
        **dict.fromkeys(("log2sumexp", "delta"), ((by_query[0], 8, by_query[1]), jnp.float32)),
        "sum_dq": ((by_query[0], LANES, by_query[1]), jnp.float32),
        **dict.fromkeys(("sum_dk", "sum_dv"), ((by_key[0], LANES, by_key[1]), jnp.float32)),
    }
    if k_rope is not None:
        scratch["rotated_k"] = ((shape.keys, LANES), q.dtype)
    if shape.masked:
        scratch["key_column"] = ((slots, shape.key, LANES), jnp.int32)
    dq, dk, dv = _call(flash_backward.body, launch, words, inputs, outputs, scratch, interpret)
    return launch.unfold(dq, q.shape), launch.unfold(dk, k.shape), launch.unfold(dv, k.shape)


Tensor = tuple[Array, pl.BlockSpec]


class _Launch(NamedTuple):
    """How the arrays of a call lie in the kernel's blocks.

    The grid counts (rows of the batch, groups of heads, spans of queries, spans of keys).
    """

    shape: Shape
    grid: tuple[int, int, int, int]
    inputs: dict[str, Tensor]

    def fold(self, x: Array, padded: int) -> Array:
        """[B, T, D] padded to whole tiles and groups, short rows end to end."""
        lanes = self.grid[1] * LANES
        x = jnp.pad(x, ((0, 0), (0, padded - x.shape[1]), (0, lanes - x.shape[2])))
        return x.reshape(self.grid[0], self.shape.rows * padded, lanes)

    def unfold(self, x: Array, shape: tuple[int, ...]) -> Array:
        """Back to [B, T, D]."""
        return x.reshape(shape[0], -1, x.shape[2])[:, : shape[1], : shape[2]]

    def queries(self, x: Array) -> Tensor:
        """A tensor with a vector for every query."""
        padded = self.shape.queries * self.shape.query_spans // self.shape.rows
        spec = pl.BlockSpec((1, self.shape.queries, LANES), lambda b, g, i, j: (b, i, g))
        return self.fold(x, padded), spec

    def keys(self, x: Array) -> Tensor:
        """A tensor with a vector for every key."""
        padded = self.shape.keys * self.shape.key_spans // self.shape.rows
        spec = pl.BlockSpec((1, self.shape.keys, LANES), lambda b, g, i, j: (b, j, g))
        return self.fold(x, padded), spec

    def like_queries(self, dtype: Any) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        """An output with a vector for every query."""
        shape = (self.grid[0], self.shape.queries * self.shape.query_spans, self.grid[1] * LANES)
        spec = pl.BlockSpec((1, self.shape.queries, LANES), lambda b, g, i, j: (b, i, g))
        return jax.ShapeDtypeStruct(shape, dtype), spec

    def like_keys(self, dtype: Any) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        """An output with a vector for every key."""
        shape = (self.grid[0], self.shape.keys * self.shape.key_spans, self.grid[1] * LANES)
        spec = pl.BlockSpec((1, self.shape.keys, LANES), lambda b, g, i, j: (b, j, g))
        return jax.ShapeDtypeStruct(shape, dtype), spec

    def per_head(self) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        """An output with a number for every query and head."""
        shape = (*self.grid[:2], self.shape.heads, self.shape.queries * self.shape.query_spans)
        spec = pl.BlockSpec((1, 1, self.shape.heads, self.shape.queries), lambda b, g, i, j: (b, g, 0, i))
        return jax.ShapeDtypeStruct(shape, jnp.float32), spec

    def fold_rows(self, x: Array) -> Tensor:
        """[B, N, T] in the blocks of `per_head`."""
        struct, spec = self.per_head()
        padded = struct.shape[3] // self.shape.rows
        lanes = self.grid[1] * self.shape.heads
        x = jnp.pad(x, ((0, 0), (0, lanes - x.shape[1]), (0, padded - x.shape[2])))
        x = x.reshape(self.grid[0], self.shape.rows, lanes, padded)
        return jnp.swapaxes(x, 1, 2).reshape(struct.shape), spec

    def unfold_rows(self, x: Array, heads: int, length: int) -> Array:
        """Back to [B, N, T]."""
        x = x.reshape(self.grid[0], -1, self.shape.rows, x.shape[3] // self.shape.rows)
        x = jnp.swapaxes(x, 1, 2)
        return x.reshape(-1, *x.shape[2:])[:, :heads, :length]


def _launch(
    q: Array,
    k: Array,
    q_segments: Array | None,
    k_segments: Array | None,
    q_rope: tuple[Array, Array] | None,
    k_rope: tuple[Array, Array] | None,
    heads: int,
    rate: float,
    sizes: Sizes,
) -> _Launch:
    """Decide on tiles and spans, and list the items."""
    (B, T, D), S = q.shape, k.shape[1]
    head_dim = D // heads
    if LANES % head_dim:
        raise ValueError(f"head size {head_dim} does not divide {LANES}: this kernel takes 32, 64, 128 and the like")
    queries, keys = tiles.cut(T, sizes.query, sizes.queries), tiles.cut(S, sizes.key, sizes.keys)
    if (queries.padded, keys.padded) != (T, S) and q_segments is None:
        q_segments, k_segments = jnp.ones((B, T), jnp.int32), jnp.ones((B, S), jnp.int32)
    rows = _rows_together(B, queries, keys, min(sizes.queries, sizes.keys))
    shape = Shape(
        head_dim=head_dim,
        query=queries.tile,
        key=keys.tile,
        chunk=sizes.chunk if queries.tile % sizes.chunk == 0 else LANES,
        part=min(sizes.part, LANES) if keys.tile % sizes.part else sizes.part,
        queries=queries.span * rows,
        keys=keys.span * rows,
        query_spans=queries.spans,
        key_spans=keys.spans,
        rows=rows,
        row=queries.padded,
        rate=rate,
        turn=min(sizes.turn, 2),  # with masks every stage exists twice, and long turns take long to compile
        turns=None,
        masked=q_segments is not None,
    )
    inputs: dict[str, Tensor] = {}
    items: Any
    by_query, by_key = (lambda b, g, i, j: (b, 0, i)), (lambda b, g, i, j: (b, 0, j))
    if q_segments is None or k_segments is None:
        pairs = np.ones((1, T // shape.query, S // shape.key), bool)
        # Without masks there are no blank items to fill the last turn with, so turns must come out even.
        count = rows * pairs.size // (queries.spans * keys.spans)
        shape = shape._replace(turn=next(turn for turn in range(sizes.turn, 0, -1) if count % turn == 0))
        items = tiles.pack(*_side_by_side(pairs, pairs, rows, np), (queries.spans, keys.spans), shape.turn, np)
        shape = shape._replace(turns=int(items[0, 0, 0]))
    else:
        q_segments = jnp.pad(q_segments, ((0, 0), (0, queries.padded - T)))
        k_segments = jnp.pad(k_segments, ((0, 0), (0, keys.padded - S)))
        visit, full = tiles.compare(q_segments, k_segments, shape.query, shape.key)
        items = tiles.pack(*_side_by_side(visit, full, rows, jnp), (queries.spans, keys.spans), shape.turn)
        # Padding among the queries has a number of its own, which no key has.
        q_ids = jnp.where(q_segments > 0, q_segments, -1).reshape(B // rows, 1, -1)
        inputs["q_ids"] = (q_ids, pl.BlockSpec((1, 1, shape.queries), by_query))
        inputs["k_ids"] = (k_segments.reshape(B // rows, 1, -1), pl.BlockSpec((1, 1, shape.keys), by_key))
    count, each = keys.spans * queries.spans, items.shape[0] > 1
    at = lambda b, g, i, j: ((b * count if each else 0) + i * keys.spans + j, 0, 0)  # noqa: E731
    spec = pl.BlockSpec((1, 1, items.shape[2]), at, memory_space=pltpu.SMEM)
    inputs["items"] = (jnp.asarray(items).reshape(-1, 1, items.shape[2]), spec)
    for name, rope, side, index in (("q_table", q_rope, queries, by_query), ("k_table", k_rope, keys, by_key)):
        if rope is not None:
            table = jnp.concatenate([x.astype(jnp.float32) for x in rope] * shape.heads, axis=2)
            table = jnp.pad(table, ((0, 0), (0, side.padded - table.shape[1]), (0, 0)))
            inputs[name] = _lay_table(table, rows, side.span * rows, index)
    return _Launch(shape, (B // rows, -(-D // LANES), queries.spans, keys.spans), inputs)


def _rows_together(B: int, queries: Side, keys: Side, span: int) -> int:
    """How many short rows of the batch one program takes at once, so that it has enough items to keep busy."""
    if queries.spans > 1 or keys.spans > 1:
        return 1
    limit = max(1, span // max(queries.padded, keys.padded))
    return max(rows for rows in range(1, min(B, limit) + 1) if B % rows == 0)


def _side_by_side(visit: Any, full: Any, rows: int, xp: Any) -> tuple[Any, Any]:
    """Pairs of tiles of several rows end to end: those of different rows see nothing."""
    if rows == 1:
        return visit, full
    same = np.eye(rows, dtype=bool)[None, :, None, :, None]

    def spread(x: Any) -> Any:
        x = xp.broadcast_to(x, (max(x.shape[0], rows), *x.shape[1:]))
        B, columns, keys = x.shape
        x = x.reshape(B // rows, rows, columns, 1, keys) & same
        return x.reshape(B // rows, rows * columns, rows * keys)

    return spread(visit), spread(full)


def _lay_table(table: Array, rows: int, span: int, index: Callable) -> Tensor:
    """Rotary table in blocks, one for all rows of the batch or one for each."""
    if table.shape[0] == 1:
        table = jnp.tile(table, (1, rows, 1))
    table = table.reshape(-1, table.shape[1] * (1 if table.shape[0] == 1 else rows), LANES)
    each = table.shape[0] > 1
    spec = pl.BlockSpec((1, span, LANES), lambda b, g, i, j: (b if each else 0, index(b, g, i, j)[2], 0))
    return table, spec


def _call(
    body: Callable,
    launch: _Launch,
    words: Array,
    inputs: dict[str, Tensor],
    outputs: dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    scratch: dict[str, tuple[tuple[int, ...], Any]],
    interpret: Any,
) -> tuple[Array, ...]:
    """Run a body, which gets its references by name."""
    words_spec = pl.BlockSpec(memory_space=pltpu.SMEM)
    inputs = {"words": (words, words_spec), **inputs}
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
