"""From the teacher's layers to a student with rotary positions: exact where it can be, and near it elsewhere.

Parameters are float32 arrays by our paths (`jina_jax.layouts.PARAMETERS`).
"""

from collections.abc import Mapping, Sequence

import numpy as np

from jina_jax.layouts import PARAMETERS

Parameters = dict[str, np.ndarray]
QKV = "layers/attention/qkv/"


def take(teacher: Mapping[str, np.ndarray], layers: Sequence[int], positions: np.ndarray) -> Parameters:
    """Some of the layers; positions become one vector, that of the token type.

    Args:
        teacher: Parameters, "positions" among them.
        layers: Layers to keep.
        positions: How often each position occurs, [T]: the weights of the mean.

    Returns:
        Parameters of the student, without adapters.
    """
    found = {path: x for path, x in teacher.items() if path != "positions"}
    found |= {path: x[list(layers)] for path, x in found.items() if path.startswith("layers/")}
    mean = positions / positions.sum() @ teacher["positions"][: len(positions)]
    found["embed/types/embedding"] = found["embed/types/embedding"][:1] + mean
    return {path: np.asarray(x, np.float32) for path, x in found.items()}


def rebase(student: Mapping[str, np.ndarray], inputs: np.ndarray) -> Parameters:
    """Queries and keys in another basis of each head: rotation then disturbs what matters least.

    What queries and keys give without rotation is unchanged. Their bilinear form, as the layer's inputs see it, is
    taken apart into singular values; the largest go to the rotary pairs that turn slowest.

    Args:
        student: Parameters.
        inputs: What each layer reads, [L, n, D]: some thousand tokens.

    Returns:
        All parameters.
    """
    kernel, bias = student[QKV + "kernel"].astype(np.float64), student[QKV + "bias"].astype(np.float64)
    L, D, _, N, H = kernel.shape
    joined = np.concatenate([kernel, bias[:, None]], axis=1)  # L D+1 J N H
    place = pair_places(H)
    for layer in range(L):
        read = np.concatenate([inputs[layer], np.ones((inputs.shape[1], 1))], axis=1)
        root = np.linalg.qr(read / np.sqrt(len(read)), mode="r")
        for head in range(N):
            q, k = joined[layer, :, 0, head], joined[layer, :, 1, head]
            upper = [np.linalg.qr(root @ x, mode="r") for x in (q, k)]
            u, s, v = np.linalg.svd(upper[0] @ upper[1].T)
            joined[layer, :, 0, head, place] = (q @ np.linalg.solve(upper[0], u * np.sqrt(s))).T
            joined[layer, :, 1, head, place] = (k @ np.linalg.solve(upper[1], v.T * np.sqrt(s))).T
    changed = {QKV + "kernel": joined[:, :D], QKV + "bias": joined[:, D]}
    return dict(student) | {path: np.ascontiguousarray(x, np.float32) for path, x in changed.items()}


def pair_places(head: int) -> np.ndarray:
    """Where the strongest component of a head goes, the second strongest, and so on.

    Component i turns with i + H/2, and the larger i, the slower: two and two they go to the slowest pair that is left.

    Args:
        head: Size H of a head.

    Returns:
        Int64 [H], a permutation.
    """
    slowest = np.arange(head // 2)[::-1]
    return np.stack([slowest, slowest + head // 2], axis=1).ravel()


def permute(parameters: Mapping[str, np.ndarray], order: np.ndarray) -> Parameters:
    """Dimensions of the residual stream in another order: the same model, but for the order of what it gives.

    Args:
        parameters: Parameters, adapters included.
        order: Which dimension comes first, and so on: [D].

    Returns:
        All parameters.
    """
    found = {}
    for path, x in parameters.items():
        for axis, letter in enumerate(PARAMETERS[path].split()):
            if letter in "DE":
                x = np.take(x, order, axis=axis)
        found[path] = x
    return found


def centre(parameters: Mapping[str, np.ndarray], mean: np.ndarray) -> Parameters:
    """Take a vector off everything that the model gives: off the bias of its last norm.

    Args:
        parameters: Parameters.
        mean: Of what the model gives before it is scaled to unit length, [D].

    Returns:
        All parameters.
    """
    bias = parameters["layers/mlp_norm/bias"].copy()
    bias[-1] -= mean
    return dict(parameters) | {"layers/mlp_norm/bias": bias}
