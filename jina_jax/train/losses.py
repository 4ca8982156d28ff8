"""Losses of embeddings, and of masked words: pure functions of vectors, in float32 (or float64, if given that).

Vectors may have any length, since similarities are cosines. Contrast with negatives has a file of its own.

Axes: K texts of a batch, N pairs or positions, D width, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from jina_jax.pooling import check_dimensions
from jina_jax.sharding import constrain
from jina_jax.train.contrast import info_nce as info_nce
from jina_jax.train.contrast import info_nce_statistics as info_nce_statistics
from jina_jax.train.cosines import all_pairs, product
from jina_jax.train.cosines import cosine as cosine
from jina_jax.train.grad_cache import parts_of

Scalar = Float[Array, ""]
# Logits of what is left out where all may be: finite, so that gradients are; two of them add up in float32.
_LOW = -1e30


# ---- Order of similarities -------------------------------------------------------------------------------------------


def cosent(
    similarities: Float[Array, "N"],
    scores: Shaped[Array, "N"],
    *,
    tau: float,
    valid: Bool[Array, "N"] | None = None,
) -> Scalar:
    """Pairs with the higher score should be the more similar ones (CoSENT; Su, 2022): O(N log N).

    ln(1 + the sum of exp((s_j - s_i) / tau) over all i, j with score_i > score_j). The paper misprints it, with tau
    outside of the exponential.

    Args:
        similarities: Cosines of pairs of texts.
        scores: How similar they should be; only their order counts.
        tau: Temperature.
        valid: False for pairs that do not count.

    Returns:
        The loss; 0 where no two scores differ.
    """
    valid = jnp.ones(similarities.shape, bool) if valid is None else valid
    similarities, scores, valid = (constrain(x, "_") for x in (similarities, scores, valid))
    order = jnp.argsort(scores)
    scores, logits, valid = scores[order], similarities[order] / tau, valid[order]
    # For each pair, the sum over all that have a higher score; ties have not.
    higher = jax.lax.cumlogsumexp(jnp.where(valid, -logits, _LOW), reverse=True)
    higher = jnp.append(higher, jnp.full((1,), _LOW, higher.dtype))
    first = jnp.searchsorted(scores, scores, side="right")
    return jax.nn.softplus(jax.nn.logsumexp(jnp.where(valid, logits, _LOW) + higher[first]))


def cosent_binary(
    similarities: Float[Array, "*N"],
    positive: Bool[Array, "*N"],
    *,
    tau: float,
    valid: Bool[Array, "*N"] | None = None,
) -> Scalar:
    """`cosent` where scores are 0 or 1: the sum over pairs of pairs is a product of two sums, O(N).

    Args:
        similarities: Cosines of pairs of texts; any axes.
        positive: Whether their score is 1.
        tau: Temperature.
        valid: False for pairs that do not count.

    Returns:
        The loss; 0 where all scores are the same.
    """
    logits = similarities / tau
    counts = jnp.ones(positive.shape, bool) if valid is None else valid
    low = jax.nn.logsumexp(jnp.where(counts & ~positive, logits, _LOW))
    high = jax.nn.logsumexp(jnp.where(counts & positive, -logits, _LOW))
    return jax.nn.softplus(low + high)


def cosent_naive(similarities: Float[Array, "N"], scores: Shaped[Array, "N"], *, tau: float) -> Scalar:
    """`cosent` as its formula stands, O(N²): the judge of the other two.

    Args:
        similarities: Cosines of pairs of texts.
        scores: How similar they should be.
        tau: Temperature.

    Returns:
        The loss.
    """
    logits = (similarities[None] - similarities[:, None]) / tau
    return jnp.log1p(jnp.sum(jnp.where(scores[:, None] > scores[None], jnp.exp(logits), 0.0)))


def separation(
    vectors: Float[Array, "K D"], labels: Int[Array, "K"], *, tau: float, valid: Bool[Array, "K"] | None = None
) -> Scalar:
    """Every two texts of one label should be more similar than every two of different ones.

    `cosent_binary` over all pairs of texts. (The paper's equation has pairs of one label only, for which it is 0.)

    Args:
        vectors: One for each text.
        labels: Their labels.
        tau: Temperature.
        valid: False for texts that do not count.

    Returns:
        The loss; 0 unless there are two texts of one label and two of different ones.
    """
    cosines, ahead = all_pairs(vectors)
    pairs = ahead > 0
    if valid is not None:
        pairs &= valid[:, None] & valid[None]
    return cosent_binary(cosines, labels[:, None] == labels[None], tau=tau, valid=pairs)


# ---- Words -----------------------------------------------------------------------------------------------------------


def mlm(
    features: Float[Array, "N D"],
    table: Float[Array, "V D"],
    bias: Float[Array, "V"],
    targets: Int[Array, "N"],
    weights: Float[Array, "N"],
    *,
    chunk: int | None = None,
    words: int | None = None,
) -> Scalar:
    """Cross entropy of words that were masked, without ever holding all scores (N * V of them).

    Args:
        features: `Model.mlm_features` at the masked positions. Products are of their type, accumulated in float32.
        table: The word table.
        bias: Of the scores.
        targets: The words that were there.
        weights: Of the positions; 0 for those that only fill up.
        chunk: Rows of the table scored at once; None scores all.
        words: Rows of the table that are words; None means all. Rows that only make it even come after them.

    Returns:
        The weighted mean; 0 if all weights are 0.
    """
    V, D = table.shape
    words = V if words is None else words
    parts = parts_of(V, chunk)
    fewest = 1 if chunk is None else math.ceil(V / chunk)
    rows = V // parts
    if parts > 2 * fewest:  # hardly any divisor: fill up instead, at the price of a copy
        parts, rows = fewest, math.ceil(V / fewest)
        table = jnp.pad(table, ((0, parts * rows - V), (0, 0)))
        bias = jnp.pad(bias, (0, parts * rows - V))
    # The loop takes the table in parts, and so its gradient comes in parts; of a whole table it would be added up anew
    # for each. Where the table is split over devices, each of them holds rows of every part.
    starts = jnp.arange(parts, dtype=jnp.int32)
    if jax.sharding.get_abstract_mesh().shape.get("tensor", 1) > 1:
        step = parts
        tables = table.reshape(rows, parts, D).swapaxes(0, 1)
        biases = bias.reshape(rows, parts).swapaxes(0, 1)
    else:
        step, starts = 1, starts * rows
        tables, biases = table.reshape(parts, rows, D), bias.reshape(parts, rows)
    x = constrain(features, "B _")

    def score(seen: tuple[Array, Array], part: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        total, target = seen
        table, bias, start = part
        scores = product("ND,VD->NV", x, constrain(table, "V _").astype(x.dtype))
        scores = constrain(scores, "B V") + bias.astype(scores.dtype)[None]
        word = start + step * jnp.arange(rows, dtype=jnp.int32)[None]
        scores = jnp.where(word < words, scores, _LOW)
        target += jnp.sum(jnp.where(word == targets[:, None], scores, 0.0), axis=1)
        return (jnp.logaddexp(total, jax.nn.logsumexp(scores, axis=1)), target), None

    dtype = np.promote_types(features.dtype, jnp.float32)
    first = (constrain(jnp.full((len(x),), _LOW, dtype), "B"), constrain(jnp.zeros((len(x),), dtype), "B"))
    scanned = (constrain(tables, "_ V D"), constrain(biases, "_ V"), starts)
    (total, target), _ = jax.lax.scan(jax.checkpoint(score, prevent_cse=False), first, scanned)
    weights = weights.astype(dtype)
    count = weights.sum()
    return jnp.sum(weights * (total - target)) / jnp.where(count > 0, count, 1.0)


# ---- On top of other losses ------------------------------------------------------------------------------------------


def matryoshka(
    loss: Callable[..., Array],
    dims: Sequence[int] | None,
    weights: Sequence[float] | None = None,
    reduce: str = "sum",
) -> Callable[..., tuple[Array, dict[int, Array]]]:
    """A loss at several sizes of the vectors (Kusupati et al., 2022).

    Args:
        loss: Function of vectors [..., D] that takes cosines, which renormalises what is cut.
        dims: Sizes; None means the vectors' own alone.
        weights: Their weights; None means 1 for all.
        reduce: "sum", or "mean", which is the sum divided by the number of sizes.

    Returns:
        A function of vectors (None passes through) and of the loss's keywords, to the loss and those of each size.

    Raises:
        ValueError: If there are other weights than sizes, or now or later, if a size is more than the vectors have.
    """
    if reduce not in ("sum", "mean"):
        raise ValueError(f"{reduce=} must be sum or mean")
    if weights is not None and len(weights) != len(dims or (0,)):
        raise ValueError(f"{len(weights)} weights for {len(dims or (0,))} sizes")

    def at_every_size(*vectors: Array | None, **keywords: Any) -> tuple[Array, dict[int, Array]]:
        full = next(x.shape[-1] for x in vectors if x is not None)
        by_size = {}
        for size in dims or (full,):
            check_dimensions(size, full)
            by_size[size] = loss(*(None if x is None else x[..., :size] for x in vectors), **keywords)
        factors = weights or (1.0,) * len(by_size)
        total = sum(factor * one for factor, one in zip(factors, by_size.values(), strict=True))
        return jnp.asarray(total) / (len(by_size) if reduce == "mean" else 1), by_size

    return at_every_size


def distill(
    vectors: Float[Array, "K D"], teacher: Float[Array, "K teacher"], *, how: str = "cosine", tau: float = 0.05
) -> Scalar:
    """How far vectors are from those of another model.

    Args:
        vectors: One for each text.
        teacher: Another model's; no gradient reaches them.
        how: "cosine", one minus the cosine of the two vectors of a text. Or "similarity_kl", for teachers of any width:
            the softmax of a text's cosines with the other texts should be the teacher's (Kullback-Leibler divergence of
            ours from theirs).
        tau: Temperature of both softmaxes.

    Returns:
        The mean over texts.

    Raises:
        ValueError: If the widths differ and `how` compares vectors.
    """
    teacher = jax.lax.stop_gradient(teacher.astype(vectors.dtype))
    if how == "cosine":
        if vectors.shape != teacher.shape:
            raise ValueError(
                f"a teacher of width {teacher.shape[1]} cannot be compared with vectors of width {vectors.shape[1]} "
                "one by one; how='similarity_kl' can"
            )
        return jnp.mean(1.0 - cosine(vectors, teacher))
    if how != "similarity_kl":
        raise ValueError(f"{how=} must be cosine or similarity_kl")

    def others(vectors: Array) -> Array:
        """Log of the softmax over the other texts, and nearly nothing for a text itself."""
        cosines, ahead = all_pairs(vectors)
        return jax.nn.log_softmax(jnp.where(ahead == 0, _LOW, cosines / tau), axis=1)

    wanted, found = others(teacher), others(vectors)
    return jnp.mean(jnp.sum(jnp.where(wanted > _LOW / 2, jnp.exp(wanted) * (wanted - found), 0.0), axis=1))


def spread_out(vectors: Float[Array, "K D"]) -> Scalar:
    """Push vectors of different texts apart, as if drawn at random from the sphere (Zhang et al., 2017).

    Args:
        vectors: One for each text.

    Returns:
        The square of their mean cosine, plus what the mean of the squares has above the 1 / D of random directions.
        0 for one text.
    """
    cosines, ahead = all_pairs(vectors)
    cosines = jnp.where(ahead == 0, 0.0, cosines)
    K, D = vectors.shape
    count = max(K * (K - 1), 1)
    return jnp.square(cosines.sum() / count) + jax.nn.relu(jnp.square(cosines).sum() / count - 1 / D)
