"""Keeps the model's process: starts it, talks to it, notices its end, starts it again."""

import asyncio
import contextlib
import itertools
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Literal

from jina_jax.serve.jobs import Done, Job, WorkerLostError
from jina_jax.serve.worker import Computed, Ready, Spec, packed

log = logging.getLogger("jina_jax.serve")

State = Literal["starting", "ready", "failed", "stopped"]
KILL_AFTER = 10.0  # seconds that a worker has to end by itself
STEADY = 10.0  # seconds after which a worker counts as one that works
PAUSE = 0.5  # seconds before the second start in a row, twice that before the third, and so on


class Supervisor:
    """One worker at a time.

    Attributes:
        state: "ready" if it takes jobs; "failed" if it could not be brought back.
        ready: What the worker said when it was ready the first time; None before.
        restarts: Times it was started again.
        message: Why it failed.
    """

    def __init__(
        self, spec: Spec, *, restarts: int, job_timeout: float, changed: Callable[[], None] = lambda: None
    ) -> None:
        self.spec, self.changed, self.most_restarts, self.job_timeout = spec, changed, restarts, job_timeout
        self.state: State = "starting"
        self.ready: Ready | None = None
        self.restarts, self.message = 0, ""
        self._failures = 0  # in a row
        self._idle = False
        self._ready_at = 0.0
        self._numbers = itertools.count()
        self._jobs: dict[int, asyncio.Future[Computed]] = {}
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None
        self._sending = threading.Lock()
        self._keeper: asyncio.Task | None = None

    @property
    def pid(self) -> int | None:
        """Id of the worker's process."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the worker, and keep it running from now on."""
        self._keeper = asyncio.get_running_loop().create_task(self._keep())

    async def stop(self) -> None:
        """End the worker."""
        self._set("stopped")
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)

    async def compute(self, job: Job) -> Done:
        """Have a job computed.

        Args:
            job: The job.

        Returns:
            What came of it.

        Raises:
            WorkerLostError: If the worker ended meanwhile.
            RuntimeError: If it could not compute the job.
        """
        if self.state != "ready" or self._connection is None:
            raise WorkerLostError("the model's process is not running")
        number, loop = next(self._numbers), asyncio.get_running_loop()
        future = self._jobs[number] = loop.create_future()
        try:
            # Sending blocks while the pipe is full.
            await asyncio.to_thread(self._send, self._connection, packed(number, job.model, job.texts))
            found = await asyncio.wait_for(future, self.job_timeout)
        except TimeoutError as error:
            if self._process is not None:
                log.error("worker_stuck", extra={"pid": self.pid, "seconds": self.job_timeout})
                self._process.kill()
            raise WorkerLostError("the model's process did not answer in time, and was ended") from error
        except OSError as error:
            raise WorkerLostError("the model's process ended") from error
        finally:
            del self._jobs[number]
        if found.means is None:
            raise RuntimeError(f"the model's process could not compute a batch: {found.error}")
        return Done(found.means, found.seconds, found.computed_tokens, found.programs)

    def _send(self, connection: Connection, message: Any) -> None:
        with self._sending:
            connection.send(message)

    async def _keep(self) -> None:
        """Run workers, one after the other."""
        while True:
            self._set("starting")
            self._idle, self._ready_at = False, float("inf")
            try:
                reason = await self._run()
            finally:
                await asyncio.shield(asyncio.to_thread(self._end))
            if reason is not None:  # loading the same files again would end the same way
                self._fail(reason)
                return
            self._failures = 1 if time.monotonic() - self._ready_at > STEADY else self._failures + 1
            log.error("worker_lost", extra={"pid": self.pid, "exit_code": self._returncode(), "tries": self._failures})
            if self._failures > self.most_restarts:
                self._fail(f"the model's process ended {self._failures} times in a row; last with {self._returncode()}")
                return
            self.restarts += 1
            await asyncio.sleep(PAUSE * (2 ** (self._failures - 1) - 1))

    async def _run(self) -> str | None:
        """Run a worker to its end; a text if it could not load the models."""
        ours, its = Pipe()
        loop = asyncio.get_running_loop()
        messages: asyncio.Queue[Any] = asyncio.Queue()
        command = [sys.executable, "-m", "jina_jax.serve.worker", str(its.fileno())]
        with its:
            self._process = subprocess.Popen(command, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL)
        self._connection = ours
        reader = threading.Thread(target=_read, args=(ours, loop, messages), name="jina_jax-worker", daemon=True)
        reader.start()
        with contextlib.suppress(OSError):  # the reader sees the end, too
            await asyncio.to_thread(self._send, ours, self.spec)
        while (message := await messages.get()) is not None:
            if isinstance(message, Computed):
                self._failures = 0
                future = self._jobs.get(message.number)
                if future is not None and not future.done():
                    future.set_result(message)
            elif isinstance(message, Ready):
                log.info("worker_ready", extra={"pid": self.pid, "seconds": round(message.seconds, 3)})
                self.ready = self.ready or message
                self._idle, self._ready_at = True, time.monotonic()
                self._set("ready")
            else:
                return str(message)
        return None

    def _end(self) -> None:
        """End the worker: it may finish if it is told to while idle; otherwise it is killed."""
        process, connection = self._process, self._connection
        if process is None or connection is None:
            return
        try:
            if process.poll() is None and self.state == "stopped" and self._idle:
                self._send(connection, None)
                process.wait(KILL_AFTER)
        except (OSError, subprocess.TimeoutExpired):
            pass
        if process.poll() is None:
            process.kill()
        process.wait()

    def _returncode(self) -> int | None:
        return None if self._process is None else self._process.poll()

    def _fail(self, message: str) -> None:
        self.message = message
        self._set("failed")

    def _set(self, state: State) -> None:
        if self.state == "stopped":
            return
        self.state = state
        if state != "ready":
            for future in self._jobs.values():
                if not future.done():
                    future.set_exception(WorkerLostError("the model's process ended"))
        self.changed()


def _read(connection: Connection, loop: asyncio.AbstractEventLoop, messages: asyncio.Queue) -> None:
    """Take messages of a worker to the event loop; None after the last."""
    message: Any = ...
    while message is not None:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            message = None
        except Exception:  # half a message, or one of another version
            log.exception("worker_garbled")
            message = None
        try:
            loop.call_soon_threadsafe(messages.put_nowait, message)
        except RuntimeError:  # the loop is closed
            return
