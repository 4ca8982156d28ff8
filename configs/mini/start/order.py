"""An order of dimensions in which the first ones keep similarities best, for embeddings that can be cut."""

import numpy as np

PAIRS = 20_000
NEAR = 5  # nearest texts of each, which are half of the pairs: what is found is decided among the near ones


def greedy(vectors: np.ndarray, count: int = 192, seed: int = 0) -> np.ndarray:
    """Dimensions in the order in which they are worth keeping.

    Each next one is that with which the cosines of pairs of texts come closest to those of whole vectors (least
    squares).

    Args:
        vectors: [n, D], centred: a few thousand.
        count: How many are chosen so; the others follow by their variance.
        seed: For the pairs.

    Returns:
        Int64 [D], a permutation.
    """
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    left, right = pairs(vectors, seed)
    products, left, right = (x.astype(np.float32) for x in (left * right, left**2, right**2))
    wanted = products.sum(axis=1)
    D = vectors.shape[1]
    chosen: list[int] = []
    dot, one, other = (np.zeros((len(wanted), 1), np.float32) for _ in range(3))
    for _ in range(min(count, D)):
        rest = np.setdiff1d(np.arange(D), chosen)
        cosines = (dot + products[:, rest]) / np.sqrt((one + left[:, rest]) * (other + right[:, rest]) + 1e-12)
        best = rest[np.argmin(np.square(cosines - wanted[:, None]).sum(axis=0))]
        chosen.append(int(best))
        dot, one, other = dot + products[:, [best]], one + left[:, [best]], other + right[:, [best]]
    rest = np.setdiff1d(np.arange(D), chosen)
    return np.array([*chosen, *rest[np.argsort(-vectors[:, rest].var(axis=0))]], np.int64)


def pairs(vectors: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays of vectors: of texts near each other, and of any two."""
    n = len(vectors)
    similar = vectors @ vectors.T
    np.fill_diagonal(similar, -np.inf)
    near = np.argpartition(-similar, min(NEAR, n - 1) - 1, axis=1)[:, :NEAR]
    rng = np.random.default_rng(seed)
    first = np.concatenate([np.repeat(np.arange(n), near.shape[1]), rng.integers(0, n, PAIRS)])
    second = np.concatenate([near.ravel(), rng.integers(0, n, PAIRS)])
    kept = rng.permutation(np.flatnonzero(first != second))[:PAIRS]
    return vectors[first[kept]], vectors[second[kept]]
