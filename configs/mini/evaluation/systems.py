"""What is compared: each model as one function from texts to unit vectors, which remembers what it has computed."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from jina_jax import Embedder

# Texts and their task (one of `jina_jax.TASKS`) to unit vectors [n, D].
Encode = Callable[[Sequence[str], str | None], np.ndarray]


def remembering(encode: Encode) -> Encode:
    """An encoder that computes each text of a task once."""
    rows: dict[tuple[str | None, str], np.ndarray] = {}

    def again(texts: Sequence[str], task: str | None) -> np.ndarray:
        new = [text for text in dict.fromkeys(texts) if (task, text) not in rows]
        if new:
            rows.update(zip(((task, text) for text in new), encode(new, task), strict=True))
        return np.stack([rows[task, text] for text in texts])

    return again


def adapters(embedder: Embedder) -> Encode:
    """A model with the adapter and the prompt of each task."""
    return remembering(lambda texts, task: embedder.encode(list(texts), task=task))


def bare(embedder: Embedder) -> Encode:
    """A model without adapters and prompts, whatever the task."""
    encode = remembering(lambda texts, _: embedder.encode(list(texts)))
    return lambda texts, _: encode(texts, None)


def teacher(work: Path) -> Encode:
    """The teacher, with the prefixes that it was trained with: "passage: " for passages, "query: " for all else."""
    # Imported here because whoever measures nothing but students needs no teacher.
    from configs.mini.start import teacher as taught

    loaded = taught.load(work)
    encode = remembering(lambda texts, prefix: taught.encode(list(texts), str(prefix), teacher=loaded))
    return lambda texts, task: encode(texts, "passage: " if task == "retrieval.passage" else "query: ")


def digest(paths: Iterable[Path]) -> str:
    """One hash of the contents of files, in the order given, and of their names."""
    found = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            found.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()


def cut(vectors: np.ndarray, dimensions: int) -> np.ndarray:
    """The first numbers of each vector, at unit length again."""
    kept = vectors[:, :dimensions]
    return kept / np.maximum(np.linalg.norm(kept, axis=1, keepdims=True), np.float32(1e-12))
