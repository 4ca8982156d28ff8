"""Reading inputs: once through when a corpus is planned, and the rows of single shards later."""

import contextlib
from collections.abc import Generator, Iterator, Sequence

import pyarrow as pa

from jina_jax.corpus import lines, tables
from jina_jax.corpus.inputs import LINES, RECORDS, Check, Columns, Part, Row, Scan, Source
from jina_jax.records import InputError


def scan(source: Source, columns: Columns, shard_rows: int, check: Check) -> Scan:
    """Read an input once through, and look for mistakes that should not wait until the corpus is half done.

    Args:
        source: The input.
        columns: Which columns to read.
        shard_rows: Rows of a shard.
        check: Raises ValueError for an unknown task.

    Returns:
        What it holds.

    Raises:
        InputError: If it is damaged or malformed; names the line or the column.
    """
    with _told(source):
        if _has_lines(source):
            return lines.scan(source, columns, shard_rows, check)
        return tables.scan(source, columns, check)


def rows(source: Source, columns: Columns, default: str | None, parts: Sequence[Part]) -> Generator[Row]:
    """The rows of some parts of an input, in one pass.

    Args:
        source: The input.
        columns: Which columns to read.
        default: The task of rows that name none.
        parts: Which rows, in ascending order.

    Yields:
        Row after row.

    Raises:
        InputError: If the input is damaged, malformed, or has changed.
    """
    with _told(source):
        yield from (lines if _has_lines(source) else tables).rows(source, columns, default, parts)


def _has_lines(source: Source) -> bool:
    return source.path.lower().endswith(LINES + RECORDS)


@contextlib.contextmanager
def _told(source: Source) -> Iterator[None]:
    """Damage of an input is the user's to mend."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the system, not of the reader
            raise
        raise InputError(f"{source.path}: cannot be read ({error})") from error
