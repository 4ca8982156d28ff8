"""One shard as a Parquet file: its columns, and the facts in its footer by which it is known to be whole."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jina_jax.corpus.plan import Shard
from jina_jax.corpus.store import Store

KEY = b"jina_jax"
ROW_GROUP = 8192

Facts = dict[str, Any]


def name(number: int) -> str:
    """The file of a shard."""
    return f"shards/{number:06d}.parquet"


def texts(ids: Sequence[str], embeddings: np.ndarray) -> pa.Table:
    """A row for each text.

    Args:
        ids: An id for each.
        embeddings: Numbers [n, E]; they are not copied.

    Returns:
        Columns "id" and "embedding", a fixed-size list.
    """
    return _table({"id": pa.array(ids, pa.string())}, embeddings)


def chunks(ids: Sequence[str], documents: Sequence[Any], empty: np.ndarray) -> pa.Table:
    """A row for each chunk.

    Args:
        ids: An id for each document.
        documents: The `Chunks` of each.
        empty: Embeddings of nothing, [0, E].

    Returns:
        Columns "id", "chunk" (its number in the document), "start" and "end" (its characters), "status", "embedding".
    """
    counts = [len(one.status) for one in documents]
    spans = np.concatenate([np.zeros((0, 2), np.int64), *(one.spans for one in documents)])
    columns = {
        "id": pa.array([id for id, count in zip(ids, counts, strict=True) for _ in range(count)], pa.string()),
        "chunk": pa.array([index for count in counts for index in range(count)], pa.int32()),
        "start": pa.array(np.ascontiguousarray(spans[:, 0])),
        "end": pa.array(np.ascontiguousarray(spans[:, 1])),
        "status": pa.array([status for one in documents for status in one.status], pa.string()),
    }
    return _table(columns, np.concatenate([empty, *(one.embeddings for one in documents)]))


def _table(columns: dict[str, pa.Array], embeddings: np.ndarray) -> pa.Table:
    flat = pa.array(np.ascontiguousarray(embeddings).reshape(-1))
    kind = pa.list_(pa.field("element", flat.type, nullable=False), embeddings.shape[1])
    columns = columns | {"embedding": pa.FixedSizeListArray.from_arrays(flat, type=kind)}
    schema = pa.schema([pa.field(key, column.type, nullable=False) for key, column in columns.items()])
    return pa.Table.from_arrays(list(columns.values()), schema=schema)


def pack(table: pa.Table, facts: Facts) -> memoryview:
    """A shard as a Parquet file, the same bytes for the same content.

    Args:
        table: Its rows.
        facts: What the footer says about it; "sha256" of the content is added.

    Returns:
        The file.
    """
    facts = facts | {"sha256": content_hash(table)}
    sink = pa.BufferOutputStream()
    plain = [key for key in table.column_names if key != "embedding"]
    pq.write_table(
        table.replace_schema_metadata({KEY: json.dumps(facts, sort_keys=True)}),
        sink,
        row_group_size=ROW_GROUP,
        compression=dict.fromkeys(plain, "zstd"),
        use_dictionary=[key for key in plain if key == "status"],
        write_statistics=plain,
    )
    return memoryview(sink.getvalue())


def facts(store: Store, shard: Shard, identity: str) -> Facts | str:
    """What the footer of a shard says; a complaint if it is not there, not readable, or of another plan.

    Args:
        store: The output directory.
        shard: The shard.
        identity: Of the manifest.

    Returns:
        The facts, or the complaint.
    """
    try:
        with store.fs.open(store.path(name(shard.number)), "rb") as handle:
            found = pq.read_metadata(handle).metadata
    except FileNotFoundError:
        return "missing"
    except (pa.ArrowException, OSError) as error:
        return f"not readable ({error})"
    try:
        content: Facts = json.loads((found or {})[KEY])
        same = (content["plan"], content["shard"], content["rows"]) == (identity, shard.number, shard.part.rows)
    except (KeyError, ValueError, TypeError):
        return "not a shard of a corpus"
    return content if same else "not of this manifest"


def content_hash(table: pa.Table) -> str:
    """A hash of all rows."""
    plain = [table.column(key).to_pylist() for key in table.column_names if key != "embedding"]
    digest = hashlib.sha256(json.dumps(plain).encode())
    digest.update(np.ascontiguousarray(vectors(table)).view(np.uint8).data)
    return digest.hexdigest()


def vectors(table: pa.Table) -> np.ndarray:
    """The embeddings of a shard, [n, E]."""
    column = table.column("embedding")
    flat = column.combine_chunks().flatten() if len(column) else pa.array([], column.type.value_type)
    return flat.to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size)
