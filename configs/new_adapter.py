"""An adapter of your own, beside those that the model has, from your own records.

    jina-jax train configs/new_adapter.py --data my_pairs.jsonl --task my-domain
    jina-jax train configs/new_adapter.py --data my_pairs.jsonl --task my-domain --model jinaai/jina-embeddings-v3

Then `jina_jax.Embedder.load("runs/new_adapter/export").encode(texts, task="my-domain")`. What the other adapters give
stays as it is, to the bit. A record is a line such as {"query": "...", "pos": "..."}; triplets with "neg", scored pairs
and labelled texts will do as well. The last tenth of the records is kept to measure with, unless there are others for
that (--eval-data). To try it, there is the bundled set of a made-up jargon:

    jina-jax train configs/new_adapter.py --data configs/data/jargon.jsonl --eval-data configs/data/jargon.eval.jsonl
"""

import dataclasses
from collections.abc import Sequence

from jina_jax import Config, examples, hub
from jina_jax.train.recipe import Adapters, Data, Eval, Init, Loss, Phase, Recipe, Save, datasets, eval_tasks

HELD_OUT = 0.1
EPOCHS, LEAST, MOST = 4, 60, 2000


def get_config(
    data: str | Sequence[str],
    task: str = "my-domain",
    model: str = "mini",
    eval_data: str | None = None,
) -> Recipe:
    """The recipe.

    Args:
        data: Your records: files, directories or globs.
        task: Name of the new adapter; the name of one that the model has trains that one anew.
        model: The model that gets it: a directory, a name on the hub, or "mini".
        eval_data: Held-out records; None keeps the last tenth of the others.

    Returns:
        The recipe.
    """
    share = HELD_OUT if eval_data is None else 0.0
    given = tuple(dataclasses.replace(one, hold_out=share) for one in datasets(data))
    measured = eval_tasks(data, task, share=share) if eval_data is None else eval_tasks(eval_data, task)
    count = sum(1 for one in given for _ in examples.lines(one.path))
    batch = 32
    steps = min(max(EPOCHS * count // batch, LEAST), MOST)
    return Recipe(
        stage="adapter",
        init=Init(model),
        # Few steps take larger ones: this is near the paper's 5e-4 from some thousand steps on.
        phases=(Phase("new", steps, batch, max_length=512, lr=5e-3 * (LEAST / steps) ** 0.5, tau=0.05),),
        data=Data(given),
        loss=Loss(dims=Config.from_json(hub.find(model) / "config.json").matryoshka_dimensions),
        adapters=Adapters((task,)),
        eval=Eval(measured),
        save=Save(every=100),
        dropout=0.0,
    )
