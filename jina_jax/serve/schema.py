"""What requests and responses hold: the Jina v3 contract and OpenAI's in one, with the names that clients give things.

Fields that are not known are ignored, as the hosted API ignores them.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    PlainValidator,
    RootModel,
    Tag,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from jina_jax.serve.errors import ApiError

EMBEDDING_TYPES = ("float", "base64", "binary", "ubinary", "int8", "uint8")
SHOWN = 80  # characters of a wrong value that an error repeats

Ids = list[int]
Inputs = list[str] | list[Ids]
Body = TypeVar("Body", bound=BaseModel)


# ---- Inputs ----------------------------------------------------------------------------------------------------


def _wrong(kind: str, message: str) -> PydanticCustomError:
    return PydanticCustomError(kind, "{message}", {"message": message})


def _text(value: Any, where: str) -> str:
    if isinstance(value, Mapping):
        if isinstance(value.get("text"), str):
            value = value["text"]
        else:
            kinds = ", ".join(sorted(map(str, value)))[:SHOWN] or "nothing"
            raise _wrong("document", f"{where} is a document with {kinds}; this model embeds text")
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise _wrong("text", f'{where} is {kind}, must be a string or {{"text": string}}')
    return value


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def read_inputs(value: Any) -> Inputs:
    """Texts, or token ids, in any form that clients send.

    Args:
        value: A text, a document `{"text": ...}`, token ids, or a list of one of these; texts and documents may mix.

    Returns:
        Texts, or token ids of each text.

    Raises:
        PydanticCustomError: If it is something else; says where.
    """
    if not isinstance(value, list):
        return [_text(value, "input")]
    if not value:
        raise _wrong("empty", "input is an empty list; give at least one text")
    if _is_id(value[0]):
        value = [value]
    if isinstance(value[0], list):
        for number, ids in enumerate(value):
            if not (isinstance(ids, list) and ids and all(map(_is_id, ids))):
                raise _wrong("token_ids", f"input[{number}] must be a list of token ids, as the others")
        return value
    return [_text(one, f"input[{number}]") for number, one in enumerate(value)]


_TEXT_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
    ]
}
_IDS_SCHEMA: dict[str, Any] = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
INPUT_SCHEMA: dict[str, Any] = {
    "description": "A text, a document, or a list of them; token ids where the server takes them.",
    "anyOf": [
        *_TEXT_SCHEMA["anyOf"],
        {"type": "array", "items": _TEXT_SCHEMA, "minItems": 1},
        _IDS_SCHEMA,
        {"type": "array", "items": _IDS_SCHEMA, "minItems": 1},
    ],
}
TEXTS_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
Input = Annotated[Any, PlainValidator(read_inputs), WithJsonSchema(INPUT_SCHEMA)]


# ---- Types and dimensions --------------------------------------------------------------------------------------


def _types(value: Any) -> Any:
    """One type, or several."""
    if value is None:
        return ("float",)
    if isinstance(value, list):
        if not value:
            raise _wrong("empty", "embedding_type is an empty list; name at least one type")
        return tuple(dict.fromkeys(map(_type, value)))
    return (_type(value),)


def _type(value: Any) -> str:
    if not isinstance(value, str) or value not in EMBEDDING_TYPES:
        raise _wrong("embedding_type", f"{str(value)[:SHOWN]!r} is not one of {', '.join(EMBEDDING_TYPES)}")
    return value


def _switch(default: bool) -> Callable[[Any], Any]:
    return lambda value: default if value is None else value


_TYPE_SCHEMA: dict[str, Any] = {"type": "string", "enum": list(EMBEDDING_TYPES)}
TYPES_SCHEMA: dict[str, Any] = {
    "anyOf": [_TYPE_SCHEMA, {"type": "array", "items": _TYPE_SCHEMA, "minItems": 1}, {"type": "null"}],
    "default": "float",
}
Types = Annotated[tuple[str, ...], PlainValidator(_types), WithJsonSchema(TYPES_SCHEMA)]
_OPTIONAL_BOOL = {"anyOf": [{"type": "boolean"}, {"type": "null"}]}
Switch = Annotated[bool, BeforeValidator(_switch(False)), WithJsonSchema(_OPTIONAL_BOOL | {"default": False})]
OnSwitch = Annotated[bool, BeforeValidator(_switch(True)), WithJsonSchema(_OPTIONAL_BOOL | {"default": True})]
Dimensions = Annotated[int | None, Field(strict=True, gt=0)]
# Clients' words for a task: Voyage's and Cohere's `input_type`.
INPUT_TYPES = {
    "query": "retrieval.query",
    "document": "retrieval.passage",
    "search_query": "retrieval.query",
    "search_document": "retrieval.passage",
    "classification": "classification",
    "clustering": "separation",
}


# ---- Requests --------------------------------------------------------------------------------------------------


class EmbeddingRequest(BaseModel):
    """A request for embeddings, by the Jina contract or OpenAI's."""

    model: str | None = Field(None, description="Name of the model; the first of this server if there is none.")
    input: Input = Field(validation_alias=AliasChoices("input", "texts", "content"))
    task: str | None = Field(
        None,
        validation_alias=AliasChoices("task", "task_type"),
        description="A task of the model; null is the bare model, without adapter and instruction.",
    )
    input_type: str | None = Field(None, description="Voyage's word for the task: query or document.")
    dimensions: Dimensions = Field(
        None,
        validation_alias=AliasChoices("dimensions", "output_dimension"),
        description="Numbers to keep of each embedding; any from 1 to the model's.",
    )
    normalized: OnSwitch = Field(True, description="Whether embeddings have unit length.")
    embedding_type: Types = Field(
        ("float",),
        validation_alias=AliasChoices(
            "embedding_type", "encoding_type", "encoding_format", "embedding_types", "output_dtype"
        ),
        description="Form of each embedding; with several, each embedding is an object keyed by type.",
    )
    late_chunking: Switch = Field(False, description="Embed all texts as chunks of one document.")
    truncate: Annotated[bool | None, Field(validation_alias=AliasChoices("truncate", "truncation"))] = Field(
        None, description="Whether texts that are too long are cut; otherwise they are an error."
    )
    return_multivector: Annotated[Any, Field(exclude=True)] = Field(None, description="Not of this model.")


class InvocationRequest(BaseModel):
    """SageMaker's envelope: documents and parameters apart."""

    data: Input
    parameters: dict[str, Any] = Field(default_factory=dict)


def _is_envelope(value: Any) -> str:
    """Which of two bodies /invocations was sent."""
    return (
        "envelope" if isinstance(value, InvocationRequest) or (isinstance(value, dict) and "data" in value) else "plain"
    )


class AnyInvocation(RootModel):
    """What SageMaker's /invocations takes: its envelope, or the body of /v1/embeddings."""

    root: Annotated[
        Annotated[EmbeddingRequest, Tag("plain")] | Annotated[InvocationRequest, Tag("envelope")],
        Discriminator(_is_envelope),
    ]


class TeiRequest(BaseModel):
    """A request of a client of Hugging Face's text-embeddings-inference."""

    inputs: Input
    normalize: OnSwitch = True
    truncate: bool | None = None
    prompt_name: str | None = Field(None, description="The task.")
    dimensions: Dimensions = None


class CohereRequest(BaseModel):
    """A request of Cohere's client, version 2."""

    model: str | None = None
    texts: Annotated[Any, PlainValidator(read_inputs), WithJsonSchema(TEXTS_SCHEMA)]
    input_type: str | None = None
    embedding_types: Types = ("float",)
    output_dimension: Dimensions = None
    truncate: Literal["NONE", "START", "END"] | None = Field(None, description="START is not possible here.")


class TokenizeRequest(BaseModel):
    """Texts to cut into tokens."""

    inputs: Annotated[Any, PlainValidator(read_inputs), WithJsonSchema(TEXTS_SCHEMA)] = Field(
        validation_alias=AliasChoices("inputs", "input", "content", "texts")
    )
    model: str | None = None
    add_special_tokens: OnSwitch = True


class SimilarityInputs(BaseModel):
    """A text and those to compare it with."""

    source_sentence: str
    sentences: list[str] = Field(min_length=1)


class SimilarityRequest(BaseModel):
    """A text and those to compare it with, as text-embeddings-inference takes them."""

    inputs: SimilarityInputs
    model: str | None = None
    task: str | None = "text-matching"
    truncate: bool | None = None


# ---- Responses -------------------------------------------------------------------------------------------------

Number = float | int
Vector = list[float] | list[int] | str


class Usage(BaseModel):
    """Tokens of a request."""

    total_tokens: int
    prompt_tokens: int


class Embedding(BaseModel):
    """One embedding."""

    object: Literal["embedding"]
    index: int
    embedding: Vector | dict[str, Vector]


class EmbeddingResponse(BaseModel):
    """The embeddings of a request, in the order of its inputs."""

    model: str
    object: Literal["list"]
    usage: Usage
    data: list[Embedding]


class CohereResponse(BaseModel):
    """Embeddings by type."""

    id: str
    texts: list[str]
    embeddings: dict[str, list[Vector]]
    response_type: Literal["embeddings_by_type"]
    meta: dict[str, Any]


class Token(BaseModel):
    """A token and where it stands."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class ModelCard(BaseModel):
    """A model that may be asked for."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int
    context_length: int
    dimensions: int
    tasks: list[str]


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    """Whether the server works."""

    status: str
    ready: bool


# ---- Validation ------------------------------------------------------------------------------------------------


def parse(model: type[Body], body: bytes) -> Body:
    """A request from the bytes of its body.

    Args:
        model: What it must be.
        body: JSON.

    Returns:
        The request.

    Raises:
        ApiError: 422 with every problem; 400 for what is valid, but of no use with this model.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False, include_context=False)) from None


def invalid(problems: list[ErrorDetails]) -> ApiError:
    """The error for what validation found.

    Args:
        problems: What pydantic says.

    Returns:
        The error.
    """
    first = problems[0]
    if first["type"] == "document":
        return ApiError(400, first["msg"], "INPUT_TYPE_NOT_SUPPORTED", param="input")
    found = [
        {
            "field": " -> ".join(["body", *map(str, problem["loc"])]),
            "message": problem["msg"],
            "type": problem["type"],
            "input": _shown(problem.get("input")),
        }
        for problem in problems[:20]
    ]
    detail = "; ".join(f"{one['field']}: {one['message']}" for one in found[:3])
    param = str(first["loc"][0]) if first["loc"] else None
    return ApiError(422, detail, param=param, errors=found)


def field_error(field: str, message: str, value: Any = None) -> ApiError:
    """The error for a field whose value this model does not know."""
    problem = {"field": f"body -> {field}", "message": message, "type": "value_error", "input": _shown(value)}
    return ApiError(422, message, param=field, errors=[problem])


def _shown(value: Any) -> Any:
    """A wrong value, if it is short and plain: texts of clients do not belong into errors."""
    if value is None or isinstance(value, bool | int | float):
        return value if not isinstance(value, int) or abs(value) < 2**53 else str(value)[:SHOWN]
    return value[:SHOWN] if isinstance(value, str) and len(value) <= SHOWN else None
