"""Texts in and results out, for the command line: mistakes are told with their line, files are written whole."""

import contextlib
import gzip
import json
import os
import socket
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

LINES = (".txt", ".txt.gz")
RECORDS = (".jsonl", ".jsonl.gz")
HOST = socket.gethostname()
# JSON allows these in strings, but many programs would end the line there.
_LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}


class InputError(ValueError):
    """A mistake in what the user gave; the message is one line that says what, where and the fix."""


@dataclass(frozen=True)
class Record:
    """One text to embed.

    Attributes:
        text: The text.
        where: Where it came from, for messages.
        task: Its task.
        id: The id its record has, if any.
        chunk: If it is a chunk of a longer text: its number there, its first character, and the one after its last.
    """

    text: str
    where: str
    task: str | None = None
    id: str | int | None = None
    chunk: tuple[int, int, int] | None = None


def read(inputs: Sequence[str], task: str | None = None) -> list[Record]:
    """Texts from command line arguments, in order.

    Args:
        inputs: Each is a text, "-" for the lines of standard input, or a file by its ending: `.txt` has a text on
            every line, empty lines included, so that positions are line numbers; `.jsonl` has a string or an object
            `{"text": ..., "id": ..., "task": ...}` on every line that is not blank. Both may end in `.gz`.
        task: The task of texts that do not name one.

    Returns:
        The records.

    Raises:
        InputError: If a file is missing, unreadable or malformed; names the file and the line.
    """
    records: list[Record] = []
    for position, name in enumerate(inputs):
        if name == "-":
            records += _read_lines(sys.stdin.buffer, "standard input", task)
        elif name.lower().endswith(LINES + RECORDS):
            parse = _read_lines if name.lower().endswith(LINES) else _read_records
            with _open(Path(name)) as lines:
                records += parse(lines, name, task)
        else:
            # What the shell passed need not be UTF-8.
            text = os.fsencode(name).decode("utf-8", "replace")
            records.append(Record(text, f"text {position + 1} of the command line", task))
    return records


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Iterable[bytes]]:
    """A file to read, unpacked if need be; what is wrong with the file is the user's mistake."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as handle:
            yield handle
    except FileNotFoundError as error:
        raise InputError(
            f"no file {path}; an argument with this ending names a file (to embed the words themselves: "
            f"echo '{path}' | jina-jax embed -)"
        ) from error
    except (OSError, EOFError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _read_lines(lines: Iterable[bytes], name: str, task: str | None) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        yield Record(decode(line, f"{name}:{number}", first=number == 1), f"{name}:{number}", task)


def _read_records(lines: Iterable[bytes], name: str, task: str | None) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        where = f"{name}:{number}"
        if line.strip():
            yield parse_record(line, where, task, first=number == 1)


def parse_record(
    line: bytes, where: str, default: str | None, *, first: bool, text: str = "text", id: str = "id", task: str = "task"
) -> Record:
    """One line of a `.jsonl` file: a string, or an object.

    Args:
        line: The line.
        where: Its file and number, for messages.
        default: The task, if it names none.
        first: Whether it is the first of its file.
        text: The key of its text.
        id: The key of its id.
        task: The key of its task.

    Returns:
        The record.

    Raises:
        InputError: If the line is malformed.
    """
    try:
        content = json.loads(decode(line, where, first=first))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); every line must be a record of its own") from error
    content = {text: content} if isinstance(content, str) else content
    if not isinstance(content, dict) or not isinstance(content.get(text), str):
        raise InputError(f'{where}: must be a string or an object with a string "{text}"')
    if not isinstance(content.get(task), str | None):
        raise InputError(f'{where}: "{task}" must be a string or null, not {json.dumps(content[task])}')
    if isinstance(content.get(id), bool) or not isinstance(content.get(id), str | int | None):
        raise InputError(f'{where}: "{id}" must be a string or a whole number, not {json.dumps(content[id])}')
    return Record(content[text], where, content.get(task, default), content.get(id))


def decode(line: bytes, where: str, first: bool) -> str:
    """One line without its end, nor the byte order mark that some editors put before the first.

    Args:
        line: The line.
        where: Its file and number, for messages.
        first: Whether it is the first of its file.

    Returns:
        The text.

    Raises:
        InputError: If it is not UTF-8.
    """
    try:
        text = line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 at byte {error.start}; convert the file (iconv -t UTF-8)") from error
    return text.removesuffix("\n").removesuffix("\r")


def json_lines(records: Sequence[Record], embeddings: np.ndarray) -> Iterator[str]:
    """One JSON object for every text: its index, id and place (if it has them), text and embedding.

    Args:
        records: The texts.
        embeddings: Numbers [n, E].

    Returns:
        Lines. Numbers have as many digits as restore the value exactly.
    """
    for index, (record, row) in enumerate(zip(records, embeddings, strict=True)):
        head = {"index": index} | ({} if record.id is None else {"id": record.id})
        head |= {} if record.chunk is None else dict(zip(("chunk", "start", "end"), record.chunk, strict=True))
        head |= {"text": record.text}
        numbers = ", ".join(row.astype(str).tolist())
        line = json.dumps(head, ensure_ascii=False).translate(_LINE_ENDS)
        yield f'{line[:-1]}, "embedding": [{numbers}]}}'


def encode_json(line: str) -> bytes:
    """A JSON line in UTF-8; lone surrogates, which UTF-8 cannot hold, become the escapes that JSON has for them."""
    return f"{line}\n".encode("utf-8", "backslashreplace")


def write(path: Path, records: Sequence[Record], embeddings: np.ndarray) -> None:
    """Write embeddings to a file, whole or not at all.

    Args:
        path: `.npy` holds the array alone, anything else the lines of `json_lines`. A file that exists is replaced.
        records: The texts.
        embeddings: Numbers [n, E].

    Raises:
        OSError: If the file cannot be written; nothing is left behind then.
    """
    with whole_file(path) as file:
        if path.suffix.lower() == ".npy":
            # np.save would say "3 requested and 0 written" where the disk is full.
            embeddings = np.ascontiguousarray(embeddings)
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(embeddings))
            file.write(embeddings.data)
        else:
            file.writelines(map(encode_json, json_lines(records, embeddings)))


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file to write that takes its name once the block has ended well.

    Args:
        path: The file. One that exists is replaced.

    Yields:
        The file under a temporary name.

    Raises:
        OSError: If it cannot be written; nothing is left behind then.
    """
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.{HOST}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    # A name too survives a loss of power only once its directory is on the disk, where directories can be synced.
    with contextlib.suppress(OSError):
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def similarity_table(texts: Sequence[str], embeddings: np.ndarray, columns: int) -> str:
    """Cosine similarities of all pairs.

    The texts stand last in their lines: neither wide characters nor writing from right to left can then shift the
    numbers.

    Args:
        texts: The texts.
        embeddings: Float [n, E], of any length.
        columns: Width of a line; texts are shortened to it.

    Returns:
        Lines, without a final newline.
    """
    vectors: Any = np.asarray(embeddings, np.float64)
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    cosines = np.round(vectors @ vectors.T, 3) + 0.0  # no -0.000
    width = len(str(len(texts)))
    head = " " * width + "".join(f"{index:7d}" for index in range(len(texts)))
    room = max(columns - len(head) - 3, 20)
    return "\n".join(
        [head]
        + [
            f"{index:{width}d}" + "".join(f"{cosine:7.3f}" for cosine in row) + "   " + shorten(text, room)
            for index, (text, row) in enumerate(zip(texts, cosines, strict=True))
        ]
    )


def shorten(text: str, columns: int) -> str:
    """The beginning of a text in one line of a terminal, at most `columns` wide.

    Args:
        text: The text. Runs of blanks become one, and characters that cannot be printed a U+FFFD.
        columns: Columns of the terminal; Chinese, Japanese and Korean characters take two.

    Returns:
        The line, with "…" where something was cut.
    """
    text = " ".join(text.split())
    # Of the invisible formatting characters only the joiners stay: others can turn the whole line around.
    text = "".join(char for char in text if char in "\u200c\u200d" or unicodedata.category(char) != "Cf")
    text = "".join(char if char.isprintable() or char in "\u200c\u200d" else "\ufffd" for char in text)
    if sum(map(_width, text)) <= columns:
        return text
    used, kept = 1, ""
    for char in text:
        used += _width(char)
        if used > columns:
            break
        kept += char
    return kept.rstrip() + "…"


def _width(char: str) -> int:
    """Columns that a character takes: none for marks that sit on others, two for wide ones."""
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1
