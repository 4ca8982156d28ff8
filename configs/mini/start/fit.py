"""What layers that were left out, and rotation, have changed is put right by least squares, before any training."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.mini.start import e5, teacher
from configs.mini.start.surgery import Parameters
from jina_jax import rope

RIDGE = 0.1  # of the mean square of what is regressed on


def hidden(given: teacher.Teacher, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """What the teacher's layers read and give, at the tokens of texts themselves.

    Args:
        given: The teacher.
        texts: Texts, which it reads with its prefix.

    Returns:
        Batches of tokens [B, T], a mask, and vectors [layers + 1, B, T, D]. Those of the last layer are moved so that
        their mean over a text is that over the prefix as well.
    """
    skip = len(given.tokenizer.encode(teacher.PREFIX).ids) - 2
    found = []
    ids = [one.ids for one in given.tokenizer.encode_batch_fast([teacher.PREFIX + text for text in texts])]
    for places, tokens, mask in teacher.batches(ids):
        mask[len(places) :] = False
        vectors = np.array(_hidden(given.table, given.start, given.layers, tokens, mask, eps=given.eps))
        whole = _mean(vectors[-1], mask)
        tokens, mask = (np.delete(x, np.s_[1 : 1 + skip], axis=1) for x in (tokens, mask))
        vectors = np.delete(vectors, np.s_[1 : 1 + skip], axis=2)
        vectors[-1] += (whole - _mean(vectors[-1], mask))[:, None]
        found.append((tokens, mask, vectors))
    return found


def _mean(vectors: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Over the tokens of each row."""
    return (vectors * mask[:, :, None]).sum(axis=1) / np.maximum(mask.sum(axis=1), 1)[:, None]


@functools.partial(jax.jit, static_argnames="eps")
def _hidden(table: jax.Array, start: Any, layers: Any, tokens: jax.Array, mask: jax.Array, *, eps: float) -> jax.Array:
    """What the first layer reads, and what each gives."""
    positions, scale, bias = start
    found = [e5.norm(table[tokens] + positions[: tokens.shape[1]], scale, bias, eps)]
    for layer in layers:
        found.append(e5.block(found[-1], mask, layer, eps))
    return jnp.stack(found)


def downs(
    student: Mapping[str, np.ndarray],
    layers: Sequence[int],
    given: teacher.Teacher,
    batches: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    base: float,
    ridge: float = RIDGE,
) -> Parameters:
    """Fit the last product of each layer, one layer after the other.

    A layer of the student is to give what the teacher's next kept layer reads. Its last norm becomes that of the last
    layer it stands for, whose inverse says what ought to enter it; the products of the mlp are then fitted to that.

    Args:
        student: Parameters.
        layers: Which of the teacher's layers they are.
        given: The teacher.
        batches: What `hidden` gave.
        base: Of the rotation.
        ridge: How much weights are held where they were.

    Returns:
        All parameters.
    """
    found = {path: np.array(x) for path, x in student.items()}
    last = [*(layer - 1 for layer in layers[1:]), len(given.layers) - 1]
    kinds, head = found["embed/types/embedding"][0], found["layers/attention/qkv/kernel"].shape[-1]
    norms = found["embed/norm/scale"], found["embed/norm/bias"]
    states = [e5.norm(given.table[tokens] + kinds, *norms, given.eps) for tokens, _, _ in batches]
    for index, final in enumerate(last):
        for part in ("scale", "bias"):
            found[f"layers/mlp_norm/{part}"][index] = given.layers[final][f"mlp_norm/{part}"]
        layer = {path.removeprefix("layers/"): x[index] for path, x in found.items() if path.startswith("layers/")}
        left, right, mids = 0.0, 0.0, []
        for (_, mask, vectors), x in zip(batches, states, strict=True):
            turn = tuple(x[None] for x in rope.tables(mask.shape[1], head, base))
            mid, wide, a, b = _normal(x, mask, layer, vectors[final + 1], turn, eps=given.eps)
            mids.append((mid, wide))
            left, right = left + np.asarray(a, np.float64), right + np.asarray(b, np.float64)
        held = ridge * np.trace(left) / len(left) * np.eye(len(left))
        change = np.linalg.solve(left + held, right)
        found["layers/mlp/down/kernel"][index] += change[:-1]
        found["layers/mlp/down/bias"][index] += change[-1]
        layer = {path.removeprefix("layers/"): x[index] for path, x in found.items() if path.startswith("layers/")}
        states = [_finish(mid, wide, layer, eps=given.eps) for mid, wide in mids]
    return found


@functools.partial(jax.jit, static_argnames="eps")
def _normal(
    x: jax.Array, mask: jax.Array, layer: e5.Layer, wanted: jax.Array, turn: e5.Turn, *, eps: float
) -> tuple[jax.Array, ...]:
    """The halves of a layer, and the normal equations of the change of its last product."""
    mid = e5.attend(x, mask, layer, eps, turn)
    wide = e5.widen(mid, layer)
    z = mid + jnp.einsum("BTF,FD->BTD", wide, layer["mlp/down/kernel"]) + layer["mlp/down/bias"]
    ideal = (wanted - layer["mlp_norm/bias"]) / layer["mlp_norm/scale"]
    scale = (z * ideal).mean(axis=-1, keepdims=True)
    scale = jnp.maximum(scale, 0.3 * z.std(axis=-1, keepdims=True))
    rest = z.mean(axis=-1, keepdims=True) + scale * ideal - z
    weight = jnp.where(mask[:, :, None], 1 / scale, 0)
    terms = jnp.concatenate([wide, jnp.ones_like(wide[..., :1])], axis=-1) * weight
    return mid, wide, jnp.einsum("BTF,BTG->FG", terms, terms), jnp.einsum("BTF,BTD->FD", terms, rest * weight)


@functools.partial(jax.jit, static_argnames="eps")
def _finish(mid: jax.Array, wide: jax.Array, layer: e5.Layer, *, eps: float) -> jax.Array:
    """The rest of a layer."""
    z = mid + jnp.einsum("BTF,FD->BTD", wide, layer["mlp/down/kernel"]) + layer["mlp/down/bias"]
    return e5.norm(z, layer["mlp_norm/scale"], layer["mlp_norm/bias"], eps)
