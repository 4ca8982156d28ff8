"""From what a request asks for to texts for the worker, and from means to embeddings: what `Embedder` does, too."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jina_jax import chunking
from jina_jax.batching import Text
from jina_jax.config import Config
from jina_jax.serve import fields
from jina_jax.serve.errors import ApiError
from jina_jax.serve.settings import Settings
from jina_jax.tokenizer import Tokenizer, Tokens

OVERLAP = 256  # of windows; no text here is longer than one
IDS_REFUSED = (
    "input holds token ids, and those of another model's tokenizer would give meaningless embeddings; send text "
    "(LangChain's OpenAIEmbeddings: check_embedding_ctx_length=False), or start the server with --allow-token-ids if "
    "they are of this model's tokenizer"
)


@dataclass(frozen=True)
class Served:
    """A model that is served: its names (the first is its own), configuration, tokenizer and default size."""

    names: tuple[str, ...]
    config: Config
    tokenizer: Tokenizer
    dimensions: int


@dataclass(frozen=True)
class Ask:
    """What a request wants, whatever its dialect.

    Attributes:
        inputs: Texts, or token ids.
        model: Name of the model; None for the first.
        task: Task; None for the default one.
        dimensions: Numbers to keep.
        normalized: Whether to scale to unit length.
        late_chunking: Whether the inputs are chunks of one document.
        truncate: Whether too long inputs are cut; None for the server's default.
    """

    inputs: fields.Inputs
    model: str | None = None
    task: str | None = None
    dimensions: int | None = None
    normalized: bool = True
    late_chunking: bool = False
    truncate: bool | None = None


def check(ask: Ask, served: Served, settings: Settings) -> str | None:
    """Check what can be checked before any work is done.

    Args:
        ask: What the request wants.
        served: Its model.
        settings: The settings.

    Returns:
        Its task.

    Raises:
        ApiError: If something is not possible; says what.
    """
    config, inputs = served.config, ask.inputs
    task = settings.default_task if ask.task is None else ask.task
    if task is not None and task not in config.tasks:
        known = ", ".join(config.tasks) or "none"
        raise fields.field_error("task", f"unknown task {task[:80]!r}; this model has: {known} (or null)", task)
    if ask.dimensions is not None and ask.dimensions > config.hidden_size:
        message = f"dimensions must be at most {config.hidden_size}, the size of this model's embeddings"
        raise fields.field_error("dimensions", message, ask.dimensions)
    if len(inputs) > settings.max_inputs:
        message = f"input has {len(inputs)} texts, at most {settings.max_inputs} go in a request; send several"
        raise fields.field_error("input", message)
    if isinstance(inputs[0], list):
        if not settings.allow_token_ids:
            raise ApiError(400, IDS_REFUSED, "INPUT_TOKEN_IDS_NOT_ALLOWED", param="input")
        if ask.late_chunking:
            raise fields.field_error("late_chunking", "late chunking needs texts, not token ids")
    return task


def prepare(ask: Ask, served: Served, task: str | None, settings: Settings) -> tuple[list[Text], int]:
    """Tokens of a request, as `Embedder.encode` and `Embedder.encode_chunks` make them.

    Args:
        ask: What the request wants.
        served: Its model.
        task: Its task.
        settings: The settings.

    Returns:
        Texts for the worker, and the tokens of the request.

    Raises:
        ApiError: If a text is too long and may not be cut, or all are.
    """
    config, tokenizer = served.config, served.tokenizer
    truncate = settings.auto_truncate if ask.truncate is None else ask.truncate
    limit, prompt = config.max_tokens, "" if task is None else config.prompts[config.task_id(task)]
    task_id = int(config.task_ids([task])[0])
    cut = limit if truncate else None
    size, overlap = limit, min(OVERLAP, limit // 4)
    if ask.late_chunking:
        document, spans = chunking.join([str(one) for one in ask.inputs])
        tokens = tokenizer.encode(prompt + document, cut)
        _check_lengths([tokens], limit, "the texts of a late-chunking request have {} tokens together")
        ranges = chunking.token_ranges(tokens, chunking.check_spans(spans, len(document)), len(prompt), True)
        texts = chunking.cut(tokens.ids, task_id, ranges, 0, size, overlap)
        return texts, len(tokens.ids)
    if isinstance(ask.inputs[0], list):
        found = [_given(ids, config.vocab_size, number, cut) for number, ids in enumerate(ask.inputs)]
    else:
        found = tokenizer.encode_batch([prompt + str(one) for one in ask.inputs], cut, offsets=False)
    _check_lengths(found, limit, "input[{number}] has {} tokens")
    total = sum(len(one.ids) for one in found)
    if total > settings.max_request_tokens:
        message = f"the request has {total} tokens, at most {settings.max_request_tokens} go in one; send several"
        raise ApiError(400, message, "INPUT_TOKEN_LIMIT_EXCEEDED", param="input")
    texts = []
    for number, one in enumerate(found):
        texts += chunking.cut(one.ids, task_id, np.array([[0, len(one.ids)]]), number, size, overlap)
    return texts, total


def _check_lengths(found: Sequence[Tokens], limit: int, what: str) -> None:
    for number, one in enumerate(found):
        if len(one.ids) > limit:
            message = what.format(len(one.ids), number=number)
            raise ApiError(
                400,
                f"{message}, the model takes {limit}; shorten or split it, or send truncate=true to have it cut",
                "INPUT_TOKEN_LIMIT_EXCEEDED",
                param="input",
            )


def _given(ids: object, vocab_size: int, number: int, cut: int | None) -> Tokens:
    """Token ids that a client gave, as they are."""
    try:
        array = np.array(ids, np.int64)
    except OverflowError:
        array = np.array([-1])
    if array.min() < 0 or array.max() >= vocab_size:
        message = f"input[{number}] holds token ids that are not of this model's tokenizer; they go from 0 to "
        raise fields.field_error("input", message + str(vocab_size - 1))
    kept = array.astype(np.int32)
    if cut is not None and len(kept) > cut:
        kept = np.append(kept[: cut - 1], kept[-1:])
    return Tokens(kept, np.zeros((0, 2), np.int32), len(array))


def finish(means: np.ndarray, dimensions: int, normalized: bool) -> np.ndarray:
    """Means to embeddings, as `Embedder.encode` does it.

    Args:
        means: Float32 [n, D].
        dimensions: Numbers to keep.
        normalized: Whether to scale to unit length after that.

    Returns:
        Float32 [n, E].

    Raises:
        ApiError: 500 if the model gave what is no number.
    """
    if not np.isfinite(means).all():
        raise ApiError(500, "the model gave embeddings that are not finite; are its weights whole?")
    vectors = means[:, :dimensions]
    if normalized:
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))
    return np.ascontiguousarray(vectors, np.float32)
