"""Body of the forward attention kernel for TPUs (Dao, 2023, algorithm 1, on transposed scores)."""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from jina_jax.kernels import flash
from jina_jax.kernels.common import LOG2_E, NO_KEYS
from jina_jax.kernels.flash import LOWEST, MASKED, NT, Item, Shape, dot, head_rows


def body(shape: Shape, refs: dict[str, Any]) -> None:
    """Attention of one group of heads, one span of queries and one span of keys.

    Args:
        shape: Static sizes.
        refs: References by name, as `tpu.forward` lists them. Given are items, words, q, k, v and, where there are
            any, q_ids, k_ids, q_table, k_table; wanted are out and logsumexp; the rest is scratch.
    """
    program = _, _, query_span, key_span = tuple(pl.program_id(axis) for axis in range(4))
    k = refs["rotated_k"] if "rotated_k" in refs else refs["k"].at[0]
    flash.prepare(
        shape,
        key_span == 0,
        lambda rows, i: prepare_queries(shape, refs, rows, i),
        (query_span == 0) | (shape.key_spans > 1),
        lambda rows, j: prepare_keys(shape, refs, rows, j),
    )

    def produce(item: Item, head: int, columns: slice, masked: bool) -> None:
        """Scores of a chunk, and their maxima."""
        queries, row, top = flash.part_of(item.query, shape.query, columns), slice(head, head + 1), None
        for part in shape.parts:
            scores = dot(k[flash.part_of(item.key, shape.key, part)], refs["masked_q"][head, queries], NT)
            if masked:
                scores = jnp.where(flash.visible(shape, refs, item, columns, part), scores, MASKED)
            refs["scores"][item.slot, head, part, columns] = scores
            part_top = scores.max(axis=0, keepdims=True)
            top = part_top if top is None else jnp.maximum(top, part_top)
        refs["tops"][item.slot, row, columns] = top

    def weigh(item: Item, head: int, columns: slice) -> None:
        """Scores to weights, relative to the largest score so far."""
        row, at = slice(head, head + 1), item.query
        before = refs["top"][at, row, columns]
        top = jnp.maximum(before, refs["tops"][item.slot, row, columns])
        shrink = jnp.exp2(before - top)
        total = refs["total"][at, row, columns] * shrink
        for part in shape.parts:
            weights = jnp.exp2(refs["scores"][item.slot, head, part, columns] - top)
            total = total + weights.sum(axis=0, keepdims=True)
            if shape.rate:
                kept = flash.kept(shape, refs["words"], program, item, head, columns, part)
                weights = jnp.where(kept, weights, 0.0)
            refs["weights"][item.slot, head, part, columns] = weights.astype(refs["v"].dtype)
        refs["total"][at, row, columns] = total
        refs["top"][at, row, columns] = top
        refs["shrink"][item.slot, row, columns] = shrink

    def consume(item: Item, head: int, columns: slice) -> None:
        """Weights times values, added to what earlier keys gave."""
        row, rows, at = slice(head, head + 1), head_rows(shape, head), item.query
        values = dot(refs["transposed_v"][item.key, rows], refs["weights"][item.slot, head, :, columns])
        before = jnp.where(item.first, 0.0, refs["sum"][at, rows, columns])
        refs["sum"][at, rows, columns] = before * refs["shrink"][item.slot, row, columns] + values

    flash.pipeline(shape, refs, produce, weigh, consume)

    @pl.when(key_span == shape.key_spans - 1)
    def _finish() -> None:
        flash.for_tiles(shape.queries // shape.query, (shape.query, lambda rows, i: finish(shape, refs, rows, i)))


def prepare_queries(shape: Shape, refs: dict[str, Any], rows: Any, i: Any) -> None:
    """Rotated, scaled for exponentials with base 2, and once for every head with the lanes of the others zeroed."""
    q = refs["q"][0, rows].astype(jnp.float32)
    if "q_table" in refs:
        q = flash.rotate(q, refs["q_table"][0, rows], shape.head_dim)
    q = (q * (shape.head_dim**-0.5 * LOG2_E)).astype(refs["q"].dtype)
    for head in range(shape.heads):
        refs["masked_q"][head, rows] = flash.only_head(shape, q, head)
    refs["top"][i] = jnp.full_like(refs["top"][i], LOWEST)
    refs["total"][i] = jnp.zeros_like(refs["total"][i])


def prepare_keys(shape: Shape, refs: dict[str, Any], rows: Any, j: Any) -> None:
    """Keys rotated, values transposed and clean: 0 times what stands in padding must be 0."""
    if "k_table" in refs:
        k = flash.rotate(refs["k"][0, rows].astype(jnp.float32), refs["k_table"][0, rows], shape.head_dim)
        refs["rotated_k"][rows] = k.astype(refs["k"].dtype)
    refs["transposed_v"][j] = flash.clean(refs, "k_ids", rows, refs["v"][0, rows].T)


def finish(shape: Shape, refs: dict[str, Any], rows: Any, i: Any) -> None:
    """Divide by the sum of the weights, and turn round."""
    parts = []
    for head in range(shape.heads):
        top, total = refs["top"][i, head : head + 1], refs["total"][i, head : head + 1]
        some = total > 0  # where there were no keys, the sum is not even initialised
        scale = 1 / ((1 - shape.rate) * jnp.where(some, total, 1.0))
        out = jnp.where(some, refs["sum"][i, head_rows(shape, head)] * scale, 0.0)
        parts.append(out.astype(refs["out"].dtype))
        refs["logsumexp"][0, 0, head : head + 1, rows] = jnp.where(some, (top + jnp.log2(total)) / LOG2_E, NO_KEYS)
    refs["out"][0, rows] = jnp.concatenate(parts, axis=0).T
