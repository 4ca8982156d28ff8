"""uvicorn with what it lacks: time limits for slow senders, and an end that loses no request."""

import asyncio
import logging
import signal
from collections.abc import Callable
from types import FrameType

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from jina_jax.serve.gate import Gate
from jina_jax.serve.settings import Settings

log = logging.getLogger("jina_jax.serve")

MOST_HEADER_BYTES = 65_536


def protocol(settings: Settings) -> type[HttpToolsProtocol]:
    """The protocol of uvicorn with deadlines for headers, and for bodies that nobody waits for any more.

    Args:
        settings: The time limits.

    Returns:
        The class.
    """

    class Protocol(HttpToolsProtocol):
        """A connection."""

        deadline: asyncio.TimerHandle | None = None
        header_bytes = 0
        in_headers = True
        body_left = False

        def _within(self, seconds: float) -> None:
            """Close the connection after so many seconds, instead of what was said before; never for 0."""
            if self.deadline is not None:
                self.deadline.cancel()
            self.deadline = self.loop.call_later(seconds, self._late) if seconds else None

        def _late(self) -> None:
            if self.transport is not None and not self.transport.is_closing():
                self.transport.close()

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            """A client came."""
            super().connection_made(transport)
            self._within(settings.header_timeout)

        def connection_lost(self, exc: Exception | None) -> None:
            """A client went."""
            self._within(0.0)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            """A client said something."""
            if self.in_headers:
                if self.header_bytes == 0 and self.deadline is None:
                    self._within(settings.header_timeout)
                self.header_bytes += len(data)
            super().data_received(data)
            if self.in_headers and self.header_bytes > MOST_HEADER_BYTES and not self.transport.is_closing():
                self.send_400_response("The headers are too large.")

        def on_headers_complete(self) -> None:
            """All headers of a request are there."""
            self._within(0.0)
            self.in_headers, self.header_bytes, self.body_left = False, 0, True
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            """All of a request is there."""
            self._within(0.0)
            self.in_headers, self.body_left = True, False
            super().on_message_complete()

        def on_response_complete(self) -> None:
            """A request is answered; its body may still be coming, and is thrown away."""
            super().on_response_complete()
            if self.body_left and not self.transport.is_closing():
                self._within(settings.body_timeout)

    return Protocol


class Server(uvicorn.Server):
    """A server that ends in two steps: first it takes requests but asks clients to go elsewhere, then it ends."""

    def __init__(self, config: uvicorn.Config, gate: Gate, drain: float, stopping: Callable[[], None]) -> None:
        super().__init__(config)
        self.gate, self.drain, self.stopping = gate, drain, stopping
        self.stopped_by: int | None = None
        self.loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list | None = None) -> None:
        """Start."""
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first ends tidily, the second at once."""
        if self.stopped_by is None and self.loop is not None:
            self.stopped_by = sig
            self.loop.call_soon_threadsafe(self._drain)
            return
        self.should_exit = self.force_exit = True

    def _drain(self) -> None:
        name = signal.Signals(self.stopped_by).name if self.stopped_by else "nobody"
        log.info("draining", extra={"signal": name, "running": self.gate.running})
        self.gate.draining = True
        self.stopping()
        asyncio.get_running_loop().call_later(self.drain, setattr, self, "should_exit", True)
