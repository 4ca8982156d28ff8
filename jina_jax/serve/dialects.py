"""What clients of other servers say, in terms of `Ask`, and what they expect to hear. Nothing is computed here."""

import uuid
from typing import Any

import numpy as np
from pydantic import ValidationError

from jina_jax._version import __version__
from jina_jax.serve import fields, schema, wire
from jina_jax.serve.prepare import Ask, Served
from jina_jax.serve.service import Answer
from jina_jax.serve.settings import Settings


def _task_of(input_type: str | None, field: str = "input_type") -> str | None:
    """The task that another API's word for it means."""
    if input_type is None:
        return None
    if input_type not in fields.INPUT_TYPES:
        known = ", ".join(fields.INPUT_TYPES)
        raise fields.field_error(field, f"{input_type[:80]!r} is not one of {known}", input_type)
    return fields.INPUT_TYPES[input_type]


def from_jina(body: schema.EmbeddingRequest) -> Ask:
    """What a request by the Jina or OpenAI contract wants.

    Args:
        body: The request.

    Returns:
        What it wants.

    Raises:
        ApiError: If it wants what this model does not have.
    """
    if body.return_multivector:
        raise fields.field_error("return_multivector", "return_multivector is not possible with this model")
    return Ask(
        body.input,
        body.model,
        body.task if body.task is not None else _task_of(body.input_type),
        body.dimensions,
        body.normalized,
        body.late_chunking,
        body.truncate,
    )


def from_sagemaker(body: schema.InvocationRequest) -> schema.EmbeddingRequest:
    """SageMaker's envelope as a request by the Jina contract: parameters next to the input."""
    try:
        return schema.EmbeddingRequest.model_validate({**body.parameters, "input": body.data})
    except ValidationError as error:
        raise fields.invalid(error.errors(include_url=False, include_context=False)) from None


def from_tei(body: schema.TeiRequest) -> Ask:
    """What a client of text-embeddings-inference wants."""
    return Ask(
        body.inputs,
        task=body.prompt_name,
        dimensions=body.dimensions,
        normalized=body.normalize,
        truncate=body.truncate,
    )


def from_cohere(body: schema.CohereRequest) -> Ask:
    """What a client of Cohere wants; without a word about it, its texts are cut."""
    if body.truncate == "START":
        raise fields.field_error("truncate", "texts are cut at their end only; send END or NONE", "START")
    return Ask(
        body.texts,
        body.model,
        _task_of(body.input_type),
        body.output_dimension,
        truncate=body.truncate != "NONE",
    )


def to_cohere(answer: Answer, body: schema.CohereRequest) -> bytes:
    """An answer as Cohere's client reads it."""
    return wire.dumps(
        {
            "id": str(uuid.uuid4()),
            "texts": body.texts if isinstance(body.texts[0], str) else [],
            "embeddings": {kind: wire.encode(answer.vectors, kind) for kind in body.embedding_types},
            "meta": {"api_version": {"version": "2"}, "billed_units": {"input_tokens": answer.tokens}},
            "response_type": "embeddings_by_type",
        }
    )


def similarities(answer: Answer) -> list[float]:
    """Cosines of the first vector with each of the others."""
    return [float(one) for one in np.clip(answer.vectors[1:] @ answer.vectors[0], -1, 1)]


def check_texts(body: schema.TokenizeRequest, settings: Settings) -> None:
    """Check that a request to /tokenize has texts, and not too many.

    Args:
        body: The request.
        settings: Limits.

    Raises:
        ApiError: Otherwise.
    """
    if not isinstance(body.inputs[0], str):
        raise fields.field_error("inputs", "inputs must be texts")
    if len(body.inputs) > settings.max_inputs:
        message = f"inputs has {len(body.inputs)} texts, at most {settings.max_inputs} go in a request; send several"
        raise fields.field_error("inputs", message)


def tokens_of(body: schema.TokenizeRequest, served: Served) -> bytes:
    """The tokens of each text, as text-embeddings-inference gives them.

    Args:
        body: The texts.
        served: The model whose tokenizer cuts them.

    Returns:
        JSON.
    """
    found = []
    for text, tokens in zip(body.inputs, served.tokenizer.encode_batch(body.inputs), strict=True):
        last = len(tokens.ids) - 1
        rows: list[dict[str, Any]] = []
        for place, (one, (start, stop)) in enumerate(zip(tokens.ids.tolist(), tokens.offsets.tolist(), strict=True)):
            if place in (0, last):
                if body.add_special_tokens:
                    name = "</s>" if place else "<s>"
                    rows.append({"id": one, "text": name, "special": True, "start": None, "stop": None})
            else:
                rows.append({"id": one, "text": text[start:stop], "special": False, "start": start, "stop": stop})
        found.append(rows)
    return wire.dumps(found)


def info(served: Served, settings: Settings, batch_tokens: int) -> dict[str, Any]:
    """What text-embeddings-inference says of itself."""
    return {
        "model_id": served.names[0],
        "model_sha": settings.revision,
        "model_dtype": settings.dtype,
        "model_type": {"embedding": {"pooling": "mean"}},
        "prompts": list(served.config.tasks),
        "max_concurrent_requests": settings.max_queue_requests,
        "max_input_length": served.config.max_tokens,
        "max_batch_tokens": batch_tokens,
        "max_client_batch_size": settings.max_inputs,
        "auto_truncate": settings.auto_truncate,
        "version": __version__,
    }


def cards(models: dict[str, Served], created: int) -> dict[str, Any]:
    """All models by all their names, as OpenAI and others list them; `root` is the name that a model has of itself."""
    return {
        "object": "list",
        "data": [
            {
                "id": name,
                "object": "model",
                "created": created,
                "owned_by": "jina-jax",
                "root": one.names[0],
                "max_model_len": one.config.max_tokens,
                "context_length": one.config.max_tokens,
                "dimensions": one.config.hidden_size,
                "tasks": list(one.config.tasks),
            }
            for name, one in models.items()
        ],
    }
