"""The measures of single texts: rankings, similarities, classes and clusters, each with a way to resample it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configs.mini.evaluation.systems import Encode, cut
from jina_jax import examples
from jina_jax.eval import metrics
from jina_jax.eval.judgements import from_records
from jina_jax.examples import Example
from jina_jax.records import InputError

# Records of a set that are measured; that a classifier is fitted on; characters of a labelled text (mails are long).
MOST, FITTED, CHARACTERS = 2000, 2000, 600
CUTOFF, SEEDS, RESAMPLES = 10, 5, 1000
# Pairs whose texts occur more often than this are resampled by their texts, since they do not vary on their own.
SHARED = 10


class Score(NamedTuple):
    """What a measure found.

    Attributes:
        value: The value.
        texts: Queries, pairs or texts behind it.
        again: The value of a resample, drawn by a generator. Scores of one set draw the same from equal generators,
            so that two models are compared on the same resamples.
    """

    value: float
    texts: int
    again: Callable[[np.random.Generator], float]


class Set(NamedTuple):
    """A test set: what is measured, and for classification what is fitted on."""

    records: Sequence[Example]
    fitted: Sequence[Example] = ()


# ---- Sets ------------------------------------------------------------------------------------------------------


def files(work: Path, family: str) -> dict[str, list[Path]]:
    """The files of each set of a family, by the set's name: "help.de", or "spam"."""
    folder = work / "test" / FAMILIES[family].folder
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        if path.name.endswith(".test.jsonl"):
            found[path.name.removesuffix(".test.jsonl")] = [
                path,
                path.with_name(path.name.replace(".test.", ".train.")),
            ]
        elif not path.name.endswith(".train.jsonl"):
            found[path.stem] = [path]
    if not found:
        raise InputError(f"{folder} holds no test sets; make them with python -m configs.mini.corpus --work {work}")
    return found


def sets(work: Path, family: str, limit: int | None = None) -> dict[str, Set]:
    """The sets of a family.

    Args:
        work: The work directory.
        family: One of `FAMILIES`.
        limit: Records of each set; None means `MOST`, and `FITTED` to fit on.

    Returns:
        Sets by name.

    Raises:
        InputError: If there are none, or a record is malformed.
    """
    found = {}
    for name, paths in files(work, family).items():
        parts = [list(examples.read(path)) for path in paths]
        if not all(parts):
            raise InputError(f"{paths[parts.index([])]} holds no records; make the corpus again")
        most = [limit or MOST, limit or FITTED]
        found[name] = Set(*(some(part, count) for part, count in zip(parts, most, strict=False)))
    return found


def some(records: list[Example], count: int) -> list[Example]:
    """At most so many records, the same ones in every run."""
    if len(records) <= count:
        return records
    return [records[place] for place in sorted(np.random.default_rng(0).permutation(len(records))[:count])]


# ---- Measures --------------------------------------------------------------------------------------------------


def bitext(given: Set, encode: Encode, dimensions: int) -> Score:
    """Share of the sentences whose own translation is the most similar one."""
    return _ranking(given, encode, dimensions, 1, ("text-matching", "text-matching"))


def retrieval(given: Set, encode: Encode, dimensions: int) -> Score:
    """nDCG@10 of passages for queries."""
    return _ranking(given, encode, dimensions, CUTOFF, ("retrieval.query", "retrieval.passage"))


def _ranking(given: Set, encode: Encode, dimensions: int, k: int, tasks: tuple[str, str]) -> Score:
    judged = from_records(given.records)
    texts = (judged.queries, judged.passages)
    queries, passages = (cut(encode(one, task), dimensions) for one, task in zip(texts, tasks, strict=True))
    found = np.array([ndcg(row, list(gains), k) for row, gains in zip(queries @ passages.T, judged.gains, strict=True)])
    return mean_of(found)


def ndcg(scores: np.ndarray, relevant: list[int], k: int) -> float:
    """nDCG@k of a query, by the similarity of all passages; top-1 accuracy if k is 1."""
    gains = np.zeros(len(scores), np.int64)
    gains[relevant] = 1
    kept = scores >= scores[relevant].min()  # the others cannot change it
    ranked = metrics.ranked(scores[kept], gains[kept])
    return metrics.ndcg(np.concatenate([ranked, np.zeros(k, np.int64)]), k)


def mean_of(values: np.ndarray) -> Score:
    """The mean of a number for each query or text."""
    return Score(
        float(values.mean()), len(values), lambda rng: float(values[rng.integers(len(values), size=len(values))].mean())
    )


def sts(given: Set, encode: Encode, dimensions: int) -> Score:
    """Spearman's correlation of cosines with human scores."""
    sides = [[record.texts[side] for record in given.records] for side in (0, 1)]
    a, b = (cut(encode(texts, "text-matching"), dimensions).astype(np.float64) for texts in sides)
    cosines, wanted = np.einsum("nd,nd->n", a, b), np.array([record.score for record in given.records])
    place = {text: number for number, text in enumerate(dict.fromkeys(sides[0] + sides[1]))}
    pairs = np.array([[place[text] for text in record.texts] for record in given.records])
    count = len(pairs)
    shared = 2 * count > SHARED * len(place)

    def again(rng: np.random.Generator) -> float:
        if shared:
            times = np.bincount(rng.integers(len(place), size=len(place)), minlength=len(place))
            drawn = np.repeat(np.arange(count), times[pairs[:, 0]] * times[pairs[:, 1]])
        else:
            drawn = rng.integers(count, size=count)
        return metrics.spearman(cosines[drawn], wanted[drawn])

    return Score(metrics.spearman(cosines, wanted), count, again)


def classification(given: Set, encode: Encode, dimensions: int) -> Score:
    """Share of the texts whose label logistic regression tells, fitted on others (as `jina_jax.eval.metrics`)."""
    from sklearn.linear_model import LogisticRegression

    fitted, held_out = (cut(encode(_texts(one), "classification"), dimensions) for one in (given.fitted, given.records))
    model = LogisticRegression(C=10.0, max_iter=1000).fit(fitted, [str(record.label) for record in given.fitted])
    wanted = np.array([str(record.label) for record in given.records])
    return mean_of((model.predict(held_out) == wanted).astype(np.float64))


def clustering(given: Set, encode: Encode, dimensions: int) -> Score:
    """V-measure of k-means with as many clusters as labels, the mean of several first centres."""
    from sklearn.cluster import KMeans

    vectors = cut(encode(_texts(given.records), "separation"), dimensions)
    _, labels = np.unique([str(record.label) for record in given.records], return_inverse=True)
    count = int(labels.max()) + 1
    if len(np.unique(vectors, axis=0)) < count:
        return mean_of(np.zeros(len(labels)))
    found = [KMeans(count, n_init=1, random_state=seed).fit_predict(vectors) for seed in range(SEEDS)]

    def value(drawn: np.ndarray) -> float:
        return float(np.mean([v_measure(labels[drawn], clusters[drawn]) for clusters in found]))

    return Score(
        value(np.arange(len(labels))), len(labels), lambda rng: value(rng.integers(len(labels), size=len(labels)))
    )


def v_measure(labels: np.ndarray, clusters: np.ndarray) -> float:
    """V-measure of clusters: twice their mutual information with the labels, over the sum of both entropies."""
    joint = np.zeros((labels.max() + 1, clusters.max() + 1))
    np.add.at(joint, (labels, clusters), 1 / len(labels))
    a, b, both = (_entropy(table) for table in (joint.sum(1), joint.sum(0), joint))
    return float(2 * (a + b - both) / (a + b)) if a + b else 1.0


def _entropy(shares: np.ndarray) -> float:
    some = shares[shares > 0]
    return float(-(some * np.log(some)).sum())


def _texts(records: Sequence[Example]) -> list[str]:
    return [record.texts[0][:CHARACTERS] for record in records]


class Family(NamedTuple):
    """A measure, the folder of its sets, and what it is called in tables."""

    folder: str
    measure: Callable[[Set, Encode, int], Score]
    unit: str


FAMILIES = {
    "bitext": Family("bitext", bitext, "top-1"),
    "retrieval": Family("retrieval", retrieval, "nDCG@10"),
    "sts": Family("sts", sts, "Spearman"),
    "classification": Family("labelled", classification, "accuracy"),
    "clustering": Family("labelled", clustering, "V-measure"),
}


# ---- Means and differences -------------------------------------------------------------------------------------


def with_means(scores: Mapping[str, Score]) -> dict[str, Score]:
    """Scores of sets, those of sources ("help" for "help.de" and the like), and "mean", that of the sources."""
    by_source: dict[str, list[Score]] = {}
    for name, score in scores.items():
        by_source.setdefault(name.split(".")[0], []).append(score)
    sources = {name: mean(some) for name, some in by_source.items()}
    return {**scores, **sources, "mean": mean(list(sources.values()))}


def mean(scores: Sequence[Score]) -> Score:
    """The mean of several scores, each resampled on its own."""
    if len(scores) == 1:
        return scores[0]
    return Score(
        float(np.mean([score.value for score in scores])),
        sum(score.texts for score in scores),
        lambda rng: float(np.mean([score.again(rng) for score in scores])),
    )


def difference(a: Score, b: Score, resamples: int | None = None, seed: int = 0) -> dict[str, Any]:
    """How much more a model has than another on the same set.

    Args:
        a: Its score.
        b: That of the other.
        resamples: How often both are resampled, in pairs; None means `RESAMPLES`.
        seed: Of the resamples.

    Returns:
        The "difference", and "low" and "high", which are the bounds of its 95% bootstrap interval.
    """
    seeds = np.random.SeedSequence(seed).spawn(resamples or RESAMPLES)
    found = [a.again(np.random.default_rng(one)) - b.again(np.random.default_rng(one)) for one in seeds]
    low, high = np.quantile(found, [0.025, 0.975])
    return {"difference": a.value - b.value, "low": float(low), "high": float(high)}
