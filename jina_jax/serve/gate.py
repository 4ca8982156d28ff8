"""What every request passes first and last: its id, its key, its size, its log line. Nothing is read before that."""

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jina_jax.serve import errors
from jina_jax.serve.errors import ApiError
from jina_jax.serve.metrics import Metrics
from jina_jax.serve.service import Note
from jina_jax.serve.settings import Settings

log = logging.getLogger("jina_jax.serve")

# Who may come without a key: probes, and people who look what this is.
OPEN = {"/", "/health", "/live", "/ready", "/ping", "/metrics", "/docs", "/openapi.json"}
PROBES = {"/health", "/live", "/ready", "/ping", "/metrics"}
BODIES = 8  # bodies of the largest size that are held at a time
_REQUEST_ID = re.compile(r"[\w.\-]{1,64}", re.ASCII)
T = TypeVar("T")


class Gate:
    """An ASGI application around another.

    Attributes:
        running: Requests with a body that are not answered yet.
        draining: Whether connections end with their next answer.
    """

    def __init__(self, app: ASGIApp, settings: Settings, keys: Sequence[str], metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        # Hashes have one length, whatever the keys have.
        self.keys = [hashlib.sha256(key.encode()).digest() for key in keys]
        self.running, self.held, self.draining = 0, 0, False
        self.retry_after: Callable[[], int] = lambda: 1
        self.endpoints: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        note, start, status, held = Note(), time.perf_counter(), 0, [0]
        scope.setdefault("state", {}).update(request_id=request_id, note=note, gate=self, held=held)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                if self.draining:
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        counted = scope["method"] == "POST"
        self.running += counted
        try:
            error = self._refusal(scope, headers, counted)
            if error is not None:
                await errors.response(error, request_id)(scope, receive, answer)
            else:
                await self.app(scope, receive, answer)
        except ClientDisconnect:
            self.metrics.cancelled.inc()
            status = 499
        except Exception:
            log.exception("failed", extra={"request_id": request_id, "path": scope["path"]})
            if not status:
                error = ApiError(500, "something went wrong; the server's log says what, under this request_id")
                await errors.response(error, request_id)(scope, receive, answer)
        finally:
            self.running -= counted
            self.held -= held[0]
            self._tell(scope, request_id, note, status, time.perf_counter() - start)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes], counted: bool) -> ApiError | None:
        """Why a request is not even read, if it is not."""
        looks = scope["method"] == "OPTIONS" or (scope["method"] in ("GET", "HEAD") and scope["path"] in OPEN)
        error = None if looks or not self.keys else self._check_key(headers.get(b"authorization"))
        if error is not None:
            return error
        if not counted:
            return None
        if self.running > self.settings.max_queue_requests:
            return errors.overloaded(self.retry_after())
        length = headers.get(b"content-length", b"")
        return too_large(self.settings) if length.isdigit() and int(length) > self.settings.max_body else None

    def _check_key(self, given: bytes | None) -> ApiError | None:
        """What is wrong with a key."""
        challenge = {"www-authenticate": "Bearer"}
        if not given:
            message = "no API key; send it as header 'Authorization: Bearer KEY'"
            return ApiError(401, message, "AUTH_MISSING_API_KEY", headers=challenge)
        scheme, _, key = given.partition(b" ")
        if scheme.lower() != b"bearer" or not key.strip():
            message = "the Authorization header must be 'Bearer KEY'"
            return ApiError(401, message, "AUTH_INVALID_FORMAT", headers=challenge)
        digest = hashlib.sha256(key.strip()).digest()
        # All are compared, so that the time says nothing about which was nearest.
        if not sum(hmac.compare_digest(digest, one) for one in self.keys):
            return ApiError(401, "the API key is not known here", "AUTH_INVALID_API_KEY", headers=challenge)
        return None

    def hold(self, held: list[int], count: int) -> None:
        """Account for bytes of a body until its request is answered.

        Args:
            held: Those of the request so far, which is changed.
            count: How many more.

        Raises:
            ApiError: 429 if there are too many of all requests.
        """
        if self.held + count > BODIES * self.settings.max_body:
            raise errors.overloaded(self.retry_after())
        self.held += count
        held[0] += count

    def _tell(self, scope: Scope, request_id: str, note: Note, status: int, seconds: float) -> None:
        """Log and count a request."""
        # Paths of nobody's making would each be a metric of their own.
        endpoint = scope["path"] if scope["path"] in self.endpoints else "other"
        self.metrics.answered(endpoint, status, seconds)
        if not self.settings.log_requests or endpoint in PROBES:
            return
        fields: dict[str, Any] = {
            "request_id": request_id,
            "method": scope["method"],
            "path": endpoint if endpoint != "other" else scope["path"][:200],
            "status": status,
            "ms": round(1000 * seconds, 2),
        }
        if note.texts:
            fields |= {"model": note.model, "task": note.task, "texts": note.texts, "tokens": note.tokens}
            fields |= {"late_chunking": note.late_chunking, "queue_ms": round(1000 * note.queue_seconds, 2)}
        log.info("request", extra=fields)


def too_large(settings: Settings) -> ApiError:
    """The error for a body beyond the limit."""
    return ApiError(413, f"the body has more than {settings.max_body} bytes, which is the limit; send less at a time")


async def read_body(scope: Scope, receive: Receive, settings: Settings) -> bytes:
    """The body of a request.

    Args:
        scope: The request.
        receive: What it comes through.
        settings: Limits.

    Returns:
        The body.

    Raises:
        ApiError: If it is too large or too slow.
        ClientDisconnect: If the client went away.
    """
    gate: Gate = scope["state"]["gate"]
    parts, size = [], 0
    try:
        async with asyncio.timeout(settings.body_timeout or None):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                part = message.get("body", b"")
                size += len(part)
                if size > settings.max_body:
                    raise too_large(settings)
                gate.hold(scope["state"]["held"], len(part))
                parts.append(part)
                more = message.get("more_body", False)
    except TimeoutError:
        late = f"the body did not come within {settings.body_timeout:g} s"
        raise ApiError(408, late, headers={"connection": "close"}) from None
    return b"".join(parts)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T], timeout: float) -> T:
    """Do something as long as the client is there to take the result.

    Args:
        receive: What says that it went away.
        work: What to do; cancelled if it did.
        timeout: Seconds that it may take; 0 for any.

    Returns:
        The result.

    Raises:
        ClientDisconnect: If the client went away.
        ApiError: 504 if it took too long.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        done, _ = await asyncio.wait({task, gone}, timeout=timeout or None, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        if gone in done:
            raise ClientDisconnect
        raise ApiError(504, f"this took more than {timeout:g} s; send less at a time, or try again later")
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
