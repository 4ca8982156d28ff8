"""What a loaded model holds, tensor by tensor as a layout stores it, and whether that is what the files hold."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jina_jax import Config, layouts, peft
from jina_jax.checkpoint import as_stored, flatten
from jina_jax.config import read_json
from jina_jax.tensors import TensorFiles

ROWS_BYTES = 64 << 20
# Both spellings of the attention of the -hf layout; a file has one of them.
BASES = {
    "original": layouts.ORIGINAL,
    "hf": layouts.HF + tuple(rule for rule in layouts.HF_SPLIT if rule not in layouts.HF),
}


def compare(directory: Path, layout: str, config: Config, variables: Mapping[str, Any]) -> tuple[int, int, list[str]]:
    """Compare every stored tensor with what is held, bit for bit, in pieces of bounded size.

    This runs the tables from the parameters back to the files, the other way round than loading did.

    Args:
        directory: The checkpoint.
        layout: Its layout, "original" or "hf".
        config: Configuration of the loaded model.
        variables: Its variables, float32.

    Returns:
        How many tensors are equal; how many were not compared, because they are held in another shape (adapters of
        several ranks or scales); and the names of those that differ or are not held at all.
    """
    flat = flatten(variables)
    jobs: list[tuple[str, TensorFiles, Sequence[layouts.Rule], dict[str, int]]]
    jobs = [(layout, TensorFiles(directory), BASES[layout], {})]
    equal, others, wrong = 0, 0, []
    for task, folder in peft.find(directory, config.tasks).items() if layout == "hf" else ():
        files = TensorFiles(folder, "adapter_model")
        if _held_as_stored(folder, config):
            jobs.append(("hf-adapter", files, layouts.HF_ADAPTER, {"K": config.tasks.index(task)}))
        else:
            others += len(files.shapes)
    for spelling, files, table, at in jobs:
        stored = {layouts.canonical(spelling, name): name for name in files.shapes}
        stored = {
            name: own
            for name, own in stored.items()
            if not any(re.fullmatch(pattern, name) for pattern in layouts.IGNORED[spelling])
        }
        for canonical, held in as_stored(flat, config, table, at):
            name = stored.pop(canonical, None)
            if name is not None and _equal(files, name, held):
                equal += 1
            elif name is not None:
                wrong.append(name)
        wrong += stored.values()
    return equal, others, wrong


def fingerprints(variables: Mapping[str, Any], config: Config, names: Sequence[str]) -> dict[str, str]:
    """Sha256 of some tensors, over the bytes of their float32 values.

    Args:
        variables: Variables of the model.
        config: Its configuration.
        names: Names as in the -hf layout, in any of its spellings, with q, k and v apart.

    Returns:
        The sha256 by name; names that the model does not have are left out.
    """
    wanted = {layouts.canonical("hf", name): name for name in names}
    found = {}
    for canonical, held in as_stored(flatten(variables), config, layouts.HF_SPLIT):
        if canonical in wanted:
            found[wanted[canonical]] = hashlib.sha256(np.ascontiguousarray(held, np.float32).data).hexdigest()
    return found


def _held_as_stored(folder: Path, config: Config) -> bool:
    """Whether an adapter has the rank and scale of the whole stack; others are padded and rescaled."""
    raw = read_json(folder / "adapter_config.json")
    plain = raw["r"] == config.lora_rank and not raw.get("use_rslora")
    return plain and math.isclose(raw["lora_alpha"], config.lora_alpha)


def _equal(files: TensorFiles, name: str, held: np.ndarray) -> bool:
    """Whether a stored tensor, as float32, has the very bits of the one held."""
    if files.shapes[name] != held.shape:
        return False
    rows = max(1, ROWS_BYTES // (4 * math.prod(held.shape[1:])))
    with files.open([name]) as tensors:
        for start in range(0, held.shape[0], rows):
            piece = slice(start, min(start + rows, held.shape[0]))
            ours = np.ascontiguousarray(held[piece], np.float32)
            theirs = np.ascontiguousarray(tensors[name][piece]).astype(np.float32)
            if not np.array_equal(ours.view(np.uint32), theirs.view(np.uint32)):
                return False
    return True
