"""What waits for the worker, and what goes to it and comes back."""

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from jina_jax.batching import Text


class FullError(Exception):
    """The queue takes no more; `retry_after` seconds may help."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class WorkerLostError(Exception):
    """The worker ended while it had the batch."""


@dataclass(frozen=True)
class Job:
    """A batch for the worker.

    Attributes:
        model: Name of the model.
        texts: Its texts; their `targets` count the means of the job.
        count: Means in all.
    """

    model: str
    texts: list[Text]
    count: int


@dataclass(frozen=True)
class Done:
    """What the worker made of a job.

    Attributes:
        means: Float32 [count, D].
        seconds: It took.
        computed_tokens: Tokens computed, padding included.
        programs: Programs compiled so far.
    """

    means: np.ndarray
    seconds: float
    computed_tokens: int
    programs: int


@dataclass(eq=False)
class Waiting:
    """A request in the queue.

    Attributes:
        model: Name of its model.
        texts: Its texts.
        vectors: Its results, float32 [n, D]; whole when `end` is done.
        end: Done when all texts are computed.
        next: Texts not yet in a batch, by number.
        left: Number of texts not yet computed.
        since: When it came.
        first: When its first batch began.
        lost: Texts whose worker was lost.
    """

    model: str
    texts: list[Text]
    vectors: np.ndarray
    end: asyncio.Future
    next: deque[int]
    left: int
    since: float = field(default_factory=time.perf_counter)
    first: float | None = None
    lost: set[int] = field(default_factory=set)

    @property
    def tokens(self) -> int:
        """Tokens not yet in a batch."""
        return sum(len(self.texts[number].ids) for number in self.next)
