"""Stage 3: five adapters on the frozen backbone, each with its own loss; each run starts from the one before.

    jina-jax train configs/mini/adapters.py --adapter retrieval --model RUN/0/export --data RUN/mined --run-dir RUN/1
    jina-jax train configs/mini/adapters.py --adapter separation --model RUN/1/export --data DATA --run-dir RUN/2

And so on with classification and text-matching, in the order of `ADAPTERS`; DATA is the directory of that name in
WORK/train, or "scored" for text-matching. As in the paper, the rotary base is 10,000 in training and 20,000 in what is
exported.
"""

import dataclasses
from typing import NamedTuple

from jina_jax.train.recipe import (
    Adapters,
    Data,
    Eval,
    Init,
    Log,
    Loss,
    Optim,
    Phase,
    Recipe,
    Save,
    datasets,
    eval_tasks,
)

DIMS = (24, 48, 96, 192, 384)


class Adapter(NamedTuple):
    """What differs between the adapters.

    Attributes:
        trains: Tasks.
        prompts: Their prompts.
        loss: Of its records; None means that of their kind.
        phase: Steps, batch, length, learning rate and temperature.
        negatives: Hard negatives of a record; for labels, texts of other labels.
    """

    trains: tuple[str, ...]
    prompts: tuple[str, ...]
    loss: str | None
    phase: Phase
    negatives: int = 1


ADAPTERS = {
    "retrieval": Adapter(
        ("retrieval.query", "retrieval.passage"),
        ("Represent the query for retrieving evidence documents: ", "Represent the document for retrieval: "),
        None,
        Phase("retrieval", steps=100, batch=48, max_length=96, lr=3e-3, tau=0.05),
    ),
    "separation": Adapter(
        ("separation",),
        ("",),
        "separation",
        Phase("separation", steps=100, batch=128, max_length=64, lr=2e-3, tau=0.05),
    ),
    "classification": Adapter(
        ("classification",),
        ("",),
        "info_nce",
        Phase("classification", steps=120, batch=64, max_length=64, lr=2e-3, tau=0.05),
    ),
    "text-matching": Adapter(
        ("text-matching",),
        ("",),
        "cosent",
        Phase("text-matching", steps=120, batch=128, max_length=64, lr=2e-3, tau=0.05),
    ),
}


def get_config(data: str, model: str, adapter: str = "retrieval", eval_data: str | list[str] | None = None) -> Recipe:
    """The recipe.

    Args:
        data: Records: files, or a directory of them.
        model: The export of the run before.
        adapter: One of `ADAPTERS`.
        eval_data: Held-out records.

    Returns:
        The recipe.
    """
    one = ADAPTERS[adapter]
    sets = tuple(dataclasses.replace(found, loss=one.loss) for found in datasets(data))
    passages = one.trains[1] if len(one.trains) > 1 else None
    labelled = "clustering" if adapter == "separation" else "classification"
    return Recipe(
        stage="adapter",
        init=Init(model, rope_base=10_000.0, export_rope_base=20_000.0),
        phases=(one.phase,),
        data=Data(sets, alpha=0.5, by_language=False, negatives=one.negatives),
        loss=Loss(dims=DIMS, reduce="mean", false_negatives="label" if adapter == "classification" else "ids"),
        optim=Optim(b2=0.98, schedule="linear", warmup=0.1),
        adapters=Adapters(one.trains, prompts=one.prompts, start="fresh", rank=4, alpha=1.0),
        eval=Eval(eval_tasks(eval_data, one.trains[0], passages, labelled=labelled), dims=DIMS),
        save=Save(every=100, last=1),
        log=Log(every=20),
        dropout=0.0,
    )
