"""What the tests of training share: a small model with the bundled tokenizer, records to train on, and recipes."""

import json
import random
from pathlib import Path

import numpy as np

import jina_jax
from jina_jax.train.recipe import Adapters, Data, Dataset, Eval, EvalTask, Init, Log, Optim, Phase, Recipe, Save

MINI = Path(jina_jax.__file__).parent / "mini"
CONFIG = jina_jax.Config(
    vocab_size=32_003,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=66,
    matryoshka_dimensions=(8, 32),
    hidden_dropout_prob=0.1,
    attention_probs_dropout_prob=0.1,
)
WORDS = [
    "river",
    "stone",
    "market",
    "winter",
    "garden",
    "letter",
    "music",
    "doctor",
    "window",
    "bridge",
    "teacher",
    "forest",
    "engine",
    "coffee",
]
TIMES = ("seconds", "tokens_per_second")


def model(path: Path) -> Path:
    """Write the small model."""
    from conftest import random_variables  # not for processes that choose their own devices

    one = jina_jax.Model(CONFIG)
    return jina_jax.save(path, one, random_variables(one), layout="original", tokenizer=MINI)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(count: int, seed: int = 0) -> list[dict]:
    """Records whose passage says with other words in between what the query says."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        words = rng.sample(WORDS, 3)
        rows.append(
            {
                "query": f"{' '.join(words)} {number}",
                "pos": f"about the {words[2]}, the {words[0]} and number {number} of the {words[1]}",
                "neg": [f"about the {' '.join(rng.sample(WORDS, 2))}" for _ in range(rng.randrange(1, 3))],
            }
        )
    return rows


def data(folder: Path) -> Path:
    """Write a set of pairs, one of triplets, and one to measure on."""
    write(folder / "pairs.jsonl", [{"query": row["query"], "pos": row["pos"]} for row in pairs(64)])
    write(folder / "triplets.jsonl", pairs(48, 1))
    write(folder / "held_out.jsonl", pairs(24, 2))
    return folder


def recipe(base: Path, folder: Path, **changes: object) -> Recipe:
    """Adapter training in two phases, with evaluation; two programs to compile for each phase."""
    datasets = tuple(Dataset(name, str(folder / f"{name}.jsonl")) for name in ("pairs", "triplets"))
    held_out = folder / "held_out.jsonl"
    return Recipe(
        stage="adapter",
        phases=(
            Phase("first", 7, 16, 16, 1e-2, tau=0.1, datasets=("triplets",)),
            Phase("second", 8, 16, 16, 5e-3, tau=0.1, datasets=("pairs",)),
        ),
        data=Data(datasets, negatives=1),
        init=Init(str(base)),
        optim=Optim(warmup=2.0),
        adapters=Adapters(("retrieval.query", "retrieval.passage")),
        eval=Eval((EvalTask("toy", "ir", str(held_out), "retrieval.query", "retrieval.passage"),), every=5),
        log=Log(every=1),
        save=Save(every=3, last=2),
        seed=7,
    ).replace(**changes)


def short(base: Path, folder: Path, **changes: object) -> Recipe:
    """The same in one phase without evaluation: one program to compile."""
    one = Phase("only", 15, 16, 16, 1e-2, tau=0.1, datasets=("triplets",))
    return recipe(base, folder, phases=(one,), eval=Eval()).replace(**changes)


def rows(run: Path) -> list[dict]:
    """The rows of metrics.jsonl without what depends on the clock."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in lines]


def exported(run: Path) -> dict[str, np.ndarray]:
    """Parameters of the export."""
    _, variables = jina_jax.load(run / "export")
    return {path: np.asarray(x) for path, x in jina_jax.checkpoint.flatten(variables).items()}
