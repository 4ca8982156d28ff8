"""The Hugging Face implementation of jina-embeddings-v3 (`transformers` and `peft`): the second judge.

It reads the `-hf` layouts only; the original layout is judged by `convert.reference`.
Axes: B rows, T tokens, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def load_hf(directory: str | Path) -> Any:
    """Load a native checkpoint with all its adapters, in float32, silently.

    Args:
        directory: `config.json`, `model.safetensors` and one PEFT folder per task.

    Returns:
        A `transformers.JinaEmbeddingsV3Model` in eval mode, adapters disabled; each adapter is named as its
        folder (`retrieval_query`, ...).

    Raises:
        ValueError: if any tensor is missing, unexpected or misshapen. `transformers` itself would only warn
            and leave random weights.
    """
    from transformers import JinaEmbeddingsV3Model

    directory = Path(directory)
    with _quiet():
        model, info = JinaEmbeddingsV3Model.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        _refuse(directory, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
        adapters = sorted(file.parent for file in directory.glob("*/adapter_config.json"))
        for folder in adapters:
            report = model.load_adapter(str(folder), adapter_name=folder.name)
            # transformers 5.23 also reports the adapters loaded before this one as missing; they are intact.
            missing = [key for key in report.missing_keys if folder.name in key.split(".")]
            _refuse(folder, missing, report.unexpected_keys, report.mismatched_keys)
    if adapters:
        model.disable_adapters()
    return model.float().eval()


def run_hf(model: Any, ids: Tensor, mask: Tensor, task: str | None = None) -> tuple[Tensor, Tensor]:
    """Run the native model with one adapter, or with none.

    Args:
        model: from `load_hf`; its active adapter is changed.
        ids: `[B, T]` integers.
        mask: `[B, T]`, nonzero for real tokens.
        task: one task for all rows (the native model cannot mix them), spelt `retrieval.query` or
            `retrieval_query`; None for the bare backbone.

    Returns:
        The last hidden state `[B, T, D]` and the pooler output `[B, D]`.
    """
    if task is not None:
        model.enable_adapters()
        model.set_adapter(task.replace(".", "_").replace("-", "_"))
    elif getattr(model, "peft_config", None):
        model.disable_adapters()
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask)
    return output.last_hidden_state, output.pooler_output


def _refuse(path: Path, missing: Any, unexpected: Any, mismatched: Any) -> None:
    """Raise one error that names every key that did not find its place."""
    groups = {"missing": missing, "unexpected": unexpected, "misshapen": mismatched}
    lines = [f"  {kind}: {key}" for kind, keys in groups.items() for key in sorted(map(str, keys))]
    if lines:
        raise ValueError("\n".join([f"{path} is not a complete native checkpoint:", *lines]))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence progress bars, load reports and the notice of a second adapter; restore the settings after."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute", UserWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
