"""Inputs that are tables: Parquet, and the Arrow streams of Hugging Face data sets."""

import bisect
import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jina_jax.corpus.inputs import (
    OTHER_COLUMN,
    PARQUET,
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

BATCH_ROWS = 256


def scan(source: Source, columns: Columns, check: Check) -> Scan:
    """As `formats.scan`."""
    with source.open() as handle:
        if source.path.lower().endswith(PARQUET):
            revision = _footer_hash(handle)
            file = pq.ParquetFile(handle)
            task = _check_schema(file.schema_arrow, columns, source)["task"]
            _check_nulls(file.metadata, columns.text, source)
            for batch in [] if task is None else file.iter_batches(columns=[task]):
                _check_tasks(batch.column(task), check, source)
            return Scan(file.metadata.num_rows, revision, [])
        revision = hashlib.file_digest(handle, "sha256").hexdigest()
        handle.seek(0)
        stream, count = pa.ipc.open_stream(handle), 0
        task = _check_schema(stream.schema, columns, source)["task"]
        for batch in stream:
            count += batch.num_rows
            if task is not None:
                _check_tasks(batch.column(task), check, source)
        return Scan(count, revision, [])


def rows(source: Source, columns: Columns, default: str | None, parts: Sequence[Part]) -> Iterator[Row]:
    """As `formats.rows`."""
    batches = _parquet_batches if source.path.lower().endswith(PARQUET) else _arrow_batches
    waiting = deque(parts)
    with source.open() as handle:
        for first, batch in batches(handle, columns, parts):
            end = first + batch.num_rows
            while waiting and waiting[0].first < end:
                part = waiting[0]
                low, high = max(part.first, first), min(part.first + part.rows, end)
                yield from _rows(batch.slice(low - first, high - low), low, source, columns, default)
                if part.first + part.rows > end:
                    break
                waiting.popleft()
    if waiting:
        raise ended(source)


def _rows(batch: Any, first: int, source: Source, columns: Columns, default: str | None) -> Iterator[Row]:
    names = _names(batch.schema, columns)
    found = {role: batch.column(name).to_pylist() for role, name in names.items() if name is not None}
    nothing = [None] * batch.num_rows
    ids, tasks = found.get("id", nothing), found.get("task", nothing)
    for row, (text, given, task) in enumerate(zip(found["text"], ids, tasks, strict=True), first):
        where = f"{source.path}, row {row}"
        if text is None:
            raise InputError(f"{where}: has no text")
        yield Row(row_id(given, source, row, where), text, task or default)


def _footer_hash(handle: Any) -> str:
    """A hash of the size and the footer of a Parquet file, which holds the statistics of all columns."""
    size = handle.seek(0, 2)
    handle.seek(max(size - 8, 0))
    length = int.from_bytes(handle.read(4), "little")
    handle.seek(max(size - 8 - length, 0))
    revision = hashlib.sha256(f"{size} ".encode() + handle.read()).hexdigest()
    handle.seek(0)
    return revision


def _parquet_batches(handle: Any, columns: Columns, parts: Sequence[Part]) -> Iterator[tuple[int, Any]]:
    """Batches with the numbers of their first rows; row groups that nothing is wanted of are not read."""
    file, first = pq.ParquetFile(handle), 0
    names = [name for name in _names(file.schema_arrow, columns).values() if name is not None]
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        near = bisect.bisect_left(parts, first, key=lambda part: part.first + part.rows - 1)
        if near < len(parts) and parts[near].first < first + count:
            row = first
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=names):
                yield row, batch
                row += batch.num_rows
        first += count


def _arrow_batches(handle: Any, columns: Columns, parts: Sequence[Part]) -> Iterator[tuple[int, Any]]:
    first = 0
    for batch in pa.ipc.open_stream(handle):
        for start in range(0, batch.num_rows, BATCH_ROWS):
            yield first + start, batch.slice(start, BATCH_ROWS)
        first += batch.num_rows


def _names(schema: pa.Schema, columns: Columns) -> dict[str, str | None]:
    """The columns to read; None for those that are not there."""
    return {role: name if name in schema.names else None for role, name in columns.names().items()}


def _check_schema(schema: pa.Schema, columns: Columns, source: Source) -> dict[str, str | None]:
    check_columns(schema.names, columns, source.path)
    names = _names(schema, columns)
    for role, name in names.items():
        if name is None:
            continue
        kind = schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
        if not (text or pa.types.is_null(kind) or (role == "id" and pa.types.is_integer(kind))):
            kinds = "strings or whole numbers" if role == "id" else "strings"
            raise InputError(f"{source.path}: column {name!r} holds {kind}, but must hold {kinds}")
    return names


def _check_nulls(metadata: pq.FileMetaData, text: str, source: Source) -> None:
    """Rows without a text, as far as the footer tells."""
    for group in range(metadata.num_row_groups):
        parts = metadata.row_group(group)
        for part in map(parts.column, range(parts.num_columns)):
            told = part.statistics if part.path_in_schema == text else None
            if told is not None and told.null_count:
                raise InputError(f"{source.path}: column {text!r} has {told.null_count} rows without a text")


def _check_tasks(tasks: Any, check: Check, source: Source) -> None:
    for task in tasks.unique().to_pylist():
        try:
            check(task)
        except ValueError as error:
            raise InputError(f"{source.path}: {error}; {OTHER_COLUMN}") from error
