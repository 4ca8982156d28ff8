"""Who is computed next, with a worker that is made up: each mean is the sum of its tokens."""

import asyncio

import numpy as np
import pytest

from jina_jax.batching import Text
from jina_jax.serve.batcher import Batcher
from jina_jax.serve.jobs import Done, FullError, Job, WorkerLostError

WIDTH = 3


def texts(lengths, start=0, task=0):
    """A text for each length, whose tokens nobody else has."""
    ends = np.cumsum(lengths) + start
    return [
        Text(
            np.arange(end - length, end, dtype=np.int32), task, np.array([[0, length]]), np.array([i]), np.ones(1, "f")
        )
        for i, (end, length) in enumerate(zip(ends, lengths, strict=True))
    ]


def sums(found):
    return np.array([[text.ids.sum()] * WIDTH for text in found], np.float32)


class Worker:
    """Computes a batch when it is told to, or at once."""

    def __init__(self, wait=True):
        self.jobs, self.ends, self.wait = [], [], wait

    async def __call__(self, job: Job) -> Done:
        self.jobs.append(job)
        if self.wait:
            end = asyncio.get_running_loop().create_future()
            self.ends.append(end)
            await end
        else:
            await asyncio.sleep(0)
        means = np.zeros((job.count, WIDTH), np.float32)
        for text in job.texts:
            for (start, stop), target in zip(text.spans, text.targets, strict=True):
                means[target] = text.ids[start:stop].sum()
        return Done(means, 0.01, sum(len(text.ids) for text in job.texts), 1)

    def tokens(self, number):
        return sum(len(text.ids) for text in self.jobs[number].texts)


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


async def start(batcher, found, model="m"):
    task = asyncio.get_running_loop().create_task(batcher.run(model, found, len(found), WIDTH))
    await settle()
    return task


async def test_everybody_gets_their_own():
    worker = Worker(wait=False)
    batcher = Batcher(worker, batch_tokens=64)
    rng = np.random.default_rng(0)
    asked = [texts(rng.integers(1, 40, rng.integers(1, 30)), start=10_000 * i, task=i % 6 - 1) for i in range(50)]
    found = await asyncio.gather(*(batcher.run("ab"[i % 2], one, len(one), WIDTH) for i, one in enumerate(asked)))
    for one, request in zip(asked, found, strict=True):
        np.testing.assert_array_equal(request.vectors, sums(one))
    assert batcher.waiting_tokens == batcher.requests == batcher.running == 0
    assert all(worker.tokens(i) <= 64 for i in range(len(worker.jobs)))
    assert sum(worker.tokens(i) for i in range(len(worker.jobs))) == sum(len(t.ids) for one in asked for t in one)
    assert any(len({text.task for text in job.texts}) > 1 for job in worker.jobs)  # tasks are mixed


async def test_parts_of_means_add_up():
    """Late chunking: a text with several means, and a mean in parts with shares."""
    ids = np.arange(10, dtype=np.int32)
    spans, targets, shares = np.array([[0, 4], [4, 10]]), np.array([0, 1]), np.array([1, 0.25], np.float32)
    more = Text(ids + 10, 0, np.array([[2, 5]]), np.array([1]), np.array([0.75], np.float32))
    batcher = Batcher(Worker(wait=False), batch_tokens=16)
    request = await batcher.run("m", [Text(ids, 0, spans, targets, shares), more], 2, WIDTH)
    np.testing.assert_array_equal(request.vectors[:, 0], [0 + 1 + 2 + 3, 0.25 * 39 + 0.75 * (12 + 13 + 14)])


async def test_a_large_request_does_not_hold_up_a_query():
    worker = Worker()
    batcher = Batcher(worker, batch_tokens=64)
    bulk = await start(batcher, texts([16] * 2048))
    assert len(worker.jobs) == 2
    query = await start(batcher, texts([5], start=99_000))
    worker.ends[0].set_result(None)
    await settle()
    assert {len(text.ids) for text in worker.jobs[2].texts} == {5, 16}  # in the very next batch, and that is full
    assert worker.tokens(2) == 5 + 3 * 16
    worker.ends[2].set_result(None)
    await settle()
    assert query.done()
    assert not bulk.done()
    bulk.cancel()
    await settle()


async def test_queries_that_never_end_do_not_starve_a_large_request():
    worker = Worker(wait=False)
    batcher = Batcher(worker, batch_tokens=16)
    bulk = await start(batcher, texts([16] * 20))
    ended = False

    async def queries(number):
        while not ended:
            await batcher.run("m", texts([8], start=1000 * number), 1, WIDTH)

    others = [asyncio.create_task(queries(number)) for number in range(8)]
    await asyncio.wait_for(bulk, 10)
    ended = True
    await asyncio.gather(*others)


async def test_a_text_larger_than_a_batch_leaves_a_way_past():
    worker = Worker()
    batcher = Batcher(worker, batch_tokens=64)
    large = [await start(batcher, texts([500], start=1000 * i)) for i in range(3)]
    query = await start(batcher, texts([5]))
    assert [worker.tokens(i) for i in range(len(worker.jobs))] == [500, 5]  # one at a time
    for i in range(4):
        worker.ends[i].set_result(None)
        await settle()
    assert query.done()
    assert all(task.done() for task in large)


async def test_batches_are_of_one_model():
    worker = Worker(wait=False)
    batcher = Batcher(worker, batch_tokens=1000)
    batcher.set_open(False)
    tasks = [await start(batcher, texts([3, 4]), model) for model in "abab"]
    batcher.set_open(True)
    await asyncio.gather(*tasks)
    assert sorted((job.model, len(job.texts)) for job in worker.jobs) == [("a", 4), ("b", 4)]


async def test_what_was_cancelled_is_not_computed():
    worker = Worker()
    batcher = Batcher(worker, batch_tokens=64)
    gone = await start(batcher, texts([32] * 100))
    stays = await start(batcher, texts([32] * 3, start=50_000))
    gone.cancel()
    await settle()
    assert batcher.waiting_tokens == 96
    while not stays.done():
        for end in worker.ends:
            if not end.done():
                end.set_result(None)
        await settle()
    np.testing.assert_array_equal(stays.result().vectors, sums(texts([32] * 3, start=50_000)))
    assert sum(worker.tokens(i) for i in range(len(worker.jobs))) == 2 * 64 + 96  # two batches were under way


async def test_full():
    worker = Worker()
    batcher = Batcher(worker, batch_tokens=64, max_tokens=200)
    tasks = [await start(batcher, texts([64] * 5))]  # alone, more than the limit is taken
    with pytest.raises(FullError) as error:
        await batcher.run("m", texts([64]), 1, WIDTH)
    assert 1 <= error.value.retry_after <= 60
    worker.wait = False
    for end in worker.ends:
        end.set_result(None)
    await asyncio.gather(*tasks)
    await batcher.run("m", texts([64]), 1, WIDTH)


async def test_a_lost_worker_costs_nothing_once():
    worker = Worker()
    batcher = Batcher(worker, batch_tokens=64)
    task = await start(batcher, texts([16] * 10))
    batcher.set_open(False)
    for end in worker.ends:
        end.set_exception(WorkerLostError())
    await settle()
    assert not task.done()
    assert batcher.waiting_tokens == 160
    worker.wait = False
    batcher.set_open(True)
    np.testing.assert_array_equal((await task).vectors, sums(texts([16] * 10)))


async def test_what_kills_workers_is_told_so_and_given_up():
    async def dies(job):
        raise WorkerLostError

    batcher = Batcher(dies, batch_tokens=64)
    with pytest.raises(WorkerLostError):
        await batcher.run("m", texts([16] * 10), 10, WIDTH)
    assert batcher.waiting_tokens == batcher.requests == 0


async def test_an_error_is_for_those_in_the_batch():
    worker = Worker()
    batcher = Batcher(worker, batch_tokens=64)
    first, second = await start(batcher, texts([64])), await start(batcher, texts([64]))
    worker.ends[0].set_exception(RuntimeError("no memory"))
    worker.ends[1].set_result(None)
    await settle()
    assert isinstance(first.exception(), RuntimeError)
    assert second.result().left == 0


async def test_batches_shrink_to_the_time_they_may_take():
    batcher = Batcher(Worker(wait=False), batch_tokens=4096, latency_target=0.05)
    assert batcher.budget() == 4096
    batcher.speed = 20_000.0
    assert batcher.budget() == 512  # 1000 tokens in 50 ms, and rows are powers of two
    batcher.speed = 10.0
    assert batcher.budget() == 256
    batcher.speed = 1e9
    assert batcher.budget() == 4096


@pytest.fixture(autouse=True)
def anyio_backend():
    return "asyncio"


pytestmark = pytest.mark.anyio
