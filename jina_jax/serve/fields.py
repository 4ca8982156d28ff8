"""Fields of requests: what clients may send in each, and how a wrong one is told."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema
from pydantic_core import ErrorDetails, PydanticCustomError

from jina_jax.serve.errors import ApiError

EMBEDDING_TYPES = ("float", "base64", "binary", "ubinary", "int8", "uint8")
SHOWN = 80  # characters of a wrong value that an error repeats

Ids = list[int]
Inputs = list[str] | list[Ids]


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


# ---- Errors --------------------------------------------------------------------------------------------------------


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
