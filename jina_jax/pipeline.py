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
from typing import Any, Generic, TypeVar

import numpy as np

from jina_jax import batching
from jina_jax.batching import Arrays, Batch, Text

AT_ONCE = 2  # batches
WINDOW_TEXTS = 4096

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Window(Generic[T]):
    """Texts, or documents, that are packed together.

    Attributes:
        items: What was read of each.
        first: Number of the first of them in its group.
        ends: Whether the group ends with them.
    """

    items: list[T]
    first: int
    ends: bool


@dataclass(eq=False)
class Work:
    """A window of texts, ready to be computed.

    Attributes:
        made: What was made of each item, for whoever takes the results.
        texts: Its texts.
        batches: Their batches.
        vectors: Results, float32 [n, D], whole when the work comes out of `stream`.
        adapters: Whether any text of the call may have a task.
        ends: Whether a group ends with it.
    """

    made: list[Any]
    texts: list[Text]
    batches: list[Batch]
    vectors: np.ndarray
    adapters: bool = True
    ends: bool = False


def windows(groups: Iterable[Iterable[T]], characters: int, length: Callable[[T], int]) -> Iterator[Window[T]]:
    """Cut groups of texts into windows; none holds texts of two groups.

    Args:
        groups: The groups.
        characters: Characters of a window, roughly; it has at most 4096 texts, too.
        length: Characters of an item.

    Yields:
        Windows in order. What came before an error in a group comes out before it.
    """
    for group in groups:
        items: list[T] = []
        first = total = 0
        try:
            for item in group:
                if total >= characters or len(items) >= WINDOW_TEXTS:
                    yield Window(items, first, ends=False)
                    first, items, total = first + len(items), [], 0
                items.append(item)
                total += length(item)
        except Exception:
            if items:
                yield Window(items, first, ends=False)
            raise
        yield Window(items, first, ends=True)


def stream(
    compute: Callable[[Arrays], Any],
    prepare: Callable[[Window[T]], Work],
    windows: Iterable[Window[T]],
    pad_id: int,
    in_order: bool = False,
) -> Iterator[Work]:
    """Compute windows one after the other.

    Args:
        compute: Means [B, P, D] of a batch, or an array on a device that will hold them; runs in threads.
        prepare: Makes work of a window; runs in a thread of its own.
        windows: The windows. If they end with an error, what came before it still comes out first.
        pad_id: Id that stands at padding.
        in_order: Whether batches must be started one after the other. Programs that run on several devices must, in
            the same order on each: they wait for each other.

    Returns:
        The works in order, with their results.
    """
    running: deque[tuple[Work, Batch, Future]] = deque()
    left: deque[list] = deque()  # [work, batches not yet fetched] in order

    def finished(most: int) -> Iterator[Work]:
        """Fetch until at most so many batches are running; give the works that are whole."""
        while len(running) > most:
            work, batch, means = running.popleft()
            batching.collect(batch, work.texts, np.asarray(means.result()), work.vectors)
            left[0][1] -= 1
            while left and not left[0][1]:
                yield left.popleft()[0]

    def run(work: Work, batch: Batch) -> Any:
        return compute(batching.fill(batch, work.texts, pad_id, work.adapters))

    threads = ThreadPoolExecutor(1 if in_order else AT_ONCE, "jina_jax-compute")
    works = _ahead(prepare, windows)
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


def _ahead(prepare: Callable[[Window[T]], Work], windows: Iterable[Window[T]]) -> Generator[Work, None, None]:
    """Works in order, each prepared while the one before is computed."""
    error, ahead = None, deque[Future]()

    def prepared(window: Window[T]) -> Work:
        work = prepare(window)
        work.ends = window.ends
        return work

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
                ahead.append(thread.submit(prepared, window))
                if len(ahead) > 1:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
    if error is not None:
        raise error
