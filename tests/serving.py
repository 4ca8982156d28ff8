"""What the tests of serving share: a small model, a server in a thread, and a client."""

import asyncio
import contextlib
import socket
import threading
import time
from pathlib import Path

import httpx
import uvicorn
from conftest import random_variables

import jina_jax
from jina_jax.serve import app, http
from jina_jax.serve.settings import Settings
from jina_jax.serve.worker import ModelSpec, Spec

MINI = Path(jina_jax.__file__).parent / "mini"
PROMPTS = ("Find what answers: ", "A document: ", "", "", "")
TASKS = (None, *jina_jax.TASKS)
LONGEST = 128
WIDTH = 64


def save_small(path: Path) -> Path:
    """A checkpoint whose adapters differ, with the tokenizer of the bundled model."""
    config = jina_jax.Config.from_json(
        MINI / "config.json",
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=LONGEST + 2,
        matryoshka_dimensions=(16, 32, 64),
        prompts=PROMPTS,
    )
    model = jina_jax.Model(config)
    return jina_jax.save(path, model, random_variables(model), layout="original", tokenizer=MINI)


class Running:
    """A server that runs in a thread of this process, with its worker in another process."""

    def __init__(self, built: app.Server, url: str, loop: asyncio.AbstractEventLoop) -> None:
        self.built, self.url, self.loop = built, url, loop

    def client(self, **options) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def ask(self, input, path="/v1/embeddings", **fields) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json={"input": input, **fields})


@contextlib.contextmanager
def running(folder: Path, keys=(), more=(), wait=True, **changes):
    """Serve a model until the context ends."""
    settings = Settings(**({"drain": 0.0, "log_requests": False} | changes))
    names = ["small", *more]
    spec = Spec(tuple(ModelSpec(name, folder) for name in names), batch_tokens=settings.batch_tokens)
    built = app.build(settings, spec, {"small": ("jina-embeddings-v3",), **dict.fromkeys(more, ())}, keys)
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        built.gate, http=http.protocol(settings), ws="none", lifespan="on", log_config=None, access_log=False
    )
    server = http.Server(config, built.gate, 0.0, lambda: None)
    loop = asyncio.new_event_loop()

    def run() -> None:
        loop.run_until_complete(server.serve(sockets=[listening]))
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    one = Running(built, f"http://127.0.0.1:{listening.getsockname()[1]}", loop)
    try:
        if wait:
            until(lambda: built.is_ready)
        yield one
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()
        assert not thread.is_alive()


def until(condition, seconds=120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to this"
        time.sleep(0.02)
