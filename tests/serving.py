"""What the tests of serving share: a small model, a server in a thread, and a client."""

import asyncio
import contextlib
import functools
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import uvicorn
from conftest import random_variables

import jina_jax
from jina_jax.serve import app, http
from jina_jax.serve.settings import Settings
from jina_jax.serve.worker import ModelSpec, Spec

ROOT = Path(__file__).parent.parent
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


_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # reading the system's certificates takes longer than a request


class Running:
    """A server that runs in a thread of this process, with its worker in another process."""

    def __init__(self, built: app.Server, url: str, loop: asyncio.AbstractEventLoop) -> None:
        self.built, self.url, self.loop = built, url, loop

    def client(self, **options) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=600, verify=_NO_TLS, **options)

    @functools.cached_property
    def shared(self) -> httpx.Client:
        """A client for all threads."""
        return self.client()

    def ask(self, input, path="/v1/embeddings", **fields) -> httpx.Response:
        return self.shared.post(path, json={"input": input, **fields})


@contextlib.contextmanager
def running(folder: Path, keys=(), more=(), wait=True, **changes):
    """Serve a model until the context ends."""
    settings = Settings(**({"drain": 0.0, "log_requests": False} | changes))
    names = ["small", *more]
    spec = Spec(
        tuple(ModelSpec(name, folder) for name in names), batch_tokens=settings.batch_tokens, mesh=settings.mesh
    )
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
        one.shared.close()
        server.should_exit = True
        thread.join(30)
        listening.close()
        assert not thread.is_alive()


def until(condition, seconds=300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to this"
        time.sleep(0.02)


class Process:
    """`jina-jax serve` with a model; the log is a file."""

    def __init__(self, folder, path, *flags, **environment):
        self.log = path / "log"
        command = [sys.executable, "-m", "jina_jax", "serve", "--port", "0", *flags]
        names = {"JINA_JAX_MODEL": str(folder), "JINA_JAX_CACHE": str(path / "xla")} | environment
        with self.log.open("w") as file:
            self.process = subprocess.Popen(command, stderr=file, cwd=ROOT, env=os.environ | names)

    def events(self):
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    @property
    def url(self):
        until(lambda: any(one["event"] == "listening" for one in self.events()) or self.process.poll() is not None)
        return next(one["url"] for one in self.events() if one["event"] == "listening")

    def ready(self):
        def is_ready():
            assert self.process.poll() is None, self.log.read_text()
            return httpx.get(f"{self.url}/ready").status_code == 200

        until(is_ready)
        return self

    def worker(self) -> psutil.Process:
        """The process of the model."""
        [child] = psutil.Process(self.process.pid).children()
        return child
