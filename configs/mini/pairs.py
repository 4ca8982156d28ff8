"""Stage 2: texts that belong together come together, at every Matryoshka size, and the teacher is not forgotten.

jina-jax train configs/mini/pairs.py --model RUN/distill/export --data WORK/train --run-dir RUN/pairs

A batch holds one kind of records: translations, pages with their titles, words with their glosses, or plain texts.
"""

from pathlib import Path

from jina_jax.train.recipe import Data, Dataset, Eval, Init, Log, Loss, Optim, Phase, Recipe, Save, eval_tasks

DIMS = (24, 48, 96, 192, 384)
# Pairs, and their share of the steps; the rest is distillation.
SHARES = {"translations": 0.35, "titles": 0.3, "glosses": 0.1}


def get_config(data: str, model: str, eval_data: str | None = None) -> Recipe:
    """The recipe.

    Args:
        data: Directory with the pairs, and with the texts of the first stage and the teacher's vectors.
        model: The export of the first stage.
        eval_data: Held-out pairs.

    Returns:
        The recipe.
    """
    train = Path(data)
    pairs = [Dataset(name, str(train / f"{name}.jsonl"), kind="pair", weight=share) for name, share in SHARES.items()]
    texts = Dataset(
        "texts",
        str(train / "distill.jsonl"),
        kind="text",
        loss="distill",
        teacher=str(train / "distill.npy"),
        weight=1 - sum(SHARES.values()),
    )
    return Recipe(
        stage="pairs",
        init=Init(model, rope_base=10_000.0),
        phases=(Phase("pairs", steps=100, batch=128, max_length=128, lr=1e-4, tau=0.05),),
        data=Data((*pairs, texts), by_language=False),
        loss=Loss(dims=DIMS, reduce="mean", distill="both", cosine_weight=5.0),
        optim=Optim(b2=0.98, schedule="linear", warmup=0.1),
        eval=Eval(eval_tasks(eval_data), dims=DIMS),
        save=Save(every=100, last=1),
        log=Log(every=20),
        dropout=0.0,
    )
