"""Pair training: the backbone learns from pairs of texts that belong together, at every Matryoshka size.

    jina-jax train configs/pairs.py --model runs/mlm/export --data pairs/ --eval-data held_out.jsonl
    jina-jax train configs/pairs.py --preset tiny

DATA holds pairs, a file for each data set; a batch has records of one set and one language only.
"""

from collections.abc import Sequence
from pathlib import Path

from jina_jax import Config
from jina_jax.records import InputError
from jina_jax.train.recipe import Data, Eval, Init, Loss, Phase, Recipe, Save, datasets, eval_tasks

BUNDLED = Path(__file__).parent / "data"


def get_config(
    preset: str = "paper",
    data: str | Sequence[str] | None = None,
    eval_data: str | None = None,
    model: str | None = None,
) -> Recipe:
    """The recipe.

    Args:
        preset: "paper" has the numbers of Table A1 (arXiv:2409.10173), "tiny" takes less than a minute on two cores.
        data: Pairs: files, directories or globs.
        eval_data: Held-out ones.
        model: Where to start from.

    Returns:
        The recipe.
    """
    if preset == "tiny":
        return tiny(data, eval_data, model)
    if preset != "paper" or data is None:
        raise InputError("give --data, pairs to learn from, or --preset tiny" if preset == "paper" else UNKNOWN)
    dims = (32, 64, 128, 256, 512, 768, 1024)
    return Recipe(
        stage="pairs",
        init=Init(model or "runs/mlm/export", rope_base=10_000.0),
        phases=(
            # Ours: how many parts, and that the long phase has long pairs only.
            Phase("short", steps=60_000, batch=8 * 2048, max_length=192, lr=3e-5, tau=0.05, grad_cache=64),
            Phase("long", 50_000, batch=2 * 512, max_length=1024, lr=2e-5, tau=0.02, grad_cache=16, min_tokens=192),
        ),
        data=Data(datasets(data), by_language=True),
        loss=Loss(dims=dims, chunk=512),  # ours: all sizes in this stage, with equal weights
        # Ours: the optimizer but for its schedule, which is linear after a warmup.
        eval=Eval(eval_tasks(eval_data), every=1000, dims=dims),
        save=Save(every=500, keep_every=10_000),
        dtype="bfloat16",  # ours
        remat="full",
    )


UNKNOWN = "--preset must be paper or tiny"


def tiny(data: str | Sequence[str] | None, eval_data: str | None, model: str | None) -> Recipe:
    """Two layers of width 64 learn questions and answers in three languages, and translations."""
    small = Config(
        vocab_size=32_000,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=256,
        max_position_embeddings=514,
        tasks=(),
        prompts=(),
        matryoshka_dimensions=(16, 32, 64),
        rope_base=10_000.0,
    )
    held_out = [str(BUNDLED / f"{name}.eval.jsonl") for name in ("pairs", "translations", "scored")]
    return Recipe(
        stage="pairs",
        init=Init("mini", small) if model is None else Init(model),
        phases=(
            Phase("short", steps=40, batch=32, max_length=32, lr=3e-3, tau=0.05),
            Phase("long", steps=10, batch=16, max_length=64, lr=1e-3, tau=0.02, min_tokens=12, grad_cache=2),
        ),
        data=Data(datasets(data or [str(BUNDLED / "pairs.jsonl"), str(BUNDLED / "translations.jsonl")])),
        loss=Loss(dims=(16, 32, 64)),
        eval=Eval(eval_tasks(eval_data or held_out)),
        dropout=0.0,
    )
