"""Queries, a corpus, and how relevant which passages are: from pairs and triplets, or a directory as BEIR has them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jina_jax import examples
from jina_jax.examples import Example
from jina_jax.records import InputError


@dataclass(frozen=True)
class Judged:
    """Queries and a corpus.

    Attributes:
        queries: Texts of the queries.
        passages: Texts of the corpus.
        gains: For each query how relevant which passages are.
        lost: For each query how relevant passages are that the corpus lacks.
        own: For each query the passage that is no answer because it is the query itself, if there is one.
    """

    queries: list[str]
    passages: list[str]
    gains: list[dict[int, int]]
    lost: list[list[int]]
    own: list[int | None]


def from_records(records: Sequence[Example]) -> Judged:
    """Pairs or triplets as queries and a corpus: all passages, each once.

    Args:
        records: The records; those of one query, by its id or text, are one query.

    Returns:
        Queries and corpus.
    """
    corpus: dict[str, int] = {}
    for record in records:
        for text in (*record.positives, *record.negatives):
            corpus.setdefault(text, len(corpus))
    queries: dict[Any, tuple[str, dict[int, int]]] = {}
    for record in records:
        text = record.texts[0]
        key = ("text", text) if record.query_id is None else ("id", record.query_id)
        _, gains = queries.setdefault(key, (text, {}))
        gains.update({corpus[positive]: 1 for positive in record.positives})
    texts, gains_of = [text for text, _ in queries.values()], [gains for _, gains in queries.values()]
    return Judged(texts, list(corpus), gains_of, [[]] * len(texts), [None] * len(texts))


def beir(folder: Path, name: str) -> Judged:
    """A directory with corpus.jsonl, queries.jsonl and qrels/*.tsv, as BEIR has them (Thakur et al., 2021).

    Args:
        folder: The directory.
        name: Name of the task, for messages.

    Returns:
        The queries that are judged, and the corpus.

    Raises:
        InputError: If a file is missing or malformed.
    """
    for needed in ("corpus.jsonl", "queries.jsonl", "qrels"):
        if not (folder / needed).exists():
            raise InputError(f"{name}: {folder} has no {needed}; it needs corpus.jsonl, queries.jsonl and qrels/")
    files = sorted((folder / "qrels").glob("*.tsv"))
    files = [file for file in files if file.stem == "test"] or files
    if len(files) != 1:
        raise InputError(f"{name}: {folder / 'qrels'} must hold test.tsv, or one .tsv alone; it has {len(files)}")
    passages, queries = _by_id(folder / "corpus.jsonl"), _by_id(folder / "queries.jsonl")
    found: dict[str, dict[str, int]] = {}
    for query, passage, gain in _qrels(files[0]):
        if gain > 0 and query in queries:
            found.setdefault(query, {})[passage] = gain
    if not found:
        raise InputError(f"{name}: {files[0]} judges no query of {folder / 'queries.jsonl'}")
    place = {passage: index for index, passage in enumerate(passages)}
    return Judged(
        [queries[query] for query in found],
        list(passages.values()),
        [{place[one]: gain for one, gain in gains.items() if one in place} for gains in found.values()],
        [[gain for one, gain in gains.items() if one not in place] for gains in found.values()],
        [place.get(query) for query in found],
    )


def _by_id(path: Path) -> dict[str, str]:
    """Texts by id, titles before them."""
    found = {}
    for line, where in examples.lines(path):
        try:
            record = json.loads(line)
            found[str(record["_id"])] = " ".join([record.get("title") or "", record["text"]]).strip()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f'{where}: must be an object in JSON with "_id" and a string "text"') from error
    return found


def _qrels(path: Path) -> Iterator[tuple[str, str, int]]:
    """Lines of a query's id, a passage's id and how relevant it is; the first is a heading."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[1:], 2):
        parts = line.split("\t")
        if line.strip():
            try:
                query, passage, gain = parts
                yield query, passage, int(gain)
            except ValueError as error:
                message = "must be a query's id, a passage's id and a score, with tabs between"
                raise InputError(f"{path}:{number}: {message}") from error
