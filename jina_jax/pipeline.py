"""Keeps the device busy: the next texts are prepared, and the last results fetched, while it computes.

What is prepared and what is computed comes from the embedder; here is only who waits for whom. At any time one window
of texts is being prepared in a thread, one is being computed, and the results of at most one wait to be taken, so
memory does not grow with the number of texts. Two batches are computed at once: an accelerator always has the next one
waiting, and on a CPU the one uses the cores that the other leaves idle, since XLA runs small products on one core.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from jina_jax import batching
from jina_jax.batching import Arrays, Batch, Text

AT_ONCE = 2  # batches

T = TypeVar("T")


@dataclass(eq=False)
class Work(Generic[T]):
    """A window of texts, ready to be computed.

    Attributes:
        window: What it was made from.
        texts: Its texts.
        batches: Their batches.
        vectors: Results, float32 [n, D], whole when the work comes out of `stream`.
    """

    window: T
    texts: list[Text]
    batches: list[Batch]
    vectors: np.ndarray


def stream(
    compute: Callable[[Arrays], np.ndarray], prepare: Callable[[T], Work], windows: Iterable[T], pad_id: int
) -> Iterator[Work]:
    """Compute windows one after the other.

    Args:
        compute: Means [B, P, D] of a batch; runs in threads.
        prepare: Makes work of a window; runs in a thread of its own.
        windows: The windows. If they end with an error, what came before it still comes out first.
        pad_id: Id that stands at padding.

    Returns:
        The works in order, with their results.
    """
    running: deque[tuple[Work, Batch, Future]] = deque()
    left: deque[list] = deque()  # [work, batches not yet fetched] in order

    def finished(most: int) -> Iterator[Work]:
        """Fetch until at most so many batches are running; give the works that are whole."""
        while len(running) > most:
            work, batch, means = running.popleft()
            batching.collect(batch, work.texts, means.result(), work.vectors)
            left[0][1] -= 1
            while left and not left[0][1]:
                yield left.popleft()[0]

    def run(work: Work, batch: Batch) -> np.ndarray:
        return compute(batching.fill(batch, work.texts, pad_id))

    threads, works = ThreadPoolExecutor(AT_ONCE, "jina_jax-compute"), _ahead(prepare, windows)
    try:
        for work in works:
            left.append([work, len(work.batches)])
            for batch in work.batches:
                running.append((work, batch, threads.submit(run, work, batch)))
                yield from finished(AT_ONCE)
            if not running:  # nothing to compute in it
                yield left.popleft()[0]
        yield from finished(0)
    except Exception:
        yield from finished(0)
        raise
    finally:
        works.close()
        threads.shutdown(cancel_futures=True)


def _ahead(prepare: Callable[[T], Work], windows: Iterable[T]) -> Generator[Work, None, None]:
    """Works in order, each prepared while the one before is computed."""
    error, ahead = None, deque[Future]()
    with ThreadPoolExecutor(1, "jina_jax-prepare") as thread:
        try:
            source = iter(windows)
            while True:
                try:
                    window = next(source)
                except StopIteration:
                    break
                except Exception as found:  # told after what came before it has been computed
                    error = found
                    break
                ahead.append(thread.submit(prepare, window))
                if len(ahead) > 1:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
    if error is not None:
        raise error
