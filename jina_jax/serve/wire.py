"""Embeddings as they go over the wire: floats, base64, or fewer bits; and JSON."""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
from starlette.responses import Response

from jina_jax import quantization

# The types of the API that are called otherwise among ours.
PRECISIONS = {"binary": "binary", "ubinary": "ubinary", "int8": "int8", "uint8": "uint8"}


def encode(vectors: np.ndarray, kind: str) -> Sequence[Any]:
    """Vectors in one form.

    Args:
        vectors: Float32 [n, E].
        kind: One of `schema.EMBEDDING_TYPES`.

    Returns:
        Rows, for `dumps`; strings for base64, which holds float32 in little-endian order.
    """
    if kind == "base64":
        return [base64.b64encode(row).decode() for row in vectors.astype("<f4", copy=False)]
    if kind in PRECISIONS:
        return list(quantization.quantize(vectors, PRECISIONS[kind]))
    return list(vectors)


def embedding_list(vectors: np.ndarray, types: tuple[str, ...], model: str, tokens: int) -> bytes:
    """The body of a response to /v1/embeddings, with keys in the order of the hosted API.

    Args:
        vectors: Float32 [n, E].
        types: Their forms; with several, each embedding is an object keyed by them.
        model: Name of the model.
        tokens: Tokens of the request.

    Returns:
        JSON.
    """
    forms = [encode(vectors, kind) for kind in types]
    rows: Any = (
        forms[0] if len(types) == 1 else [dict(zip(types, row, strict=True)) for row in zip(*forms, strict=True)]
    )
    return dumps(
        {
            "model": model,
            "object": "list",
            "usage": {"total_tokens": tokens, "prompt_tokens": tokens},
            "data": [{"object": "embedding", "index": number, "embedding": row} for number, row in enumerate(rows)],
        }
    )


def dumps(value: Any) -> bytes:
    """JSON of anything that holds NumPy arrays; float32 in as few digits as make it again."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def json_response(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response of JSON that is there already."""
    return Response(body, status, headers, "application/json")
