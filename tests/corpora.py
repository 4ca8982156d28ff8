"""What the tests of the corpus job share: a small checkpoint, and corpora in every format."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
from conftest import random_variables

import jina_jax

MINI = Path(jina_jax.__file__).parent / "mini"


def save_small(path):
    """A checkpoint whose adapters differ, with prompts."""
    config = jina_jax.Config.from_json(
        MINI / "config.json",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=50,
        prompts=("Find: ", "A document: ", "", "", ""),
    )
    model = jina_jax.Model(config)
    return str(jina_jax.save(path, model, random_variables(model), layout="original", tokenizer=MINI))


def rows(count, prefix="t"):
    """Short texts with ids."""
    return [{"id": f"{prefix}{index}", "text": f"{prefix} {'word ' * (index % 7)}{index}"} for index in range(count)]


def write(path, records, **options):
    """Write records in the format that the name of the file says."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind, *packed = path.name.split(".", 1)[1].split(".")
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path, **options)
        return str(path)
    lines = [one["text"] if kind == "txt" else json.dumps(one) for one in records]
    content = "".join(f"{line}\n" for line in lines).encode()
    # In two pieces, as tools that compress in parallel write them.
    pieces = [content[: len(content) // 2], content[len(content) // 2 :]]
    if packed == ["gz"]:
        content = b"".join(gzip.compress(piece, mtime=0) for piece in pieces)
    elif packed == ["zst"]:
        content = b"".join(pa.compress(piece, "zstd", asbytes=True) for piece in pieces)
    path.write_bytes(content)
    return str(path)


def save_dataset(path, records, files=2, batch=4):
    """A directory as the `save_to_disk` of Hugging Face's datasets writes it."""
    path = Path(path)
    path.mkdir(parents=True)
    names = [f"data-{index:05d}-of-{files:05d}.arrow" for index in range(files)]
    size = -(-len(records) // files)
    for index, name in enumerate(names):
        table = pa.Table.from_pylist(records[index * size : (index + 1) * size])
        with pa.ipc.new_stream(path / name, table.schema) as stream:
            stream.write_table(table, max_chunksize=batch)
    (path / "cache-0123456789abcdef.arrow").write_bytes(b"of no importance")
    (path / "dataset_info.json").write_text("{}")
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": None}
    (path / "state.json").write_text(json.dumps(state))
    return str(path)


def read(output):
    """All rows of an embedded corpus."""
    return pyarrow.dataset.dataset(f"{output}/shards").to_table()


def files(output):
    """Name and content of every file that lasts: the manifest and the shards."""
    paths = [Path(output) / "manifest.json", *sorted((Path(output) / "shards").iterdir())]
    return {path.name: path.read_bytes() for path in paths}
