"""The process that computes: token ids and tasks come in through a pipe, means go out. It knows of no request.

`python -m jina_jax.serve.worker FD` is started by `supervisor`, and ends when the other end of its pipe is closed.
"""

import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from jina_jax.batching import Text
from jina_jax.config import Config


@dataclass(frozen=True)
class ModelSpec:
    """A model to load: its name, directory, further adapters and other prompts by task, and its longest text."""

    name: str
    directory: Path
    adapters: dict[str, str] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)
    max_model_len: int | None = None


@dataclass(frozen=True)
class Spec:
    """What a worker shall hold: models, the type and mesh to compute in, tokens at once, whether to warm up."""

    models: tuple[ModelSpec, ...]
    dtype: str = "float32"
    mesh: tuple[tuple[str, int], ...] | None = None
    batch_tokens: int | None = None
    warmup: bool = True


@dataclass(frozen=True)
class Ready:
    """What the worker says when it takes jobs: the models' configurations, the tokens it computes at once, and more."""

    configs: dict[str, Config]
    dimensions: dict[str, int]
    batch_tokens: int
    programs: int
    seconds: float


class Packed(NamedTuple):
    """A job as it goes through the pipe; arrays are those of `Text`, one after the other."""

    number: int
    model: str
    ids: np.ndarray
    lengths: np.ndarray
    tasks: np.ndarray
    spans: np.ndarray
    counts: np.ndarray


class Computed(NamedTuple):
    """The answer to a job: its means, or an error."""

    number: int
    means: np.ndarray | None
    error: str | None
    seconds: float
    computed_tokens: int
    programs: int


def packed(number: int, model: str, texts: Sequence[Text]) -> Packed:
    """A job as it goes through the pipe.

    Args:
        number: Its number.
        model: Name of its model.
        texts: Its texts.

    Returns:
        The job.
    """
    return Packed(
        number,
        model,
        np.concatenate([text.ids for text in texts]),
        np.array([len(text.ids) for text in texts], np.int64),
        np.array([text.task for text in texts], np.int32),
        np.concatenate([text.spans for text in texts]),
        np.array([len(text.spans) for text in texts], np.int64),
    )


def unpacked(job: Packed) -> list[Text]:
    """Texts of a job; the means of each follow those of the one before.

    Args:
        job: The job.

    Returns:
        The texts.
    """
    ids = np.split(job.ids, np.cumsum(job.lengths)[:-1])
    ends = np.cumsum(job.counts)
    spans, targets = np.split(job.spans, ends[:-1]), np.split(np.arange(ends[-1]), ends[:-1])
    return [
        Text(one, int(task), span, target, np.ones(len(target), np.float32))
        for one, task, span, target in zip(ids, job.tasks, spans, targets, strict=True)
    ]


def load(spec: Spec) -> dict[str, Any]:
    """Load the models.

    Args:
        spec: Which.

    Returns:
        Embedders by name.

    Raises:
        CheckpointError: If a model is damaged.
        ValueError: If a mesh or length does not fit.
    """
    from jina_jax import sharding
    from jina_jax.embedder import Embedder
    from jina_jax.model import Model

    axes: dict[str, Any] = {"data": 1} | dict(spec.mesh or ())
    mesh = None if spec.mesh is None else sharding.make_mesh(**axes)
    embedders = {}
    for one in spec.models:
        found = Embedder.load(one.directory, dtype=spec.dtype, mesh=mesh, adapters=one.adapters)
        config = found.config
        for task, prompt in one.prompts.items():
            at = config.task_id(task)
            config = config.replace(prompts=(*config.prompts[:at], prompt, *config.prompts[at + 1 :]))
        if one.max_model_len is not None and one.max_model_len < config.max_tokens:
            config = config.replace(max_position_embeddings=one.max_model_len + 2)
        if config != found.config:
            found = Embedder(Model(config), found.variables, found.tokenizer, mesh)
        embedders[one.name] = found
    return embedders


def _compute(embedder: Any, job: Packed, batch_tokens: int | None) -> Computed:
    from jina_jax.embedder import Usage

    start, usage = time.perf_counter(), Usage()
    means = embedder.means(unpacked(job), int(job.counts.sum()), batch_tokens=batch_tokens, usage=usage)
    seconds = time.perf_counter() - start
    return Computed(job.number, means, None, seconds, usage.computed_tokens, embedder.programs)


def serve(connection: Connection, spec: Spec) -> None:
    """Load, say so, and compute jobs until the pipe is closed.

    Args:
        connection: The pipe.
        spec: What to load.
    """
    import jax

    from jina_jax import compilation, sharding
    from jina_jax.embedder import BATCH_TOKENS, BATCH_TOKENS_ACCELERATOR
    from jina_jax.pipeline import AT_ONCE

    compilation.enable_cache()
    start = time.perf_counter()
    embedders = load(spec)
    if spec.warmup:
        for embedder in embedders.values():
            embedder.warmup(batch_tokens=spec.batch_tokens)
    configs = {name: embedder.config for name, embedder in embedders.items()}
    first = next(iter(embedders.values()))
    usual = BATCH_TOKENS.get(jax.default_backend(), BATCH_TOKENS_ACCELERATOR)
    usual *= 1 if first.mesh is None else math.prod(sharding.parts(first.mesh))
    connection.send(
        Ready(
            configs,
            {name: embedder.dimensions for name, embedder in embedders.items()},
            spec.batch_tokens or usual,
            sum(embedder.programs for embedder in embedders.values()),
            time.perf_counter() - start,
        )
    )
    lock = Lock()

    def run(job: Packed) -> None:
        try:
            found = _compute(embedders[job.model], job, spec.batch_tokens)
        except Exception as error:
            traceback.print_exc()
            found = Computed(job.number, None, f"{type(error).__name__}: {error}", 0.0, 0, 0)
        with lock:
            connection.send(found)

    # Programs of several devices must be started in one order on all of them.
    with ThreadPoolExecutor(1 if spec.mesh is not None else AT_ONCE) as threads:
        while True:
            try:
                job = connection.recv()
            except (EOFError, OSError):
                job = None
            if job is None:
                os._exit(0)  # nobody is there to take what is still being computed
            threads.submit(run, job)


def main() -> int:
    """Run a worker."""
    # Signals to the whole group, such as Ctrl-C, are for the server: it ends this process when all is answered.
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    try:
        serve(connection, connection.recv())
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0
    except Exception as error:
        if os.environ.get("JINA_JAX_DEBUG"):
            traceback.print_exc()
        connection.send(f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    # What goes through the pipe must be of the module that the other end knows, which is not `__main__`.
    from jina_jax.serve import worker

    sys.exit(worker.main())
