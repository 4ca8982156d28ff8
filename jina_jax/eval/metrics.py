"""Scores of rankings, similarities, clusters and classes, in NumPy; scikit-learn where something must be fitted.

Ties count against the model: a passage ranks behind all that are as similar and less relevant, so that a model whose
vectors are all the same finds nothing, wherever the right passage happens to stand. Values that are not numbers rank
last.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Int, Num

NEEDS_SKLEARN = "classification and clustering need scikit-learn; pip install 'jina-jax[train]'"


def ranked(scores: Float[np.ndarray, "P"], gains: Int[np.ndarray, "P"]) -> Int[np.ndarray, "P"]:
    """Order passages by their scores.

    Args:
        scores: Similarity of each passage to the query.
        gains: How relevant each is; 0 for not at all.

    Returns:
        The gains from the highest score to the lowest.
    """
    return gains[np.lexsort((gains, -np.nan_to_num(scores, nan=-np.inf)))]


def ndcg(ranked: Int[np.ndarray, "P"], k: int) -> float:
    """Normalised discounted cumulative gain, gains taken as they are (as trec_eval and scikit-learn do).

    Args:
        ranked: Gains of all passages, in the order in which they were found.
        k: How many of them count.

    Returns:
        From 0 to 1; 0 if nothing is relevant.
    """
    discounts = 1 / np.log2(np.arange(2, min(k, len(ranked)) + 2))
    ideal = -np.sort(-ranked)[:k] @ discounts
    return float(ranked[:k] @ discounts / ideal) if ideal else 0.0


def mrr(ranked: Int[np.ndarray, "P"], k: int) -> float:
    """One over the place of the first relevant passage, counted from 1; 0 if the first k have none."""
    places = np.flatnonzero(ranked[:k])
    return float(1 / (places[0] + 1)) if len(places) else 0.0


def recall(ranked: Int[np.ndarray, "P"], k: int) -> float:
    """Share of the relevant passages among the first k; 0 if there are none."""
    return np.count_nonzero(ranked[:k]) / max(int(np.count_nonzero(ranked)), 1)


def average_precision(ranked: Int[np.ndarray, "P"]) -> float:
    """Mean over the relevant passages of the share of relevant ones up to their places; 0 if there are none."""
    places = np.flatnonzero(ranked) + 1
    return float(np.mean(np.arange(1, len(places) + 1) / places)) if len(places) else 0.0


def spearman(a: Num[np.ndarray, "N"], b: Num[np.ndarray, "N"]) -> float:
    """Correlation of ranks, equal values sharing theirs.

    Args:
        a: Numbers.
        b: As many.

    Returns:
        From -1 to 1; 0 where either has no order: all equal, or not numbers.
    """
    from scipy import stats

    if len(a) < 2 or not (np.isfinite(a).all() and np.isfinite(b).all()) or np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(stats.spearmanr(a, b).statistic)


def v_measure(vectors: Float[np.ndarray, "N E"], labels: list[Any], seed: int = 0) -> float:
    """How well k-means with as many clusters as labels finds the labels (Rosenberg and Hirschberg, 2007).

    Args:
        vectors: Embeddings.
        labels: The label of each.
        seed: Of the first centres.

    Returns:
        From 0 to 1; 0 if there are fewer different vectors than labels.
    """
    try:
        from sklearn.cluster import KMeans
        from sklearn.metrics import v_measure_score
    except ImportError as error:
        raise ImportError(NEEDS_SKLEARN) from error

    count, vectors = len(set(labels)), np.nan_to_num(vectors)
    if len(np.unique(vectors, axis=0)) < count:
        return 0.0
    found = KMeans(count, n_init=4, random_state=seed).fit_predict(vectors)
    return float(v_measure_score(labels, found))


def classification(
    train: Float[np.ndarray, "N E"], train_labels: list[Any], vectors: Float[np.ndarray, "M E"], labels: list[Any]
) -> dict[str, float]:
    """How well logistic regression tells the labels of vectors.

    Args:
        train: Embeddings to fit on.
        train_labels: The label of each.
        vectors: Embeddings to tell the labels of.
        labels: What they should be.

    Returns:
        "accuracy", and "f1": its mean over the labels.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import f1_score
    except ImportError as error:
        raise ImportError(NEEDS_SKLEARN) from error

    names, given = sorted(map(str, set(train_labels))), np.array([str(label) for label in labels])
    if len(names) < 2:
        found = np.full(len(given), names[0])
    else:
        model = LogisticRegression(C=10.0, max_iter=1000)
        found = model.fit(np.nan_to_num(train), [str(x) for x in train_labels]).predict(np.nan_to_num(vectors))
    return {
        "accuracy": float(np.mean(found == given)),
        "f1": float(f1_score(given, found, average="macro", zero_division=0.0)),
    }
