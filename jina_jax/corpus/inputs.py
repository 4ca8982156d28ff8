"""From what the user names to input files: directories, globs, data sets and URLs."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import fsspec

from jina_jax.records import InputError

LINES = (".txt", ".txt.gz", ".txt.zst")
RECORDS = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET = (".parquet",)
ARROW = (".arrow",)  # only as part of a directory that Hugging Face's `save_to_disk` wrote
ENDINGS = LINES + RECORDS + PARQUET
# What file systems tell that changes with a file's content.
_STAMPS = ("ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "last_modified", "created")


OTHER_COLUMN = "--task-column names another column, or '' none"
Check = Callable[[str | None], None]


@dataclass(frozen=True)
class Columns:
    """Which columns, or keys of records, to read.

    Attributes:
        text: The text.
        id: The id; None means "id", where there is one, and "" none.
        task: The task; None means "task", where there is one, and "" none.
    """

    text: str = "text"
    id: str | None = None
    task: str | None = None

    def names(self) -> dict[str, str]:
        """The column of each role."""
        wanted = {"text": self.text, "id": self.id, "task": self.task}
        return {role: role if name is None else name for role, name in wanted.items()}


@dataclass(frozen=True)
class Source:
    """An input file.

    Attributes:
        name: Its path below the directory that all inputs share; part of the ids of rows that have none.
        fs: Its file system.
        path: Where it is on that.
        stamp: Its size, and what else is cheap to ask for and changes with the content.
    """

    name: str
    fs: Any
    path: str
    stamp: str

    def open(self) -> Any:
        """The file, as it is stored.

        Raises:
            InputError: If it is not what it was when it was listed.
        """
        if _stamp(self.fs, self.path) != self.stamp:
            raise InputError(f"{self.path}: changed while it was read; run again once it stays as it is")
        return self.fs.open(self.path, "rb")


class Row(NamedTuple):
    """A text of the corpus."""

    id: str
    text: str
    task: str | None


class Part(NamedTuple):
    """Consecutive rows of an input.

    Attributes:
        first: Number of the first, from 0.
        rows: How many there are.
        start: Where the first begins, if the input consists of lines: byte of the unpacked file, and line, from 1.
    """

    first: int
    rows: int
    start: tuple[int, int] = (0, 1)


class Scan(NamedTuple):
    """What an input holds.

    Attributes:
        rows: How many rows.
        revision: A hash of its content; of Parquet, of the size and the footer.
        starts: Of each shard of an input that consists of lines, as `Part.start`.
    """

    rows: int
    revision: str
    starts: list[tuple[int, int]]


def find(inputs: Sequence[str], output: str = "") -> list[Source]:
    """Input files, in the order of the arguments, those of a directory or glob sorted.

    Args:
        inputs: Files, directories, globs and URLs. A directory stands for all files with known endings in it, at any
            depth, but those whose names begin with "." or "_".
        output: URL of a directory that is no input even if it lies in one.

    Returns:
        The files.

    Raises:
        InputError: If there is none, one is missing, given twice, or of a format that is not read.
    """
    found: dict[str, tuple[Any, str]] = {}
    for name in inputs:
        fs, path = fsspec.url_to_fs(name)
        path = path.rstrip("/")
        if any(char in name for char in "*?[") and not fs.exists(path):
            matches = sorted(match for match in fs.glob(path) if not _hidden(PurePosixPath(match).name))
            files = [file for match in matches for file in _files(fs, match, named=False)]
        else:
            files = _files(fs, path, named=True)
        files = [file for file in files if not (output and fs.unstrip_protocol(file).startswith(f"{output}/"))]
        if not files:
            raise InputError(f"{name}: no such input; inputs are files, directories or globs of {', '.join(ENDINGS)}")
        for file in files:
            url = fs.unstrip_protocol(file)
            if url in found:
                raise InputError(f"{file} is given twice; its rows would have the same ids")
            found[url] = fs, file
    shared = _shared_directory(list(found))
    return [Source(url[shared:], fs, file, _stamp(fs, file)) for url, (fs, file) in found.items()]


def row_id(given: str | int | None, source: Source, row: int, where: str) -> str:
    """The id of a row: a string, or its input and its number if it has none.

    Args:
        given: What the row has.
        source: The input.
        row: Its number there, from 0.
        where: Where that is, for messages.

    Returns:
        The id.

    Raises:
        InputError: If it cannot be written.
    """
    if given is None:
        return f"{source.name}:{row}"
    try:
        str(given).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: the id {given!r} is not valid Unicode") from error
    return str(given)


def check_columns(there: Sequence[str], columns: Columns, where: str) -> None:
    """Whether the columns are there that were asked for.

    Args:
        there: Those that there are.
        columns: Which to read.
        where: Where, for messages.

    Raises:
        InputError: If one is missing; lists those that there are.
    """
    for name in (columns.text, columns.id, columns.task):
        if name and name not in there:
            raise InputError(f"{where}: no column {name!r}; there are: {', '.join(there)}")


def ended(source: Source) -> InputError:
    """The error for an input that is shorter than planned."""
    return InputError(f"{source.path}: ends before it should; it has changed since the corpus was planned")


def _files(fs: Any, path: str, *, named: bool) -> list[str]:
    """A file, or those of a directory; only one that was named must be of a format that is read."""
    if not fs.isdir(path):
        known = path.lower().endswith(ENDINGS)
        if not fs.exists(path) or not (known or named):
            return []
        if not known:
            raise InputError(f"{path}: not a format that is read; there are {', '.join(ENDINGS)} and directories")
        return [path]
    inside = sorted(file for file in fs.find(path) if not _hidden(file[len(path) :]))
    files = [file for file in inside if file.lower().endswith(ENDINGS)]
    for file in inside:
        if PurePosixPath(file).name == "state.json":
            files += _dataset_files(fs, file)
    return sorted(files)


def _dataset_files(fs: Any, state: str) -> list[str]:
    """The files of a data set that `save_to_disk` wrote; caches beside them do not count."""
    content = json.loads(fs.cat_file(state))
    if not isinstance(content, dict) or "_data_files" not in content:
        return []
    if content.get("_indices_data_files"):
        raise InputError(f"{state}: a data set with an index beside it; call flatten_indices() and save it again")
    return [str(PurePosixPath(state).parent / file["filename"]) for file in content["_data_files"]]


def _hidden(path: str) -> bool:
    return any(part.startswith((".", "_")) for part in PurePosixPath(path).parts)


def _shared_directory(urls: list[str]) -> int:
    """Characters of the directory that all files share."""
    first, last = min(urls), max(urls)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first.rfind("/", 0, same) + 1


def _stamp(fs: Any, path: str) -> str:
    fs.invalidate_cache(path)
    info = fs.info(path)
    told = [f"{key}={info[key]}" for key in _STAMPS if info.get(key)]
    return " ".join([str(info.get("size")), *told[:1]])
