"""Checks a finished corpus against its manifest."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jina_jax.corpus import plan, shards
from jina_jax.corpus.plan import Manifest, Shard
from jina_jax.corpus.store import Store
from jina_jax.records import InputError

# Ids are compared by 16 bytes each; more than so many are compared in several passes.
IDS_AT_ONCE = 1 << 25
LISTED = 5
LENGTHS = {"float32": 1e-5, "float16": 2e-3}


def verify(output: str) -> tuple[str, list[str]]:
    """Check that every shard is there, whole and unchanged, and that no id stands twice.

    Memory does not grow with the corpus: one shard is read at a time, and ids take 512 MiB at most.

    Args:
        output: The output directory.

    Returns:
        A line that sums up, and a line for each problem.

    Raises:
        InputError: If there is no manifest.
    """
    store = Store(output)
    manifest = plan.read(store)
    if manifest is None:
        raise InputError(f"{store.url}: no {plan.MANIFEST}; this is no corpus, or its planning was interrupted")
    problems, good, rows, tokens = [], [], 0, 0
    wanted = set()
    for shard in plan.shards(manifest):
        wanted.add(shards.name(shard.number).removeprefix("shards/"))
        found = _check(store, shard, manifest)
        if isinstance(found, str):
            problems.append(f"{shards.name(shard.number)}: {found}")
        else:
            good.append(shard)
            rows, tokens = rows + found["written"], tokens + found["tokens"]
    problems += [f"shards/{name}: not in the manifest" for name in store.names("shards") if name not in wanted]
    problems += _duplicates(store, good, rows)
    inputs = sum(entry["rows"] for entry in manifest["inputs"])
    what = f"{rows:,} chunks of {inputs:,}" if manifest["options"]["chunks"] else f"{inputs:,}"
    state = f"{len(problems):,} problems" if problems else "all there, whole, and every id once"
    return f"{store.url}: {what} rows in {len(wanted):,} shards, {tokens:,} tokens: {state}", problems


def _check(store: Store, shard: Shard, manifest: Manifest) -> dict[str, Any] | str:
    """The facts of a shard, or what is wrong with it."""
    facts = shards.facts(store, shard, plan.identity(manifest))
    if isinstance(facts, str):
        return facts
    try:
        table = pq.read_table(pa.BufferReader(store.read(shards.name(shard.number)) or b""))
    except (pa.ArrowException, OSError) as error:
        return f"damaged ({error})"
    if shards.content_hash(table) != facts["sha256"]:
        return "its rows are not those that were written"
    chunks = "chunk" in table.column_names
    if not chunks and len(table) != shard.part.rows:
        return f"has {len(table)} rows instead of {shard.part.rows}"
    vectors = shards.vectors(table)
    if not np.isfinite(vectors).all():
        return "holds numbers that are not finite"
    options = manifest["options"]
    if options["normalize"] and options["precision"] in LENGTHS:
        lengths = np.linalg.norm(vectors.astype(np.float32), axis=1)
        # Chunks without tokens are zeros.
        wrong = np.abs(lengths - 1) > LENGTHS[options["precision"]]
        wrong &= ~np.isin(table.column("status").to_pylist(), ("empty", "truncated")) if chunks else True
        if wrong.any():
            return f"{int(wrong.sum())} embeddings have not unit length"
    return facts | {"written": len(table)}


def _duplicates(store: Store, good: list[Shard], rows: int) -> list[str]:
    """Ids that stand twice; the first few by name."""
    passes, total, some = max(1, -(-rows // IDS_AT_ONCE)), 0, set[bytes]()
    for number in range(passes):
        keys = bytearray()
        for key, _ in _keys(store, good):
            if int.from_bytes(key[:4], "little") % passes == number:
                keys += key
        hashes = np.frombuffer(keys, [("high", ">u8"), ("low", ">u8")])
        hashes.sort()
        twice = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
        total += len(twice)
        some |= {one.tobytes() for one in twice[: LISTED - len(some)]}
    names = sorted({id for key, id in _keys(store, good) if key in some}) if some else []
    more = [f"{total:,} ids in all stand more than once"] if total > LISTED else []
    return [f"id {id!r} stands more than once" for id in names] + more


def _keys(store: Store, good: Iterable[Shard]) -> Iterator[tuple[bytes, str]]:
    """A hash of each id, with the chunk's number if there is one, and the id."""
    for shard in good:
        with store.fs.open(store.path(shards.name(shard.number)), "rb") as handle:
            file = pq.ParquetFile(handle)
            columns = [name for name in ("id", "chunk") if name in file.schema_arrow.names]
            for values in zip(*file.read(columns=columns).to_pydict().values(), strict=True):
                key = "\0".join(map(str, values)).encode()
                yield hashlib.blake2b(key, digest_size=16).digest(), values[0]
