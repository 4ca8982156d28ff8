"""Every flag of the server as data: its name, type, default and what it says of itself; `JINA_JAX_*` mirrors each."""

import argparse
import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jina_jax import hub
from jina_jax.arguments import one_of, option, positive, switch, whole
from jina_jax.records import InputError

MESH_AXES = ("data", "fsdp", "tensor", "sequence")


def seconds(value: str) -> float:
    """A type for argparse: a number of seconds of at least 0."""
    try:
        found = float(value)
    except ValueError:
        found = -1.0
    if not 0 <= found < float("inf"):
        raise argparse.ArgumentTypeError(f"{value!r} is not a number of at least 0")
    return found


def mesh(value: str) -> tuple[tuple[str, int], ...]:
    """A type for argparse: `data=2,tensor=4`, with -1 for all devices that are left."""
    if not re.fullmatch(r"(\w+=(-1|\d+))(,\w+=(-1|\d+))*", value):
        raise argparse.ArgumentTypeError(f"{value!r} must look like data=-1,tensor=2")
    axes = tuple((name, int(size)) for name, size in (part.split("=") for part in value.split(",")))
    unknown = [name for name, _ in axes if name not in MESH_AXES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no axis of a mesh; there are {', '.join(MESH_AXES)}")
    return axes


def _setting(default: Any, help: str, type: Callable[[str], Any] = str, metavar: str = "N", many: bool = False) -> Any:
    about = {"help": help, "type": type, "metavar": metavar, "many": many}
    return dataclasses.field(default=default, metadata=about)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the server does. Fields are flags, `body_timeout` for `--body-timeout`; many-valued ones are tuples."""

    model: tuple[str, ...] = _setting(
        (),
        f"directory, name on the hub such as {hub.REAL_MODEL}, or mini (default); name=MODEL to serve it under that "
        "name; may be given several times, the first is the default",
        metavar="[NAME=]MODEL",
        many=True,
    )
    adapter: tuple[str, ...] = _setting(
        (), "PEFT adapter of the first model, as a further task", metavar="TASK=DIR", many=True
    )
    served_model_name: tuple[str, ...] = _setting(
        (),
        "names that requests may give for the first model (default: its own, and jina-embeddings-v3, which clients of "
        "the hosted API send)",
        metavar="NAME",
        many=True,
    )
    prompt: tuple[str, ...] = _setting(
        (), "text put before the inputs of a task, instead of the model's own", metavar="TASK=TEXT", many=True
    )
    revision: str | None = _setting(None, "branch, tag or commit on the hub", metavar="NAME")
    dtype: str = _setting(
        "float32", "float32 (default, exact) or bfloat16", one_of(("float32", "bfloat16")), metavar="TYPE"
    )
    mesh: tuple[tuple[str, int], ...] | None = _setting(
        None, "devices to split model and batches over, such as data=-1,tensor=2", mesh, metavar="AXES"
    )
    max_model_len: int | None = _setting(
        None, "longest text in tokens (default: the model's); less needs fewer programs", positive
    )
    default_task: str | None = _setting(
        None, "task of requests that name none; without one, no adapter and no prompt", metavar="TASK"
    )
    auto_truncate: bool = _setting(False, "cut texts that are too long, if a request does not say")
    allow_token_ids: bool = _setting(False, "take token ids as input; they must be of this model's own tokenizer")

    host: str = _setting("127.0.0.1", "address to listen at; 0.0.0.0 is all (default: 127.0.0.1)", metavar="ADDRESS")
    port: int = _setting(8080, "port (default: 8080); 0 takes a free one", whole)
    api_key: tuple[str, ...] = _setting(
        (),
        "key that requests must show; better in the environment or a file, others see command lines",
        metavar="KEY",
        many=True,
    )
    api_key_file: str | None = _setting(
        None, "file of keys, one on each line; blank lines and # comments are skipped", metavar="FILE"
    )
    cors_origin: tuple[str, ...] = _setting(
        (), "origin whose pages may call this server (default: none)", metavar="URL", many=True
    )

    max_inputs: int = _setting(2048, "most texts of a request (default: 2048)", positive)
    max_body: int = _setting(32 << 20, "most bytes of a request's body (default: 33554432)", positive)
    max_request_tokens: int = _setting(1 << 19, "most tokens of a request (default: 524288)", positive)
    max_queue_requests: int = _setting(512, "most requests at a time; more get 429 (default: 512)", positive)
    max_queue_tokens: int = _setting(
        1 << 20, "most tokens waiting; requests beyond get 429 (default: 1048576)", positive
    )
    batch_tokens: int | None = _setting(
        None, "most tokens computed at once (default: 1024 on a CPU, else 32768)", positive
    )
    latency_target: float = _setting(
        0.05,
        "seconds that a batch shall take: batches are smaller where the device is slow, so that nobody waits long "
        "for their end; 0 for none (default: 0.05)",
        seconds,
        metavar="S",
    )
    cache_size: int = _setting(0, "texts whose vectors are kept for when they come again (default: 0)", whole)

    header_timeout: float = _setting(10.0, "for a client to send its headers (default: 10)", seconds, metavar="S")
    body_timeout: float = _setting(30.0, "for a client to send its body (default: 30)", seconds, metavar="S")
    request_timeout: float = _setting(600.0, "for an answer, 504 after it (default: 600)", seconds, metavar="S")
    keep_alive: float = _setting(75.0, "for an idle connection (default: 75)", seconds, metavar="S")
    drain: float = _setting(
        1.0, "from SIGTERM, while /ready says 503, until no connection is taken (default: 1)", seconds, metavar="S"
    )
    grace: float = _setting(120.0, "for requests in flight at the end (default: 120)", seconds, metavar="S")
    worker_restarts: int = _setting(
        3, "tries in a row to bring the model's process back before giving up (default: 3)", whole
    )

    warmup: bool = _setting(True, "compile every program before /ready")
    log_format: str = _setting("json", "json (default) or text", one_of(("json", "text")), metavar="HOW")
    log_requests: bool = _setting(True, "log a line for every request")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every setting to a parser.

    Args:
        parser: The parser of the command.
    """
    for field in dataclasses.fields(Settings):
        flag, about = "--" + field.name.replace("_", "-"), field.metadata
        if isinstance(field.default, bool):
            switch(parser, flag, about["help"], field.default)
        elif about["many"]:
            variable = "JINA_JAX_" + field.name.upper()
            help = f"{about['help']}; repeat it for several [env: {variable}, with commas]"
            parser.add_argument(flag, action="append", metavar=about["metavar"], help=help)
        else:
            default = None if field.default is None else str(field.default)
            option(parser, flag, about["help"], type=about["type"], default=default, metavar=about["metavar"])


def from_arguments(args: argparse.Namespace) -> Settings:
    """Settings from parsed arguments.

    Args:
        args: What a parser with `add_arguments` gave.

    Returns:
        The settings.

    Raises:
        InputError: If settings contradict each other.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Settings):
        value = getattr(args, field.name)
        if field.metadata["many"]:
            given = os.environ.get("JINA_JAX_" + field.name.upper(), "") if value is None else None
            parts = value if given is None else [part.strip() for part in given.split(",")]
            value = tuple(part for part in parts if part)
        values[field.name] = value
    settings = Settings(**values)
    if settings.served_model_name and len(settings.model) > 1:
        raise InputError("--served-model-name is for one model; for several give --model name=MODEL for each")
    if settings.max_model_len is not None and settings.max_model_len < 8:
        raise InputError(f"--max-model-len {settings.max_model_len} must be at least 8")
    for flag, form in (("adapter", "TASK=DIR"), ("prompt", "TASK=TEXT")):
        for value in getattr(settings, flag):
            if not value.partition("=")[0] or "=" not in value:
                raise InputError(f"--{flag} {value!r} must be {form}")
    return settings


def keys(settings: Settings) -> tuple[str, ...]:
    """The API keys; none if everybody may come.

    Args:
        settings: The settings.

    Returns:
        The keys of flags, environment and file.

    Raises:
        InputError: If the file has none, or one that no header can carry.
        OSError: If it cannot be read.
    """
    found = list(settings.api_key)
    if settings.api_key_file is not None:
        lines = [line.strip() for line in Path(settings.api_key_file).read_text().splitlines()]
        of_file = [line for line in lines if line and not line.startswith("#")]
        if not of_file:
            raise InputError(f"{settings.api_key_file} has no key; put one on a line, or leave --api-key-file out")
        found += of_file
    for number, key in enumerate(found, 1):
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise InputError(f"API key {number} holds blanks or characters that an HTTP header cannot carry")
    return tuple(found)
