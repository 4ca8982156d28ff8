"""Evaluation of an embedder on held-out records: each task is encoded once, and measured at every Matryoshka size."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jina_jax import examples
from jina_jax.embedder import Embedder
from jina_jax.eval import metrics
from jina_jax.eval.judgements import Judged, beir, from_records
from jina_jax.examples import Example
from jina_jax.records import InputError

# Similarities held at once.
SCORES = 1 << 24
CUTOFF, RECALLS = 10, (10, 100)


@runtime_checkable
class Task(Protocol):
    """Something to measure, as `jina_jax.train.recipe.EvalTask` says it."""

    @property
    def name(self) -> str:
        """Its name in results and messages."""

    @property
    def kind(self) -> str:
        """One of `MEASURES`, or "mlm"."""

    @property
    def path(self) -> str:
        """A file of records; for "ir" a directory as BEIR has them, too."""

    @property
    def task(self) -> str | None:
        """The adapter of texts, or of queries."""

    @property
    def passage_task(self) -> str | None:
        """The adapter of passages; None means `task`."""

    @property
    def train_path(self) -> str | None:
        """For "classification", records to fit on; None fits on every second record of each label."""

    @property
    def share(self) -> float:
        """Share of the records, the last of the file, that are measured."""


@dataclass(frozen=True)
class Measure:
    """What to encode for a task, and what to make of it.

    Attributes:
        main: The metric that matters most.
        queries: Texts that get the task's adapter.
        passages: Texts that get that of passages.
        score: From the vectors of both to metrics by name.
    """

    main: str
    queries: list[str]
    passages: list[str]
    score: Callable[[np.ndarray, np.ndarray], dict[str, float]]


def evaluate(
    tasks: Sequence[Task],
    embedder: Embedder | Any,
    dims: Sequence[int] | None = None,
    perplexity: Callable[[str], float] | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure an embedder.

    Args:
        tasks: What to measure.
        embedder: The embedder, or what has its `encode` and `config`.
        dims: Sizes at which everything is measured; None means the Matryoshka sizes of the model, and its full size.
        perplexity: From the path of a "mlm" task to its perplexity; None if there are no such tasks.

    Returns:
        For each task by name {"main": name of a metric, "metrics": {name: {size: value}}}. Perplexity is measured at
        full size alone.

    Raises:
        InputError: If records are missing, malformed or of the wrong kind, or a size or an adapter is not there.
    """
    config = embedder.config
    dims = _sizes(dims, config.matryoshka_dimensions, config.hidden_size)
    results: dict[str, dict[str, Any]] = {}
    for task in tasks:
        for name in {task.task, task.passage_task} - {None, *config.tasks}:
            raise InputError(f"{task.name}: the model has no task {name!r}; it has: {', '.join(config.tasks)}")
        if task.kind == "mlm":
            if perplexity is None:
                raise InputError(f"{task.name}: the masked language model is measured while it trains, not alone")
            found = {"perplexity": {config.hidden_size: perplexity(task.path)}}
            results[task.name] = {"main": "perplexity", "metrics": found}
        else:
            measure = MEASURES[task.kind](task)
            scores = {dim: measure.score(*pair) for dim, pair in _vectors(task, measure, embedder, dims)}
            by_name = {name: {dim: scores[dim][name] for dim in dims} for name in scores[dims[0]]}
            results[task.name] = {"main": measure.main, "metrics": by_name}
    return results


def _sizes(dims: Sequence[int] | None, trained: Sequence[int], full: int) -> tuple[int, ...]:
    """Sizes to measure at, the smallest first."""
    given = [dim for dim in trained if dim < full] + [full] if dims is None else dims
    for dim in given:
        if not 1 <= dim <= full:
            raise InputError(f"eval.dims: {dim} must be at least 1 and at most {full}, the model's own size")
    return tuple(sorted(set(given)))


def _vectors(
    task: Task, measure: Measure, embedder: Any, dims: Sequence[int]
) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
    """Unit vectors of queries and passages at each size, of one encoding of all distinct texts."""
    other = task.task if task.passage_task is None else task.passage_task
    wanted = [(text, task.task) for text in measure.queries] + [(text, other) for text in measure.passages]
    places = {pair: index for index, pair in enumerate(dict.fromkeys(wanted))}
    names = [name for _, name in places]
    # Calls without any task know no adapters, and are the fastest.
    asked = names if any(names) else None
    full = embedder.config.hidden_size
    found = embedder.encode([text for text, _ in places], task=asked, dimensions=full, normalize=False)
    rows = np.array([places[pair] for pair in wanted], np.int64)
    for dim in dims:
        cut = found[:, :dim]
        unit = cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), np.float32(1e-12))
        yield dim, (unit[rows[: len(measure.queries)]], unit[rows[len(measure.queries) :]])


def _records(task: Task, *kinds: str, path: str | None = None) -> list[Example]:
    """The records of a task, which must be of one of some kinds."""
    path, share = (task.path, task.share) if path is None else (path, 1.0)
    found = list(examples.read(path))
    if not found:
        raise InputError(f"{task.name}: {path} holds no records")
    for example in found[:1]:
        if example.kind not in kinds:
            needed = " or ".join(kinds)
            message = f"{task.kind} measures {needed} records, and {path} holds records of the kind {example.kind}"
            raise InputError(f"{task.name}: {message}")
    return found[len(found) - max(round(len(found) * share), 1) :]


def _dots(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Similarity of each row of one to the same row of the other."""
    return np.einsum("nd,nd->n", a.astype(np.float64), b.astype(np.float64))


# ---- The kinds of tasks ----------------------------------------------------------------------------------------


def _ir(task: Task) -> Measure:
    folder = Path(task.path)
    judged = beir(folder, task.name) if folder.is_dir() else from_records(_records(task, "pair", "triplet"))

    def score(queries: np.ndarray, passages: np.ndarray) -> dict[str, float]:
        found = []
        step = max(SCORES // len(passages), 1)
        for start in range(0, len(queries), step):
            for number, scores in enumerate(queries[start : start + step] @ passages.T, start):
                found.append(_found(judged, number, scores))
        return {name: float(np.mean([one[name] for one in found])) for name in found[0]}

    return Measure(f"ndcg@{CUTOFF}", judged.queries, judged.passages, score)


def _found(judged: Judged, number: int, scores: np.ndarray) -> dict[str, float]:
    """What a query found, by the similarity of all passages."""
    gains = np.zeros(len(scores), np.int64)
    gains[list(judged.gains[number])] = list(judged.gains[number].values())
    own, lost = judged.own[number], judged.lost[number]
    if own is not None:
        scores, gains = np.delete(scores, own), np.delete(gains, own)
    # What is less similar than all that is relevant changes nothing, and need not be sorted.
    scores = np.nan_to_num(scores, nan=-np.inf)
    kept = scores >= scores[gains > 0].min(initial=np.inf)
    ranked = metrics.ranked(scores[kept], gains[kept])
    # What the corpus lacks ranks behind everything that counts, however small the corpus.
    behind = np.count_nonzero(~kept) + (max(RECALLS) if lost else 0)
    ranked = np.concatenate([ranked, np.zeros(behind, np.int64), np.array(lost, np.int64)])
    found = {f"ndcg@{CUTOFF}": metrics.ndcg(ranked, CUTOFF), f"mrr@{CUTOFF}": metrics.mrr(ranked, CUTOFF)}
    return found | {f"recall@{k}": metrics.recall(ranked, k) for k in RECALLS}


def _sts(task: Task) -> Measure:
    records = _records(task, "scored")
    wanted = np.array([record.score for record in records], np.float64)

    def score(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
        return {"spearman": metrics.spearman(_dots(a, b), wanted)}

    return Measure("spearman", [r.texts[0] for r in records], [r.texts[1] for r in records], score)


def _candidates(task: Task) -> tuple[list[Example], list[np.ndarray], list[str]]:
    """Triplets, gains of the candidates of each, and all candidates."""
    records = _records(task, "triplet")
    gains = [np.repeat([1, 0], [len(r.positives), len(r.negatives)]) for r in records]
    return records, gains, [text for r in records for text in (*r.positives, *r.negatives)]


def _each(
    queries: np.ndarray, passages: np.ndarray, gains: list[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Similarities and gains of the candidates of each record."""
    stops = np.cumsum([len(one) for one in gains])
    for query, one, stop in zip(queries, gains, stops, strict=True):
        yield passages[stop - len(one) : stop] @ query, one


def _triplet(task: Task) -> Measure:
    records, gains, candidates = _candidates(task)

    def score(queries: np.ndarray, passages: np.ndarray) -> dict[str, float]:
        won = [scores[0] > scores[one == 0].max() for scores, one in _each(queries, passages, gains)]
        return {"accuracy": float(np.mean(won))}

    return Measure("accuracy", [r.texts[0] for r in records], candidates, score)


def _reranking(task: Task) -> Measure:
    records, gains, candidates = _candidates(task)

    def score(queries: np.ndarray, passages: np.ndarray) -> dict[str, float]:
        ranked = [metrics.ranked(scores, one) for scores, one in _each(queries, passages, gains)]
        return {
            "map": float(np.mean([metrics.average_precision(one) for one in ranked])),
            f"mrr@{CUTOFF}": float(np.mean([metrics.mrr(one, CUTOFF) for one in ranked])),
        }

    return Measure("map", [r.texts[0] for r in records], candidates, score)


def _classification(task: Task) -> Measure:
    records = _records(task, "labelled")
    if task.train_path is not None:
        train = _records(task, "labelled", path=task.train_path)
    else:
        train, records = _halves(records)
    if not records:
        message = (
            "has no two records of one label; half of each label's are fitted on, unless there are others for that"
        )
        raise InputError(f"{task.name}: {task.path} {message}")

    def score(fitted: np.ndarray, held_out: np.ndarray) -> dict[str, float]:
        return metrics.classification(fitted, [r.label for r in train], held_out, [r.label for r in records])

    return Measure("accuracy", [r.texts[0] for r in train], [r.texts[0] for r in records], score)


def _halves(records: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Every second record of each label, and the others."""
    halves: tuple[list[Example], list[Example]] = ([], [])
    seen: dict[Any, int] = {}
    for record in records:
        number = seen[record.label] = seen.get(record.label, -1) + 1
        halves[number % 2].append(record)
    return halves


def _clustering(task: Task) -> Measure:
    records = _records(task, "labelled")

    def score(vectors: np.ndarray, _: np.ndarray) -> dict[str, float]:
        return {"v_measure": metrics.v_measure(vectors, [r.label for r in records])}

    return Measure("v_measure", [r.texts[0] for r in records], [], score)


MEASURES: Mapping[str, Callable[[Task], Measure]] = {
    "ir": _ir,
    "sts": _sts,
    "triplet": _triplet,
    "classification": _classification,
    "clustering": _clustering,
    "reranking": _reranking,
}
