"""Hard negatives: passages that a model takes for near, but that answer no such query."""

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jina_jax.embedder import Embedder
from jina_jax.examples import Example
from jina_jax.records import InputError
from jina_jax.train import draws
from jina_jax.train.index import text_hash

STRATEGIES = ("top", "random")
# Queries and passages whose similarities are held at once.
_QUERIES, _PASSAGES = 512, 16_384
_WORD = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+")


@dataclass(frozen=True)
class Mining:
    """What makes a negative.

    Attributes:
        negatives: Negatives of a query at most.
        range_min: The nearest passages are left out, so many; positives do not count.
        range_max: Only so many of the nearest passages are looked at.
        max_score: Cosine to the query at most.
        absolute_margin: How much farther than the positive a negative must be.
        relative_margin: The same as a share of the positive's cosine.
        strategy: "top" takes the nearest that are left, "random" any of them.
        lexical: Whether passages that BM25 finds take turns with those that the model finds.
        seed: Of "random".
    """

    negatives: int = 7
    range_min: int = 0
    range_max: int = 100
    max_score: float | None = None
    absolute_margin: float | None = None
    relative_margin: float | None = 0.05
    strategy: str = "top"
    lexical: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.strategy not in STRATEGIES:
            raise InputError(f"strategy={self.strategy!r} must be one of {', '.join(STRATEGIES)}")
        if self.negatives < 1 or not 0 <= self.range_min < self.range_max:
            raise InputError(
                f"negatives={self.negatives}, range_min={self.range_min} and range_max={self.range_max} leave nothing "
                "to take; range_min must be below range_max"
            )


def mine(
    pairs: Sequence[Example],
    embedder: Embedder,
    mining: Mining = Mining(),
    *,
    corpus: Sequence[str] = (),
    tasks: tuple[str | None, str | None] = ("retrieval.query", "retrieval.passage"),
    progress: bool = False,
) -> Iterator[Example]:
    """Triplets of pairs.

    A passage is no negative of a query if its text is that of the query, or of any positive of a record with the same
    query.

    Args:
        pairs: Pairs, or triplets, whose negatives are left out.
        embedder: Finds what is near.
        mining: What makes a negative.
        corpus: Passages besides the positives of all pairs.
        tasks: Of queries and of passages.
        progress: Whether to show progress bars on stderr.

    Yields:
        Triplets in the order of the pairs, with the cosines of positives and negatives; pairs that no negative was
        found for are left out.

    Raises:
        InputError: If a record is of another kind.
    """
    for pair in pairs:
        if pair.kind not in ("pair", "triplet"):
            raise InputError(f"{pair.where}: negatives are for pairs, not for records of the kind {pair.kind}")
    if not pairs:
        return
    passages = _unique([text for pair in pairs for text in pair.positives] + list(corpus))
    queries = _unique([pair.texts[0] for pair in pairs])
    places = {key: place for place, key in enumerate(passages)}
    known = _known(pairs, places)
    vectors = [
        embedder.encode(list(texts.values()), task=task, progress=progress)
        for texts, task in zip((queries, passages), tasks, strict=True)
    ]
    near = nearest(vectors[0], vectors[1], mining.range_max + max(map(len, known), default=0))
    rankings = [near]
    if mining.lexical:
        rankings.append(BM25(list(passages.values())).nearest(list(queries.values()), near.shape[1]))
    numbers = {key: number for number, key in enumerate(queries)}
    texts = list(passages.values())
    for row, pair in enumerate(pairs):
        query = numbers[text_hash(pair.texts[0])]
        positives = [places[text_hash(text)] for text in pair.positives]
        scores = vectors[0][query] @ vectors[1][positives].T
        found = []
        for ranking in rankings:
            ranked = [int(place) for place in ranking[query] if place >= 0 and place not in known[row]]
            found.append(np.array(ranked[mining.range_min : mining.range_max], np.int64))
        # Turn by turn, each passage once.
        candidates = _alternate(found)
        cosines = vectors[1][candidates] @ vectors[0][query]
        fitting = np.flatnonzero(_fits(cosines, float(scores.min()), mining))
        if mining.strategy == "random" and len(fitting) > mining.negatives:
            rng = draws.generator(mining.seed, row)
            fitting = np.sort(rng.choice(fitting, mining.negatives, replace=False))
        fitting = fitting[: mining.negatives]
        if len(fitting):
            yield dataclasses.replace(
                pair,
                kind="triplet",
                texts=(*pair.texts[:2], *(texts[place] for place in candidates[fitting])),
                neg_ids=(),
                pos_scores=tuple(round(float(score), 4) for score in scores),
                neg_scores=tuple(round(float(score), 4) for score in cosines[fitting]),
            )


def _unique(texts: Sequence[str]) -> dict[int, str]:
    """Texts that differ, by their hashes, in order."""
    found: dict[int, str] = {}
    for text in texts:
        found.setdefault(text_hash(text), text)
    return found


def _known(pairs: Sequence[Example], places: dict[int, int]) -> list[set[int]]:
    """Of each pair the places of passages that are no negatives of its query."""
    by_text: dict[int, set[int]] = {}
    by_id: dict[str | None, set[int]] = {}
    for pair in pairs:
        own = {places[key] for key in map(text_hash, (pair.texts[0], *pair.positives)) if key in places}
        by_text.setdefault(text_hash(pair.texts[0]), set()).update(own)
        if pair.query_id is not None:
            by_id.setdefault(pair.query_id, set()).update(own)
    return [by_text[text_hash(pair.texts[0])] | by_id.get(pair.query_id, set()) for pair in pairs]


def _alternate(rankings: Sequence[np.ndarray]) -> np.ndarray:
    """Several rankings as one, in turns; each item once."""
    found: dict[int, None] = {}
    for turn in range(max(map(len, rankings))):
        found |= dict.fromkeys(int(ranking[turn]) for ranking in rankings if turn < len(ranking))
    return np.array(list(found), np.int64)


def _fits(cosines: np.ndarray, positive: float, mining: Mining) -> np.ndarray:
    """Which candidates are far enough, bool."""
    most = np.inf if mining.max_score is None else mining.max_score
    if mining.absolute_margin is not None:
        most = min(most, positive - mining.absolute_margin)
    if mining.relative_margin is not None:
        most = min(most, positive - mining.relative_margin * abs(positive))
    return cosines <= most


# ---- Search ----------------------------------------------------------------------------------------------------


def nearest(
    queries: Float[np.ndarray, "Q D"],
    passages: Float[np.ndarray, "N D"],
    count: int,
    block: tuple[int, int] = (_QUERIES, _PASSAGES),
) -> Int[np.ndarray, "Q k"]:
    """The passages with the largest dot products, exactly, in memory that does not grow with their number.

    Args:
        queries: Vectors of queries.
        passages: Vectors of passages.
        count: How many to find.
        block: Queries and passages whose products are held at once.

    Returns:
        Numbers of passages, the nearest first; of equal ones that with the lower number. k is `count`, or less where
        there are fewer passages.
    """
    count = min(count, len(passages))
    found = [np.zeros((0, count), np.int32)]
    width = min(block[1], len(passages))
    for start in range(0, len(queries), block[0]):
        some = jnp.asarray(queries[start : start + block[0]])
        best = (jnp.full((len(some), count), -jnp.inf), jnp.zeros((len(some), count), jnp.int32))
        for first in range(0, len(passages), width):
            # The last block begins earlier, and what was seen before does not count again.
            begin = min(first, len(passages) - width)
            best = _merge(*best, some, jnp.asarray(passages[begin : begin + width]), begin, first)
        found.append(np.asarray(best[1]))
    return np.concatenate(found)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _merge(
    scores: Float[Array, "Q k"],
    numbers: Int[Array, "Q k"],
    queries: Float[Array, "Q D"],
    passages: Float[Array, "n D"],
    begin: Int[Array, ""] | int,
    first: Int[Array, ""] | int,
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"]]:
    """The best of those found and of some more passages."""
    products = jnp.matmul(queries, passages.T, precision=jax.lax.Precision.HIGHEST)
    these = jnp.arange(len(passages), dtype=jnp.int32) + jnp.int32(begin)
    products = jnp.where((these >= jnp.int32(first))[None], products, -jnp.inf)
    scores = jnp.concatenate([scores, products], axis=1)
    numbers = jnp.concatenate([numbers, jnp.broadcast_to(these, products.shape)], axis=1)
    # Of equal scores the one further left comes first: that of the lower number.
    best, places = jax.lax.top_k(scores, numbers.shape[1] - len(passages))
    return best, jnp.take_along_axis(numbers, places, axis=1)


class BM25:
    """Passages by the words they share with a query: Robertson's BM25 with the idf of Lucene, exactly.

    Args:
        passages: The passages.
        k1: How soon further occurrences of a word count less.
        b: How much long passages count less.
    """

    def __init__(self, passages: Sequence[str], k1: float = 1.2, b: float = 0.75) -> None:
        from scipy import sparse

        self._words: dict[str, int] = {}
        counts = self._count([self._numbers(text) for text in passages])
        lengths = np.asarray(counts.sum(axis=1)).reshape(-1)
        rows = np.repeat(np.arange(len(passages)), np.diff(counts.indptr))
        found = np.bincount(counts.indices, minlength=len(self._words))
        idf = np.log1p((len(passages) - found + 0.5) / (found + 0.5))
        bound = k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-9))
        weights = idf[counts.indices] * counts.data * (k1 + 1) / (counts.data + bound[rows])
        self._weights = sparse.csr_matrix((weights, counts.indices, counts.indptr), counts.shape).T.tocsr()

    def nearest(self, queries: Sequence[str], count: int, block: int = 64) -> Int[np.ndarray, "Q k"]:
        """The passages that score best.

        Args:
            queries: Queries.
            count: How many to find.
            block: Queries whose scores are held at once.

        Returns:
            Numbers of passages, the best first; -1 where none is left that shares a word.
        """
        found = np.full((len(queries), count), -1, np.int64)
        for start in range(0, len(queries), block):
            numbers = [self._numbers(text, known=True) for text in queries[start : start + block]]
            scores = (self._count(numbers) @ self._weights).tocsr()
            for row in range(len(numbers)):
                part = slice(scores.indptr[row], scores.indptr[row + 1])
                order = np.lexsort((scores.indices[part], -scores.data[part]))[:count]
                found[start + row, : len(order)] = scores.indices[part][order]
        return found

    def _numbers(self, text: str, known: bool = False) -> list[int]:
        """Numbers of the words of a text; new words get new ones unless only those known count."""
        words = _WORD.findall(text.lower())
        if known:
            return [self._words[word] for word in words if word in self._words]
        return [self._words.setdefault(word, len(self._words)) for word in words]

    def _count(self, texts: list[list[int]]) -> Any:
        """How often each word occurs in each text, a sparse matrix [texts, words]."""
        from scipy import sparse

        rows = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
        columns = np.array([number for text in texts for number in text], np.int64)
        found = sparse.coo_matrix((np.ones(len(rows)), (rows, columns)), (len(texts), len(self._words)))
        counts = found.tocsr()
        counts.sum_duplicates()
        return counts
