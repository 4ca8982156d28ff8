"""From texts of any length to batches of few shapes, since every shape is compiled once.

`pack` lays texts end to end in rows, so that almost nothing is padding: best-fit decreasing, the longest text first,
each into the row in which it leaves the least room. Rows have a length from `row_lengths`, 8 for a model that takes
8192 tokens. `bucket` gives every text a row of its own instead, for implementations of attention whose work grows
with the row rather than with the texts in it.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SHORTEST_ROW = 64
SHORTEST_BUCKET = 16
TOKENS_PER_PLACE = 4


@dataclass(frozen=True, eq=False)
class Batch:
    """Some texts and the shape in which they are computed.

    Attributes:
        members: The texts of each row in their order, int64 [texts of the row]; rows at the end may have none.
        rows: Rows B.
        length: Tokens T of a row.
        places: Places P for means in a row.
    """

    members: tuple[np.ndarray, ...]
    rows: int
    length: int
    places: int


class Arrays(NamedTuple):
    """A batch as the model takes it.

    Attributes:
        tokens: Token ids, int32 [B, T], padding at the end of a row.
        segments: 0 for padding, p for the tokens of the row's p-th text, int32 [B, T].
        task: Adapter of each text, -1 for none, int32 [B, P]; None if no text of the whole call has one.
        spans: First token of the row and the one after the last of each mean, int32 [B, P, 2].
    """

    tokens: np.ndarray
    segments: np.ndarray
    task: np.ndarray | None
    spans: np.ndarray


@dataclass(frozen=True, eq=False)
class Text:
    """Tokens that see each other, and the means wanted of them.

    Attributes:
        ids: Token ids, int32 [T].
        task: Its adapter, -1 for none.
        spans: First token and the one after the last of each mean, int64 [S, 2].
        targets: Number of the vector that each mean is a part of, int64 [S].
        shares: What part of it, float32 [S]; 1 but for documents in several windows.
    """

    ids: np.ndarray
    task: int
    spans: np.ndarray
    targets: np.ndarray
    shares: np.ndarray


@dataclass(frozen=True)
class Split:
    """Into how many parts a batch is split over a mesh of devices.

    Attributes:
        rows: Every batch has a multiple of so many rows.
        tokens: Every row has a multiple of so many tokens.
    """

    rows: int = 1
    tokens: int = 1


def row_lengths(max_tokens: int, batch_tokens: int, split: Split = Split()) -> tuple[int, ...]:
    """Lengths of packed rows: powers of two from 64, or 128 where batches have several rows, and last `max_tokens`.

    Args:
        max_tokens: Length of the longest text allowed.
        batch_tokens: Tokens computed at once.
        split: Into what batches are split.

    Returns:
        Lengths, ascending; 8 for 8192 tokens computed 1024 at once.

    Raises:
        ValueError: If a limit is not positive.
    """
    if max_tokens < 1 or batch_tokens < 1:
        raise ValueError(f"{max_tokens=} and {batch_tokens=} must be at least 1")
    shortest = SHORTEST_ROW if batch_tokens < 2 * split.rows * max_tokens else 2 * SHORTEST_ROW
    powers = (shortest << i for i in range(max_tokens.bit_length()))
    lengths = (*(length for length in powers if length < max_tokens), max_tokens)
    return tuple(sorted({-(-length // split.tokens) * split.tokens for length in lengths}))


def row_places(length: int) -> int:
    """Places for means in a packed row: one for every four tokens."""
    return max(1, length // TOKENS_PER_PLACE)


def pack(texts: Sequence[Text], max_tokens: int, batch_tokens: int, split: Split = Split()) -> list[Batch]:
    """Lay texts end to end in rows.

    Args:
        texts: Texts of at most `max_tokens`, each with at most `row_places(max_tokens)` means.
        max_tokens: Length of the longest text allowed.
        batch_tokens: Tokens computed at once: rows are so long where texts allow it, and several go together where
            this is more than `max_tokens`.
        split: Into what batches are split.

    Returns:
        Batches, the longest rows first; every text is in exactly one row. The shapes are those of `row_shapes`.

    Raises:
        ValueError: If a text is too long, or a limit is not positive.
    """
    sizes = row_lengths(max_tokens, batch_tokens, split)
    lengths = _checked_lengths(texts, max_tokens, batch_tokens)
    wanted = [max(1, len(text.targets)) for text in texts]
    usual = next((size for size in sizes if size * split.rows >= batch_tokens), sizes[-1])

    def shortest(tokens: int, places: int) -> int:
        return next(size for size in sizes if size >= tokens and row_places(size) >= places)

    rows: list[list[int]] = []
    places: list[int] = []  # that are left in each row
    room: list[tuple[int, int]] = []  # (tokens left, row) of the rows that take more, ascending
    for text in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[text])
        at = bisect.bisect_left(room, (length, -1))
        while at < len(room) and places[room[at][1]] < wanted[text]:
            at += 1
        if at < len(room):
            free, row = room.pop(at)
        else:
            free, row = max(usual, shortest(length, wanted[text])), len(rows)
            rows.append([])
            places.append(row_places(free))
        rows[row].append(text)
        places[row] -= wanted[text]
        if free > length and places[row]:
            bisect.insort(room, (free - length, row))

    by_size: dict[int, list[np.ndarray]] = {}
    for members in rows:
        size = shortest(int(lengths[members].sum()), sum(wanted[text] for text in members))
        by_size.setdefault(size, []).append(np.array(members, np.int64))
    batches = []
    for size, found in sorted(by_size.items(), reverse=True):
        together = _most_rows(size, batch_tokens, split) if size == sizes[-1] else split.rows
        while found:
            count = together if len(found) > together - split.rows else split.rows
            batches.append(Batch(tuple(found[:count]), count, size, row_places(size)))
            del found[:count]
    return batches


def _most_rows(size: int, batch_tokens: int, split: Split) -> int:
    """Rows of such a length that are computed at once."""
    return split.rows * max(1, batch_tokens // (split.rows * size))


def row_shapes(max_tokens: int, batch_tokens: int, split: Split = Split()) -> list[tuple[int, int]]:
    """Every shape (rows, length) that `pack` can give: 8 for 8192 tokens, computed 1024 or 32768 at once.

    Args:
        max_tokens: Length of the longest text allowed.
        batch_tokens: Tokens computed at once.
        split: Into what batches are split.

    Returns:
        Shapes without repetition.
    """
    sizes = row_lengths(max_tokens, batch_tokens, split)
    together = _most_rows(sizes[-1], batch_tokens, split)
    return [(split.rows, size) for size in sizes] + [(together, sizes[-1])] * (together > split.rows)


def bucket_lengths(max_tokens: int) -> tuple[int, ...]:
    """Lengths to which texts are filled up: 16, 24, 32, 48, 64, 96, 128 and so on, and last `max_tokens`.

    Powers of two alone would leave 28 % padding where these leave 15 % (lengths spread evenly on a log scale).

    Args:
        max_tokens: Length of the longest text allowed.

    Returns:
        Lengths, ascending; 19 for 8192.

    Raises:
        ValueError: If `max_tokens` is not positive.
    """
    if max_tokens < 1:
        raise ValueError(f"{max_tokens=} must be at least 1")
    lengths, size = [], SHORTEST_BUCKET
    while size < max_tokens:
        lengths += [size, size * 3 // 2]
        size *= 2
    return (*(length for length in lengths if length < max_tokens), max_tokens)


def bucket(texts: Sequence[Text], max_tokens: int, batch_tokens: int, split: Split = Split()) -> list[Batch]:
    """Give each text a row, among texts of about its length.

    A batch has a length from `bucket_lengths` and a power of two of rows, as many as the budget allows; rows left over
    go to the next texts, shorter ones included.

    Args:
        texts: Texts of at most `max_tokens`.
        max_tokens: Length of the longest text allowed.
        batch_tokens: Tokens of a batch, padding included. A text longer than that goes alone.
        split: Into what batches are split.

    Returns:
        Batches, the longest texts first; every text is in exactly one.

    Raises:
        ValueError: If a text is too long, or a limit is not positive.
    """
    sizes = np.array(sorted({-(-length // split.tokens) * split.tokens for length in bucket_lengths(max_tokens)}))
    lengths = _checked_lengths(texts, max_tokens, batch_tokens)
    order = np.argsort(-lengths, kind="stable")
    found = np.searchsorted(sizes, lengths[order])
    # Where each bucket ends in that order, found once rather than for every batch.
    ends = np.searchsorted(-found, -np.arange(len(sizes)), side="right")
    places = max((len(text.targets) for text in texts), default=1)
    places = 1 << (max(places, 1) - 1).bit_length()

    batches, start = [], 0
    while start < len(order):
        length = int(sizes[found[start]])
        most = 1 << (max(1, batch_tokens // (length * split.rows)).bit_length() - 1)
        here = -(-(int(ends[found[start]]) - start) // split.rows)
        rows = split.rows * min(most, 1 << (here - 1).bit_length())
        batches.append(Batch(tuple(order[start : start + rows, None]), rows, length, places))
        start += rows
    return batches


def fill(batch: Batch, texts: Sequence[Text], pad_id: int, adapters: bool = True) -> Arrays:
    """The arrays of one batch.

    Args:
        batch: One of `pack` or `bucket`.
        texts: All texts that these were given.
        pad_id: Id that stands at padding.
        adapters: Whether any text may have a task.

    Returns:
        The arrays.
    """
    B, T, P = batch.rows, batch.length, batch.places
    arrays = Arrays(
        np.full((B, T), pad_id, np.int32),
        np.zeros((B, T), np.int32),
        np.full((B, P), -1, np.int32) if adapters else None,
        np.zeros((B, P, 2), np.int32),
    )
    for row, members in enumerate(batch.members):
        here = [texts[index] for index in members]
        lengths = np.array([len(text.ids) for text in here])
        starts, used = np.cumsum(lengths) - lengths, int(lengths.sum())
        arrays.tokens[row, :used] = np.concatenate([text.ids for text in here])
        arrays.segments[row, :used] = np.repeat(np.arange(1, len(here) + 1), lengths)
        if arrays.task is not None:
            arrays.task[row, : len(here)] = [text.task for text in here]
        spans = np.concatenate([text.spans + start for text, start in zip(here, starts, strict=True)])
        arrays.spans[row, : len(spans)] = spans
    return arrays


def collect(batch: Batch, texts: Sequence[Text], means: np.ndarray, vectors: np.ndarray) -> None:
    """Put the means of one batch where they belong.

    Args:
        batch: The batch.
        texts: As for `fill`.
        means: Float32 [B, P, D].
        vectors: Float32 [n, D], to which they are added.
    """
    for row, members in enumerate(batch.members):
        targets = np.concatenate([texts[index].targets for index in members])
        shares = np.concatenate([texts[index].shares for index in members])
        found = means[row, : len(targets)]
        if (shares == 1).all():
            vectors[targets] = found
        else:
            np.add.at(vectors, targets, found * shares[:, None])


def _checked_lengths(texts: Sequence[Text], max_tokens: int, batch_tokens: int) -> np.ndarray:
    if batch_tokens < 1:
        raise ValueError(f"{batch_tokens=} must be at least 1")
    lengths = np.array([len(text.ids) for text in texts], np.int64)
    if lengths.size and lengths.max() > max_tokens:
        index = int(lengths.argmax())
        raise ValueError(f"text {index} has {lengths[index]} tokens, more than {max_tokens=}; truncate it first")
    return lengths
