"""Bodies of the flash attention kernels for GPUs, in Pallas-Triton.

Forward follows Dao (2023), algorithm 1; the gradients of queries and of keys and values come from a kernel each, so
that no sum depends on the order of atomic additions. Every program holds one block of one side, of queries or of keys,
and walks over the blocks of the other side. `gpu.py` launches them.
"""

import functools
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from jina_jax.kernels import tiles
from jina_jax.kernels.common import LOG2_E, NO_KEYS
from jina_jax.kernels.dropout import survives


class Size(NamedTuple):
    """How a kernel is cut: tokens held by a program, tokens per step of its walk, warps, steps loaded ahead."""

    held: int
    step: int
    warps: int
    stages: int


def forward_kernel(refs: dict, results: dict, *, size: Size, lengths: tuple[int, int], rate: float, ptx: bool) -> None:
    """The result of one block of queries: online softmax over blocks of keys."""
    start, H = pl.program_id(0) * size.held, refs["q"].shape[-1]
    scale = H**-0.5 * LOG2_E  # makes exponents of two
    q_ids, q_valid = _held_ids(refs, "q_segments", start, size.held, lengths[0])
    q = _block(refs["q"], start, size.held, q_valid)
    lines = _block(refs["lines"], start, size.held, q_valid)[:, None] if rate else None

    def step(block: Array, carry: tuple, masked: bool) -> tuple:
        (top, total, out), start = carry, block * size.step
        k_ids = _ids(refs, "k_segments", start, size.step, lengths[1]) if masked else None
        k, v = (_block(refs[name], start, size.step, k_ids) for name in "kv")
        scores, before = _dot(q, k, 1), top
        if k_ids is not None:
            scores = jnp.where(q_ids[:, None] == k_ids[None], scores, NO_KEYS)
        top = jnp.maximum(top, scores.max(axis=1))
        # A query that has seen no key yet takes nothing off, so that NO_KEYS stays the exponent of zero.
        shift = jnp.where(top == NO_KEYS, 0.0, top * scale) if masked else top * scale
        weights, shrink = _power(scores, scale, shift[:, None], ptx), _power(before, scale, shift, ptx)
        total = total * shrink + weights.sum(axis=1)
        if lines is not None:
            kept = survives(lines, _block(refs["columns"], start, size.step, k_ids)[None], rate)
            weights = jnp.where(kept, weights, 0.0)
        return top, total, out * shrink[:, None] + _dot(weights.astype(v.dtype), v, 0)

    nothing = (jnp.full((size.held,), NO_KEYS), jnp.zeros((size.held,)), jnp.zeros((size.held, H)))
    top, total, out = _walk(step, nothing, refs, size.step, lengths[1])
    seen = (q_ids != 0) & (top != NO_KEYS)
    out = jnp.where(seen[:, None], out * (1 / ((1 - rate) * total))[:, None], 0.0)
    _store(results["out"], start, out, lengths[0])
    _store(results["logsumexp"], start, jnp.where(seen, top * H**-0.5 + jnp.log(total), NO_KEYS), lengths[0])


def queries_kernel(refs: dict, results: dict, *, size: Size, lengths: tuple[int, int], rate: float, ptx: bool) -> None:
    """The gradient of one block of queries."""
    start, H = pl.program_id(0) * size.held, refs["q"].shape[-1]
    q_ids, q_valid = _held_ids(refs, "q_segments", start, size.held, lengths[0])
    read = (_block(refs[name], start, size.held, q_valid) for name in ("q", "out", "d_out", "logsumexp"))
    q, out, d_out, logsumexp = read
    lines = _block(refs["lines"], start, size.held, q_valid)[:, None] if rate else None
    exponent = logsumexp * LOG2_E
    # The softmax's Jacobian needs sum_s p_s dp_s for every query, which equals out . d_out, dropout included.
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis=1)
    _store(results["delta"], start, delta, lengths[0])

    def step(block: Array, dq: Array, masked: bool) -> Array:
        start = block * size.step
        k_ids = _ids(refs, "k_segments", start, size.step, lengths[1]) if masked else None
        k, v = (_block(refs[name], start, size.step, k_ids) for name in "kv")
        weights = _power(_dot(q, k, 1), H**-0.5 * LOG2_E, exponent[:, None], ptx)
        if k_ids is not None:
            weights = jnp.where(q_ids[:, None] == k_ids[None], weights, 0.0)
        d_weights = _dot(d_out, v, 1)
        if lines is not None:
            kept = survives(lines, _block(refs["columns"], start, size.step, k_ids)[None], rate)
            d_weights = jnp.where(kept, d_weights * (1 / (1 - rate)), 0.0)
        d_scores = weights * (d_weights - delta[:, None])
        return dq + _dot(d_scores.astype(k.dtype), k, 0)

    dq = _walk(step, jnp.zeros((size.held, H)), refs, size.step, lengths[1]) * H**-0.5
    if "cos" in refs:
        cos, sin = _angles(refs, start, size.held, q_valid)
        dq = _turn(dq, cos, -sin)
    _store(results["dq"], start, jnp.where((q_ids != 0)[:, None], dq, 0.0), lengths[0])


def keys_kernel(refs: dict, results: dict, *, size: Size, lengths: tuple[int, int], rate: float, ptx: bool) -> None:
    """The gradients of one block of keys and values. Scores are transposed here: keys by queries."""
    start, H = pl.program_id(0) * size.held, refs["k"].shape[-1]
    k_ids, k_valid = _held_ids(refs, "k_segments", start, size.held, lengths[0])
    k, v = (_block(refs[name], start, size.held, k_valid) for name in "kv")
    columns = _block(refs["columns"], start, size.held, k_valid)[:, None] if rate else None

    def step(block: Array, carry: tuple, masked: bool) -> tuple:
        (dk, dv), start = carry, block * size.step
        q_ids = _ids(refs, "q_segments", start, size.step, lengths[1]) if masked else None
        read = (_block(refs[name], start, size.step, q_ids) for name in ("q", "d_out", "logsumexp", "delta"))
        q, d_out, logsumexp, delta = read
        weights = _power(_dot(k, q, 1), H**-0.5 * LOG2_E, (logsumexp * LOG2_E)[None], ptx)
        if q_ids is not None:
            weights = jnp.where(k_ids[:, None] == q_ids[None], weights, 0.0)
        d_weights, dropped = _dot(v, d_out, 1), weights
        if columns is not None:
            kept = survives(_block(refs["lines"], start, size.step, q_ids)[None], columns, rate)
            dropped = jnp.where(kept, weights, 0.0)
            d_weights = jnp.where(kept, d_weights * (1 / (1 - rate)), 0.0)
        dv = dv + _dot(dropped.astype(d_out.dtype), d_out, 0)
        d_scores = weights * (d_weights - delta[None])
        return dk + _dot(d_scores.astype(q.dtype), q, 0), dv

    nothing = jnp.zeros((size.held, H))
    dk, dv = _walk(step, (nothing, nothing), refs, size.step, lengths[1])
    dk, dv = dk * H**-0.5, dv * (1 / (1 - rate))
    if "cos" in refs:
        cos, sin = _angles(refs, start, size.held, k_valid)
        dk = _turn(dk, cos, -sin)
    for name, gradient in (("dk", dk), ("dv", dv)):
        _store(results[name], start, jnp.where((k_ids != 0)[:, None], gradient, 0.0), lengths[0])


def _walk(step: Callable, carry: Any, refs: dict, size: int, length: int) -> Any:
    """Apply `step` to all blocks of the other side that may be seen: first those that need no mask, then the rest."""
    clear, masked = (functools.partial(step, masked=flag) for flag in (False, True))
    if "visits" not in refs:
        whole, rest = divmod(length, size)
        carry = jax.lax.fori_loop(0, whole, clear, carry)
        return masked(jnp.int32(whole), carry) if rest else carry
    visits = refs["visits"]
    carry = jax.lax.fori_loop(visits[0], visits[1], clear, carry)
    return jax.lax.fori_loop(3, visits[2], lambda i, carry: masked(visits[i], carry), carry)


def visits(held: Int[Array, "B T"], other: Int[Array, "B S"], size: Size) -> Int[Array, "B blocks words"]:
    """For every block held, the blocks of the other side that its tokens may see.

    Args:
        held: Segments of the side held.
        other: Segments of the other side.
        size: Sizes of the blocks.

    Returns:
        Int32, for every block: first, last, end, list. Blocks from first up to last need no mask: all their tokens
        belong to one segment, as do all tokens held. Words 3 up to end list the others.
    """
    sides = []
    for segments, block in ((held, size.held), (other, size.step)):
        padded = jnp.pad(segments, ((0, 0), (0, -segments.shape[1] % block)))
        sides.append(tiles.ranges(padded, block))
    low, high, _ = (x[:, :, None] for x in sides[0])
    other_low, other_high, padding = (x[:, None, :] for x in sides[1])

    seen = (low <= other_high) & (other_low <= high)
    clear = seen & (low == high) & (other_low == other_high) & ~padding
    count = clear.shape[2]
    index = jnp.arange(count, dtype=jnp.int32)[None, None]
    first = jnp.argmax(clear, axis=2, keepdims=True).astype(jnp.int32)
    last = jnp.where(~clear & (index >= first), index, count).min(axis=2, keepdims=True)
    listed = seen & ((index < first) | (index >= last))
    end = 3 + listed.sum(axis=2, keepdims=True, dtype=jnp.int32)
    return jnp.concatenate([first, last, end, jnp.sort(jnp.where(listed, index, count), axis=2)], axis=2)


def _dot(x: Array, y: Array, contract: int) -> Float[Array, "rows columns"]:
    """Product of x with y, or y transposed, accumulated in float32; float32 is never rounded to fewer bits."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dimensions = (((1,), (contract,)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _power(x: Array, scale: float, shift: Array, ptx: bool) -> Array:
    """2 ** (x * scale - shift), in two instructions where PTX is understood: XLA's own take seven."""
    if not ptx:
        return jnp.exp2(x * scale - shift)
    factor = struct.pack(">f", scale).hex()
    [power] = pltriton.elementwise_inline_asm(
        f"{{ .reg .f32 x; fma.rn.f32 x, $1, 0f{factor}, $2; ex2.approx.ftz.f32 $0, x; }}",
        args=[x, jnp.broadcast_to(-shift, x.shape)],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return power


def _indices(start: Array, size: int) -> Int[Array, "size"]:
    """Positions of the tokens of a block."""
    return start + jax.lax.iota(jnp.int32, size)


def _ids(refs: dict, name: str, start: Array, size: int, length: int) -> Int[Array, "size"]:
    """Segments of the tokens of a block, 0 beyond the end of the row."""
    inside = _indices(start, size) < length
    if name not in refs:
        return inside.astype(jnp.int32)
    return pltriton.load(refs[name].at[pl.ds(start, size)], mask=inside, other=0)


def _held_ids(refs: dict, name: str, start: Array, size: int, length: int) -> tuple[Array, Array | None]:
    """The same for the block held; then once more, or None if no token can be padding."""
    ids = _ids(refs, name, start, size, length)
    return ids, ids if name in refs or length % size else None


def _block(ref: Any, start: Array, size: int, ids: Array | None) -> Array:
    """The tokens of a block; zeros at padding, of which nothing is read."""
    at = ref.at[pl.ds(start, size)]
    if ids is None:
        return pltriton.load(at)
    mask = ids != 0
    return pltriton.load(at, mask=mask if ref.ndim == 1 else mask[:, None], other=jnp.zeros((), ref.dtype))


def _store(ref: Any, start: Array, x: Array, length: int) -> None:
    """Write a block, up to the end of the row."""
    mask = None
    if length % x.shape[0]:
        mask = _indices(start, x.shape[0]) < length
        mask = mask if x.ndim == 1 else mask[:, None]
    pltriton.store(ref.at[pl.ds(start, x.shape[0])], x.astype(ref.dtype), mask=mask)


def _angles(refs: dict, start: Array, size: int, ids: Array | None) -> tuple[Array, Array]:
    """Cosines and sines of a block."""
    return _block(refs["cos"], start, size, ids), _block(refs["sin"], start, size, ids)


def _turn(x: Float[Array, "size H"], cos: Array, sin: Array) -> Float[Array, "size H"]:
    """Rotate the pairs (i, i + H/2)."""
    first, second = jnp.split(x, 2, axis=1)
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=2)
    return jnp.swapaxes(turned, 1, 2).reshape(x.shape)
