"""Inputs that consist of lines: texts, or records in JSON."""

import codecs
import contextlib
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from jina_jax import records
from jina_jax.corpus.inputs import (
    LINES,
    OTHER_COLUMN,
    Check,
    Columns,
    Part,
    Row,
    Scan,
    Source,
    check_columns,
    ended,
    row_id,
)
from jina_jax.records import InputError

PACKED = {".gz": "gzip", ".zst": "zstd"}
_BLOCK = 1 << 20


def scan(source: Source, columns: Columns, shard_rows: int, check: Check) -> Scan:
    """As `formats.scan`."""
    digest, count, starts, offset = hashlib.sha256(), 0, [], 0
    with _opened(source) as lines:
        for number, line in enumerate(lines, 1):
            digest.update(line)
            if _is_row(source, line):
                if count % shard_rows == 0:
                    starts.append((offset, number))
                if count == 0:
                    _check_keys(source, line, columns)
                row = _row(source, columns, None, line, number, count)
                try:
                    check(row.task)
                except ValueError as error:
                    raise InputError(f"{source.path}:{number}: {error}; {OTHER_COLUMN}") from error
                count += 1
            offset += len(line)
    return Scan(count, digest.hexdigest(), starts)


def rows(source: Source, columns: Columns, default: str | None, parts: Sequence[Part]) -> Iterator[Row]:
    """As `formats.rows`."""
    with _opened(source) as lines:
        position = 0
        for part in parts:
            offset, number = part.start
            if lines.seekable():
                position = lines.seek(offset)
            while position < offset:
                position += len(_some(source, lines.read(min(_BLOCK, offset - position))))
            row = part.first
            while row < part.first + part.rows:
                line = _some(source, lines.readline())
                position += len(line)
                if _is_row(source, line):
                    yield _row(source, columns, default, line, number, row)
                    row += 1
                number += 1


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[Any]:
    """The lines of a file, unpacked if need be."""
    with source.open() as stored:
        packed = PACKED.get(source.path[source.path.rindex(".") :].lower())
        # Unlike others, Arrow's reader notices where a file was cut off.
        with io.BufferedReader(pa.CompressedInputStream(stored, packed) if packed else stored, _BLOCK) as lines:
            yield lines


def _is_row(source: Source, line: bytes) -> bool:
    """An empty line is a text, but no record."""
    return _is_plain(source) or bool(line.strip())


def _is_plain(source: Source) -> bool:
    return source.path.lower().endswith(LINES)


def _row(source: Source, columns: Columns, default: str | None, line: bytes, number: int, row: int) -> Row:
    where, first = f"{source.path}:{number}", number == 1
    if _is_plain(source):
        return Row(f"{source.name}:{row}", records.decode(line, where, first=first), default)
    found = records.parse_record(line, where, default, first=first, **columns.names())
    return Row(row_id(found.id, source, row, where), found.text, found.task)


def _check_keys(source: Source, line: bytes, columns: Columns) -> None:
    """The keys that are needed are there in the first record at least, unless it is a bare string."""
    if not _is_plain(source):
        with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError, RecursionError):  # told better later
            content = json.loads(line.removeprefix(codecs.BOM_UTF8))
            if isinstance(content, dict):
                check_columns(list(content), columns, source.path)


def _some(source: Source, read: bytes) -> bytes:
    if not read:
        raise ended(source)
    return read
