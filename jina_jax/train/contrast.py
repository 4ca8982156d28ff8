"""Contrast of queries with passages: InfoNCE with the negatives of the whole batch, and what must not be one.

Axes: K records of a batch, M hard negatives of a record, D width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jina_jax.sharding import constrain
from jina_jax.train.cosines import product, unit
from jina_jax.train.grad_cache import in_chunks, parts_of

Scalar = Float[Array, ""]


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
    """Contrast queries with the passages of the batch, and back (van den Oord et al., 2018; Günther et al., 2023).

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
    hard = (negatives, negative_ids, negative_mask, negative_groups)
    records, batch = _prepare(queries, passages, *hard, query_ids, passage_ids, groups, in_batch)

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
        for what in ("queries", "passages"):
            back += _compare(rows, batch, what, in_batch, margin)
        logits += [block.logits(tau) for block in back]
        return _logsumexp(logits) - pair

    return in_chunks(contrast, records, parts_of(len(queries), chunk)).mean()


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
    hard = (negatives, negative_ids, negative_mask, negative_groups)
    records, batch = _prepare(queries, passages, *hard, query_ids, passage_ids, groups, in_batch)

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

    seen = in_chunks(look, records, parts_of(len(queries), chunk))
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
    number: Array
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
    negative_ids: Array | None,
    negative_mask: Array | None,
    negative_groups: Array | None,
    query_ids: Array | None,
    passage_ids: Array | None,
    groups: Array | None,
    in_batch: bool,
) -> tuple[_Records, _Records]:
    """The records of a batch as rows, and the same as candidates, whole on every device."""
    given = [one for one in (negative_ids, negative_mask, negative_groups) if one is not None]
    if given and negatives is None:
        raise ValueError("ids, mask and groups of hard negatives come with their vectors; negatives is None")
    if negative_ids is not None and passage_ids is None:
        raise ValueError("negative_ids tell what is a passage; they need passage_ids")
    number = jnp.arange(len(queries), dtype=jnp.int32)
    if negatives is not None and negative_mask is None:
        negative_mask = jnp.ones(negatives.shape[:2], bool)
    records = _Records(
        queries=unit(queries),
        passages=unit(passages),
        negatives=None if negatives is None else unit(negatives),
        number=number,
        query_ids=number if query_ids is None else query_ids,
        passage_ids=number if passage_ids is None else passage_ids,
        groups=jnp.full_like(number, -1) if groups is None else groups,
        negative_ids=negative_ids,
        negative_mask=negative_mask,
        negative_groups=negative_groups,
    )
    rows = jax.tree.map(lambda x: constrain(x, "B" + " _" * (x.ndim - 1)), records)
    if in_batch:
        rows = rows._replace(negatives=None, negative_ids=None, negative_mask=None, negative_groups=None)
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
        same = rows.number[:, None] == batch.number[None]
        alike = rows.query_ids[:, None] == batch.query_ids[None]
        alike |= rows.passage_ids[:, None] == batch.passage_ids[None]
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
            there &= jnp.repeat(rows.number[:, None] != batch.number[None], M, axis=1)
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


def _logsumexp(logits: Sequence[Array]) -> Array:
    """Over the last axis of several arrays side by side."""
    each = [jax.nn.logsumexp(one, axis=-1) for one in logits]
    total = each[0]
    for one in each[1:]:
        total = jnp.logaddexp(total, one)
    return total
