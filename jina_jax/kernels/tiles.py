"""Which tiles of queries and keys see each other, and how large tiles are."""

import functools
import json
from importlib import resources
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jina_jax.kernels.common import target

LANES = 128
_BLANK = np.int32(2**30 + 2**29)  # masked and blank: nothing is visible


def pack(
    visit: Any, full: Any, spans: tuple[int, int], turn: int, xp: ModuleType = jnp
) -> Int[Array, "B spans words"] | Int[np.ndarray, "B spans words"]:
    """Lists of the items that a kernel works on, one list per pair of spans.

    Args:
        visit: Which pairs of tiles are items, bool [B, query tiles, key tiles].
        full: Which of them need no mask.
        spans: Number of spans of queries and of keys; each list holds the items of one of each.
        turn: Items in a turn; lists are filled up to whole turns.
        xp: NumPy for what is known already, or jax.numpy.

    Returns:
        Int32 [B, query spans * key spans, 1 + items]. Each list starts with its number of turns. An item is query
        tile | key tile << 14, both counted from the start of the span, then one bit each: first of its query tile
        in any list, masked, blank.
    """
    B, rows, columns = visit.shape
    query = xp.arange(rows, dtype=xp.int32)[None, :, None] % (rows // spans[0])
    key = xp.arange(columns, dtype=xp.int32)[None, None, :] % (columns // spans[1])
    first = visit & (xp.cumsum(visit, axis=2) == 1)
    words = query | (key << 14) | (first.astype(xp.int32) << 28) | ((visit & ~full).astype(xp.int32) << 29)

    def by_span(x: Any) -> Any:
        x = x.reshape(B, spans[0], rows // spans[0], spans[1], columns // spans[1])
        return xp.moveaxis(x, 3, 2).reshape(B, spans[0] * spans[1], -1)

    words, chosen = by_span(words), by_span(visit)
    most = words.shape[2]
    index = xp.arange(most, dtype=xp.int32)[None, None]
    order = xp.argsort(index + xp.where(chosen, 0, most), axis=2)
    count = chosen.astype(xp.int32).sum(axis=2)
    words = xp.where(index < count[:, :, None], xp.take_along_axis(words, order, axis=2), _BLANK)
    blanks = xp.full((*words.shape[:2], -most % turn), _BLANK, xp.int32)
    return xp.concatenate([(-(-count // turn))[:, :, None], words, blanks], axis=2).astype(xp.int32)


def compare(q_segments: Int[Array, "B T"], k_segments: Int[Array, "B S"], query: int, key: int) -> tuple[Array, Array]:
    """Which pairs of tiles hold a query and a key of the same text, and which hold nothing else.

    The first is exact for texts that stand side by side in ascending order, and may say yes too often otherwise.

    Args:
        q_segments: Segments of the queries, 0 for padding.
        k_segments: Segments of the keys.
        query: Queries in a tile, a divisor of T.
        key: Keys in a tile, a divisor of S.

    Returns:
        Two bool arrays [B, query tiles, key tiles].
    """
    q_low, q_high, q_padding = (x[:, :, None] for x in ranges(q_segments, query))
    k_low, k_high, k_padding = (x[:, None, :] for x in ranges(k_segments, key))
    visit = (q_high >= k_low) & (k_high >= q_low)
    return visit, visit & (q_low == q_high) & (k_low == k_high) & ~q_padding & ~k_padding


def ranges(segments: Int[Array, "B T"], size: int) -> tuple[Array, Array, Array]:
    """What each tile holds: its lowest and highest segment, and whether it has padding.

    Args:
        segments: Segments, 0 for padding.
        size: Tokens in a tile, a divisor of T.

    Returns:
        Three arrays [B, tiles]. Tiles of nothing but padding have a range that meets no other.
    """
    segments = segments.reshape(segments.shape[0], -1, size)
    padding, limits = segments == 0, jnp.iinfo(segments.dtype)
    low = jnp.where(padding, limits.max, segments).min(axis=2)
    high = jnp.where(padding, limits.min, segments).max(axis=2)
    return low, high, padding.any(axis=2)


def side_by_side(pairs: Any, rows: int, xp: ModuleType = jnp) -> Any:
    """Pairs of tiles of several rows end to end: those of different rows see nothing.

    Args:
        pairs: Bool [B, query tiles, key tiles], or B = 1 for the same in all rows.
        rows: Rows that are laid end to end.
        xp: As in `pack`.

    Returns:
        Bool [B / rows, rows * query tiles, rows * key tiles].
    """
    B, (queries, keys) = max(pairs.shape[0], rows), pairs.shape[1:]
    pairs = xp.broadcast_to(pairs, (B, queries, keys)).reshape(B // rows, rows, queries, 1, keys)
    same = np.eye(rows, dtype=bool)[None, :, None, :, None]
    return (pairs & same).reshape(B // rows, rows * queries, rows * keys)


class Sizes(NamedTuple):
    """Sizes of the tiles of a kernel, in tokens.

    Attributes:
        query: Queries in a tile, at most.
        key: Keys in a tile, at most.
        chunk: Queries of a tile that pass through a stage together.
        part: Keys of a tile that a stage takes at once.
        turn: Items that are worked on together.
        queries: Queries held in fast memory at once, at most.
        keys: Keys held in fast memory at once, at most.
    """

    query: int
    key: int
    chunk: int
    part: int
    turn: int
    queries: int
    keys: int


class Side(NamedTuple):
    """Queries or keys cut into tiles and spans.

    Attributes:
        tile: Tokens in a tile.
        span: Tokens in a span.
        spans: Number of spans.
    """

    tile: int
    span: int
    spans: int

    @property
    def padded(self) -> int:
        """Tokens with padding, so that all tiles and spans are full."""
        return self.span * self.spans


def cut(length: int, tile: int, span: int) -> Side:
    """Cut a length into equal tiles of at most the given size, a multiple of LANES, and these into equal spans."""
    count = -(-length // max(tile, LANES))
    tile = -(-length // (count * LANES)) * LANES
    count = -(-length // tile)
    spans = -(-count // max(span // tile, 1))
    return Side(tile, -(-count // spans) * tile, spans)


def choose(name: str, head_dim: int, dtype: Any) -> Sizes:
    """Sizes for the device that programs are traced for, from blocks.json (found by tests/benchmarks/search.py).

    Args:
        name: "forward" or "backward".
        head_dim: Size H of a head.
        dtype: Type of queries, keys and values.

    Returns:
        Sizes. Spans shrink as tokens take more room: with float32, and with many small heads. A float32 product is
        six of bfloat16, so tiles shrink too, lest the program become too long to compile.
    """
    blocks = _blocks()
    sizes = Sizes(**blocks.get(target().device_kind, blocks["default"])[name])
    if jnp.dtype(dtype).itemsize == 4:
        sizes = sizes._replace(query=min(sizes.query, 256), key=min(sizes.key, 256), turn=1)
    room = max(1, jnp.dtype(dtype).itemsize * (LANES // head_dim) // 4)
    return sizes._replace(queries=sizes.queries // room, keys=sizes.keys // room)


@functools.cache
def _blocks() -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(resources.files("jina_jax.kernels").joinpath("blocks.json").read_text())
