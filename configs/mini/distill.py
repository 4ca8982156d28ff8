"""Stage 1: the backbone learns to see texts as its teacher does, which reads them, or their English translation.

    jina-jax train configs/mini/distill.py --model WORK/start --data WORK/train/distill.jsonl --run-dir RUN/distill

Beside the texts lie the teacher's vectors, `distill.npy`. Where a text has an English translation, the teacher read
that: so languages meet in one place that is good for English.
"""

from pathlib import Path

from jina_jax.train.recipe import Data, Dataset, Eval, Init, Log, Loss, Optim, Phase, Recipe, Save, eval_tasks

DIMS = (24, 48, 96, 192, 384)


def get_config(data: str, model: str, eval_data: str | None = None) -> Recipe:
    """The recipe.

    Args:
        data: The texts; the teacher's vectors lie beside them.
        model: The student before training.
        eval_data: Held-out pairs.

    Returns:
        The recipe.
    """
    texts = Dataset("texts", data, kind="text", loss="distill", teacher=str(Path(data).with_suffix(".npy")))
    return Recipe(
        stage="distill",
        init=Init(model, rope_base=10_000.0),
        phases=(
            Phase("short", steps=620, batch=256, max_length=128, lr=6e-4, tau=0.05),
            Phase("long", steps=30, batch=24, max_length=512, lr=5e-5, tau=0.05, min_tokens=128),
        ),
        data=Data((texts,), by_language=False),
        # The direction of each vector, and at every size how similar the texts of a batch are.
        loss=Loss(dims=DIMS, reduce="mean", distill="both", cosine_weight=5.0),
        optim=Optim(b2=0.98, schedule="cosine", warmup=0.05),
        eval=Eval(eval_tasks(eval_data), dims=DIMS),
        save=Save(every=50, last=1),
        log=Log(every=20),
        dropout=0.0,
    )
