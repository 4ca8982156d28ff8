"""The student before any training, in DIR/start: eight of the teacher's layers, rotary positions, fewer pieces.

    python -m configs.mini.start.student --work DIR [--vocab 36864]

Takes what `python -m configs.mini.start.teacher` leaves in DIR/teacher, and the texts that it is to learn from. It is
written in the layout of jina-embeddings-v3, with five adapters that change nothing yet. `--measure` says how good it is
by now.
"""

import argparse
import json
import lzma
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from configs.mini.start import fit, surgery, teacher, vocabulary
from jina_jax import Config, Embedder, Model, checkpoint, layouts
from jina_jax.records import InputError, whole_file

LAYERS = (0, 1, 2, 4, 6, 8, 10, 11)
BASE = 10_000.0
SIZES = (24, 48, 96, 192, 384)
TEXTS = 120  # of each language that layers are fitted to
LONGEST = 400  # characters of these
TOKENS = 20_000  # of them that show what the layers read


def config(vocab: int, sizes: Mapping[str, int | float]) -> Config:
    """The student's configuration.

    Args:
        vocab: Pieces of the vocabulary.
        sizes: The teacher's, see `e5.read`.

    Returns:
        The configuration, with the prompts of the released model.
    """
    return Config(
        vocab_size=vocab,
        hidden_size=int(sizes["D"]),
        num_hidden_layers=len(LAYERS),
        num_attention_heads=int(sizes["N"]),
        intermediate_size=int(sizes["F"]),
        layer_norm_eps=float(sizes["eps"]),
        rope_base=BASE,
        matryoshka_dimensions=SIZES,
    )


def parameters(given: teacher.Teacher, found: Mapping[str, np.ndarray], texts: Sequence[str]) -> surgery.Parameters:
    """The student's parameters, without adapters, with the whole vocabulary.

    Args:
        given: The teacher.
        found: Its parameters.
        texts: Some of what the student is to learn from, in all languages.

    Returns:
        Float32 arrays by path.
    """
    batches = fit.hidden(given, texts)
    lengths = np.concatenate([mask.sum(axis=1) for _, mask, _ in batches])
    positions = (lengths[:, None] > np.arange(lengths.max())).sum(axis=0)
    student = surgery.take(found, LAYERS, positions)
    student = surgery.rebase(student, inputs(batches))
    return fit.downs(student, LAYERS, given, batches, BASE)


def inputs(batches: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> np.ndarray:
    """What the layers that are kept read, [L, n, D]: some of the tokens that `fit.hidden` saw."""
    step = max(1, sum(int(mask.sum()) for _, mask, _ in batches) // TOKENS)
    return np.stack([np.concatenate([x[layer][mask] for _, mask, x in batches])[::step] for layer in LAYERS])


def with_adapters(model: Model, found: Mapping[str, np.ndarray], seed: int = 0) -> dict[str, np.ndarray]:
    """All parameters of a model: those given, adapters that change nothing, and a pooler that is the identity."""
    fresh = checkpoint.flatten(jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32)))
    pooler = {"pooler/kernel": np.eye(model.config.hidden_size, dtype=np.float32)}
    return {path: np.asarray(x) for path, x in fresh.items()} | dict(found) | pooler


def make(work: Path, vocab: int) -> Path:
    """Make DIR/start.

    Args:
        work: The work directory.
        vocab: Pieces of the vocabulary.

    Returns:
        The directory.

    Raises:
        InputError: If the teacher's order of dimensions is missing.
    """
    order, folder = work / "teacher" / "permutation.npy", work / "start"
    if not order.exists():
        raise InputError(f"{order} is missing: run python -m configs.mini.start.teacher --work {work} first")
    records = teacher.read_lines(work / "train" / "distill.jsonl")
    smaller, rows = cut(records, vocab)
    with whole_file(work / "teacher" / "tokenizer.json") as file:
        file.write(json.dumps(smaller, ensure_ascii=False).encode())
    short = [one for one in records if len(one["text"]) <= LONGEST]
    texts = [short[i]["text"] for i in teacher.balanced([one["lang"] for one in short], TEXTS)]

    found, sizes = teacher.parameters(work)
    student = parameters(teacher.ready(found, sizes), found, texts)
    student |= {"embed/words/embedding": student["embed/words/embedding"][rows]}
    model = Model(config(len(rows), sizes))
    student = surgery.permute(with_adapters(model, student), np.load(order))
    save(folder, model, student)
    means = Embedder.load(folder).encode(texts, normalize=False)
    save(folder, model, surgery.centre(student, means.mean(axis=0)))
    return folder


def save(folder: Path, model: Model, student: Mapping[str, np.ndarray]) -> None:
    """Write the student; its tokenizer lies beside the teacher's files."""
    half = layouts.nest({path: jnp.asarray(x, jnp.float16) for path, x in student.items()})
    tokenizer = folder.parent / "teacher"
    checkpoint.save(folder, model, {"params": half}, layout="original", tokenizer=tokenizer, overwrite=True)


def cut(records: Sequence[Mapping[str, str]], vocab: int) -> tuple[dict, np.ndarray]:
    """The content of the student's tokenizer, and which of the teacher's pieces it has."""
    texts: dict[str, list[str]] = {}
    for one in records:
        texts.setdefault(one["lang"], []).append(one["text"])
    with lzma.open(teacher.TOKENIZER, "rt", encoding="utf-8") as file:
        full = json.load(file)
    smaller = vocabulary.choose(full, texts, vocab)
    return smaller, vocabulary.rows(smaller, full)


# ---- What it is worth ------------------------------------------------------------------------------------------


def measure(work: Path, count: int = 30) -> dict[str, float]:
    """How near the student is to its targets, and how often it finds the translation of a text.

    Args:
        work: The work directory.
        count: Texts of each language for the first.

    Returns:
        "cosine", the mean of those to the targets, and for every source of test/bitext the mean over languages.
    """
    embedder = Embedder.load(work / "start")
    records = teacher.read_lines(work / "train" / "distill.jsonl")
    places = teacher.balanced([one["lang"] for one in records], count)
    targets = np.load(work / "train" / "distill.npy", mmap_mode="r")[places].astype(np.float32)
    found = {"cosine": float((embedder.encode([records[i]["text"] for i in places]) * targets).sum(axis=1).mean())}
    hits: dict[str, list[float]] = {}
    for file in sorted((work / "test" / "bitext").glob("*.jsonl")):
        pairs = teacher.read_lines(file)
        foreign, english = (embedder.encode([pair[side] for pair in pairs]) for side in ("query", "positive"))
        hit = (foreign @ english.T).argmax(axis=1) == np.arange(len(pairs))
        hits.setdefault(file.name.split(".")[0], []).append(float(hit.mean()))
    return found | {source: float(np.mean(values)) for source, values in hits.items()}


def main() -> None:
    """Make the start of a work directory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="the work directory")
    parser.add_argument("--vocab", type=int, default=36_864, help="pieces of the vocabulary")
    parser.add_argument("--measure", action="store_true", help="measure it as well")
    args = parser.parse_args()
    print(f"{make(args.work, args.vocab)}: {len(LAYERS)} layers, {args.vocab:,} pieces")
    if args.measure:
        print(json.dumps(measure(args.work), indent=1))


if __name__ == "__main__":
    main()
