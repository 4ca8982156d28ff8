"""Body of the backward attention kernel for TPUs (Dao, 2023, algorithm 2, on transposed scores, in one pass).

The scores are recomputed from queries, keys and the saved logsumexp; the gradients of queries, keys and values come
out of the same visit to each pair of tiles. Of its five products only two fill all rows of the matrix unit.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from jina_jax.kernels import flash
from jina_jax.kernels.common import LOG2_E, NO_KEYS
from jina_jax.kernels.flash import MASKED, NT, Item, Shape, dot, head_rows


def body(shape: Shape, refs: dict[str, Any]) -> None:
    """Gradients of one group of heads, one span of queries and all keys.

    Args:
        shape: Static sizes.
        refs: References by name, as `tpu.backward` lists them. Given are items, words, q, k, v, out, logsumexp,
            d_out and, where there are any, q_ids, k_ids, q_table, k_table; wanted are dq, dk and dv; the rest is
            scratch.
    """
    program = _, _, query_span, _ = tuple(pl.program_id(axis) for axis in range(4))
    k = refs["rotated_k"] if "rotated_k" in refs else refs["k"].at[0]
    flash.prepare(
        shape,
        True,
        lambda rows, i: prepare_queries(shape, refs, rows, i),
        query_span == 0,
        lambda rows, j: prepare_keys(shape, refs, rows, j),
    )

    def produce(item: Item, head: int, columns: slice, masked: bool) -> None:
        """Scores of a chunk, and the gradients of the weights."""
        queries = flash.part_of(item.query, shape.query, columns)
        for part in shape.parts:
            keys = flash.part_of(item.key, shape.key, part)
            scores = dot(k[keys], refs["masked_q"][head, queries], NT)
            d_weights = dot(refs["v"][0, keys], refs["masked_d_out"][head, queries], NT)
            if masked:
                visible = flash.visible(shape, refs, item, columns, part)
                scores, d_weights = jnp.where(visible, scores, MASKED), jnp.where(visible, d_weights, 0.0)
            refs["scores"][item.slot, head, part, columns] = scores
            refs["d_weights"][item.slot, head, part, columns] = d_weights

    def weigh(item: Item, head: int, columns: slice) -> None:
        """Weights, and the gradients of the scores."""
        row, dtype, scale = slice(head, head + 1), refs["v"].dtype, 1 / (1 - shape.rate)
        log2sumexp, delta = refs["log2sumexp"][item.query, row, columns], refs["delta"][item.query, row, columns]
        for part in shape.parts:
            weights = jnp.exp2(refs["scores"][item.slot, head, part, columns] - log2sumexp)
            d_weights, dropped = refs["d_weights"][item.slot, head, part, columns], weights
            if shape.rate:
                kept = flash.kept(shape, refs["words"], program, item, head, columns, part)
                dropped, d_weights = jnp.where(kept, weights * scale, 0.0), jnp.where(kept, d_weights * scale, 0.0)
            d_scores = weights * (d_weights - delta)
            refs["weights"][item.slot, head, part, columns] = dropped.astype(dtype)
            refs["d_scores"][item.slot, head, part, columns] = d_scores.astype(dtype)

    def consume(item: Item, head: int, columns: slice) -> None:
        """What the chunk adds to the three gradients, all transposed."""
        rows, i, j = head_rows(shape, head), item.query, item.key
        d_scores, weights = (refs[name][item.slot, head, :, columns] for name in ("d_scores", "weights"))
        refs["sum_dq"][i, rows, columns] += dot(refs["transposed_k"][j, rows], d_scores)
        refs["sum_dk"][j, rows] += dot(refs["transposed_q"][i, rows, columns], d_scores, NT)
        refs["sum_dv"][j, rows] += dot(refs["transposed_d_out"][i, rows, columns], weights, NT)

    flash.pipeline(shape, refs, produce, weigh, consume)
    flash.for_tiles(shape.queries // shape.query, (shape.query, lambda rows, i: finish(shape, refs, "q", rows, i)))

    @pl.when(query_span == shape.query_spans - 1)
    def _keys() -> None:
        def part(rows: Any, j: Any) -> None:
            finish(shape, refs, "k", rows, j)
            refs["dv"][0, rows] = refs["sum_dv"][j].T.astype(refs["dv"].dtype)

        flash.for_tiles(shape.keys // shape.key, (shape.key, part))


def prepare_queries(shape: Shape, refs: dict[str, Any], rows: Any, i: Any) -> None:
    """Queries and gradients of the output, once for every head and once transposed, and their row statistics."""
    q, d_out = refs["q"][0, rows].astype(jnp.float32), refs["d_out"][0, rows]
    if "q_table" in refs:
        q = flash.rotate(q, refs["q_table"][0, rows], shape.head_dim)
    scaled = (q * (shape.head_dim**-0.5 * LOG2_E)).astype(refs["q"].dtype)
    for head in range(shape.heads):
        refs["masked_q"][head, rows] = flash.only_head(shape, scaled, head)
        refs["masked_d_out"][head, rows] = flash.only_head(shape, d_out, head)
    refs["transposed_q"][i] = flash.clean(refs, "q_ids", rows, q.astype(refs["q"].dtype).T)
    refs["transposed_d_out"][i] = flash.clean(refs, "q_ids", rows, d_out.T)
    # The softmax's Jacobian needs sum_s p_s dp_s for every query, which equals out . d_out, dropout included.
    products = refs["out"][0, rows].astype(jnp.float32) * d_out.astype(jnp.float32)
    products = flash.clean(refs, "q_ids", rows, products.T)
    for head in range(shape.heads):
        row = slice(head, head + 1)
        refs["delta"][i, row] = products[head_rows(shape, head)].sum(axis=0, keepdims=True)
        logsumexp = refs["logsumexp"][0, 0, row, rows]
        # Relative to a huge sum, a query without keys weighs them 0.
        refs["log2sumexp"][i, row] = jnp.where(logsumexp <= NO_KEYS / 2, -MASKED, logsumexp * LOG2_E)
    refs["sum_dq"][i] = jnp.zeros_like(refs["sum_dq"][i])


def prepare_keys(shape: Shape, refs: dict[str, Any], rows: Any, j: Any) -> None:
    """Keys rotated, and transposed too."""
    k = refs["k"][0, rows]
    if "k_table" in refs:
        k = flash.rotate(k.astype(jnp.float32), refs["k_table"][0, rows], shape.head_dim).astype(k.dtype)
        refs["rotated_k"][rows] = k
    refs["transposed_k"][j] = flash.clean(refs, "k_ids", rows, k.T)
    for name in ("sum_dk", "sum_dv"):
        refs[name][j] = jnp.zeros_like(refs[name][j])


def finish(shape: Shape, refs: dict[str, Any], name: str, rows: Any, i: Any) -> None:
    """Turn a gradient round, and rotate it back, which is the transpose of rotating."""
    x = refs[f"sum_d{name}"][i].T * shape.head_dim**-0.5
    if f"{name}_table" in refs:
        x = flash.rotate(x, refs[f"{name}_table"][0, rows], shape.head_dim, back=True)
    refs[f"d{name}"][0, rows] = x.astype(refs[f"d{name}"].dtype)
