"""Ours against PyTorch on one checkpoint: its weights bit for bit, then its outputs, for every task.

The original layout is judged by `convert.reference`, the -hf layout by `transformers` and `peft`.
Axes: B rows, T tokens, D width, K adapters.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

import jina_jax
from convert import anchors as published
from convert import bits, reference
from convert.hf_reference import load_hf, run_hf
from convert.pickles import readable
from convert.report import Check, UsageError, skipped, within
from jina_jax import Config
from jina_jax.config import OWN_MODEL_TYPE, read_json
from jina_jax.tensors import TensorFiles

# Largest difference of any component, of hidden states and of embeddings. The judge runs in float64, which is the
# truth for this purpose: two float32 implementations that are both right may stand on opposite sides of it.
LIMITS = {"float32": (1e-5, 1e-6), "bfloat16": (0.0, 0.0)}
# How rounding adds up depends on the weights: on 24 random layers PyTorch itself is 1.2e-5 off in float32 for the
# shortest texts. So ours may be this many times as far off as PyTorch is, at worst, in the same type.
TIMES_PYTORCH = {"float32": 3.0, "bfloat16": 1.5}
MIXED = "mixed tasks"


class Batch(NamedTuple):
    """What both sides are run on.

    Attributes:
        ids: Int32 [B, T].
        mask: Bool [B, T], right-padded; one row's first token is masked as well.
        mixed: Int32 [B], an adapter for each row, -1 for none.
    """

    ids: np.ndarray
    mask: np.ndarray
    mixed: np.ndarray


Outputs = dict[str | None, tuple[np.ndarray, np.ndarray]]  # hidden [B, T, D] and embeddings [B, D] by task


def verify(
    source: str | Path,
    *,
    tokens: int = 64,
    dtype: str = "float32",
    fast: bool = False,
    anchors: published.Anchors | None = None,
) -> Iterator[Check]:
    """Compare ours with PyTorch on a checkpoint, and with what was published if it is the released one.

    Weights are held by one framework at a time.

    Args:
        source: A directory of the original or the -hf layout, or its name on the hub.
        tokens: Length of the longest row.
        dtype: Type in which ours computes, "float32" or "bfloat16"; the weights are held in float32.
        fast: Whether the judge runs in float32 alone, in less time and memory, with limits twice as wide.
        anchors: What was published; None means `anchors.json`.

    Yields:
        The checks.

    Raises:
        UsageError: If PyTorch has no judge for this layout, or the rows are too short or too long.
        CheckpointError: If this is not a whole checkpoint.
    """
    with readable(source) as directory:
        layout = judged_layout(directory)
        model, variables = jina_jax.load(directory, dtype=dtype, param_dtype=jnp.float32)
        config = model.config
        if fast and dtype != "float32":
            raise UsageError(f"--dtype {dtype} is judged by its distance from float64; leave --fast out")
        if not 3 <= tokens <= config.max_tokens:
            raise UsageError(f"--tokens {tokens} must be from 3 to {config.max_tokens}, the model's longest input")
        equal, others, wrong = bits.compare(directory, layout, config, variables)
        total = equal + len(wrong)
        yield Check("stored tensors held, bit for bit", f"{equal} of {total}", f"{total}", not wrong)
        for name in wrong[:5]:
            yield skipped("", f"differs: {name}")
        if others:
            yield skipped("adapter tensors of another rank or scale", f"{others}, held padded: judged by the outputs")
        yield from published.check(directory, model, variables, published.read() if anchors is None else anchors)

        batch = draw_batch(config, tokens)
        ours = run_ours(model, variables, batch)
        del model, variables
        gc.collect()
        if fast:  # each side may be off by a limit
            (judge,) = run_reference(layout, directory, config, batch, [torch.float32])
            yield from compare(ours, judge, batch.mask, [2 * limit for limit in LIMITS[dtype]])
            return
        judge, rounded = run_reference(layout, directory, config, batch, [torch.float64, getattr(torch, dtype)])
        worst = np.max([differences(rounded, judge, batch.mask, task) for task in judge], axis=0)
        yield skipped(f"PyTorch itself, {dtype} against float64", "hidden {:.2e}, embeddings {:.2e}".format(*worst))
        limits = [max(limit, TIMES_PYTORCH[dtype] * own) for limit, own in zip(LIMITS[dtype], worst, strict=True)]
        yield from compare(ours, judge, batch.mask, limits)


def judged_layout(directory: Path) -> str:
    """Which of the two public layouts a checkpoint has.

    Args:
        directory: The checkpoint.

    Returns:
        "original" or "hf".

    Raises:
        UsageError: If it is neither, so that no PyTorch model reads it.
        ModuleNotFoundError: If the packages that read it are not installed.
    """
    kind = read_json(directory / "config.json").get("model_type")
    own = kind == OWN_MODEL_TYPE
    if not own and any(".parametrizations." in name for name in TensorFiles(directory).shapes):
        return "original"
    if kind == "jina_embeddings_v3":
        for package in ("transformers", "peft"):  # said now rather than after minutes
            if importlib.util.find_spec(package) is None:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return "hf"
    hint = f"write it in one that it can: python -m convert to-torch {directory} OUTPUT --layout hf"
    raise UsageError(f"{directory} is in {'our own' if own else 'a'} layout, which PyTorch cannot judge; {hint}")


def draw_batch(config: Config, tokens: int) -> Batch:
    """Random rows of several lengths, the same ones for the same sizes.

    Args:
        config: The model's configuration.
        tokens: Length T of the longest row.

    Returns:
        The batch.
    """
    rng = np.random.default_rng(0)
    lengths = np.array([tokens, 3 * tokens // 4, tokens // 2, tokens // 4 + 1, 2, tokens])
    mask = np.arange(tokens)[None] < lengths[:, None]
    ids = np.where(mask, rng.integers(0, config.vocab_size, mask.shape), config.pad_token_id).astype(np.int32)
    mask[-1, 0] = False  # positions count from the row's start, masked or not
    mixed = np.arange(len(lengths), dtype=np.int32) % (len(config.tasks) + 1) - 1
    return Batch(ids, mask, mixed)


def run_ours(model: jina_jax.Model, variables: Mapping[str, Any], batch: Batch) -> Outputs:
    """The JAX model without a task, with each task, and with a task for each row.

    Args:
        model: The model.
        variables: Its variables.
        batch: The rows.

    Returns:
        Hidden states and embeddings, by task; `MIXED` for the mixed batch, if there are adapters.
    """
    apply, config = jax.jit(model.apply), model.config
    tasks: dict[str | None, np.ndarray | None] = {None: None}
    tasks |= {task: config.task_ids([task] * len(batch.ids)) for task in config.tasks}
    if config.tasks:
        tasks[MIXED] = batch.mixed
    outputs: Outputs = {}
    for task, ids in tasks.items():
        out = apply(variables, batch.ids, batch.mask, ids)
        outputs[task] = np.asarray(out.hidden, np.float64), np.asarray(out.embeddings, np.float64)
    return outputs


def run_reference(
    layout: str, directory: Path, config: Config, batch: Batch, dtypes: Sequence[torch.dtype]
) -> Iterator[Outputs]:
    """The PyTorch model on the same rows; it reads the checkpoint by itself, once.

    Args:
        layout: "original" or "hf".
        directory: The checkpoint.
        config: Names the tasks.
        batch: The rows.
        dtypes: Types in which it computes, widest first.

    Yields:
        Outputs as those of `run_ours`, for each type.
    """
    ids, mask = torch.tensor(batch.ids, dtype=torch.int64), torch.tensor(batch.mask)
    forward = _judge(layout, directory)
    for dtype in dtypes:
        outputs: Outputs = {}
        for task in (None, *config.tasks):
            with torch.no_grad():
                hidden = forward(ids, mask, task, dtype)
            wide = hidden.to(torch.promote_types(dtype, torch.float32))
            weights = mask.to(wide.dtype)[:, :, None]
            embeddings = reference.embed((wide * weights).sum(1) / weights.sum(1))
            outputs[task] = hidden.double().numpy(), embeddings.double().numpy()
        if config.tasks:
            # Neither model mixes tasks in one pass: a mixed batch is the rows of the passes of its tasks.
            tasks = [None if index < 0 else config.tasks[index] for index in batch.mixed]
            rows = [(outputs[task][0][row], outputs[task][1][row]) for row, task in enumerate(tasks)]
            outputs[MIXED] = np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows])
        yield outputs


def _judge(layout: str, directory: Path) -> Callable[[Tensor, Tensor, str | None, torch.dtype], Tensor]:
    """The PyTorch model of a layout: ids, mask, a task and a type to hidden states."""
    if layout == "original":
        state, raw = reference.load_state(directory), read_json(directory / "config.json")
        return lambda ids, mask, task, dtype: reference.forward(state, raw, ids, mask, task, dtype=dtype).hidden
    model = load_hf(directory)
    return lambda ids, mask, task, dtype: run_hf(model.to(dtype), ids, mask, task)[0]


def differences(ours: Outputs, theirs: Outputs, mask: np.ndarray, task: str | None) -> tuple[float, float]:
    """The largest difference of hidden states over valid tokens, and of embeddings."""
    (hidden, embeddings), (expected, expected_embeddings) = ours[task], theirs[task]
    return float(np.abs(hidden - expected)[mask].max()), float(np.abs(embeddings - expected_embeddings).max())


def compare(ours: Outputs, theirs: Outputs, mask: np.ndarray, limits: Sequence[float]) -> Iterator[Check]:
    """Hold the largest differences of every task to the limits.

    Args:
        ours: Outputs of `run_ours`.
        theirs: Outputs of `run_reference`.
        mask: Bool [B, T].
        limits: For hidden states, and for embeddings.

    Yields:
        Two checks for every task.
    """
    for task in ours:
        hidden, embeddings = differences(ours, theirs, mask, task)
        yield within(f"hidden, {task or 'no task'}", hidden, limits[0])
        yield within(f"embeddings, {task or 'no task'}", embeddings, limits[1])
