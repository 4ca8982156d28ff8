"""How the arrays of a call lie in the TPU kernels' blocks: what is padded, what is cut, which tiles are worked on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from jina_jax.kernels import tiles
from jina_jax.kernels.common import Inputs
from jina_jax.kernels.flash import Shape
from jina_jax.kernels.tiles import LANES, Side, Sizes

# An input, or the shape of an output, and the block of it that a program sees.
Tensor = tuple[Any, pl.BlockSpec]


class Launch(NamedTuple):
    """One launch of a kernel.

    Attributes:
        shape: What the kernel's body is told.
        grid: Numbers of (rows of the batch, groups of heads, spans of queries, spans of keys).
        inputs: Items, segments and rotary tables, by name.
    """

    shape: Shape
    grid: tuple[int, int, int, int]
    inputs: dict[str, Tensor]

    def vectors(self, side: str, dtype: Any) -> Tensor:
        """An array with a vector for every token of side "q" or "k"."""
        axis, span = (2, self.shape.queries) if side == "q" else (3, self.shape.keys)
        shape = (self.grid[0], span * self.grid[axis], self.grid[1] * LANES)
        spec = pl.BlockSpec((1, span, LANES), lambda *at: (at[0], at[axis], at[1]))
        return jax.ShapeDtypeStruct(shape, dtype), spec

    def rows(self) -> Tensor:
        """An array with a number for every query and head."""
        shape = (*self.grid[:2], self.shape.heads, self.shape.queries * self.grid[2])
        spec = pl.BlockSpec((1, 1, self.shape.heads, self.shape.queries), lambda b, g, i, j: (b, g, 0, i))
        return jax.ShapeDtypeStruct(shape, jnp.float32), spec

    def fold(self, side: str, x: Array) -> Tensor:
        """[B, T, D] in the blocks of `vectors`: padded to whole tiles and groups, short rows end to end."""
        struct, spec = self.vectors(side, x.dtype)
        padded = struct.shape[1] // self.shape.rows
        x = jnp.pad(x, ((0, 0), (0, padded - x.shape[1]), (0, struct.shape[2] - x.shape[2])))
        return x.reshape(struct.shape), spec

    def fold_rows(self, x: Array) -> Tensor:
        """[B, N, T] in the blocks of `rows`."""
        struct, spec = self.rows()
        padded, heads = struct.shape[3] // self.shape.rows, struct.shape[1] * struct.shape[2]
        x = jnp.pad(x, ((0, 0), (0, heads - x.shape[1]), (0, padded - x.shape[2])))
        x = x.reshape(self.grid[0], self.shape.rows, heads, padded)
        return jnp.swapaxes(x, 1, 2).reshape(struct.shape), spec

    def unfold(self, x: Array, like: Array) -> Array:
        """Back from `vectors` to [B, T, D]."""
        return x.reshape(like.shape[0], -1, x.shape[2])[:, : like.shape[1], : like.shape[2]]

    def unfold_rows(self, x: Array, heads: int, length: int) -> Array:
        """Back from `rows` to [B, N, T]."""
        x = x.reshape(self.grid[0], -1, self.shape.rows, x.shape[3] // self.shape.rows)
        x = jnp.swapaxes(x, 1, 2)
        return x.reshape(-1, *x.shape[2:])[:, :heads, :length]


def lay_out(inputs: Inputs, k_rope: tuple[Array, Array] | None, sizes: Sizes) -> Launch:
    """Decide on tiles and spans, and list the items.

    Args:
        inputs: What to compute attention from.
        k_rope: Cosines and sines of the keys; those of the queries are in the inputs.
        sizes: Sizes of the tiles.

    Returns:
        The launch.

    Raises:
        ValueError: If heads do not fill up registers.
    """
    (B, T, D), S = inputs.q.shape, inputs.k.shape[1]
    if LANES % inputs.head_dim:
        raise ValueError(
            f"head size {inputs.head_dim} does not divide {LANES}: this kernel takes 32, 64, 128 and the like"
        )
    queries, keys = tiles.cut(T, sizes.query, sizes.queries), tiles.cut(S, sizes.key, sizes.keys)
    spans, rows = (queries.spans, keys.spans), _rows_together(B, queries, keys, min(sizes.queries, sizes.keys))
    shape = Shape(
        head_dim=inputs.head_dim,
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
        rate=inputs.rate,
        turn=min(sizes.turn, 2),  # with masks every stage exists twice, and long turns take long to compile
        turns=None,
        masked=True,
    )
    arrays: dict[str, Tensor] = {}
    by_query, by_key = (lambda b, g, i, j: (b, 0, i)), (lambda b, g, i, j: (b, 0, j))
    q_segments, k_segments = inputs.q_segments, inputs.k_segments
    items: Any
    if (q_segments is None or k_segments is None) and (queries.padded, keys.padded) == (T, S):
        pairs = tiles.side_by_side(np.ones((1, T // shape.query, S // shape.key), bool), rows, np)
        # Without masks there are no blank items to fill the last turn with, so turns must come out even.
        count = pairs.sum() // (queries.spans * keys.spans)
        turn = next(turn for turn in range(sizes.turn, 0, -1) if count % turn == 0)
        items = tiles.pack(pairs, pairs, spans, turn, np)
        shape = shape._replace(turn=turn, turns=int(items[0, 0, 0]), masked=False)
    else:
        if q_segments is None or k_segments is None:
            q_segments, k_segments = jnp.ones((B, T), jnp.int32), jnp.ones((B, S), jnp.int32)
        q_segments = jnp.pad(q_segments, ((0, 0), (0, queries.padded - T)))
        k_segments = jnp.pad(k_segments, ((0, 0), (0, keys.padded - S)))
        visit, full = tiles.compare(q_segments, k_segments, shape.query, shape.key)
        items = tiles.pack(tiles.side_by_side(visit, rows), tiles.side_by_side(full, rows), spans, shape.turn)
        # Padding among the queries has a number of its own, which no key has.
        q_ids = jnp.where(q_segments > 0, q_segments, -1).reshape(B // rows, 1, -1)
        arrays["q_ids"] = (q_ids, pl.BlockSpec((1, 1, shape.queries), by_query))
        arrays["k_ids"] = (k_segments.reshape(B // rows, 1, -1), pl.BlockSpec((1, 1, shape.keys), by_key))
    arrays["items"] = _lay_items(items, spans)
    for name, rope, side, index in (("q_table", inputs.rope, queries, by_query), ("k_table", k_rope, keys, by_key)):
        if rope is not None:
            table = jnp.concatenate([x.astype(jnp.float32) for x in rope] * shape.heads, axis=2)
            arrays[name] = _lay_table(table, side, rows, index)
    return Launch(shape, (B // rows, -(-D // LANES), *spans), arrays)


def _rows_together(B: int, queries: Side, keys: Side, span: int) -> int:
    """How many short rows of the batch one program takes at once, so that it has enough items to keep busy."""
    if queries.spans > 1 or keys.spans > 1:
        return 1
    limit = max(1, span // max(queries.padded, keys.padded))
    return max(rows for rows in range(1, min(B, limit) + 1) if B % rows == 0)


def _lay_items(items: Any, spans: tuple[int, int]) -> Tensor:
    """Lists of items [B, spans, words], one for each row of the batch or one for all, in the scalar unit's memory."""
    count, each = spans[0] * spans[1], items.shape[0] > 1
    index = lambda b, g, i, j: ((b * count if each else 0) + i * spans[1] + j, 0, 0)  # noqa: E731
    spec = pl.BlockSpec((1, 1, items.shape[2]), index, memory_space=pltpu.SMEM)
    return jnp.asarray(items).reshape(-1, 1, items.shape[2]), spec


def _lay_table(table: Array, side: Side, rows: int, index: Callable) -> Tensor:
    """A rotary table [B or 1, T, LANES] in blocks, one for each row of the batch or one for all."""
    each = table.shape[0] > 1
    table = jnp.pad(table, ((0, 0), (0, side.padded - table.shape[1]), (0, 0)))
    table = table.reshape(-1, side.padded * rows, LANES) if each else jnp.tile(table, (1, rows, 1))
    spec = pl.BlockSpec((1, side.span * rows, LANES), lambda b, g, i, j: (b if each else 0, index(b, g, i, j)[2], 0))
    return table, spec
