"""Task adapters on a frozen backbone, one after the other: each run starts from the export of the one before.

    jina-jax train configs/adapters.py --adapter retrieval --model runs/pairs/export --data triplets/ --run-dir runs/1
    jina-jax train configs/adapters.py --adapter separation --model runs/1/export --data labelled/ --run-dir runs/2
    jina-jax train configs/adapters.py --adapter classification --model runs/2/export --data labelled/ --run-dir runs/3
    jina-jax train configs/adapters.py --adapter text-matching --model runs/3/export --data scored/ --run-dir runs/4
    jina-jax train configs/adapters.py --adapter retrieval --preset tiny

In this order the five adapters stand as in the released model. DATA holds triplets (retrieval), scored pairs and
triplets (text-matching), or labelled texts (classification; separation, which takes pairs as well).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jina_jax import Config
from jina_jax.records import InputError
from jina_jax.train.recipe import (
    Adapters,
    Data,
    Dataset,
    Eval,
    EvalTask,
    Init,
    Loss,
    Phase,
    Recipe,
    Save,
    datasets,
    eval_tasks,
)

BUNDLED = Path(__file__).parent / "data"


class Adapter(NamedTuple):
    """What differs between the adapters.

    Attributes:
        trains: Tasks.
        prompts: Their prompts.
        phase: Numbers of Table A1 (arXiv:2409.10173).
        sets: Bundled data sets.
        measured: Those of them that are measured.
        clusters: Whether labels are measured by clusters.
        steps: Steps of the tiny preset.
        lr: Its learning rate.
    """

    trains: tuple[str, ...]
    prompts: tuple[str, ...]
    phase: Phase
    sets: tuple[str, ...]
    measured: tuple[str, ...]
    clusters: bool = False
    steps: int = 60
    lr: float = 1e-2


ADAPTERS = {
    "retrieval": Adapter(
        ("retrieval.query", "retrieval.passage"),
        ("Represent the query for retrieving evidence documents: ", "Represent the document for retrieval: "),
        Phase("retrieval", steps=20_000, batch=128, max_length=512, lr=5e-4, tau=0.05),
        ("search", "synthetic_f1", "synthetic_f2", "synthetic_f3", "oasst"),
        ("search", "synthetic_f1", "synthetic_f2", "synthetic_f3", "oasst"),
        steps=150,  # two adapters, which start apart
        lr=2e-2,
    ),
    "text-matching": Adapter(
        ("text-matching",),
        ("",),
        Phase("text-matching", steps=15_000, batch=256, max_length=192, lr=1e-4, tau=0.05),
        ("scored", "nli"),
        ("scored",),
    ),
    "classification": Adapter(
        ("classification",),
        ("",),
        Phase("classification", steps=11_500, batch=256, max_length=192, lr=5e-4, tau=0.02),
        ("labelled",),
        ("labelled",),
    ),
    "separation": Adapter(
        ("separation",),
        ("",),
        Phase("separation", steps=12_500, batch=512, max_length=192, lr=5e-5, tau=0.02),
        ("labelled", "pairs"),
        ("labelled",),
        clusters=True,
    ),
}


def get_config(
    adapter: str = "retrieval",
    preset: str = "paper",
    data: str | Sequence[str] | None = None,
    eval_data: str | None = None,
    model: str | None = None,
) -> Recipe:
    """The recipe.

    Args:
        adapter: "retrieval" (two adapters, trained together), "text-matching", "classification" or "separation".
        preset: "paper" has the numbers of Table A1, "tiny" takes less than a minute on two cores.
        data: Records: files, directories or globs.
        eval_data: Held-out ones.
        model: Where to start from.

    Returns:
        The recipe.
    """
    if adapter not in ADAPTERS:
        raise InputError(f"--adapter {adapter} must be one of {', '.join(ADAPTERS)}")
    if preset not in ("paper", "tiny"):
        raise InputError("--preset must be paper or tiny")
    one = ADAPTERS[adapter]
    if preset == "tiny":
        return tiny(adapter, data, eval_data, model)
    if data is None:
        raise InputError("give --data, records to learn from, or --preset tiny")
    return Recipe(
        stage="adapter",
        # As in the paper, the rotary base is 10,000 in training, and 20,000 once the model is used.
        init=Init(model or "runs/pairs/export", rope_base=10_000.0, export_rope_base=20_000.0),
        phases=(one.phase,),
        data=Data(records(adapter, datasets(data)), negatives=7),
        loss=Loss(
            dims=(32, 64, 128, 256, 512, 768, 1024),  # ours: in this stage
            false_negatives="unique_id" if adapter == "classification" else "ids",
        ),
        # Ours: the optimizer but for its schedule, which is linear after a warmup.
        adapters=Adapters(one.trains, prompts=one.prompts, rank=4, alpha=1.0, dropout=0.0),
        eval=Eval(measured(one, eval_data), every=1000, dims=(32, 64, 128, 256, 512, 768, 1024)),
        save=Save(every=500),
        dtype="bfloat16",  # ours, both
        backbone_dtype="bfloat16",
        remat="full",
    )


def records(adapter: str, found: tuple[Dataset, ...]) -> tuple[Dataset, ...]:
    """Labels make tuples of texts for classification; everything else has the loss of its kind."""
    if adapter != "classification":
        return found
    return tuple(Dataset(one.name, one.path, loss="info_nce") for one in found)


def measured(one: Adapter, paths: str | Sequence[str] | None) -> tuple[EvalTask, ...]:
    """What to measure with held-out records."""
    labelled = "clustering" if one.clusters else "classification"
    passages = one.trains[1] if len(one.trains) > 1 else None
    return eval_tasks(paths, one.trains[0], passages, labelled=labelled)


def tiny(adapter: str, data: str | Sequence[str] | None, eval_data: str | None, model: str | None) -> Recipe:
    """Adapters of two layers of width 64 learn from the bundled sets."""
    one = ADAPTERS[adapter]
    small = Config(
        vocab_size=32_000,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=256,
        max_position_embeddings=514,
        matryoshka_dimensions=(16, 32, 64),
    )
    given = data or [str(BUNDLED / f"{name}.jsonl") for name in one.sets]
    held_out = eval_data or [str(BUNDLED / f"{name}.eval.jsonl") for name in one.measured]
    return Recipe(
        stage="adapter",
        init=Init("mini", small) if model is None else Init(model),
        phases=(Phase(adapter, one.steps, batch=16, max_length=64, lr=one.lr, tau=one.phase.tau),),
        data=Data(records(adapter, datasets(given)), alpha=0.5, negatives=3),
        loss=Loss(dims=(16, 32, 64), false_negatives="unique_id" if adapter == "classification" else "ids"),
        adapters=Adapters(one.trains, prompts=one.prompts, rank=4, alpha=1.0),
        eval=Eval(measured(one, held_out)),
        dropout=0.0,
    )
