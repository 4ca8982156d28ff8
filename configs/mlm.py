"""Pre-training: masked language modelling from XLM-RoBERTa, with rotary positions in the place of its own.

    jina-jax train configs/mlm.py --data culturax/ --eval-data held_out.jsonl
    jina-jax train configs/mlm.py --preset tiny

DATA holds texts, a file for each language or records that name theirs: a batch has one language only.
"""

from collections.abc import Sequence
from pathlib import Path

from jina_jax import Config
from jina_jax.records import InputError
from jina_jax.train.recipe import Data, Eval, Init, Phase, Recipe, Save, datasets, eval_tasks

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
        data: Texts: files, directories or globs.
        eval_data: Held-out ones.
        model: Where to start from.

    Returns:
        The recipe.
    """
    if preset == "tiny":
        return tiny(data, eval_data, model)
    if preset != "paper" or data is None:
        raise InputError("give --data, texts to learn from, or --preset tiny" if preset == "paper" else UNKNOWN)
    return Recipe(
        stage="mlm",
        init=Init(model or "FacebookAI/xlm-roberta-large", rope_base=10_000.0, max_tokens=8192),
        phases=(
            Phase("short", steps=100_000, batch=128 * 8, max_length=512, lr=1e-4, grad_cache=16),  # ours: 16 parts
            Phase("long", steps=60_000, batch=8 * 8, max_length=8192, lr=5e-5, grad_cache=8),  # ours: 8 parts
        ),
        data=Data(
            datasets(data),
            by_language=True,
            alpha=0.5,  # ours; the paper says that English has about 20%
            mask_rate=0.3,  # ours
        ),
        # Ours: the optimizer but for its schedule, which is linear after a warmup.
        eval=Eval(eval_tasks(eval_data), every=5000),
        save=Save(every=1000, keep_every=20_000),
        dtype="bfloat16",  # ours
        remat="full",
    )


UNKNOWN = "--preset must be paper or tiny"


def tiny(data: str | Sequence[str] | None, eval_data: str | None, model: str | None) -> Recipe:
    """Two layers of width 64 learn sentences in six languages."""
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
    return Recipe(
        stage="mlm",
        init=Init("mini", small) if model is None else Init(model),
        phases=(Phase("short", steps=60, batch=16, max_length=64, lr=3e-3),),
        data=Data(datasets(data or str(BUNDLED / "texts.jsonl"))),
        eval=Eval(eval_tasks(eval_data or str(BUNDLED / "texts.eval.jsonl"))),
        dropout=0.0,
    )
