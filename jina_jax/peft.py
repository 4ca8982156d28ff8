"""Adapters as PEFT stores them, one folder per task, and our stack of all of them."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange

from jina_jax import layouts
from jina_jax.config import TASKS, Config, read_json
from jina_jax.tensors import TensorFiles, match

Stack = dict[str, np.ndarray]

# Options of PEFT that change what an adapter computes; only these values are the plain LoRA of this model.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
    "layers_to_transform": (None,),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "target_parameters": (None, []),
}
_TARGETS = (
    "word_embeddings",
    "token_type_embeddings",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "fc1",
    "fc2",
    "dense",
)
_QKV_A = "layers/attention/qkv/lora_a"


def folder_name(task: str) -> str:
    """Folder of a task's adapter: "text-matching" is in text_matching."""
    return re.sub(r"[^A-Za-z0-9_]", "_", task)


def adapter_config(config: Config) -> dict[str, Any]:
    """Content of the published adapter_config.json."""
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": list(_TARGETS),
    }


def find(directory: Path, tasks: tuple[str, ...]) -> dict[str, Path]:
    """Adapter folders of a checkpoint.

    Args:
        directory: The checkpoint.
        tasks: Tasks that its config.json names; their folders must be there.

    Returns:
        Folder by task: those named, then any other folder with an adapter, under the folder's own name.
    """
    names = {folder_name(task): task for task in (tasks or TASKS)}
    there = sorted(file.parent.name for file in directory.glob("*/adapter_config.json"))
    order = list(names) if tasks else [name for name in names if name in there]
    return {names.get(name, name): directory / name for name in order + [name for name in there if name not in names]}


def read(folders: Mapping[str, Path], config: Config, prompts: Mapping[str, str]) -> tuple[Config, Stack, list[str]]:
    """Read adapters and add them to a model's tasks.

    Ranks may differ (shorter ones are filled up with zeros, which changes nothing), and so may scales (the
    difference goes into B).

    Args:
        folders: Adapter folder by task.
        config: Configuration of what is there so far: a bare backbone, or one with stacked adapters.
        prompts: Prompts of tasks that have one.

    Returns:
        The configuration with the tasks added; the new adapters by parameter, float32 or as stored, with the axes
        of `layouts.PARAMETERS`; and every problem found.
    """
    problems: list[str] = []
    read_ones: list[tuple[Stack, float]] = []
    for task, folder in folders.items():
        if task in config.tasks:
            problems.append(f"task {task!r} from {folder} exists already")
        elif not (folder / "adapter_config.json").exists():
            problems.append(f"- {folder.name}/: folder of the adapter for {task!r}, not in checkpoint")
        else:
            stack, scale, wrong = _read_one(folder, config)
            read_ones.append((stack, scale))
            problems += wrong
    if problems or not read_ones:
        return config, {}, problems

    scale = config.lora_scale if config.tasks else read_ones[0][1]
    ranks = [stack[_QKV_A].shape[-1] for stack, _ in read_ones] + ([config.lora_rank] if config.tasks else [])
    rank = max(ranks)
    result: Stack = {}
    for path in read_ones[0][0]:
        axes = layouts.PARAMETERS[path].split()
        at = axes.index("K")
        arrays = []
        for stack, own_scale in read_ones:
            array = stack[path]
            if path.endswith("lora_b") and own_scale != scale:
                array = array.astype(np.float32) * np.float32(own_scale / scale)
            arrays.append(pad_rank(np.expand_dims(array, at), axes, rank))
        result[path] = np.concatenate(arrays, axis=at)
    config = config.replace(
        tasks=config.tasks + tuple(folders),
        prompts=config.prompts + tuple(prompts.get(task, "") for task in folders),
        lora_rank=rank,
        lora_alpha=scale * rank,
    )
    return config, result, []


def pad_rank(array: np.ndarray, axes: list[str], rank: int) -> np.ndarray:
    """Fill the rank axis up with zeros."""
    at = axes.index("R")
    return np.pad(array, [(0, rank - size if i == at else 0) for i, size in enumerate(array.shape)])


def _read_one(folder: Path, config: Config) -> tuple[Stack, float, list[str]]:
    """One adapter: its parameters without the K axis, its scale, and every problem."""
    raw = read_json(folder / "adapter_config.json")
    problems = [
        f"{folder.name}/adapter_config.json: {key!r} = {raw[key]!r}, but this model needs {values[0]!r}"
        for key, values in _PLAIN.items()
        if key in raw and raw[key] not in values
    ]
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        problems.append(f"{folder.name}/adapter_config.json: r = {rank!r}, lora_alpha = {alpha!r} are not numbers")
        return {}, 0.0, problems
    if problems:
        return {}, 0.0, problems
    scale = float(alpha) / (math.sqrt(rank) if raw.get("use_rslora") else rank)

    files = TensorFiles(folder, "adapter_model")
    present = {layouts.canonical("hf-adapter", name) for name in files.shapes}
    rules = [
        rule
        for rule in layouts.HF_ADAPTER
        if (config.pooler or not rule.target.startswith("pooler"))
        and _is_target(rule, raw.get("target_modules"), present)
    ]
    config = config.replace(lora_rank=rank)
    matches, wrong = match("hf-adapter", rules, config, files.shapes)
    problems += [f"{line} ({folder.name}/)" for line in wrong]
    if problems:
        return {}, scale, problems

    size, axes_of, stack = config.axis_sizes, _stack_axes(config), {}
    with files.open(list(files.shapes)) as tensors:
        dtype = tensors[matches[0].name][...].dtype
        for path, axes in axes_of.items():
            stack[path] = np.zeros([size[axis] for axis in axes.split()], dtype)
        for found in matches:
            index, axes = layouts.region(axes_of[found.rule.target], found.fixed)
            sizes = layouts.joined_sizes(found.rule.axes, size)
            tensor = rearrange(tensors[found.name][...], f"{found.rule.axes} -> {axes}", **sizes)
            stack[found.rule.target][index] = tensor
    return _share_a(stack, {rule.at["J"] for rule in rules if rule.target == _QKV_A}), scale, []


def _stack_axes(config: Config) -> dict[str, str]:
    """Axes of one adapter's parameters: no K, and an A for each of q, k and v."""
    axes = {
        path: layouts.region(path, {"K": 0})[1]
        for path in layouts.PARAMETERS
        if "lora" in path and (config.pooler or not path.startswith("pooler"))
    }
    return axes | {_QKV_A: "L J D R"}


def _is_target(rule: layouts.Rule, targets: Any, present: set[str]) -> bool:
    """Whether an adapter covers a module; those that it leaves out count as zero."""
    module = rule.source.split(".lora_")[0].replace("out_proj", "o_proj")
    if isinstance(targets, list):
        return any(module == target or module.endswith(f".{target}") for target in targets)
    return rule.source.replace("{L}", "0") in present  # a pattern: what the file has is what it covers


def _share_a(stack: Stack, covered: set[int]) -> Stack:
    """One A for q, k and v together: the common one, or all three side by side at three times the rank."""
    a, b = stack[_QKV_A], stack["layers/attention/qkv/lora_b"]  # L J D R, L R J N H
    first = min(covered, default=0)
    if all(np.array_equal(a[:, first], a[:, j]) for j in covered):
        return stack | {_QKV_A: a[:, first]}
    rank = a.shape[-1]
    wide_b = np.zeros((b.shape[0], 3 * rank, *b.shape[2:]), b.dtype)
    for j in range(3):
        wide_b[:, j * rank : (j + 1) * rank, j] = b[:, :, j]
    return stack | {_QKV_A: rearrange(a, "L J D R -> L D (J R)"), "layers/attention/qkv/lora_b": wide_b}
