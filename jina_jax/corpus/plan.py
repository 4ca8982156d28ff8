"""The manifest: what goes in, with which model and options, and how it is cut into shards.

It is written once, and compared with what is asked for whenever the job goes on.
"""

import hashlib
import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jina_jax import checkpoint, hub
from jina_jax.corpus import formats
from jina_jax.corpus.inputs import Check, Columns, Part, Source
from jina_jax.corpus.store import Store
from jina_jax.records import InputError

VERSION = 1
MANIFEST = "manifest.json"
POLL_SECONDS = 1.0
NOTE_POLLS = 30

Manifest = dict[str, Any]


class Shard(NamedTuple):
    """Consecutive rows of one input: the shard's number, that of the input, and the rows."""

    number: int
    input: int
    part: Part


def settle(
    store: Store,
    sources: Sequence[Source],
    wanted: Mapping[str, Any],
    check: Check,
    *,
    resume: bool,
    process: int,
) -> Manifest:
    """The manifest that all processes work by: written by process 0, or found and agreed with.

    Args:
        store: The output directory.
        sources: The inputs.
        wanted: The manifest without its inputs: "model" as `describe_model` gives it, "options" with all else that
            results depend on, and "shard_rows".
        check: Raises ValueError for an unknown task.
        resume: Whether there may be a manifest already.
        process: Number of this process. All but 0 wait for the manifest, and take any that they agree with: whoever
            wrote it, it describes the same work.

    Returns:
        The manifest.

    Raises:
        InputError: If there is an earlier run that is not to be resumed, or one of other inputs, model or options.
    """
    manifest = read(store)
    if process == 0 and not resume and (manifest is not None or store.names("shards")):
        raise InputError(f"{store.url} holds an earlier run; finish it with --resume, or choose another directory")
    if manifest is None and process == 0:
        manifest = {"version": VERSION, **wanted, "inputs": [_entry(source, wanted, check) for source in sources]}
        store.write(MANIFEST, encode(manifest))
        return manifest
    manifest = manifest or _wait(store)
    problems = differences(manifest, sources, wanted, check)
    if problems:
        listed = "\n  ".join(problems)
        raise InputError(
            f"{store.url} was begun differently; go on with what it was begun with, or choose another directory:"
            f"\n  {listed}"
        )
    return manifest


def _wait(store: Store) -> Manifest:
    """The manifest, once process 0 has written it."""
    for polls in itertools.count():
        if manifest := read(store):
            return manifest
        if polls == NOTE_POLLS:
            print(f"jina-jax: waiting for process 0 to write {store.url}/{MANIFEST}", file=sys.stderr, flush=True)
        time.sleep(POLL_SECONDS)
    raise AssertionError


def read(store: Store) -> Manifest | None:
    """The manifest of an output directory; None if there is none yet.

    Args:
        store: The output directory.

    Returns:
        The manifest.

    Raises:
        InputError: If it is damaged, or of a version that is not known.
    """
    content = store.read(MANIFEST)
    if not content:  # an object store's file may be seen before its content
        return None
    try:
        manifest = json.loads(content)
        version = manifest["version"]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{store.url}/{MANIFEST} is damaged ({error}); choose another directory") from error
    if version != VERSION:
        raise InputError(f"{store.url}/{MANIFEST} is of version {version}, but this program reads {VERSION}")
    return manifest


def encode(manifest: Manifest) -> bytes:
    """The manifest as a file, with a line for each input."""
    head = {key: value for key, value in manifest.items() if key != "inputs"}
    inputs = ",\n  ".join(json.dumps(entry) for entry in manifest["inputs"])
    return (json.dumps(head, indent=1).removesuffix("\n}") + f',\n "inputs": [\n  {inputs}\n ]\n}}\n').encode()


def identity(manifest: Manifest) -> str:
    """A hash of all that results depend on; every shard names it."""
    model = {"sha256": manifest["model"]["sha256"]}
    inputs = [[entry[key] for key in ("name", "rows", "revision")] for entry in manifest["inputs"]]
    whole = [manifest["version"], model, manifest["options"], manifest["shard_rows"], inputs]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def shards(manifest: Manifest) -> Iterator[Shard]:
    """All shards in order.

    Args:
        manifest: The manifest.

    Yields:
        Shard after shard.
    """
    number, size = 0, manifest["shard_rows"]
    for index, entry in enumerate(manifest["inputs"]):
        for first in range(0, entry["rows"], size):
            start = entry["starts"][first // size] if entry["starts"] else (0, 1)
            yield Shard(number, index, Part(first, min(size, entry["rows"] - first), tuple(start)))
            number += 1


def describe_model(name: str, directory: Path) -> dict[str, Any]:
    """A model's name, revision, and a hash of its weights, configuration and tokenizer.

    Args:
        name: As the user calls it.
        directory: Where it is.

    Returns:
        Keys "name", "revision" (the commit, if it came from the hub) and "sha256".
    """
    patterns = (*hub.FILES, *checkpoint.TOKENIZER_FILES, "orbax/**/*")
    files = sorted({file for pattern in patterns for file in directory.glob(pattern) if file.is_file()})
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            content = hashlib.file_digest(handle, "sha256").hexdigest()
        digest.update(f"{file.relative_to(directory).as_posix()} {content}\n".encode())
    revision = directory.name if directory.parent.name == "snapshots" else None
    return {"name": name, "revision": revision, "sha256": digest.hexdigest()}


def differences(manifest: Manifest, sources: Sequence[Source], wanted: Mapping[str, Any], check: Check) -> list[str]:
    """What is asked for otherwise than the manifest says.

    Inputs are read again only where their size or time differs.

    Args:
        manifest: The manifest.
        sources: As in `settle`.
        wanted: As in `settle`.
        check: As in `settle`.

    Returns:
        A line for each difference.
    """
    planned, given = ({"shard_rows": one["shard_rows"], **one["options"]} for one in (manifest, wanted))
    found = [
        f"! {key}: was {json.dumps(planned.get(key))}, now {json.dumps(given.get(key))}"
        for key in sorted(planned.keys() | given.keys())
        if planned.get(key) != given.get(key)
    ]
    if manifest["model"]["sha256"] != wanted["model"]["sha256"]:
        models = ["{name} ({sha256:.12})".format(**one["model"]) for one in (manifest, wanted)]
        found.append("! model: was {}, now {}".format(*models))
    entries = {entry["name"]: entry for entry in manifest["inputs"]}
    now = {source.name: source for source in sources}
    found += [f"- {name}: was an input, is none now" for name in entries if name not in now]
    found += [f"+ {name}: is an input now, was none" for name in now if name not in entries]
    if not found and list(entries) != list(now):
        found.append("! the inputs come in another order")
    for name, entry in entries.items():
        if name in now and now[name].stamp != entry["stamp"]:
            again = _entry(now[name], manifest, check)
            if again["revision"] != entry["revision"]:
                found.append(f"! {name}: has changed ({entry['rows']} rows were planned, {again['rows']} are there)")
    return found


def _entry(source: Source, head: Mapping[str, Any], check: Check) -> dict[str, Any]:
    """An input in the manifest."""
    found = formats.scan(source, Columns(**head["options"]["columns"]), head["shard_rows"], check)
    return {"name": source.name, "stamp": source.stamp, **found._asdict()}
