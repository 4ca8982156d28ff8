"""Embeds the shards of one process."""

import contextlib
import dataclasses
import hashlib
import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from jina_jax.corpus import formats, plan, shards
from jina_jax.corpus.inputs import Columns, Row, Source, find
from jina_jax.corpus.plan import Shard
from jina_jax.corpus.progress import Progress
from jina_jax.corpus.store import Store
from jina_jax.embedder import Embedder, Usage
from jina_jax.records import InputError

SHARD_ROWS = 8192
# Footers that are read at once: an object store takes its time for each.
CHECKED_AT_ONCE = 16


@dataclass(frozen=True)
class Job:
    """What to embed, and how.

    Attributes:
        inputs: Files, directories, globs and URLs.
        output: Directory or URL.
        columns: Which columns to read.
        task: The task of rows that name none.
        chunker: "sentences" or a number of tokens for late chunking; None for an embedding of each row.
        encode: Options of `Embedder.encode`: dimensions, normalize, precision, ranges, prompts, truncate, batch_tokens.
        shard_rows: Rows of a shard.
        resume: Whether to go on with a run that has begun.
        process: Number of this process.
        processes: Number of processes.
    """

    inputs: Sequence[str]
    output: str
    columns: Columns
    task: str | None
    chunker: str | int | None
    encode: dict[str, Any]
    shard_rows: int = SHARD_ROWS
    resume: bool = False
    process: int = 0
    processes: int = 1


def run(job: Job, embedder: Embedder, model: Mapping[str, Any]) -> str:
    """Embed the shards of this process; process 0 then waits for the others.

    Args:
        job: What to do.
        embedder: The model.
        model: What `plan.describe_model` says of it.

    Returns:
        A line that says what was done.

    Raises:
        InputError: If an input is malformed, or the directory holds a run that is another or not to be resumed.
        OSError: If the output cannot be written. All that is finished stays, and can be resumed.
        ValueError: If the model gives numbers that are not finite.
        RuntimeError: If other processes have died and left shards undone.
    """
    options = job.encode | {"task": job.task}
    try:
        empty = embedder.encode([], **{key: options[key] for key in ("task", "dimensions", "precision", "ranges")})
    except ValueError as error:
        raise InputError(str(error)) from error

    def check(task: str | None) -> None:
        embedder.config.task_ids([task])

    store = Store(job.output)
    sources = {source.name: source for source in find(job.inputs, store.fs.unstrip_protocol(store.root))}
    store.make()
    head = {"model": dict(model), "options": _options(job, embedder), "shard_rows": job.shard_rows}
    manifest = plan.settle(store, [*sources.values()], head, check, resume=job.resume, process=job.process)
    identity = plan.identity(manifest)
    todo, before = _left(job, store, manifest, identity)

    usage, total = Usage(), sum(entry["rows"] for entry in manifest["inputs"])
    told = Progress(store, job.process, before, total, usage)
    ordered = [sources[entry["name"]] for entry in manifest["inputs"]]
    with told.shown():
        for shard, table, counts in _embedded(job, embedder, ordered, todo, usage, empty):
            facts = {"plan": identity, "model": model["sha256"], "shard": shard.number, "rows": shard.part.rows}
            store.write(shards.name(shard.number), shards.pack(table, facts | counts))
        left = _wait(store, manifest, told) if job.process == 0 and job.processes > 1 else 0
    counts, rate = told.sum(), told.sum()["rows"] / told.seconds
    note = f"; {left:,} shards are left to processes that have not begun" if left else ""
    return (
        f"{store.url}: {total:,} rows; in this run {counts['rows']:,} rows, {counts['tokens']:,} tokens, "
        f"{counts['truncated']:,} texts cut, {rate:,.0f} rows/s{note}"
    )


def _options(job: Job, embedder: Embedder) -> dict[str, Any]:
    """All that results depend on besides the model and the inputs, as it stands in the manifest."""
    ranges = job.encode["ranges"]
    return job.encode | {
        "ranges": None if ranges is None else hashlib.sha256(ranges.tobytes()).hexdigest(),
        "task": job.task,
        "columns": dataclasses.asdict(job.columns),
        "chunks": job.chunker,
        "dtype": str(embedder.config.dtype),
    }


def _left(job: Job, store: Store, manifest: plan.Manifest, identity: str) -> tuple[list[Shard], list[int]]:
    """The shards that this process has to do, and how many rows are done already, by process."""
    missing = _missing(store, manifest)
    mine = [shard for shard in plan.shards(manifest) if shard.number % job.processes == job.process]

    def whole(shard: Shard) -> bool:
        return shard.number not in missing and isinstance(shards.facts(store, shard, identity), dict)

    with ThreadPoolExecutor(CHECKED_AT_ONCE) as pool:
        todo = [shard for shard, done in zip(mine, pool.map(whole, mine), strict=True) if not done]
    missing |= {shard.number for shard in todo}
    before = [0] * job.processes
    for shard in plan.shards(manifest):
        before[shard.number % job.processes] += shard.part.rows * (shard.number not in missing)
    return todo, before


def _embedded(
    job: Job, embedder: Embedder, sources: Sequence[Source], todo: Sequence[Shard], usage: Usage, empty: np.ndarray
) -> Iterator[tuple[Shard, pa.Table, dict[str, int]]]:
    """The rows of each shard, and the counts for its footer."""
    read: deque[list[str]] = deque()  # ids of the shards that have been read, but are not computed yet
    groups = _groups(job, sources, todo, read)
    results: Any
    if job.chunker is None:
        results = embedder.encode_groups(groups, usage=usage, **job.encode)
    else:
        results = embedder.encode_document_groups(groups, chunker=job.chunker, usage=usage, **job.encode)
    with contextlib.closing(results):
        for shard in todo:
            tokens, truncated = usage.tokens, usage.truncated
            try:
                found = next(results)
            except InputError:
                raise
            except ValueError as error:
                where = f"{sources[shard.input].path}, from row {shard.part.first}"
                raise InputError(f"{where}: {error}") from error
            ids = read.popleft()
            table = shards.texts(ids, found) if job.chunker is None else shards.chunks(ids, found, empty)
            if not np.isfinite(shards.vectors(table)).all():
                raise ValueError("the model gave embeddings that are not finite; are its weights whole?")
            yield shard, table, {"tokens": usage.tokens - tokens, "truncated": usage.truncated - truncated}


def _groups(
    job: Job, sources: Sequence[Source], todo: Sequence[Shard], read: deque[list[str]]
) -> Iterator[Iterator[tuple]]:
    """The texts of each shard with their tasks; the ids go to `read`."""
    for index, batch in itertools.groupby(todo, key=lambda shard: shard.input):
        wanted = list(batch)
        parts = [shard.part for shard in wanted]
        with contextlib.closing(formats.rows(sources[index], job.columns, job.task, parts)) as rows:
            for part in parts:
                read.append([])
                yield _texts(itertools.islice(rows, part.rows), read[-1], documents=job.chunker is not None)


def _texts(rows: Iterable[Row], ids: list[str], *, documents: bool) -> Iterator[tuple]:
    for row in rows:
        ids.append(row.id)
        yield (row.text, None, row.task) if documents else (row.text, row.task)


def _missing(store: Store, manifest: plan.Manifest) -> set[int]:
    """Numbers of the shards that have no file."""
    there = set(store.names("shards"))
    return {one.number for one in plan.shards(manifest) if shards.name(one.number).removeprefix("shards/") not in there}


def _wait(store: Store, manifest: plan.Manifest, told: Progress) -> int:
    """Wait for the other processes.

    Args:
        store: The output directory.
        manifest: The manifest.
        told: What is known of them.

    Returns:
        Number of shards that are left to processes that have not begun.

    Raises:
        RuntimeError: If one that has begun fell silent.
    """
    while True:
        missing = _missing(store, manifest)
        owners = sorted({number % len(told.before) for number in missing})
        if not any(told.alive(owner) for owner in owners):
            break
        time.sleep(told.interval)
    dead = [owner for owner in owners if owner in told.seen]
    if dead:
        listed = ", ".join(map(str, dead))
        raise RuntimeError(f"process {listed}: not heard of any more, and its shards are missing; run with --resume")
    return len(missing)
