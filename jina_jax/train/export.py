"""What a run leaves behind: the model in the public `-hf` layout, what made it, and a card for people."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jina_jax import checkpoint, layouts, peft
from jina_jax._version import __version__
from jina_jax.config import Config
from jina_jax.model import Model
from jina_jax.train.recipe import DEFAULT_LOSS, Dataset, Recipe, to_json

_LOSS_NAMES = {
    "mlm": "masked language modelling",
    "info_nce": "InfoNCE (`info_nce`)",
    "cosent": "CoSENT (`cosent`)",
    "separation": "CoSENT over equal and unequal labels (`separation`)",
    "distill": "distillation (`distill`)",
}
_MODULES = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))


def export(
    path: str | Path,
    recipe: Recipe,
    model: Model,
    variables: Mapping[str, Any],
    tokenizer: Path,
    results: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> Path:
    """Write a trained model, whole or not at all.

    Besides the checkpoint there are `modules.json`, `1_Pooling/` and `config_sentence_transformers.json` (for
    sentence-transformers), `recipe.json`, `training.json` (all facts and results) and `MODEL_CARD.md`.

    Args:
        path: Directory to create; one that exists is replaced.
        recipe: What was trained.
        model: The model, all its tasks included.
        variables: Its variables.
        tokenizer: Directory whose tokenizer files are copied.
        results: What `eval.tasks.evaluate` gave "before" and "after" training; either may be missing.
        facts: "command", "seconds", "steps", "data" (lines), "versions" and "plans" (hashes).

    Returns:
        The directory.

    Raises:
        ValueError: If the variables are not this model's.
        OSError: If it cannot be written; nothing is left behind then.
    """
    path, config = Path(path).absolute(), model.config
    path.parent.mkdir(parents=True, exist_ok=True)
    with checkpoint.replacing(path) as temporary:
        checkpoint.save(temporary, model, dict(variables), layout="hf", tokenizer=tokenizer, overwrite=True)
        for name, content in _beside(config, recipe, results, facts):
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        text = card(recipe, config, results, facts)
        (temporary / "MODEL_CARD.md").write_text(text, encoding="utf-8")
    return path


def _beside(
    config: Config, recipe: Recipe, results: Mapping[str, Any], facts: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Files of JSON beside the checkpoint: their names and contents."""
    yield (
        "modules.json",
        [
            {"idx": number, "name": str(number), "path": folder, "type": f"sentence_transformers.models.{name}"}
            for number, (name, folder) in enumerate(_MODULES)
        ],
    )
    modes = {f"pooling_mode_{mode}": mode == "mean_tokens" for mode in ("cls_token", "mean_tokens", "max_tokens")}
    yield (
        "1_Pooling/config.json",
        {"word_embedding_dimension": config.hidden_size} | modes | {"pooling_mode_mean_sqrt_len_tokens": False},
    )
    yield (
        "config_sentence_transformers.json",
        {
            "__version__": {"jina_jax": __version__},
            "prompts": dict(zip(config.tasks, config.prompts, strict=True)),
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )
    yield "recipe.json", to_json(recipe)
    yield "training.json", {"facts": dict(facts), "results": dict(results)}


# ---- The card --------------------------------------------------------------------------------------------------


def card(recipe: Recipe, config: Config, results: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The model card.

    Args:
        recipe: What was trained.
        config: The model's configuration, all tasks included.
        results: As for `export`.
        facts: As for `export`.

    Returns:
        Markdown. It names files without the directories that they were in.
    """
    title = f"Adapter {_names(recipe.adapters.trains)}" if recipe.stage == "adapter" else _TITLES[recipe.stage]
    parts = [
        _head(recipe),
        f"# {title}",
        _what(recipe, config),
        *("## Use", _use(recipe, config)),
        *("## Evaluation", _evaluation(results)),
        *("## Training data", _data(recipe, facts)),
        *("## Training", _training(recipe, config, facts)),
    ]
    return "\n\n".join(parts) + "\n"


_TITLES = {"mlm": "Backbone, pre-trained", "pairs": "Backbone, trained on pairs", "distill": "Backbone, distilled"}


def _head(recipe: Recipe) -> str:
    """What a hub reads."""
    languages = sorted({one.lang for one in recipe.datasets if one.lang})
    lines = ["library_name: jina_jax", "pipeline_tag: feature-extraction", "tags: [sentence-similarity]"]
    lines += [f"language: [{', '.join(languages)}]"] if languages else []
    # On a hub this must be a name there, which a directory's is not.
    lines += [f"base_model: {recipe.init.model}"] if _on_hub(recipe) else []
    return "\n".join(["---", *lines, "---"])


def _on_hub(recipe: Recipe) -> bool:
    name = recipe.init.model
    return recipe.init.config is None and name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _base(recipe: Recipe) -> str:
    if recipe.init.config is not None:
        return "random weights"
    if recipe.init.model == "mini":
        return "jina-jax-mini (bundled with jina_jax)"
    return recipe.init.model if _on_hub(recipe) else f"the model in `{Path(recipe.init.model).name}`"


def _what(recipe: Recipe, config: Config) -> str:
    sizes = {path: int(np.prod(shape)) for path, shape in layouts.parameter_shapes(config).items()}
    total = sum(sizes.values())
    lora = sum(size for path, size in sizes.items() if "lora" in path and not path.startswith("pooler"))
    shape = f"{config.num_hidden_layers} layers of width {config.hidden_size}, {total:,} parameters"
    if recipe.stage != "adapter":
        return f"All parameters were trained, starting from {_base(recipe)}. The model has {shape}."
    trains = recipe.adapters.trains
    count = lora // len(config.tasks) * (1 if recipe.adapters.shared else len(trains))
    shared = ", which are one and the same," if recipe.adapters.shared and len(trains) > 1 else ""
    adapters = f"The low-rank adapter{'s' * (len(trains) > 1)} {_names(trains)}{shared} of rank {config.lora_rank}"
    were = "were" if len(trains) > 1 else "was"
    return (
        f"{adapters} {were} trained ({count:,} parameters) on {_base(recipe)}, which has {shape}, and whose backbone "
        "and other adapters are untouched."
    )


def _use(recipe: Recipe, config: Config) -> str:
    trains = recipe.adapters.trains if recipe.stage == "adapter" else ()
    task = f', task="{trains[0]}"' if trains else ""
    other = f'passages = embedder.encode(["a passage"], task="{trains[1]}")\n' if len(trains) > 1 else ""
    smallest = min(config.matryoshka_dimensions, default=config.hidden_size)
    merge = f"python -m convert merge DIRECTORY OUTPUT --task {trains[0]}  # one adapter folded in\n" if trains else ""
    lines = [
        "DIRECTORY is where this file is; `pip install jina-jax`.",
        "```python\n"
        "import jina_jax\n\n"
        'embedder = jina_jax.Embedder.load("DIRECTORY")\n'
        f'vectors = embedder.encode(["a text", "another"]{task}, dimensions={smallest})  # or without dimensions=\n'
        f"{other}"
        'model, variables = jina_jax.load("DIRECTORY")  # for your own jit and grad\n```',
        "It is in the layout of jina-embeddings-v3-hf. To have it in others:",
        "```bash\n"
        "python -m convert to-torch DIRECTORY OUTPUT --layout original  # that of jina-embeddings-v3\n"
        "python -m convert to-jax DIRECTORY OUTPUT  # jina_jax's own\n"
        f"{merge}```",
    ]
    if trains:
        lines += [
            "With sentence-transformers and PEFT, an adapter at a time (its prompt is then yours to put before texts):",
            "```python\n"
            "from sentence_transformers import SentenceTransformer\n\n"
            'model = SentenceTransformer("DIRECTORY")  # the backbone\n'
            f'model[0].auto_model.load_adapter("DIRECTORY/{peft.folder_name(trains[0])}")\n```',
        ]
    if config.tasks:
        rows = [
            (f"`{name}`", f'"{prompt}"' if prompt else "none", "yes" if name in trains else "no")
            for name, prompt in zip(config.tasks, config.prompts, strict=True)
        ]
        lines.append(_table(("task", "prompt, put before texts", "trained here"), rows))
    return "\n\n".join(lines)


def _evaluation(results: Mapping[str, Any]) -> str:
    """The main metric of every task at every size, before and after."""
    moments = [name for name in ("before", "after") if results.get(name)]
    if not moments:
        return "Nothing was measured."
    # Sizes are numbers, but strings once JSON had them.
    found = {
        moment: {
            task: (one["main"], {int(dim): value for dim, value in one["metrics"][one["main"]].items()})
            for task, one in results[moment].items()
        }
        for moment in moments
    }
    dims = sorted({dim for tasks in found.values() for _, values in tasks.values() for dim in values})
    rows = []
    for task in dict.fromkeys(task for tasks in found.values() for task in tasks):
        given = [(moment, *found[moment][task]) for moment in moments if task in found[moment]]
        for moment, main, values in given:
            rows.append((task, main, moment, *(f"{values[dim]:.4f}" if dim in values else "" for dim in dims)))
        if len(given) == 2:
            (_, main, old), (_, _, new) = given
            changes = (f"{new[dim] - old[dim]:+.4f}" if dim in old and dim in new else "" for dim in dims)
            rows.append((task, main, "change", *changes))
    table = _table(("task", "metric", "", *map(str, dims)), rows)
    return (
        f"On held-out records, at each size that embeddings were cut to; all metrics are in `training.json`.\n\n{table}"
    )


def _data(recipe: Recipe, facts: Mapping[str, Any]) -> str:
    rows = [
        (one.name, Path(one.path).name, one.kind or "", one.lang or "", _loss(one), one.license or "not given")
        for one in recipe.datasets
    ]
    table = _table(("name", "file", "kind", "language", "loss", "licence"), rows)
    lines = [line for line in facts.get("data", ()) if line.strip()]
    left = f"\n\nLeft out: {', '.join(recipe.data.exclude)}." if recipe.data.exclude else ""
    return table + left + ("\n\n```\n" + "\n".join(lines) + "\n```" if lines else "")


def _loss(dataset: Dataset) -> str:
    name = dataset.loss or DEFAULT_LOSS.get(dataset.kind or "")
    return _LOSS_NAMES.get(name or "", "")


def _training(recipe: Recipe, config: Config, facts: Mapping[str, Any]) -> str:
    phases = _table(
        ("phase", "steps", "batch", "tokens of a text", "highest learning rate", "τ"),
        [(p.name, p.steps, p.batch, p.max_length, f"{p.lr:.3g}", f"{p.tau:g}") for p in recipe.phases],
    )
    optim, loss = recipe.optim, recipe.loss
    warmup = f"{optim.warmup:.0%} of each phase" if optim.warmup < 1 else f"{optim.warmup:g} steps"
    lines = [
        f"optimizer: AdamW, b1 {optim.b1:g}, b2 {optim.b2:g}, eps {optim.eps:g}, weight decay {optim.weight_decay:g}, "
        f"gradients clipped at {optim.clip}",
        f"schedule: {optim.schedule}, after a warmup of {warmup}; anew in each phase",
        f"Matryoshka sizes: {_sizes(loss.dims)}",
        f"false negatives: {loss.false_negatives}; hard negatives of a record: {recipe.data.negatives} at most",
    ]
    if recipe.stage == "adapter":
        lines.append(
            f"adapters: rank {config.lora_rank}, alpha {config.lora_alpha:g}, dropout {recipe.adapters.dropout:g}, "
            f"start: {recipe.adapters.start}"
        )
    lines += [
        f"types: {recipe.dtype} activations, {recipe.backbone_dtype} frozen weights; rotary base {config.rope_base:g}",
        f"seed: {recipe.seed}",
        f"steps done: {facts.get('steps', recipe.steps)} in {_duration(float(facts.get('seconds', 0)))}",
        f"plan of the batches: {', '.join(one[:16] for one in facts.get('plans', ()))}",
        f"versions: {', '.join(f'{name} {number}' for name, number in facts.get('versions', {}).items())}",
    ]
    told = "\n".join(f"- {line}" for line in lines)
    command = f"\n\n```bash\n{facts['command']}\n```" if facts.get("command") else ""
    return f"{phases}\n\n{told}\n\nThe whole recipe is in `recipe.json`.{command}"


def _sizes(dims: Sequence[int] | None) -> str:
    return "full size alone" if dims is None else ", ".join(map(str, dims))


def _names(tasks: Iterable[str]) -> str:
    return " and ".join(f"`{task}`" for task in tasks)


def _duration(seconds: float) -> str:
    minutes, hours = divmod(round(seconds), 60)[0], round(seconds) // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {round(seconds) % 60} s" if minutes else f"{round(seconds)} s"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
