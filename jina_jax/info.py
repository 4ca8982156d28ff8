"""What a model is, told by its files' headers alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from jina_jax import hub
from jina_jax.checkpoint import detect_layout, holds_pooler
from jina_jax.config import TASKS, Config, read_json
from jina_jax.layouts import parameter_shapes
from jina_jax.tensors import TensorFiles

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # as safetensors spells them


def describe(directory: Path, name: str) -> dict[str, Any]:
    """What there is to know about a model without reading its weights.

    Args:
        directory: Its directory.
        name: What the user called it.

    Returns:
        Facts by name, fit for JSON.

    Raises:
        CheckpointError: If the files are damaged.
        ValueError: If config.json is not one of this model.
    """
    config = Config.from_json(directory / "config.json")
    layout, stored = "orbax", None
    if not (directory / "orbax").is_dir():
        files = TensorFiles(directory)
        layout = detect_layout(read_json(directory / "config.json"), files.shapes)
        with files.open(list(files.shapes)) as tensors:
            found = sorted({tensor.get_dtype() for tensor in tensors.values()})
            stored = ", ".join(_DTYPES.get(dtype, dtype) for dtype in found)
        config = config.replace(pooler=holds_pooler(config, layout, files.shapes))
    sizes = {path: int(np.prod(shape)) for path, shape in parameter_shapes(config).items()}
    licence = None
    if name in hub.BUNDLED:
        licence = "MIT (distilled from multilingual-e5-small), see NOTICE"
    elif name.startswith("jinaai/") or (config.vocab_size, config.tasks) == (250_002, TASKS):
        licence = "the weights that Jina AI published are CC BY-NC 4.0: not for commercial use"
    return {
        "model": name,
        "path": str(directory),
        "note": hub.BUNDLED_NOTE if name in hub.BUNDLED else None,
        "licence": licence,
        "layout": layout,
        "stored_as": stored,
        "parameters": sum(sizes.values()),
        "of_adapters": sum(size for path, size in sizes.items() if "lora" in path),
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "mlp_width": config.intermediate_size,
        "vocabulary": config.vocab_size,
        "max_tokens": config.max_tokens,
        "dimensions": config.truncate_dim or config.hidden_size,
        "trained_for": list(config.matryoshka_dimensions),
        "adapter_rank": config.lora_rank if config.tasks else None,
        "tasks": dict(zip(config.tasks, config.prompts, strict=True)),
    }


def readable(facts: dict[str, Any]) -> str:
    """The facts of `describe` in lines for people.

    Args:
        facts: What `describe` returned.

    Returns:
        Lines, without a final newline.
    """
    rows = [
        (key.replace("_", " "), _value(value)) for key, value in facts.items() if key != "tasks" and value is not None
    ]
    width = max(map(len, facts["tasks"]), default=0)
    for index, (task, prompt) in enumerate(facts["tasks"].items()):
        rows.append(("" if index else "tasks", f"{task:<{width}}  {json.dumps(prompt) if prompt else '(no prompt)'}"))
    return "\n".join(f"{key:<14}{value}" for key, value in rows)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
