"""Bodies of the TPU attention kernels, in Pallas. `tpu.py` launches them; the docs page draws them.

A program works on one group of heads that fill the 128 lanes of a vector register (two heads of 64), for a span of
queries and a span of keys. What to do is a list of *items*, pairs of a query tile and a key tile that see each
other. Items pass through three stages, and each turn of the loop runs the third stage of one item, the second of the
next and the first of the one after. The three are independent, so the matrix units never wait for the exponentials.

Scores are kept transposed, keys down and queries across: maxima and sums run down the columns, where they cost no
shuffles, row statistics are flat rows, and the product with the values needs H rows of the matrix unit, not 128.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jina_jax.kernels.dropout import keep
from jina_jax.kernels.tiles import LANES

MASKED, LOWEST = -1e30, -1e29  # a masked score; a maximum that masked scores never reach, so that they weigh 0
HEADER = 1  # words before the items of a list: the number of turns
NN, NT = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ()))


class Shape(NamedTuple):
    """Static sizes of a launch.

    Attributes:
        head_dim: Size H of a head; heads of a group share the lanes.
        query: Queries in a tile.
        key: Keys in a tile.
        chunk: Queries that pass through a stage together.
        part: Keys of a tile that a stage takes at once; few of them need few registers.
        queries: Queries in a span.
        keys: Keys in a span.
        query_spans: Spans that make up all the queries.
        key_spans: Spans that make up all the keys.
        rows: Rows of the batch laid end to end in a span.
        row: Tokens of one of them.
        rate: Dropout rate.
        turn: Items that are worked on together in one turn of the loop.
        turns: Number of turns if it is the same everywhere, else None.
        masked: Whether there are items in which some keys are not visible.
    """

    head_dim: int
    query: int
    key: int
    chunk: int
    part: int
    queries: int
    keys: int
    query_spans: int
    key_spans: int
    rows: int
    row: int
    rate: float
    turn: int
    turns: int | None
    masked: bool

    @property
    def heads(self) -> int:
        """Heads in a group."""
        return LANES // self.head_dim

    @property
    def parts(self) -> list[slice]:
        """Parts of a key tile."""
        return [slice(start, start + self.part) for start in range(0, self.key, self.part)]


class Item(NamedTuple):
    """A query tile and a key tile, unpacked from the bits of one word (packed by `tiles.pack`).

    Attributes:
        slot: Which of the items of a turn this is.
        query: Index of the query tile in its span.
        key: Index of the key tile in its span.
        first: Whether no item before it has this query tile.
        masked: Whether some keys are invisible to some queries.
        blank: Whether all are: an item that only fills up a turn.
    """

    slot: int
    query: Any
    key: Any
    first: Any
    masked: Any
    blank: Any


def pipeline(
    shape: Shape,
    refs: dict[str, Any],
    produce: Callable[[Item, int, slice, bool], None],
    weigh: Callable[[Item, int, slice], None],
    consume: Callable[[Item, int, slice], None],
) -> None:
    """Run all items through the three stages, `shape.turn` items at a time.

    Args:
        shape: The sizes.
        refs: References by name, of which the items are read, and the ids of the keys where there are masks.
        produce: First stage, `produce(item, head, columns, masked)`, for some of the queries of the tile.
        weigh: Second stage, `weigh(item, head, columns)`.
        consume: Third stage, `consume(item, head, columns)`.
    """
    items = refs["items"]
    turns = items[0, 0, 0] if shape.turns is None else shape.turns
    chunks = [
        (head, slice(start, start + shape.chunk))
        for head in range(shape.heads)
        for start in range(0, shape.query, shape.chunk)
    ]

    def read(t: Any) -> list[Item]:
        words = [items[0, 0, HEADER + shape.turn * t + slot] for slot in range(shape.turn)]
        field = lambda word, low, bits: lax.shift_right_logical(word, low) & (2**bits - 1)  # noqa: E731
        return [
            Item(slot, field(word, 0, 14), field(word, 14, 14), *(field(word, bit, 1) == 1 for bit in (28, 29, 30)))
            for slot, word in enumerate(words)
        ]

    def turn(third: Any, second: Any, first: Any) -> None:
        """One turn of the loop. Stages that are None have nothing to do yet; the last turn ends all there is."""
        third, second, first = ([] if t is None else read(t) for t in (third, second, first))

        def run(masked: bool) -> None:
            for slot in range(shape.turn):
                if masked:
                    key_ids = refs["k_ids"][0, :, tile(first[slot].key, shape.key)]
                    refs["key_column"][slot] = jnp.broadcast_to(key_ids, (LANES, shape.key)).T
                for head, columns in chunks:
                    if third:
                        consume(third[slot], head, columns)
                    if second and first:
                        weigh(second[slot], head, columns)
                    if first:
                        produce(first[slot], head, columns, masked)

        if first and shape.masked:
            any_masked = functools.reduce(jnp.logical_or, [item.masked for item in first])
            lax.cond(any_masked, lambda: run(True), lambda: run(False))
        else:
            run(False)
        for item in second if not first else ():  # the last turn: what is weighed is consumed at once
            for head, columns in chunks:
                weigh(item, head, columns)
                consume(item, head, columns)

    @pl.when(turns > 0)
    def _start() -> None:
        turn(None, None, 0)

    @pl.when(turns == 1)
    def _only() -> None:
        turn(None, 0, None)

    @pl.when(turns > 1)
    def _many() -> None:
        turn(None, 0, 1)
        lax.fori_loop(1, turns - 1, lambda t, _: turn(t - 1, t, t + 1), None)
        turn(turns - 2, turns - 1, None)


def dot(x: jax.Array, y: jax.Array, dims: tuple = NN) -> jax.Array:
    """Product with float32 sums; float32 operands keep all their bits."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def rotate(x: jax.Array, table: jax.Array, head_dim: int, back: bool = False) -> jax.Array:
    """Rotary position embedding of all heads of a group.

    Args:
        x: Float32 [tokens, LANES].
        table: Cosines and sines in turn, H/2 lanes each.
        head_dim: Size of a head.
        back: Whether to rotate the other way.

    Returns:
        As `rope.apply` gives it, float32.
    """
    half = head_dim // 2
    roll = functools.partial(pltpu.roll, axis=1)
    left, right = roll(x, LANES - half), roll(x, half)
    other = roll(table, half)
    first = lax.rem(lax.broadcasted_iota(jnp.int32, x.shape, 1), head_dim) < half
    sign = jnp.float32(-1 if back else 1)
    cos = jnp.where(first, table, other)
    sin = jnp.where(first, -roll(table, LANES - half), table) * sign
    return x * cos + jnp.where(first, left, right) * sin


def head_rows(shape: Shape, head: int) -> slice:
    """Rows of one head in a transposed array."""
    return slice(head * shape.head_dim, (head + 1) * shape.head_dim)


def tile(index: Any, size: int) -> Any:
    """Slice of a tile of a span."""
    return pl.ds(pl.multiple_of(index * size, size), size)


def for_tiles(count: int, *parts: tuple[int, Callable[[Any, Any], None]]) -> None:
    """Call `part(slice, index)` for every tile of a span, for all the given (tile size, part).

    Several tiles of all parts at a time: they do not depend on each other and keep more units busy.
    """
    unroll = next(n for n in (4, 2, 1) if count % n == 0)

    def body(i: Any, _: None) -> None:
        for index in range(unroll):
            for size, part in parts:
                part(tile(i * unroll + index, size), i * unroll + index)

    lax.fori_loop(0, count // unroll, body, None)


def prepare(shape: Shape, queries: Any, prepare_queries: Callable, keys: Any, prepare_keys: Callable) -> None:
    """Call `prepare_queries(slice, index)` and `prepare_keys` for all tiles of their spans, if they need it now."""
    q, k = (shape.query, prepare_queries), (shape.key, prepare_keys)
    counts = shape.queries // shape.query, shape.keys // shape.key
    if counts[0] == counts[1] and shape.query_spans == shape.key_spans == 1:
        for_tiles(counts[0], q, k)
    else:
        pl.when(queries)(lambda: for_tiles(counts[0], q))
        pl.when(keys)(lambda: for_tiles(counts[1], k))


def only_head(shape: Shape, x: jax.Array, head: int) -> jax.Array:
    """Zero the lanes of the group's other heads, so that a product over all lanes is one over this head's."""
    if shape.heads == 1:
        return x
    lane_head = lax.broadcasted_iota(jnp.int32, x.shape, 1) // shape.head_dim
    return jnp.where(lane_head == head, x, jnp.zeros_like(x))


def clean(refs: dict[str, Any], ids: str, rows: Any, x: jax.Array) -> jax.Array:
    """Zero the columns of what stands in padding: 0 times it must be 0."""
    return jnp.where(refs[ids][0, :, rows] > 0, x, jnp.zeros_like(x)) if ids in refs else x


def part_of(index: Any, size: int, part: slice) -> Any:
    """Slice of a part of a tile of a span."""
    count = part.stop - part.start
    return pl.ds(pl.multiple_of(index * size + part.start, count), count)


def visible(shape: Shape, refs: dict[str, Any], item: Item, columns: slice, part: slice) -> jax.Array:
    """Which keys (down) each query of a chunk (across) sees. `pipeline` has set the ids of the keys."""
    key_ids = jnp.concatenate([refs["key_column"][item.slot, part]] * (shape.chunk // LANES), axis=1)
    query_ids = refs["q_ids"][0, :, part_of(item.query, shape.query, columns)]
    return key_ids == jnp.where(item.blank, -2, query_ids)


def kept(shape: Shape, words: Any, program: tuple, item: Item, head: int, columns: slice, part: slice) -> jax.Array:
    """Which probabilities of a chunk survive dropout, keys down and queries across."""
    batch, group, query_span, key_span = program
    row = query_span * shape.queries + item.query * shape.query
    column = key_span * shape.keys + item.key * shape.key
    if shape.rows > 1:  # a span of several rows of the batch
        batch = batch * shape.rows + row // shape.row
        row, column = lax.rem(row, shape.row), lax.rem(column, shape.row)
    return keep(
        words,
        shape.rate,
        batch,
        group * shape.heads + head,
        row + columns.start + lax.broadcasted_iota(jnp.int32, (1, shape.chunk), 1),
        column + part.start + lax.broadcasted_iota(jnp.int32, (shape.part, 1), 0),
    )
