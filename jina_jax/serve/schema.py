"""What requests and responses hold: the Jina v3 contract and OpenAI's in one, with the names that clients give things.

Fields that are not known are ignored, as the hosted API ignores them.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AliasChoices,
    BaseModel,
    Discriminator,
    Field,
    PlainValidator,
    RootModel,
    Tag,
    ValidationError,
    WithJsonSchema,
)

from jina_jax.serve.fields import TEXTS_SCHEMA, Dimensions, Input, OnSwitch, Switch, Types, invalid, read_inputs

Body = TypeVar("Body", bound=BaseModel)


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


# ---- Validation ----------------------------------------------------------------------------------------------------


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
