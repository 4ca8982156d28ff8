"""The corpus job against the embedder alone, and its memory.

    python -m tests.benchmarks.corpus speed     # the same rows by `Embedder.encode` and by the job, in turns
    python -m tests.benchmarks.corpus memory    # the peak of a process of its own for two sizes of a corpus

The job goes from JSONL to Parquet; planning, hashing and syncing are included.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

import jina_jax
from jina_jax import bench, corpus, hub
from tests.benchmarks.load import peak
from tests.benchmarks.memory import texts

TASK = "retrieval.passage"
SIZES = (20_000, 200_000)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "memory"))
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        if options.what == "speed":
            speed(Path(place), options.model, options.tokens, options.rounds)
        elif options.rows:
            memory(Path(place), options.model, options.rows)
        else:
            for rows in SIZES:
                command = [sys.executable, "-m", "tests.benchmarks.corpus", "memory", "--rows", str(rows)]
                subprocess.run([*command, "--model", options.model], check=True)


def speed(place: Path, name: str, tokens: int, rounds: int) -> None:
    """Rows per second of the job over those of the embedder, for each profile of texts."""
    embedder = jina_jax.Embedder.load(name)
    embedder.warmup()
    for profile in bench.PROFILES:
        found = bench.texts(embedder, bench.lengths(profile, tokens, embedder.config.max_tokens))
        write(place / f"{profile}.jsonl", found)
        alone, job = [], []
        for number in range(rounds + 1):
            begun = time.perf_counter()
            embedder.encode(found, task=TASK)
            between = time.perf_counter()
            embed(place / f"{profile}.jsonl", place / f"{profile}{number}", embedder, name)
            alone.append(between - begun)
            job.append(time.perf_counter() - between)
        print(
            f"{profile}: {len(found)} rows, {np.median(alone[1:]) / np.median(job[1:]):.2f} of the embedder", flush=True
        )


def memory(place: Path, name: str, rows: int) -> None:
    """Peak of this process after a corpus of so many rows."""
    embedder = jina_jax.Embedder.load(name)
    embedder.warmup()
    write(place / "c.jsonl", texts(rows))
    embed(place / "c.jsonl", place / "out", embedder, name)
    print(f"{rows} rows: peak {peak() / 2**20:.0f} MiB", flush=True)


def write(path: Path, found: Iterable[str]) -> None:
    """Texts as JSONL."""
    with path.open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in found)


def embed(source: Path, output: Path, embedder: jina_jax.Embedder, name: str) -> None:
    """The job on one file."""
    encode = {"dimensions": None, "normalize": True, "precision": "float32", "ranges": None}
    encode |= {"prompts": True, "truncate": True, "batch_tokens": None}
    job = corpus.Job([str(source)], str(output), corpus.Columns(), TASK, None, encode)
    corpus.run(job, embedder, corpus.describe_model(name, hub.find(name)))


if __name__ == "__main__":
    main()
