"""From texts of any length to batches of few shapes, since every shape is compiled once.

A batch has a length from `buckets` and a power of two of rows, as many as a budget of tokens allows. Texts are taken
from the longest to the shortest; a batch has the shape that its longest text needs, and rows left over go to the next
texts, shorter ones included.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SHORTEST = 16


@dataclass(frozen=True, eq=False)
class Batch:
    """Some texts and the shape in which they are computed.

    Attributes:
        indices: Int64 [n], which texts, n <= rows.
        rows: Rows B, a power of two.
        length: Tokens T of a row, one of `buckets`.
    """

    indices: np.ndarray
    rows: int
    length: int


def buckets(max_tokens: int) -> tuple[int, ...]:
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
    lengths, size = [], SHORTEST
    while size < max_tokens:
        lengths += [size, size * 3 // 2]
        size *= 2
    return (*(length for length in lengths if length < max_tokens), max_tokens)


def max_rows(length: int, batch_tokens: int) -> int:
    """The largest power of two of rows within the budget; one where a single row is already beyond it."""
    return 1 << (max(1, batch_tokens // length).bit_length() - 1)


def shapes(max_tokens: int, batch_tokens: int) -> list[tuple[int, int]]:
    """Every shape (rows, length) that `plan` can give, the bound on what is ever compiled.

    Args:
        max_tokens: Length of the longest text allowed.
        batch_tokens: Budget of tokens of a batch, padding included.

    Returns:
        Shapes without repetition: 55 for 8192 tokens and a budget of 1024, 138 for a budget of 32768. One call meets
        few of them, at most two row counts a length.
    """
    return [
        (1 << power, length)
        for length in buckets(max_tokens)
        for power in range(max_rows(length, batch_tokens).bit_length())
    ]


def plan(lengths: Sequence[int] | np.ndarray, max_tokens: int, batch_tokens: int) -> list[Batch]:
    """Distribute texts over batches.

    Args:
        lengths: Tokens of each text.
        max_tokens: Length of the longest text allowed.
        batch_tokens: Budget of tokens of a batch, padding included. A text longer than that goes alone.

    Returns:
        Batches, the longest texts first; every text is in exactly one.

    Raises:
        ValueError: If a text is longer than `max_tokens`, or a limit is not positive.
    """
    if batch_tokens < 1:
        raise ValueError(f"{batch_tokens=} must be at least 1")
    sizes, lengths = np.array(buckets(max_tokens)), np.asarray(lengths, np.int64)
    if lengths.size and lengths.max() > max_tokens:
        index = int(lengths.argmax())
        raise ValueError(f"text {index} has {lengths[index]} tokens, more than {max_tokens=}; truncate it first")
    order = np.argsort(-lengths, kind="stable")
    bucket = np.searchsorted(sizes, lengths[order])
    # Where each bucket ends in that order, found once rather than for every batch.
    ends = np.searchsorted(-bucket, -np.arange(len(sizes)), side="right")

    batches, start = [], 0
    while start < len(order):
        length = int(sizes[bucket[start]])
        of_this_length = int(ends[bucket[start]]) - start
        rows = min(max_rows(length, batch_tokens), 1 << (of_this_length - 1).bit_length())
        batches.append(Batch(order[start : start + rows], rows, length))
        start += rows
    return batches


def fill(batch: Batch, ids: Sequence[np.ndarray], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """The arrays of one batch, filled up on the right and below.

    Args:
        batch: One of `plan`.
        ids: Token ids of all texts that were planned for.
        pad_id: Id that stands at padding.

    Returns:
        Token ids int32 [B, T], and a mask bool [B, T], True for tokens; rows without a text are all False.
    """
    tokens = np.full((batch.rows, batch.length), pad_id, np.int32)
    mask = np.zeros((batch.rows, batch.length), bool)
    for row, index in enumerate(batch.indices):
        tokens[row, : len(ids[index])] = ids[index]
        mask[row, : len(ids[index])] = True
    return tokens, mask
