"""Which records meet in a batch, and which of their texts: all of it by numbers, before any text is read."""

import functools

import numpy as np


def generator(*key: int) -> np.random.Generator:
    """Random numbers that depend on two whole numbers alone."""
    return np.random.Generator(np.random.Philox(key=np.array(key, np.uint64)))


def positives(counts: np.ndarray, more: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One positive of each record.

    Args:
        counts: Texts of each record without further positives, int64 [B].
        more: Further positives, int32 [B]; they come after all other texts.
        rng: Random numbers.

    Returns:
        Number of the text within its record, int64 [B].
    """
    pick = (rng.random(len(counts)) * (1 + more)).astype(np.int64)
    return np.where(pick == 0, 1, counts + pick - 1)


def negatives(counts: np.ndarray, wanted: int, rng: np.random.Generator) -> np.ndarray:
    """Some negatives of each record, no one twice.

    Args:
        counts: Texts of each record without further positives, int64 [B]: a query, a positive, and negatives.
        wanted: Number M of negatives.
        rng: Random numbers.

    Returns:
        Numbers of the texts within their records, int64 [B, M]; -1 where a record has no more.
    """
    there = counts[:, None] - 2
    keys = rng.random((len(counts), max(int(there.max(initial=0)), wanted)))
    keys = np.where(np.arange(keys.shape[1]) < there, keys, 2.0)
    chosen = np.argsort(keys, axis=1, kind="stable")[:, :wanted]
    return np.where(np.take_along_axis(keys, chosen, axis=1) < 2, chosen + 2, -1)


class Tuples:
    """Tuples of labelled texts: one, another of its label, and some of other labels.

    Args:
        labels: Number of the label of each text, int [n].
    """

    def __init__(self, labels: np.ndarray) -> None:
        self._order = np.argsort(labels, kind="stable")
        self._rank = np.argsort(self._order, kind="stable")
        _, code, self._counts = np.unique(labels, return_inverse=True, return_counts=True)
        self._code, self._starts = code.reshape(-1), np.cumsum(self._counts) - self._counts

    def queries(self) -> np.ndarray:
        """The texts that are not alone with their label, int64."""
        return np.flatnonzero(self._counts[self._code] > 1)

    def negatives(self) -> int:
        """Negatives that every tuple can have at least."""
        return len(self._code) - int(self._counts.max(initial=0))

    def __call__(self, queries: np.ndarray, wanted: int, rng: np.random.Generator) -> np.ndarray:
        """Tuples.

        Args:
            queries: The first of each, int64 [B]; none is alone with its label.
            wanted: Number M of negatives.
            rng: Random numbers.

        Returns:
            int64 [B, 2 + M].
        """
        code = self._code[queries]
        starts, counts = self._starts[code], self._counts[code]
        # Any place in the block of the label but the query's own.
        place = (rng.random(len(queries)) * (counts - 1)).astype(np.int64)
        place += place >= self._rank[queries] - starts
        drawn = np.empty((len(queries), 2 + wanted), np.int64)
        drawn[:, 0], drawn[:, 1] = queries, self._order[starts + place]
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            others = rng.choice(len(self._code) - count, wanted, replace=False, shuffle=False)
            drawn[row, 2:] = self._order[others + count * (others >= start)]
        return drawn


class Companions:
    """Batches of labelled texts in which each has one of its label, and not all have one label.

    Args:
        labels: Number of the label of each text, int [n].
        batch: Texts of a batch, an even number.
        seed: Decides the order.

    Attributes:
        batches: Batches of an epoch; 0 if there cannot be any.
    """

    def __init__(self, labels: np.ndarray, batch: int, seed: int) -> None:
        _, code, counts = np.unique(labels, return_inverse=True, return_counts=True)
        self._code, self._counts, self._seed = code.reshape(-1), counts, seed
        pairs, self._size = counts // 2, batch // 2
        most = int(pairs.max(initial=0))
        self.batches = int(min(pairs.sum() // self._size, pairs.sum() - most)) if self._size > 1 else 0
        self._epoch = functools.lru_cache(maxsize=2)(self._deal)

    def __call__(self, number: int) -> np.ndarray:
        """The texts of a batch.

        Args:
            number: Of the batch, counted through all epochs.

        Returns:
            int64 [batch].
        """
        epoch, number = divmod(number, self.batches)
        return self._epoch(epoch)[number]

    def _deal(self, epoch: int) -> np.ndarray:
        """All batches of an epoch, int64 [batches, batch]."""
        rng, count = generator(self._seed, epoch), self.batches
        order = rng.permutation(len(self._code))
        order = order[np.argsort(self._code[order], kind="stable")]
        starts = np.cumsum(self._counts) - self._counts
        code = self._code[order]
        place = np.arange(len(order)) - starts[code]
        pairs = order[place < self._counts[code] // 2 * 2].reshape(-1, 2)
        # Pairs of a label go to one batch after the other, so that none gets but one label unless one has too many.
        code = self._code[pairs[:, 0]]
        first = np.searchsorted(code, code)
        pairs = pairs[np.arange(len(pairs)) - first < (self._size - 1) * count]
        pairs = pairs[np.sort(rng.permutation(len(pairs))[: self._size * count])]
        labels = rng.permutation(len(self._counts))[self._code[pairs[:, 0]]]
        pairs = pairs[np.argsort(labels, kind="stable")]
        return pairs.reshape(self._size, count, 2).swapaxes(0, 1).reshape(count, -1)
