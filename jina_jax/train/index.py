"""Indexes: where each record of a file stands, how long its texts are, and which of them are equal.

An index is made once and kept next to its file as `FILE.idx.npz`. With it, any record is read without those before it,
and batches are planned without reading any. Packed files and Parquet are unpacked to `FILE.idx.jsonl` for that.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import sys
import unicodedata
import weakref
import zipfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jina_jax import examples
from jina_jax.examples import Example, Parser
from jina_jax.records import InputError, whole_file
from jina_jax.tokenizer import TrainingTokenizer

VERSION = 1
SUFFIX = ".idx.npz"
# Characters tokenised at once.
_BLOCK = 2_000_000
_ARRAYS = ("offsets", "sizes", "numbers", "starts", "lengths", "hashes", "more", "langs", "labels", "groups")


class Index:
    """The records of a file, read one at a time; may be shared by threads.

    Attributes:
        path: The file.
        kind: Kind of its records.
        content: A hash of the records and of the tokenizer.
        bad: Number of records left out.
        starts: int64 [N + 1], where the texts of each of N records begin among all of them: first `Example.texts`,
            then `Example.more`.
        lengths: int32, tokens of each text, `<s>` and `</s>` included, however many they are.
        hashes: uint64, equal for texts that are equal or have one id.
        more: int32 [N], how many positives besides the first.
        numbers: int64 [N], line or row of each record, counted from 1.
        langs: int32 [N], number of its language in `lang_names`; -1 for none.
        labels: int32 [N], number of its label in `label_names`; -1 for none.
        groups: int32 [N], number of its group; -1 for none.
        lang_names: Languages.
        label_names: Labels, as JSON.
    """

    starts: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray
    more: np.ndarray
    numbers: np.ndarray
    langs: np.ndarray
    labels: np.ndarray
    groups: np.ndarray

    def __init__(self, path: Path, plain: Path, facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        self.path, self.kind, self.bad = path, str(facts["kind"]), int(facts["bad"])
        self.content = hashlib.sha256(json.dumps(_identity(facts), sort_keys=True).encode()).hexdigest()
        self.lang_names, self.label_names = list(facts["langs"]), list(facts["labels"])
        self._offsets, self._sizes = arrays["offsets"], arrays["sizes"]
        for name in _ARRAYS[2:]:
            setattr(self, name, arrays[name])
        try:
            self._file = os.open(plain, os.O_RDONLY)
        except OSError as error:
            raise InputError(f"{plain}: cannot be read ({error.strerror})") from error
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, record: int) -> Example:
        line = os.pread(self._file, int(self._sizes[record]), int(self._offsets[record]))
        try:
            return examples.parse(line, self.where(record), self.kind)
        except InputError as error:
            raise InputError(f"{error}; has the file changed since the run began?") from error

    def where(self, record: int) -> str:
        """File and line of a record, for messages."""
        return examples.place(self.path, int(self.numbers[record]))

    def longest(self) -> np.ndarray:
        """Tokens of the longest text of each record, int32 [N]."""
        return np.maximum.reduceat(self.lengths, self.starts[:-1]) if len(self) else np.zeros(0, np.int32)

    def counts(self) -> np.ndarray:
        """Texts of each record, those of `Example.more` not counted, int64 [N]."""
        return np.diff(self.starts) - self.more


def open(
    path: str | Path,
    tokenizer: TrainingTokenizer,
    kind: str | None = None,
    directory: str | Path | None = None,
    on_bad: str = "fail",
) -> Index:
    """The index of a file, made if it is missing, or older than the file, or of another tokenizer.

    Args:
        path: A file that `examples.read` can read.
        tokenizer: Gives the lengths.
        kind: Kind of the records; None tells it by the fields of the first.
        directory: Where to keep the index; None means next to the file.
        on_bad: "fail", or "skip" to leave out records that are malformed; how many is printed.

    Returns:
        The index.

    Raises:
        InputError: If the file cannot be read, has no records or bad ones, or the index cannot be kept there.
        OSError: If the disk is full; nothing is left behind then.
    """
    path = Path(path)
    target = _target(path, directory)
    plain = path if path.suffix.lower() == ".jsonl" else target.with_name(target.name[: -len(SUFFIX)] + ".idx.jsonl")
    wanted = {"version": VERSION, "tokenizer": tokenizer.fingerprint(), "kind": kind, "on_bad": on_bad}
    kept = _load(path, target, plain, wanted)
    if kept is None:
        _make(path, target, plain, tokenizer, wanted)
        kept = _load(path, target, plain, wanted)
    if kept is None:
        raise InputError(f"{path}: changed while its index was made; start again once it is finished")
    return Index(path, plain, *kept)


def text_hash(text: str, space: str = "") -> int:
    """64 bits, equal for texts that are equal but for blanks at their ends and for how Unicode composes characters.

    Args:
        text: The text, or an id.
        space: Ids of different kinds of things have different ones.

    Returns:
        An integer below 2**64.
    """
    content = f"{space}\0{unicodedata.normalize('NFC', text.strip())}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


# ---- Kept indexes ----------------------------------------------------------------------------------------------


def _target(path: Path, directory: str | Path | None) -> Path:
    if directory is None:
        return path.with_name(path.name + SUFFIX)
    # Files of one name may come from several directories.
    place = hashlib.sha256(str(path.resolve().parent).encode()).hexdigest()[:8]
    return Path(directory) / f"{path.name}.{place}{SUFFIX}"


def _identity(facts: dict[str, Any]) -> dict[str, Any]:
    """What says which records there are, and how long."""
    return {name: facts[name] for name in ("version", "tokenizer", "kind", "bad", "sha256")}


def _load(
    path: Path, target: Path, plain: Path, wanted: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """Facts and arrays of the index that is kept, if it is what is wanted."""
    try:
        with target.open("rb") as handle, np.load(handle) as kept:
            facts = json.loads(str(kept["facts"]))
            if any(facts[name] != wanted[name] for name in ("version", "tokenizer")):
                return None
            if wanted["kind"] not in (facts["kind"], None) or (wanted["kind"] is None and not facts["told"]):
                return None
            if facts["bad"] and wanted["on_bad"] == "fail":
                return None
            if plain != path and plain.stat().st_size != facts["plain"]:
                return None
            if _stamp(path) != facts["stamp"] and _sha256(path) != facts["sha256"]:
                return None
            return facts, {name: kept[name] for name in _ARRAYS}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _stamp(path: Path) -> list[int]:
    """Size and time of a file; while they stay, so does what is in it."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _make(path: Path, target: Path, plain: Path, tokenizer: TrainingTokenizer, wanted: dict[str, Any]) -> None:
    """Read a file through and keep its index."""
    try:
        stamp = _stamp(path)
    except FileNotFoundError as error:
        raise InputError(f"no file {path}; check the path") from error
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(plain) if plain != path else contextlib.nullcontext() as unpacked:
            facts, arrays = _scan(path, tokenizer, wanted, unpacked)
        facts |= {"stamp": stamp, "sha256": _sha256(path), "plain": plain.stat().st_size}
        with whole_file(target) as handle:
            np.savez(handle, facts=np.array(json.dumps(facts)), **arrays)  # type: ignore[arg-type]
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise
        raise InputError(
            f"{target.parent}: the index of {path.name} cannot be written there ({error.strerror}); name a directory "
            "for indexes (data.index, --index)"
        ) from error


def _scan(
    path: Path, tokenizer: TrainingTokenizer, wanted: dict[str, Any], unpacked: Any
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Facts and arrays of a file."""
    parser, bad = Parser(wanted["kind"]), list[str]()
    codes: dict[str, dict[Any, int]] = {"langs": {}, "labels": {}, "groups": {}}
    columns = {name: array("q") for name in ("offsets", "sizes", "numbers", "more", "counts", *codes)}
    texts, ids = array("Q"), array("Q")  # hashes of the texts, and of the ids of those that have one

    def found() -> Iterator[Example]:
        offset = 0
        for number, line in enumerate(examples.raw_lines(path), 1):
            if unpacked is not None:
                unpacked.write(line)
            offset += len(line)
            if not line.strip():
                continue
            try:
                example = parser(line, examples.place(path, number))
            except InputError as error:
                if wanted["on_bad"] == "fail":
                    raise
                bad.append(str(error))
                continue
            columns["offsets"].append(offset - len(line))
            columns["sizes"].append(len(line))
            columns["numbers"].append(number)
            columns["more"].append(len(example.more))
            label = None if example.label is None else json.dumps(example.label, ensure_ascii=False)
            for name, value in (("langs", example.lang), ("labels", label), ("groups", example.group)):
                columns[name].append(-1 if value is None else codes[name].setdefault(value, len(codes[name])))
            every = (*example.texts, *example.more)
            columns["counts"].append(len(every))
            texts.extend(map(text_hash, every))
            ids.extend(_ids(example))
            yield example

    lengths = [np.zeros(0, np.int32)]
    for block in _blocks(found()):
        lengths.append(np.array([one.full_length for one in tokenizer.encode_batch(block, offsets=False)], np.int32))
    if not texts:
        raise InputError(f"{path}: has no records" + (f"; {examples.left_out(path, bad)}" if bad else ""))
    if bad:
        print(f"jina-jax: note: {examples.left_out(path, bad)}", file=sys.stderr)
    told = {name: np.array(values, np.int64) for name, values in columns.items()}
    arrays = {name: told[name] for name in ("offsets", "sizes", "numbers")}
    arrays |= {name: told[name].astype(np.int32) for name in ("more", *codes)}
    arrays["starts"] = np.append(0, np.cumsum(told["counts"]))
    arrays["lengths"] = np.concatenate(lengths)
    arrays["hashes"] = _merge(np.array(texts, np.uint64), np.array(ids, np.uint64))
    facts = wanted | {"kind": parser.kind, "told": wanted["kind"] is None, "bad": len(bad)}
    return facts | {"langs": list(codes["langs"]), "labels": list(codes["labels"])}, arrays


def _blocks(found: Iterator[Example]) -> Iterator[list[str]]:
    """The texts of all records, some at a time."""
    block: list[str] = []
    size = 0
    for text in itertools.chain.from_iterable((*one.texts, *one.more) for one in found):
        block.append(text)
        size += len(text)
        if size >= _BLOCK:
            yield block
            block, size = [], 0
    yield block


def _ids(example: Example) -> list[int]:
    """Hashes of the ids of all texts of a record; 0 for those without."""
    if example.kind not in ("pair", "triplet"):
        return [0] * len(example.texts)
    query = 0 if example.query_id is None else text_hash(example.query_id, "query")
    passages = [example.pos_id, *(example.neg_ids or [None] * len(example.negatives))]
    return [
        query,
        *(0 if one is None else text_hash(one, "passage") for one in passages),
        *([0] * len(example.more)),
    ]


def _merge(texts: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Hashes of ids where there are any; a text without one takes that of the same text elsewhere."""
    known, first = np.unique(texts[ids != 0], return_index=True)
    if not len(known):
        return texts
    place = np.minimum(np.searchsorted(known, texts), len(known) - 1)
    inherited = np.where(known[place] == texts, ids[ids != 0][first][place], texts)
    return np.where(ids != 0, ids, inherited)
