"""From settings to a running server, and its end."""

import dataclasses
import logging
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from jina_jax import hub
from jina_jax.records import InputError
from jina_jax.serve import app, http, logs, settings
from jina_jax.serve.settings import Settings
from jina_jax.serve.worker import ModelSpec, Spec

log = logging.getLogger("jina_jax.serve")

# What clients of the hosted API send, whatever they are given to talk to.
HOSTED_NAME = "jina-embeddings-v3"


def models(given: Settings) -> tuple[list[ModelSpec], dict[str, tuple[str, ...]]]:
    """What to load, and under which names.

    Args:
        given: The settings.

    Returns:
        The models, and of each the names that it has besides its own.

    Raises:
        InputError: If two have the same name.
        FileNotFoundError: If there is no such model.
    """
    specs: list[ModelSpec] = []
    names: dict[str, tuple[str, ...]] = {}
    adapters = dict(one.split("=", 1) for one in given.adapter)
    prompts = dict(one.split("=", 1) for one in given.prompt)
    for number, one in enumerate(given.model or ("mini",)):
        alias, named, place = one.partition("=")
        # A path may hold "=", a name none of what paths are made of.
        place, own = (place, alias) if named and "/" not in alias else (one, "")
        directory = hub.find(place, given.revision)
        usual = (
            "jina-jax-mini" if place in hub.BUNDLED else Path(place).resolve().name if Path(place).is_dir() else place
        )
        own = own or usual.rpartition("/")[2]
        if own in names:
            raise InputError(f"two models are called {own!r}; name them with --model name=MODEL")
        changes = (adapters, prompts) if number == 0 else ({}, {})
        specs.append(ModelSpec(own, directory, *changes, given.max_model_len))
        names[own] = ("mini",) if place in hub.BUNDLED and own != "mini" else ()
    first = specs[0].name
    if given.served_model_name:
        own, *more = given.served_model_name
        specs[0] = dataclasses.replace(specs[0], name=own)
        names = {own: tuple(more)} | {name: of for name, of in names.items() if name != first}
    elif len(specs) == 1 and "=" not in (given.model or ("mini",))[0] and first != HOSTED_NAME:
        names[first] = (*names[first], HOSTED_NAME)
    every = [name for own, of_it in names.items() for name in (own, *of_it)]
    twice = sorted({name for name in every if every.count(name) > 1})
    if twice:
        raise InputError(f"two models are called {twice[0]!r}; name them with --model name=MODEL")
    return specs, names


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Args:
        host: Address or name.
        port: Port; 0 takes a free one.

    Returns:
        The socket.

    Raises:
        InputError: If that is not possible.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen at {host}:{port}: {error}; choose others with --host and --port") from error


def run(given: Settings) -> None:
    """Serve until told to end.

    Args:
        given: The settings.

    Raises:
        InputError: If something given is wrong.
        RuntimeError: If the model's process could not be started or brought back.
        SystemExit: When it ends upon Ctrl-C.
    """
    keys = settings.keys(given)
    specs, names = models(given)
    if not given.model:
        print(f"jina-jax: note: this is {hub.BUNDLED_NOTE} with --model", file=sys.stderr)
    spec = Spec(tuple(specs), given.dtype, given.mesh, given.batch_tokens, given.warmup)
    logs.setup(given.log_format)
    ended: list[http.Server] = []

    def end() -> None:
        for one in ended:
            one.should_exit = True

    built = app.build(given, spec, names, keys, failed=end)
    listening = listen(given.host, given.port)
    config = uvicorn.Config(
        built.gate,
        http=http.protocol(given),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=max(1, round(given.keep_alive)),
        timeout_graceful_shutdown=max(1, round(given.grace)),
    )
    server = http.Server(config, built.gate, given.drain, lambda: None)
    ended.append(server)
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{port}"
    log.info("listening", extra={"url": url, "port": port, "models": _every(names), "keys": len(keys)})
    server.run(sockets=[listening])
    log.info("stopped", extra={"state": built.supervisor.state})
    if built.supervisor.message:
        raise RuntimeError(f"the server ended: {built.supervisor.message}")
    if server.stopped_by == 2:
        raise SystemExit(130)


def _every(names: dict[str, tuple[str, ...]]) -> Sequence[str]:
    return [name for own, of_it in names.items() for name in (own, *of_it)]
