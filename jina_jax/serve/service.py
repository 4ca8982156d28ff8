"""From what a request asks for to its vectors: the one way that all dialects take."""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from jina_jax.batching import Text
from jina_jax.serve import errors
from jina_jax.serve.batcher import Batcher
from jina_jax.serve.errors import ApiError
from jina_jax.serve.jobs import FullError, Waiting, WorkerLostError
from jina_jax.serve.metrics import Metrics
from jina_jax.serve.prepare import Ask, Served, check, finish, prepare
from jina_jax.serve.settings import Settings

T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """Vectors float32 [n, E] in the order of the inputs, and the tokens they took."""

    vectors: np.ndarray
    tokens: int


@dataclass
class Note:
    """What the log and the metrics are told of a request; filled in as it goes."""

    texts: int = 0
    tokens: int = 0
    model: str = ""
    task: str = ""
    late_chunking: bool = False
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0


@dataclass
class Service:
    """What the routes need.

    Attributes:
        settings: The settings.
        batcher: The queue.
        metrics: The metrics.
        models: Every model by each of its names; empty until they are loaded.
        threads: Where texts are tokenised.
        cache: Means of texts of late, by model, task and token ids.
    """

    settings: Settings
    batcher: Batcher
    metrics: Metrics
    models: dict[str, Served] = field(default_factory=dict)
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, "jina_jax-tokenize"))
    cache: OrderedDict[bytes, np.ndarray] = field(default_factory=OrderedDict)

    def find(self, name: str | None) -> Served:
        """The model of a name.

        Args:
            name: As requests give it, with or without the owner; None for the first.

        Returns:
            The model.

        Raises:
            ApiError: If there is none of that name, or none at all yet.
        """
        if not self.models:
            raise errors.unavailable("the model is being loaded; try again")
        if name is None:
            return next(iter(self.models.values()))
        found = self.models.get(name) or self.models.get(name.rpartition("/")[2])
        if found is None:
            known = ", ".join(self.models)
            raise ApiError(
                400, f"no model {name[:80]!r} here; there is {known}", "INPUT_MODEL_NOT_FOUND", param="model"
            )
        return found

    async def embed(self, ask: Ask, note: Note) -> Answer:
        """Embed what a request asks for.

        Args:
            ask: What it wants.
            note: Filled in.

        Returns:
            The answer.

        Raises:
            ApiError: If it cannot be done; says why.
        """
        served = self.find(ask.model)
        task = check(ask, served, self.settings)
        note.texts, note.model, note.task = len(ask.inputs), served.names[0], task or "none"
        note.late_chunking = ask.late_chunking
        self.check_room()
        start = time.perf_counter()
        texts, tokens = await self.thread(prepare, ask, served, task, self.settings)
        note.tokens = tokens
        self.metrics.tokenized(time.perf_counter() - start, tokens, len(ask.inputs))
        means = await self._means(served, texts, len(ask.inputs), note, keep=not ask.late_chunking)
        self.metrics.served(note)
        vectors = await self.thread(finish, means, ask.dimensions or served.dimensions, ask.normalized)
        return Answer(vectors, tokens)

    async def thread(self, function: Callable[..., T], *arguments: object) -> T:
        """Call a function where it holds up nobody."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *arguments)

    def check_room(self, tokens: int = 0) -> None:
        """Refuse what the queue has no room for.

        Args:
            tokens: Tokens to be queued.

        Raises:
            ApiError: 429.
        """
        try:
            self.batcher.check_room(tokens)
        except FullError as error:
            raise errors.overloaded(error.retry_after) from None

    async def _means(self, served: Served, texts: list[Text], count: int, note: Note, keep: bool) -> np.ndarray:
        """Means of the inputs, from the cache where it has them."""
        keys: dict[int, bytes] = {}
        known: dict[int, np.ndarray] = {}
        if keep and self.settings.cache_size:
            keys = {number: _key(served.names[0], text) for number, text in enumerate(texts)}
            for number, key in keys.items():
                if key in self.cache:
                    self.cache.move_to_end(key)
                    known[number] = self.cache[key]
            self.metrics.cached(len(known), len(texts) - len(known))
        wanted = [text for number, text in enumerate(texts) if number not in known]
        request = await self._run(served, wanted, count)
        note.queue_seconds = (request.first or request.since) - request.since
        note.compute_seconds = time.perf_counter() - (request.first or request.since)
        for number, vector in known.items():
            request.vectors[texts[number].targets] = vector
        for number, key in keys.items():
            if number not in known:
                self.cache[key] = request.vectors[texts[number].targets].copy()
        while len(self.cache) > self.settings.cache_size:
            self.cache.popitem(last=False)
        return request.vectors

    async def _run(self, served: Served, texts: list[Text], count: int) -> Waiting:
        try:
            return await self.batcher.run(served.names[0], texts, count, served.config.hidden_size)
        except FullError as error:
            raise errors.overloaded(error.retry_after) from None
        except WorkerLostError:
            raise errors.unavailable("the model's process ended while it computed this; try again") from None


def _key(model: str, text: Text) -> bytes:
    digest = hashlib.blake2b(f"{model}\0{text.task}\0".encode(), digest_size=20)
    digest.update(text.ids.tobytes())
    return digest.digest()
