"""Records to learn from, of five kinds, in JSON lines (plain, `.gz` or `.zst`) or Parquet.

    text      text
    pair      query, pos
    triplet   query, pos (a string or several), neg (one or more)
    scored    a, b, score
    labelled  text, label

Any record may have `lang` and `id`; pairs and triplets `query_id`, `pos_id` and `group`, triplets `neg_ids`,
`pos_scores` and `neg_scores`. The names that sentence-transformers, FlagEmbedding, Tevatron and ms-swift give these
fields are understood as well. A mistake is told with its file, line and field.
"""

import contextlib
import gzip
import io
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jina_jax.records import InputError, decode

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
# What each kind cannot do without.
REQUIRED = {
    "text": ("text",),
    "pair": ("query", "pos"),
    "triplet": ("query", "pos", "neg"),
    "scored": ("a", "b", "score"),
    "labelled": ("text", "label"),
}
# Other names of a field, as sentence-transformers, FlagEmbedding, Tevatron and ms-swift have them.
ALIASES = {
    "query": ("anchor",),
    "pos": ("positive", "positive_passages", "response"),
    "neg": ("negative_passages", "rejected_response"),  # and negative, negative_1, negative_2 ...
    "a": ("sentence1",),
    "b": ("sentence2",),
    "score": ("label",),
}
_NEGATIVE = re.compile(r"negative(_[0-9]+)?")


@dataclass(frozen=True)
class Example:
    """One record.

    Attributes:
        kind: One of the five.
        texts: Its texts: (text,), (query, positive), (query, positive, negative, ...) or (a, b).
        where: Where it stands, for messages.
        lang: Its language.
        id: Its id.
        query_id: That of its query: queries of one id are equal, whatever their texts.
        pos_id: The same of its first positive.
        neg_ids: The same of its negatives; empty if they have none.
        group: Records of one group are no negatives of each other.
        score: Of a scored one, how alike its texts are.
        label: Of a labelled one.
        more: Positives besides the first.
        pos_scores: Scores of the positives by another model, if there are any.
        neg_scores: The same of the negatives.
    """

    kind: str
    texts: tuple[str, ...]
    where: str = ""
    lang: str | None = None
    id: str | None = None
    query_id: str | None = None
    pos_id: str | None = None
    neg_ids: tuple[str, ...] = ()
    group: str | None = None
    score: float | None = None
    label: str | int | None = None
    more: tuple[str, ...] = ()
    pos_scores: tuple[float, ...] = ()
    neg_scores: tuple[float, ...] = ()

    @property
    def positives(self) -> tuple[str, ...]:
        """All positives of a pair or triplet."""
        return (*self.texts[1:2], *self.more)

    @property
    def negatives(self) -> tuple[str, ...]:
        """The negatives of a triplet."""
        return self.texts[2:]


# ---- Reading ---------------------------------------------------------------------------------------------------


def read(
    path: str | Path, kind: str | None = None, on_bad: str = "fail", bad: list[str] | None = None
) -> Iterator[Example]:
    """The records of a file, in order.

    Args:
        path: A file that ends in one of `SUFFIXES`.
        kind: Their kind; None tells it by the fields of the first.
        on_bad: "fail", or "skip" to leave out records that are malformed.
        bad: Takes the messages of those left out; None prints at the end how many there were.

    Yields:
        Record after record.

    Raises:
        InputError: If the file cannot be read, or a record is malformed and `on_bad` is "fail".
    """
    skipped: list[str] = [] if bad is None else bad
    parse_next = Parser(kind)
    for line, where in lines(path):
        try:
            yield parse_next(line, where)
        except InputError as error:
            if on_bad == "fail":
                raise
            skipped.append(str(error))
    if bad is None and skipped:
        print(f"jina-jax: note: {left_out(path, skipped)}", file=sys.stderr)


def left_out(path: str | Path, bad: list[str]) -> str:
    """A line that says how many records were left out."""
    return f"{path}: {len(bad):,} bad record{'s' * (len(bad) != 1)} left out; the first: {bad[0]}"


class Parser:
    """Parses the records of one file, whose kind the first of them tells unless it is given."""

    def __init__(self, kind: str | None = None) -> None:
        self.kind, self._told = kind, kind is not None

    def __call__(self, line: bytes | str, where: str) -> Example:
        """As `parse`."""
        record = _load(line, where)
        kind = self.kind or kind_of(record, where)
        if kind == "pair" and not self._told and _find(record, "neg")[1]:
            message = "has negatives, unlike the records before; say which kind is meant, triplet or pair"
            raise InputError(f"{where}: {message}")
        example = _example(record, where, kind)
        self.kind = kind
        return example


def parse(line: bytes | str, where: str, kind: str | None = None) -> Example:
    """One record.

    Args:
        line: An object in JSON.
        where: Its file and line, for messages.
        kind: Its kind; None tells it by its fields.

    Returns:
        The record.

    Raises:
        InputError: If it is malformed.
    """
    return Parser(kind)(line, where)


def lines(path: str | Path) -> Iterator[tuple[bytes, str]]:
    """The lines of a file that are not blank; rows of Parquet as JSON.

    Args:
        path: A file that ends in one of `SUFFIXES`.

    Yields:
        A line and where it stands: "pairs.jsonl:17", or "pairs.parquet, row 17", counted from 1.

    Raises:
        InputError: If the file cannot be read.
    """
    for number, line in enumerate(raw_lines(path), 1):
        if line.strip():
            yield line, place(path, number)


def place(path: str | Path, number: int) -> str:
    """Where a line or row stands, for messages."""
    return f"{path}, row {number}" if is_parquet(path) else f"{path}:{number}"


def is_parquet(path: str | Path) -> bool:
    """Whether a file's name says that it is Parquet."""
    return str(path).lower().endswith(".parquet")


def raw_lines(path: str | Path) -> Iterator[bytes]:
    """All lines of a file with their ends, blank ones too; rows of Parquet as lines of JSON."""
    name = str(path).lower()
    if not name.endswith(SUFFIXES):
        raise InputError(f"{path}: a file of records must end in {', '.join(SUFFIXES)}")
    try:
        if is_parquet(path):
            yield from _rows(Path(path))
        else:
            with _open(Path(path)) as handle:
                yield from handle
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError(f"no file {path}; check the path") from error
    except (OSError, EOFError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    """The lines of a file, unpacked if need be."""
    if path.suffix.lower() == ".zst":
        # Unlike others, Arrow's reader notices where a file was cut off.
        packed = _arrow(path).CompressedInputStream(path.open("rb"), "zstd")
        with io.BufferedReader(packed, 1 << 20) as handle:
            yield handle
    else:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as handle:
            yield handle


def _rows(path: Path) -> Iterator[bytes]:
    """The rows of a Parquet file as lines of JSON."""
    pa = _arrow(path)
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    yield json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass") + b"\n"
    except pa.ArrowException as error:
        raise InputError(f"{path}: cannot be read ({error})") from error


def _arrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError(f"{path}: this kind of file needs pyarrow; pip install 'jina-jax[train]'") from error
    return pyarrow


# ---- Parsing ---------------------------------------------------------------------------------------------------


def kind_of(record: Mapping[str, Any], where: str) -> str:
    """The kind of a record, by the fields it has.

    Args:
        record: The record.
        where: Its file and line, for messages.

    Returns:
        One of the five.

    Raises:
        InputError: If it is none of them.
    """

    def has(field: str) -> bool:
        return _find(record, field)[1] is not None

    if has("query"):
        return "triplet" if has("neg") else "pair"
    if has("a") or has("b"):
        return "scored"
    if "text" in record:
        return "labelled" if record.get("label") is not None else "text"
    known = "; ".join(f"{kind}: {', '.join(fields)}" for kind, fields in REQUIRED.items())
    given = ", ".join(map(str, record)) or "nothing"
    raise InputError(f"{where}: no kind of record has these fields ({given}); there are {known}")


def _load(line: bytes | str, where: str) -> dict[str, Any]:
    try:
        text = decode(line, where, first=line.startswith(b"\xef\xbb\xbf")) if isinstance(line, bytes) else line
        record = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); every line must be a record of its own") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: must be an object with fields, not {_short(record)}")
    return record


def _example(record: dict[str, Any], where: str, kind: str) -> Example:
    """A record of a kind that is known."""
    if kind not in REQUIRED:
        raise InputError(f"kind={kind!r} must be one of {', '.join(REQUIRED)}")
    for field in REQUIRED[kind]:
        if _find(record, field)[1] is None:
            needs = ", ".join(REQUIRED[kind])
            raise InputError(f'{where}: "{field}" is missing; a record of the kind {kind} has {needs}')
    common: dict[str, Any] = {"kind": kind, "where": where}
    common |= {field: _id(record, field, where) for field in ("lang", "id")}
    if kind == "scored":
        texts = (_text(record, "a", where), _text(record, "b", where))
        return Example(texts=texts, score=_number(*_find(record, "score"), where), **common)
    if kind in ("text", "labelled"):
        label = _label(record["label"], where) if kind == "labelled" else None
        return Example(texts=(_text(record, "text", where),), label=label, **common)
    common |= {field: _id(record, field, where) for field in ("query_id", "pos_id", "group")}
    positives, pos_ids = _passages(record, "pos", where)
    if common["pos_id"] is None and pos_ids:
        common["pos_id"] = pos_ids[0]
    negatives: tuple[str, ...] = ()
    if kind == "triplet":
        negatives, neg_ids = _passages(record, "neg", where)
        common["neg_ids"] = _neg_ids(record, neg_ids, len(negatives), where)
        common["neg_scores"] = _scores(record, "neg_scores", len(negatives), where)
        common["pos_scores"] = _scores(record, "pos_scores", len(positives), where)
    query = _text(record, "query", where)
    return Example(texts=(query, positives[0], *negatives), more=positives[1:], **common)


def _find(record: Mapping[str, Any], field: str) -> tuple[str, Any]:
    """A field under any of its names, and that name; None if there is none, or it is null."""
    for name in (field, *ALIASES.get(field, ())):
        if record.get(name) is not None:
            return name, record[name]
    if field == "neg":  # one column, or several with numbers
        columns = [name for name in record if _NEGATIVE.fullmatch(name) and record[name] is not None]
        if columns:
            columns.sort(key=lambda name: int(name[len("negative_") :] or 0))
            return columns[0], record[columns[0]] if len(columns) == 1 else [record[name] for name in columns]
    return field, None


def _text(record: Mapping[str, Any], field: str, where: str) -> str:
    name, value = _find(record, field)
    return _string(value, name, where)


def _string(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f'{where}: "{name}" must be a string, not {_short(value)}')
    if not value.strip():
        raise InputError(f'{where}: "{name}" is empty')
    return value


def _passages(record: Mapping[str, Any], field: str, where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Texts of one or several passages, and their ids if all have one."""
    name, value = _find(record, field)
    items = value if isinstance(value, list) else [value]
    if not items:
        raise InputError(f'{where}: "{name}" is empty')
    several = len(items) > 1
    texts, ids = [], []
    for index, item in enumerate(items):
        label = f"{name}[{index}]" if several and isinstance(value, list) else name
        if isinstance(item, Mapping):  # as Tevatron has them
            title, text = item.get("title") or "", _string(item.get("text"), f"{label}.text", where)
            texts.append(f"{title} {text}".strip() if isinstance(title, str) else text)
            if item.get("docid") is not None:
                ids.append(_identifier(item["docid"], f"{label}.docid", where))
        else:
            texts.append(_string(item, label, where))
    return tuple(texts), tuple(ids) if len(ids) == len(texts) else ()


def _neg_ids(record: Mapping[str, Any], given: tuple[str, ...], count: int, where: str) -> tuple[str, ...]:
    value = record.get("neg_ids")
    if value is None:
        return given
    if not isinstance(value, list) or len(value) != count:
        raise InputError(f'{where}: "neg_ids" must be a list of {count}, one for each negative, not {_short(value)}')
    return tuple(_identifier(item, f"neg_ids[{index}]", where) for index, item in enumerate(value))


def _scores(record: Mapping[str, Any], name: str, count: int, where: str) -> tuple[float, ...]:
    value = record.get(name)
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) != count:
        raise InputError(f'{where}: "{name}" must be a list of {count} numbers, one for each text, not {_short(value)}')
    return tuple(_number(f"{name}[{index}]", item, where) for index, item in enumerate(value))


def _number(name: str, value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
        raise InputError(f'{where}: "{name}" must be a finite number, not {_short(value)}')
    return float(value)


def _finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def _id(record: Mapping[str, Any], name: str, where: str) -> str | None:
    value = record.get(name)
    return None if value is None else _identifier(value, name, where)


def _identifier(value: Any, name: str, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InputError(f'{where}: "{name}" must be a string or a whole number, not {_short(value)}')
    return str(value)


def _label(value: Any, where: str) -> str | int:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InputError(f'{where}: "label" must be a string or a whole number, not {_short(value)}')
    if isinstance(value, str) and not value.strip():
        raise InputError(f'{where}: "label" is empty')
    return value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:39]}…"


# ---- Writing ---------------------------------------------------------------------------------------------------


def to_json(example: Example) -> dict[str, Any]:
    """A record with the names of fields that this module has, and no others.

    Args:
        example: The record.

    Returns:
        What `parse` makes it of again.
    """
    match example.kind:
        case "scored":
            found: dict[str, Any] = dict(zip(("a", "b"), example.texts, strict=True)) | {"score": example.score}
        case "text" | "labelled":
            found = {"text": example.texts[0], "label": example.label}
        case _:
            positives = example.positives
            found = {"query": example.texts[0], "pos": list(positives) if example.more else positives[0]}
            found |= {"neg": list(example.negatives)} if example.kind == "triplet" else {}
            found |= {"query_id": example.query_id, "pos_id": example.pos_id, "group": example.group}
            for name in ("neg_ids", "pos_scores", "neg_scores"):
                found[name] = list(getattr(example, name)) or None
    found |= {"lang": example.lang, "id": example.id}
    return {name: value for name, value in found.items() if value is not None}
