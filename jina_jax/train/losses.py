"""Losses of embeddings, and of masked words: pure functions of vectors, in float32 (or float64, if given that).

Vectors may have any length: similarities are cosines, and products keep all their bits. Over a mesh the rows of a matrix
of similarities are split, and its columns are whole on every device: negatives come from the whole batch.

Axes: K records of a batch, M hard negatives of a record, D width, N rows, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jina_jax.pooling import check_dimensions
from jina_jax.sharding import constrain
from jina_jax.train.grad_cache import in_chunks

Scalar = Float[Array, ""]
# Logits of what is left out where all may be: finite, so that gradients are; two of them add up in float32.
_LOW = -1e30


# ---- Contrast with the other records of the batch --------------------------------------------------------------------


def info_nce(
    queries: Float[Array, "K D"],
    passages: Float[Array, "K D"],
    negatives: Float[Array, "K M D"] | None = None,
    *,
    tau: float,
    query_ids: Int[Array, "K"] | None = None,
    passage_ids: Int[Array, "K"] | None = None,
    negative_ids: Int[Array, "K M"] | None = None,
    negative_mask: Bool[Array, "K M"] | None = None,
    groups: Int[Array, "K"] | None = None,
    negative_groups: Int[Array, "K M"] | None = None,
    directions: str = "both",
    in_batch: bool = True,
    margin: float | None = None,
    hardness: float = 0.0,
    chunk: int | None = None,
) -> Scalar:
    """Contrast of each query with the passages of the batch, and back (van den Oord et al., 2018; Günther et al., 2023).

    The hard negatives of all records are candidates of every query, but passages are compared with queries alone. What
    is no negative of a record, though it stands in the batch: passages and queries of records with the same query or
    the same passage, its own passage as somebody's hard negative, and what belongs to its group. A record's own pair
    always counts.

    Args:
        queries: Vectors of queries.
        passages: Vectors of their passages.
        negatives: Vectors of their hard negatives.
        tau: Temperature.
        query_ids: Equal for equal queries; None means that all differ.
        passage_ids: Equal for equal passages; None means that all differ.
        negative_ids: Ids of the hard negatives, among those of passages; None means that none is a passage.
        negative_mask: False for hard negatives that are not there.
        groups: Records of one group are no negatives of each other; -1 for none.
        negative_groups: Groups of the hard negatives.
        directions: "both" adds the cross entropies of queries among passages and of passages among queries. "joint" has
            one softmax over these and over queries among themselves and passages among themselves (Li et al., 2023).
        in_batch: Whether other records of the batch are negatives; if not, a query has its own hard ones alone.
        margin: Leave out what is more similar than the pair by more than this (Zhang et al., 2025); None leaves in.
        hardness: Logits of a query's negatives rise by so many times their cosines, as a constant (Lan et al., 2025).
        chunk: Rows of similarities held at once; None holds all. The value is the same.

    Returns:
        The mean over records; of "both", the sum of two means.

    Raises:
        ValueError: If arguments contradict each other.
    """
    if directions not in ("both", "joint"):
        raise ValueError(f"{directions=} must be both or joint")
    records, batch = _prepare(
        queries, passages, negatives, query_ids, passage_ids, negative_ids, negative_mask, groups, negative_groups
    )

    def contrast(rows: _Records, _: None) -> Float[Array, "rows"]:
        out = _compare(rows, batch, "forth", in_batch, margin)
        logits = [block.logits(tau, hardness) for block in out]
        pair = out[0].pair(logits[0])
        if not in_batch:
            return _logsumexp(logits) - pair
        back = _compare(rows, batch, "back", in_batch, margin)
        if directions == "both":
            (turned,) = (block.logits(tau) for block in back)
            return _logsumexp(logits) - pair + _logsumexp([turned]) - back[0].pair(turned)
        within = [
            *_compare(rows, batch, "queries", in_batch, margin),
            *_compare(rows, batch, "passages", in_batch, margin),
        ]
        logits += [block.logits(tau) for block in [*back, *within]]
        return _logsumexp(logits) - pair

    return in_chunks(contrast, records, _parts(len(queries), chunk)).mean()


def info_nce_statistics(
    queries: Float[Array, "K D"],
    passages: Float[Array, "K D"],
    negatives: Float[Array, "K M D"] | None = None,
    *,
    query_ids: Int[Array, "K"] | None = None,
    passage_ids: Int[Array, "K"] | None = None,
    negative_ids: Int[Array, "K M"] | None = None,
    negative_mask: Bool[Array, "K M"] | None = None,
    groups: Int[Array, "K"] | None = None,
    negative_groups: Int[Array, "K M"] | None = None,
    in_batch: bool = True,
    margin: float | None = None,
    chunk: int | None = None,
) -> dict[str, Scalar]:
    """What a query finds among its candidates, in the same batch as `info_nce` sees it.

    Args:
        queries: As in `info_nce`, like all that follow.
        passages: Vectors.
        negatives: Vectors.
        query_ids: Ids.
        passage_ids: Ids.
        negative_ids: Ids.
        negative_mask: Which are there.
        groups: Groups.
        negative_groups: Groups.
        in_batch: Whether other records are negatives.
        margin: Margin.
        chunk: Rows held at once.

    Returns:
        "accuracy", the share of queries whose passage beats every negative (a query without any counts as right);
        "positive", "negative" and "hardest", mean cosines of pairs, of all negatives, and of each query's nearest one;
        "masked", the number of candidates that were there but did not count as negatives.
    """
    records, batch = _prepare(
        queries, passages, negatives, query_ids, passage_ids, negative_ids, negative_mask, groups, negative_groups
    )

    def look(rows: _Records, _: None) -> dict[str, Array]:
        blocks = _compare(rows, batch, "forth", in_batch, margin)
        pair = blocks[0].pair(blocks[0].cosines)
        cosines = jnp.concatenate([block.cosines for block in blocks], axis=1)
        counts = jnp.concatenate([block.keep & ~block.own for block in blocks], axis=1)
        masked = sum(jnp.sum(block.there & ~block.keep, axis=1, dtype=jnp.int32) for block in blocks)
        return {
            "pair": pair,
            "total": jnp.sum(jnp.where(counts, cosines, 0.0), axis=1),
            "hardest": jnp.max(cosines, axis=1, where=counts, initial=-2.0),
            "count": jnp.sum(counts, axis=1, dtype=jnp.int32),
            "masked": jnp.asarray(masked),
        }

    seen = in_chunks(look, records, _parts(len(queries), chunk))
    dtype, any_ = seen["pair"].dtype, seen["count"] > 0
    some = jnp.maximum(any_.sum(dtype=jnp.int32), 1).astype(dtype)
    return {
        "accuracy": jnp.mean(seen["pair"] > seen["hardest"], dtype=dtype),
        "positive": seen["pair"].mean(),
        "negative": seen["total"].sum() / jnp.maximum(seen["count"].astype(dtype).sum(), 1.0),
        "hardest": jnp.sum(jnp.where(any_, seen["hardest"], 0.0)) / some,
        "masked": seen["masked"].astype(dtype).sum(),
    }


class _Records(NamedTuple):
    """Records at unit length: those that are compared, or those that they are compared with. Leading axis K."""

    queries: Array
    passages: Array
    negatives: Array | None
    index: Array
    query_ids: Array
    passage_ids: Array
    groups: Array
    negative_ids: Array | None
    negative_mask: Array | None
    negative_groups: Array | None


class _Block(NamedTuple):
    """Some of the candidates of each row: [rows, candidates].

    `own` is a row's own pair, `there` is False for candidates that are not there, `keep` for those that do not count.
    """

    cosines: Array
    own: Array
    there: Array
    keep: Array

    def logits(self, tau: float, hardness: float = 0.0) -> Array:
        """Scores for the softmax."""
        scores = self.cosines / tau
        if hardness:
            extra = jnp.where(self.own, 0.0, jax.lax.stop_gradient(self.cosines))
            scores = scores + hardness * extra
        return jnp.where(self.keep, scores, -jnp.inf)

    def pair(self, values: Array) -> Array:
        """The value of each row's own pair."""
        return jnp.sum(jnp.where(self.own, values, 0.0), axis=1)


def _prepare(
    queries: Array,
    passages: Array,
    negatives: Array | None,
    query_ids: Array | None,
    passage_ids: Array | None,
    negative_ids: Array | None,
    negative_mask: Array | None,
    groups: Array | None,
    negative_groups: Array | None,
) -> tuple[_Records, _Records]:
    """The records of a batch as rows, and the same as candidates, whole on every device."""
    given = [one for one in (negative_ids, negative_mask, negative_groups) if one is not None]
    if given and negatives is None:
        raise ValueError("ids, mask and groups of hard negatives come with their vectors; negatives is None")
    if negative_ids is not None and passage_ids is None:
        raise ValueError("negative_ids tell what is a passage; they need passage_ids")
    index = jnp.arange(len(queries), dtype=jnp.int32)
    if negatives is not None and negative_mask is None:
        negative_mask = jnp.ones(negatives.shape[:2], bool)
    records = _Records(
        queries=_unit(queries),
        passages=_unit(passages),
        negatives=None if negatives is None else _unit(negatives),
        index=index,
        query_ids=index if query_ids is None else query_ids,
        passage_ids=index if passage_ids is None else passage_ids,
        groups=jnp.full_like(index, -1) if groups is None else groups,
        negative_ids=negative_ids,
        negative_mask=negative_mask,
        negative_groups=negative_groups,
    )
    rows = jax.tree.map(lambda x: constrain(x, "B" + " _" * (x.ndim - 1)), records)
    return rows, jax.tree.map(lambda x: constrain(x, " ".join("_" * x.ndim)), records)


def _compare(rows: _Records, batch: _Records, what: str, in_batch: bool, margin: float | None) -> list[_Block]:
    """Candidates of each row: of its query ("forth", "queries") or its passage ("back", "passages")."""
    passages = what in ("forth", "passages")
    anchors = rows.queries if what in ("forth", "queries") else rows.passages
    pair = jnp.sum(rows.queries * rows.passages, axis=1)[:, None]

    def near(cosines: Array) -> Array:
        if margin is None:
            return jnp.zeros(cosines.shape, bool)
        return cosines > pair + margin

    blocks = []
    if in_batch:
        cosines = product("KD,ND->KN", anchors, batch.passages if passages else batch.queries)
        same = rows.index[:, None] == batch.index[None]
        alike = (rows.query_ids[:, None] == batch.query_ids[None]) | (
            rows.passage_ids[:, None] == batch.passage_ids[None]
        )
        alike |= _in_group(rows.groups[:, None], batch.groups[None])
        crossing = what in ("forth", "back")
        own = same & crossing
        there = jnp.ones(cosines.shape, bool) if crossing else ~same
        blocks.append(_Block(cosines, own, there, own | (there & ~(alike | near(cosines)))))
    else:
        yes = jnp.ones(pair.shape, bool)
        blocks.append(_Block(pair, yes, yes, yes))

    if passages and batch.negatives is not None:
        # Those of all records, side by side; or each row's own.
        pattern, held, shape = "KD,KMD->KM", rows, (len(anchors), -1)
        if in_batch:
            pattern, held, shape = "KD,NMD->KNM", batch, (1, -1)
        cosines = product(pattern, anchors, held.negatives).reshape(len(anchors), -1)  # type: ignore[arg-type]
        there = held.negative_mask.reshape(shape)  # type: ignore[union-attr]
        if what == "passages":
            M = batch.negatives.shape[1]
            there &= jnp.repeat(rows.index[:, None] != batch.index[None], M, axis=1)
        alike = near(cosines)
        if held.negative_ids is not None:
            alike |= held.negative_ids.reshape(shape) == rows.passage_ids[:, None]
        if held.negative_groups is not None:
            alike |= _in_group(held.negative_groups.reshape(shape), rows.groups[:, None])
        there = jnp.broadcast_to(there, cosines.shape)
        blocks.append(_Block(cosines, jnp.zeros(cosines.shape, bool), there, there & ~alike))
    return [block._replace(cosines=constrain(block.cosines, "B _")) for block in blocks]


def _in_group(one: Array, other: Array) -> Array:
    return (one == other) & (one >= 0)


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
    return jax.nn.softplus(_logsumexp([(jnp.where(valid, logits, _LOW) + higher[first])[None]])[0])


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
    unit = _unit(vectors)
    cosines = constrain(product("KD,ND->KN", constrain(unit, "B _"), constrain(unit, "_ _")), "B _")
    index = jnp.arange(len(vectors), dtype=jnp.int32)
    pairs = index[:, None] < index[None]
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
        features: `Model.mlm_features` at the masked positions. Products are taken in their type, accumulated in float32.
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
    parts = _parts(V, chunk)
    fewest = 1 if chunk is None else math.ceil(V / chunk)
    rows = V // parts
    if parts > 2 * fewest:  # hardly any divisor: fill up instead, at the price of a copy
        parts, rows = fewest, math.ceil(V / fewest)
        table = jnp.pad(table, ((0, parts * rows - V), (0, 0)))
        bias = jnp.pad(bias, (0, parts * rows - V))
    # The table comes in as parts, so that so do its gradients: as one, all of it would be added to for every part.
    # Where it is split over devices, each holds rows of every part.
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

    dtype = jnp.promote_types(features.dtype, jnp.float32)
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
        A function of vectors (None passes through) and what keywords the loss takes, to the loss and those of each size.

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
        total = sum(
            weight * one for weight, one in zip(weights or (1.0,) * len(by_size), by_size.values(), strict=True)
        )
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
    student, teacher = _unit(vectors), jax.lax.stop_gradient(_unit(teacher).astype(_unit(vectors).dtype))
    if how == "cosine":
        if student.shape != teacher.shape:
            raise ValueError(
                f"a teacher of width {teacher.shape[1]} cannot be compared with vectors of width {student.shape[1]} "
                "one by one; how='similarity_kl' can"
            )
        return jnp.mean(1.0 - jnp.sum(student * teacher, axis=1))
    if how != "similarity_kl":
        raise ValueError(f"{how=} must be cosine or similarity_kl")

    def others(unit: Array) -> Array:
        """Log of the softmax over the other texts, and nearly nothing for a text itself."""
        cosines, self_ = _all_pairs(unit)
        return jax.nn.log_softmax(jnp.where(self_, _LOW, cosines / tau), axis=1)

    wanted, found = others(teacher), others(student)
    return jnp.mean(jnp.sum(jnp.where(wanted > _LOW / 2, jnp.exp(wanted) * (wanted - found), 0.0), axis=1))


def spread_out(vectors: Float[Array, "K D"]) -> Scalar:
    """Push vectors of different texts apart, as if drawn at random from the sphere (Zhang et al., 2017).

    Args:
        vectors: One for each text.

    Returns:
        The square of their mean cosine, and what the mean of the squares has above the 1 / D of random directions. 0 for
        one text.
    """
    cosines, self_ = _all_pairs(_unit(vectors))
    cosines = jnp.where(self_, 0.0, cosines)
    K, D = vectors.shape
    count = max(K * (K - 1), 1)
    return jnp.square(cosines.sum() / count) + jax.nn.relu(jnp.square(cosines).sum() / count - 1 / D)


# ---- Small parts -----------------------------------------------------------------------------------------------------


def cosine(one: Float[Array, "N D"], other: Float[Array, "N D"]) -> Float[Array, "N"]:
    """Cosine of each row with the same row of another array.

    Args:
        one: Vectors of any length.
        other: As many.

    Returns:
        Float32, or float64 for such vectors.
    """
    return jnp.sum(_unit(one) * _unit(other), axis=1)


def product(pattern: str, x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """Einsum of operands of one type, accumulated in at least float32, that keeps all bits of float32 ones.

    Args:
        pattern: As for einsum.
        x: First operand.
        y: Second one.

    Returns:
        Float32, or float64 for such operands.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    precision = jax.lax.Precision.HIGHEST if x.dtype == dtype else None
    return jnp.einsum(pattern, x, y, precision=precision, preferred_element_type=dtype)


def _unit(vectors: Array) -> Array:
    """Unit vectors in at least float32; zeros stay zeros, and have a finite gradient."""
    x = vectors.astype(jnp.promote_types(vectors.dtype, jnp.float32))
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def _all_pairs(unit: Array) -> tuple[Array, Array]:
    """Cosines of all pairs, and which are of a vector with itself."""
    cosines = constrain(product("KD,ND->KN", constrain(unit, "B _"), constrain(unit, "_ _")), "B _")
    index = jnp.arange(len(unit), dtype=jnp.int32)
    return cosines, index[:, None] == index[None]


def _logsumexp(logits: Sequence[Array]) -> Array:
    """Over the last axis of several arrays side by side."""
    each = [jax.nn.logsumexp(one, axis=-1) for one in logits]
    total = each[0]
    for one in each[1:]:
        total = jnp.logaddexp(total, one)
    return total


def _parts(count: int, most: int | None) -> int:
    """Into how few equal parts so many rows can be divided, with at most so many in each."""
    fewest = 1 if most is None else math.ceil(count / most)
    return next(parts for parts in range(fewest, count + 1) if count % parts == 0)
