"""Who is computed next, and with whom: texts of all requests, tasks and clients go into batches of a token budget.

A request is served in slices. A new one has its first slice in one of the next batches, whatever else is waiting; what
is left of it then goes round with all others. So a query never waits for the end of a large request, and a large one
gets its share of every fourth batch even if queries never end. No batch waits to be filled: what is there goes as soon
as the worker takes it, and under load that is many texts.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable

import numpy as np

from jina_jax.batching import Text
from jina_jax.serve.jobs import Done, FullError, Job, Waiting, WorkerLostError

AT_ONCE = 2  # batches with the worker: one is computed, the other is there when it ends
LEAST_BUDGET = 256  # tokens; fewer are hardly faster
OLD_FIRST = 4  # every so many batches begin with requests that have had a slice
SLICE = 4  # a request gets at most this part of a batch at a time


Batch = list[tuple[Waiting, int]]


class Batcher:
    """The queue, and what takes from it.

    Attributes:
        waiting_tokens: Tokens that are in no batch yet.
        speed: Tokens per second, by the batches of late.
        is_open: Whether there is a worker; the queue keeps what it has meanwhile.
    """

    def __init__(
        self,
        compute: Callable[[Job], Awaitable[Done]],
        *,
        batch_tokens: int,
        latency_target: float = 0.0,
        max_tokens: int = 1 << 20,
        observe: Callable[[Job, Done], None] = lambda job, done: None,
    ) -> None:
        self.compute, self.observe = compute, observe
        self.batch_tokens, self.latency_target, self.max_tokens = batch_tokens, latency_target, max_tokens
        self.new: deque[Waiting] = deque()
        self.old: deque[Waiting] = deque()
        self.waiting_tokens, self.speed, self.is_open = 0, 0.0, True
        self._running: set[asyncio.Task] = set()
        self._large = 0  # batches over the budget that are running
        self._turn = 0

    @property
    def requests(self) -> int:
        """Requests with texts in no batch yet."""
        return len(self.new) + len(self.old)

    @property
    def running(self) -> int:
        """Batches with the worker."""
        return len(self._running)

    def check_room(self, tokens: int = 0) -> None:
        """Raise `FullError` if so many tokens do not fit; one request always fits into an empty queue."""
        if self.waiting_tokens and self.waiting_tokens + tokens > self.max_tokens:
            raise FullError(self.retry_after())

    def retry_after(self) -> int:
        """Seconds until half the queue will be done, from 1 to 60."""
        return min(60, max(1, math.ceil(self.waiting_tokens / (2 * self.speed)))) if self.speed else 1

    async def run(self, model: str, texts: list[Text], count: int, width: int) -> Waiting:
        """Have texts computed. Cancelling this drops what is not yet in a batch.

        Args:
            model: Name of their model.
            texts: The texts; `targets` are rows of the result.
            count: Rows of the result.
            width: Columns of the result.

        Returns:
            The request with its vectors.

        Raises:
            FullError: If there is no room for it.
            WorkerLostError: If two workers were lost while computing it.
            RuntimeError: If the worker could not compute it.
        """
        request = Waiting(
            model,
            texts,
            np.zeros((count, width), np.float32),
            asyncio.get_running_loop().create_future(),
            deque(range(len(texts))),
            len(texts),
        )
        tokens = request.tokens
        self.check_room(tokens)
        if not texts:
            return request
        self.waiting_tokens += tokens
        self.new.append(request)
        self._start()
        try:
            await request.end
        finally:
            self._drop(request)
        return request

    def set_open(self, is_open: bool) -> None:
        """Say whether there is a worker."""
        self.is_open = is_open
        self._start()

    def budget(self) -> int:
        """Tokens of the next batch: as many as the worker computes in the time wanted."""
        if not (self.latency_target and self.speed):
            return self.batch_tokens
        wanted = max(self.speed * self.latency_target, 1.0)
        # Rows have lengths of powers of two: anything between would be padding.
        return min(self.batch_tokens, max(LEAST_BUDGET, 1 << int(math.log2(wanted))))

    def _start(self) -> None:
        """Give the worker batches while it takes any."""
        while self.is_open and self.requests and len(self._running) < AT_ONCE:
            budget = self.budget()
            batch = self._next_batch(budget)
            if not batch:
                return
            large = sum(len(one.texts[number].ids) for one, number in batch) > budget
            self._large += large
            task = asyncio.get_running_loop().create_task(self._run(batch, large))
            self._running.add(task)

    def _next_batch(self, budget: int) -> Batch:
        """Take texts for a batch out of the queue."""
        self._turn += 1
        lines = (self.old, self.new) if self._turn % OLD_FIRST == 0 else (self.new, self.old)
        model = next(line[0].model for line in lines if line)
        share = max(1, budget // SLICE)
        batch: Batch = []
        free = budget
        for line in lines:
            # Newcomers have one slice here and then are old; old ones go round until the batch is full.
            for _ in range(len(line)):
                request = line.popleft()
                taken = self._take(request, model, share, free, not batch)
                batch += taken
                free -= sum(len(request.texts[number].ids) for _, number in taken)
                if request.next:
                    (self.old if taken else line).append(request)
        while free > 0 and self.old:  # whoever has more may fill the rest
            before = free
            for _ in range(len(self.old)):
                request = self.old.popleft()
                taken = self._take(request, model, share, free, not batch)
                batch += taken
                free -= sum(len(request.texts[number].ids) for _, number in taken)
                if request.next:
                    self.old.append(request)
            if free == before:
                break
        return batch

    def _take(self, request: Waiting, model: str, share: int, free: int, alone: bool) -> Batch:
        """Take a slice of a request: some texts, or one that is larger than that."""
        taken: Batch = []
        if request.model != model:
            return taken
        while request.next:
            size = len(request.texts[request.next[0]].ids)
            # A text larger than a batch is one by itself, and one at a time: who comes meanwhile has a way past it.
            lonely = alone and not self._large
            if (taken and size > share) or (size > free and (taken or not lonely)):
                break
            number = request.next.popleft()
            taken.append((request, number))
            share, free = share - size, free - size
            self.waiting_tokens -= size
        return taken

    async def _run(self, batch: Batch, large: bool) -> None:
        """Have a batch computed, and hand out its means."""
        now, texts, count = time.perf_counter(), [], 0
        for request, number in batch:
            request.first = request.first or now
            text = request.texts[number]
            targets = np.arange(count, count + len(text.targets))
            # Shares are applied here: what the worker gives back is the mean of each span.
            texts.append(Text(text.ids, text.task, text.spans, targets, np.ones(len(targets), np.float32)))
            count += len(targets)
        job = Job(batch[0][0].model, texts, count)
        try:
            done = await self.compute(job)
            if done.means.shape != (count, batch[0][0].vectors.shape[1]):
                raise RuntimeError(f"the worker gave means of shape {done.means.shape} for {count}")
        except WorkerLostError as error:
            self._again(batch, error)
        except Exception as error:
            for request in {id(request): request for request, _ in batch}.values():
                _fail(request, error)
        else:
            self._hand_out(batch, job, done)
            tokens = sum(len(text.ids) for text in texts)
            speed = tokens / max(done.seconds, 1e-6)
            # Batches that are nearly empty say nothing about the speed of full ones.
            if tokens >= LEAST_BUDGET // 2:
                self.speed = speed if not self.speed else 0.8 * self.speed + 0.2 * speed
            self.observe(job, done)
        finally:
            self._large -= large
            self._running.discard(asyncio.current_task())
            self._start()

    def _hand_out(self, batch: Batch, job: Job, done: Done) -> None:
        for (request, number), text in zip(batch, job.texts, strict=True):
            given = request.texts[number]
            request.vectors[given.targets] += done.means[text.targets] * given.shares[:, None]
            request.left -= 1
            if not request.left and not request.end.done():
                request.end.set_result(None)

    def _again(self, batch: Batch, error: WorkerLostError) -> None:
        """Put texts back whose worker was lost: computing them twice harms nobody, unless they are what killed it."""
        for request, number in batch:
            if number in request.lost:
                _fail(request, error)
            request.lost.add(number)
        for request, number in reversed(batch):
            if request.end.done():
                continue
            if not request.next:
                self.new.appendleft(request)
            request.next.appendleft(number)
            self.waiting_tokens += len(request.texts[number].ids)

    def _drop(self, request: Waiting) -> None:
        """Forget what is left of a request."""
        self.waiting_tokens -= request.tokens
        request.next.clear()
        for line in (self.new, self.old):
            if request in line:
                line.remove(request)


def _fail(request: Waiting, error: Exception) -> None:
    if not request.end.done():
        request.end.set_exception(error)
