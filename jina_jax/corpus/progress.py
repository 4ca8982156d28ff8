"""How far all processes are: each tells in a small file, and process 0 shows the sum."""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from jina_jax.corpus.store import Store
from jina_jax.embedder import Usage

# Seconds between two looks on a local file system, and on an object store, which may count requests.
BEAT_SECONDS = (2.0, 10.0)
LINE_SECONDS = 30.0
# A process whose file does not change for so long is taken for dead.
SILENT_SECONDS = 60.0

Counts = dict[str, int]


class Progress:
    """The files of all processes, and a thread that writes one's own.

    No clocks are compared: a process lives while its file changes.

    Attributes:
        before: Rows in shards that were there when this process began, by process.
        seen: What each process has told in this run: "done" (rows in all), and "rows", "tokens" and "truncated" texts
            of this run.
        interval: Seconds between two looks.
    """

    def __init__(self, store: Store, process: int, before: Sequence[int], total: int, usage: Usage) -> None:
        self.before, self.seen = before, dict[int, Counts]()
        self._store, self._process, self._total, self._usage = store, process, total, usage
        self.interval = BEAT_SECONDS[0 if store.local else 1]
        self._begun = self._line = time.monotonic()
        self._beats = 0
        self._bar: Any = None
        # The files of an earlier run do not count.
        self._last = {other: (store.read(_name(other)), self._begun) for other in self._others()}

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Tell and, in process 0, show progress while the block runs."""
        stop = threading.Event()

        def work() -> None:
            while not stop.wait(self.interval):
                self._beat()

        thread = threading.Thread(target=work, name="jina_jax-progress", daemon=True)
        if self._process == 0 and sys.stderr.isatty():
            self._bar = tqdm(total=self._total, initial=sum(self.before), unit="row")
        self._beat()
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self._beat()
            if self._bar is not None:
                self._bar.close()

    def alive(self, process: int) -> bool:
        """Whether a process has told anything lately, or may still be starting."""
        return process == self._process or time.monotonic() - self._last[process][1] < SILENT_SECONDS

    def sum(self) -> Counts:
        """What all processes have done in this run, as far as is known."""
        seen = list(self.seen.values())
        return {key: sum(one[key] for one in seen) for key in ("rows", "tokens", "truncated")}

    @property
    def seconds(self) -> float:
        """Time since this process began to embed."""
        return time.monotonic() - self._begun

    def _others(self) -> range:
        """Processes to look at: process 0 looks at all others."""
        return range(1, len(self.before) if self._process == 0 else 1)

    def _beat(self) -> None:
        """Tell what this process has done; process 0 looks at the others."""
        self._beats += 1
        counts = {"rows": self._usage.texts, "tokens": self._usage.tokens, "truncated": self._usage.truncated}
        counts["done"] = self.before[self._process] + counts["rows"]
        self.seen[self._process] = counts
        # Whatever is wrong with the output, the shards will say it better; object stores raise what they like.
        with contextlib.suppress(Exception):
            content = {"process": self._process, "begun": self._begun, "beat": self._beats, **counts}
            self._store.write(_name(self._process), json.dumps(content).encode())
            for other in self._others():
                self._look(other)
        if self._process == 0:
            self._show()

    def _look(self, other: int) -> None:
        content = self._store.read(_name(other))
        if content and content != self._last[other][0]:
            self._last[other] = content, time.monotonic()
            self.seen[other] = json.loads(content)

    def _show(self) -> None:
        done = sum(self.seen[one]["done"] if one in self.seen else rows for one, rows in enumerate(self.before))
        if self._bar is not None:
            self._bar.n = done
            self._bar.refresh()
        elif time.monotonic() - self._line >= LINE_SECONDS:
            self._line = time.monotonic()
            rate = self.sum()["rows"] / self.seconds
            print(f"jina-jax: {done:,} of {self._total:,} rows, {rate:,.0f} rows/s", file=sys.stderr, flush=True)


def _name(process: int) -> str:
    return f"progress/{process}.json"
