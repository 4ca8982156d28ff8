"""The output directory, local or on an object store: files appear whole or not at all."""

import contextlib
import os
import re
import time
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from jina_jax.records import HOST, InputError, whole_file

FOLDERS = ("", "shards", "progress")
# A temporary file of a machine that cannot be asked is given up after so many seconds; writing one takes few.
STALE = 3600.0


class Store:
    """An output directory.

    On a local file system a file is written under a temporary name, synced, and renamed. An object store has no
    rename, but an object appears only once all of it has arrived.

    Attributes:
        url: The directory as it was given.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") or "/"
        self.fs, root = fsspec.url_to_fs(url)
        self.root = root.rstrip("/")
        self.local = isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """Where a file is on the file system."""
        return f"{self.root}/{name}".rstrip("/")

    def make(self) -> None:
        """Create the directory, and remove what writers that were killed have left.

        Raises:
            InputError: If it is a file.
            OSError: If it cannot be created.
        """
        if self.fs.isfile(self.root):
            raise InputError(f"{self.url} is a file; --output takes a directory")
        for folder in FOLDERS:
            self.fs.makedirs(self.path(folder), exist_ok=True)
            if self.local:
                _clean(Path(self.path(folder)))

    def names(self, folder: str) -> list[str]:
        """Names of the files in a folder; none if there is no such folder."""
        self.fs.invalidate_cache(self.path(folder))
        try:
            found = self.fs.ls(self.path(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(name for name in (Path(path).name for path in found) if not name.startswith("."))

    def read(self, name: str) -> bytes | None:
        """A file; None if there is none."""
        try:
            return self.fs.cat_file(self.path(name))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Write a file, whole or not at all; one that exists is replaced.

        Args:
            name: Its name in the directory.
            content: All of it.

        Raises:
            OSError: If it cannot be written; nothing is left behind then.
        """
        try:
            if self.local:
                with whole_file(Path(self.path(name))) as handle:
                    handle.write(content)
            else:
                self.fs.pipe_file(self.path(name), bytes(content))
        except Exception as error:  # object stores raise what they like
            reason = getattr(error, "strerror", None) or error
            raise OSError(
                f"{self.url}/{name}: {reason}; what is finished is kept, --resume goes on from there"
            ) from error


def _clean(folder: Path) -> None:
    """Remove temporary files, but not those that a process may be writing now."""
    for file in folder.glob(".*.tmp"):
        found = re.fullmatch(r".*?\.(?P<pid>\d+)\.tmp", file.name)
        if found is None:
            continue
        with contextlib.suppress(OSError):
            ours = file.name.endswith(f".{HOST}.{found['pid']}.tmp")
            if not _runs(int(found["pid"])) if ours else time.time() - file.stat().st_mtime > STALE:
                file.unlink()


def _runs(pid: int) -> bool:
    """Whether another process with this number runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return pid != os.getpid()
