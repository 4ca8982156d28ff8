"""Stage 3: five adapters on the frozen backbone, each with its own loss; each run starts from the one before.

    jina-jax train configs/mini/adapters.py --adapter retrieval --model WORK/runs/0/pairs/export --data WORK/runs/0/mined --run-dir WORK/runs/0/retrieval
    jina-jax train configs/mini/adapters.py --adapter separation --model WORK/runs/0/retrieval/export --data WORK/train --run-dir WORK/runs/0/separation

And so on with classification and text-matching, in the order of `ADAPTERS`. As in the paper, the rotary base is 10,000
in training and 20,000 in what is exported.
"""  # noqa: E501 - commands in one line

from pathlib import Path
from typing import NamedTuple

from jina_jax.train.recipe import (
    Adapters,
    Data,
    Dataset,
    Eval,
    Init,
    Log,
    Loss,
    Optim,
    Phase,
    Recipe,
    Save,
    eval_tasks,
)

DIMS = (24, 48, 96, 192, 384)


class Adapter(NamedTuple):
    """What differs between the adapters.

    Attributes:
        trains: Tasks.
        prompts: Their prompts.
        sets: Names of the records and their shares of the steps.
        loss: Of these records; None means the kind's own.
        phase: Steps, batch, length, learning rate and temperature.
        negatives: Hard negatives of a record; for labels, texts of other labels.
    """

    trains: tuple[str, ...]
    prompts: tuple[str, ...]
    sets: dict[str, float]
    loss: str | None
    phase: Phase
    negatives: int = 1


ADAPTERS = {
    "retrieval": Adapter(
        ("retrieval.query", "retrieval.passage"),
        ("Represent the query for retrieving evidence documents: ", "Represent the document for retrieval: "),
        {"titles": 0.7, "glosses": 0.3},
        None,
        Phase("retrieval", steps=150, batch=64, max_length=112, lr=3e-3, tau=0.05),
    ),
    "separation": Adapter(
        ("separation",),
        ("",),
        {"separation": 1.0},
        "separation",
        Phase("separation", steps=150, batch=128, max_length=64, lr=2e-3, tau=0.05),
    ),
    "classification": Adapter(
        ("classification",),
        ("",),
        {"classification": 1.0},
        "info_nce",
        Phase("classification", steps=150, batch=64, max_length=64, lr=2e-3, tau=0.05),
    ),
    "text-matching": Adapter(
        ("text-matching",),
        ("",),
        {"scored": 1.0},
        "cosent",
        Phase("text-matching", steps=150, batch=128, max_length=64, lr=2e-3, tau=0.05),
    ),
}


def get_config(data: str, model: str, adapter: str = "retrieval", eval_data: str | list[str] | None = None) -> Recipe:
    """The recipe.

    Args:
        data: Directory with the records.
        model: The export of the run before.
        adapter: One of `ADAPTERS`.
        eval_data: Held-out records.

    Returns:
        The recipe.
    """
    one = ADAPTERS[adapter]
    sets = tuple(
        Dataset(name, str(Path(data) / f"{name}.jsonl"), loss=one.loss, weight=share)
        for name, share in one.sets.items()
    )
    passages = one.trains[1] if len(one.trains) > 1 else None
    labelled = "clustering" if adapter == "separation" else "classification"
    return Recipe(
        stage="adapter",
        init=Init(model, rope_base=10_000.0, export_rope_base=20_000.0),
        phases=(one.phase,),
        data=Data(sets, by_language=False, negatives=one.negatives),
        loss=Loss(dims=DIMS, reduce="mean", false_negatives="label" if adapter == "classification" else "ids"),
        optim=Optim(b2=0.98, schedule="linear", warmup=0.1),
        adapters=Adapters(one.trains, prompts=one.prompts, start="fresh", rank=4, alpha=1.0),
        eval=Eval(eval_tasks(eval_data, one.trains[0], passages, labelled=labelled), dims=DIMS),
        save=Save(every=100, last=1),
        log=Log(every=20),
        dropout=0.0,
    )
