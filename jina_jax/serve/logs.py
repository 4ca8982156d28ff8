"""Log lines as JSON or text, each an event with fields. Texts of clients and keys are in none."""

import json
import logging
import sys
import time

_USUAL = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}


class JsonFormatter(logging.Formatter):
    """A line of JSON for each record."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return json.dumps(_fields(self, record), default=str, ensure_ascii=True)


class TextFormatter(logging.Formatter):
    """A line of words for each record."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        fields = _fields(self, record)
        trace = fields.pop("trace", None)
        when, level, event = (str(fields.pop(name)) for name in ("time", "level", "event"))
        # Line breaks in a path must not make lines of their own.
        line = " ".join([when, level, event, *(f"{name}={str(value)!r}" for name, value in fields.items())])
        return line if trace is None else f"{line}\n{trace}"


def _fields(formatter: logging.Formatter, record: logging.LogRecord) -> dict[str, object]:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    fields: dict[str, object] = {
        "time": f"{stamp}.{int(record.msecs):03}Z",
        "level": record.levelname.lower(),
        "event": record.getMessage(),
    }
    fields |= {name: value for name, value in vars(record).items() if name not in _USUAL}
    if record.exc_info:
        fields["trace"] = formatter.formatException(record.exc_info)
    return fields


def setup(kind: str) -> None:
    """Send the server's log to stderr.

    Args:
        kind: "json" or "text".
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if kind == "json" else TextFormatter())
    for name, level in (("jina_jax.serve", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
