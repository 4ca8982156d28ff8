"""Texts of a batch laid end to end in rows, so that little of what is computed is padding.

The records of a batch are split over devices, and the texts of a device's records share rows of that device: no text
moves. Every device has as many rows as any. How many, and how long, is chosen for each source from its first batches,
so that nearly all its batches have one shape; a batch that does not fit gets more rows.
"""

import bisect
import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from jina_jax.train.batches import LADDER, Batch

# Lengths of rows that are tried: from that of the longest text to some times as long, at least to this.
TIMES, SHORTEST = 4, 128
# Groups of records at most, where they do not go by devices.
GROUPS = 32


class Rows(NamedTuple):
    """The rows of a group of records.

    Attributes:
        number: How many.
        length: Tokens of a row.
        places: Texts of a row at most.
    """

    number: int
    length: int
    places: int


class Split(NamedTuple):
    """How a batch is computed.

    Attributes:
        devices: Over how many its records are split.
        parts: In how many parts each device embeds its rows.
        fixed: Whether rows are to be the same whatever the number of devices, because dropout goes by rows: groups of
            records are then smaller than a device's, and padding is a little more.
    """

    devices: int
    parts: int = 1
    fixed: bool = False

    def groups(self, size: int) -> int:
        """Number of groups of so many records whose texts share rows."""
        most = max(math.gcd(size, 2 * GROUPS) // 2, 1)
        return most if self.fixed and most % self.devices == 0 else self.devices


def choose(batches: Iterable[np.ndarray], split: Split) -> Rows:
    """The rows that suit some batches, with the fewest tokens in all.

    Args:
        batches: Of each, lengths of its texts int64 [B, G], 0 for none.
        split: How they are computed.

    Returns:
        The rows of a group.
    """
    groups = [group[group > 0] for lengths in batches for group in np.split(lengths, split.groups(len(lengths)))]
    longest = max(int(group.max(initial=1)) for group in groups)
    most = max(TIMES * longest, SHORTEST)
    found = []
    for length in [step for step in LADDER if longest <= step <= most] or [longest]:
        places = max(int(np.ceil(1.25 * length / max(group.mean(), 1))) for group in groups if group.size)
        needed = max(len(_fill(group, length, places)) for group in groups)
        found.append(Rows(-(-needed // split.parts) * split.parts, length, places))
    return min(found, key=lambda rows: (rows.number * rows.length, rows.length))


def lay(lengths: np.ndarray, rows: Rows, split: Split) -> tuple[Rows, np.ndarray]:
    """Where each text goes.

    Args:
        lengths: Tokens of each text at most, int64 [B, G], 0 for none.
        rows: What `choose` gave.
        split: How the batch is computed.

    Returns:
        The rows, of which there may be more, and of each text its row within its group times `rows.places` plus its
        place, int64 [B, G], -1 for none.
    """
    if lengths.max(initial=0) > rows.length:
        rows = choose([lengths], split)
    groups = np.split(lengths, split.groups(len(lengths)))
    filled = [_fill(group.ravel(), rows.length, rows.places) for group in groups]
    count, more = rows.number, split.parts * max(rows.number // 4 // split.parts, 1)
    while count < max(map(len, filled)):
        count += more
    where = np.full((len(groups), groups[0].size), -1)
    for group, members in enumerate(filled):
        for row, texts in enumerate(members):
            where[group, texts] = row * rows.places + np.arange(len(texts))
    return rows._replace(number=count), where.reshape(lengths.shape)


def _fill(lengths: np.ndarray, length: int, places: int) -> list[list[int]]:
    """Texts of each row: the longest first, each into the row in which it leaves the least room."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of rows with a place left, ascending
    for text in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[text])
        if not size:
            break
        at = bisect.bisect_left(room, (size, -1))
        left, row = room.pop(at) if at < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(text)
        if len(rows[row]) < places and left > size:
            bisect.insort(room, (left - size, row))
    return rows


def pack(batch: Batch, lengths: np.ndarray, held: np.ndarray, rows: Rows, split: Split, pad: int) -> Batch:
    """A batch whose texts share rows.

    Args:
        batch: The batch, with "tokens" [b, G, T] and "lengths" [b, G] of the records held.
        lengths: Tokens of each text of the whole batch at most, int64 [B, G]; so all processes do the same.
        held: Which records are held, int64 [b]: those of whole groups.
        rows: What `choose` gave for the source.
        split: How the batch is computed.
        pad: What fills up.

    Returns:
        The batch with "tokens" [r, T] of rows, "segments" [r, T], "roles" int32 [r, P] of each place, and "places"
        int32 [groups held, records of a group, G], where in its group the text of a record is, -1 for none.
    """
    rows, where = lay(lengths, rows, split)
    groups = split.groups(batch.size)
    size = batch.size // groups
    first = held[::size] // size  # the groups held, in order
    given, there = batch.arrays["lengths"], batch.arrays["lengths"] > 0
    # Every text by the row that it is in, among those held, and its place there.
    row = (np.searchsorted(first, held // size) * rows.number)[:, None] + where[held] // rows.places
    place = where[held] % rows.places
    order = np.lexsort((place[there], row[there]))
    row_of, place_of, length_of = (x[there][order] for x in (row, place, given))
    length_of = np.minimum(length_of, lengths[held][there][order])
    before = np.cumsum(length_of) - length_of
    start = before - before[np.searchsorted(row_of, row_of)]  # in its row

    count = len(first) * rows.number
    tokens = np.full((count, rows.length), pad, np.int32)
    segments, roles = np.zeros_like(tokens), np.zeros((count, rows.places), np.int32)
    inside = np.arange(length_of.sum()) - np.repeat(before, length_of)
    target = np.repeat(row_of, length_of), np.repeat(start, length_of) + inside
    texts = batch.arrays["tokens"][there][order]
    tokens[target] = texts[np.repeat(np.arange(len(texts)), length_of), inside]
    segments[target] = np.repeat(place_of + 1, length_of)
    roles[row_of, place_of] = np.broadcast_to(batch.roles, there.shape)[there][order]
    arrays = batch.arrays | {"tokens": tokens, "segments": segments, "roles": roles}
    arrays["places"] = np.where(there, where[held], -1).astype(np.int32).reshape(len(first), size, -1)
    return dataclasses.replace(batch, arrays=arrays, padded=groups * rows.number * rows.length)
