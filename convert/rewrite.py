"""From one layout to another, and from a model with adapters to one that has an adapter folded in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import jina_jax
from convert.pickles import readable
from convert.report import UsageError
from jina_jax.checkpoint import TOKENIZER_FILES, flatten
from jina_jax.model import count_parameters
from jina_jax.tensors import TensorFiles

_SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def rewrite(source: str, output: Path, layout: str, dtype: str = "keep") -> None:
    """Write a checkpoint in another layout, read it back, and say what was done.

    Args:
        source: A directory in any layout, with safetensors or `.bin` files, or a name on the hub.
        output: The directory to create.
        layout: "own", "orbax", "original" or "hf".
        dtype: "float32", "bfloat16", or "keep": the type of the stored tensors, or float32 if there are several.

    Raises:
        UsageError: If the output exists, or the layout cannot hold this model.
        CheckpointError: If the source is not a whole checkpoint.
        RuntimeError: If what was written reads back as something else.
    """
    _refuse_existing(output)
    with readable(source, beside=output) as directory:
        stored = stored_dtype(directory)
        model, variables = jina_jax.load(directory, param_dtype=stored if dtype == "keep" else dtype)
        if layout == "original" and not model.config.tasks:
            raise UsageError(f"{source} has no adapters, and the original layout needs some; use --layout hf")
        jina_jax.save(output, model, variables, layout=layout, tokenizer=directory)
        left_out = _left_out(directory)
    held = flatten(variables)["embed/words/embedding"].dtype
    change = f", rounded from {stored}" if held not in (stored, jnp.float32) else ""
    _describe(output, layout, f"{held}{change}", model, variables)
    if left_out:
        print(f"left out: {left_out} tensors of the masked-language-model head")
    _read_back(output, model, variables, "the rounded ones" if change else "those of the source")


def merge(source: str, output: Path, task: str, layout: str = "own", dtype: str = "float32") -> None:
    """Fold one adapter into the weights and write the result, a model without adapters.

    Args:
        source: As in `rewrite`.
        output: The directory to create.
        task: The adapter.
        layout: "own" or "hf" (without adapter folders; the original layout cannot be without adapters).
        dtype: As in `rewrite`. The sums are rounded to it once; float32 is the default because a sum of two
            bfloat16 numbers is rarely one.

    Raises:
        UsageError: If the output exists, or there is no such task.
        CheckpointError: If the source is not a whole checkpoint.
        RuntimeError: If what was written reads back as something else.
    """
    _refuse_existing(output)
    with readable(source, beside=output) as directory:
        held = stored_dtype(directory) if dtype == "keep" else jnp.dtype(dtype)
        model, variables = jina_jax.load(directory, param_dtype=jnp.float32)
        config = model.config
        if task not in config.tasks:
            known = ", ".join(config.tasks) or "none, it has no adapters"
            raise UsageError(f"unknown task {task!r}; {source} has: {known}")
        prompt = config.prompts[config.task_id(task)]
        # Rounding comes last, so that the adapter is added to the weights as they are.
        variables = jina_jax.merge(variables, task, config)
        variables = jax.tree.map(lambda leaf: leaf.astype(held), variables)
        model = jina_jax.Model(config.replace(tasks=(), prompts=(), param_dtype=held))
        jina_jax.save(output, model, variables, layout=layout, tokenizer=directory)
    _describe(output, layout, str(held), model, variables)
    print("use it with task=None" + (f"; every text of this task begins with {prompt!r}" if prompt else ""))
    _read_back(output, model, variables, "the merged ones")


def stored_dtype(directory: Path) -> np.dtype:
    """Type in which a checkpoint is stored; float32, which holds the values of all, if there are several.

    Args:
        directory: A checkpoint in any layout, with safetensors files.

    Returns:
        The type.

    Raises:
        UsageError: If the files hold numbers of a type that parameters cannot have.
    """
    if (directory / "orbax").is_dir():
        with ocp.StandardCheckpointer() as checkpointer:
            metadata = checkpointer.metadata((directory / "orbax").absolute())
        tree = getattr(metadata, "item_metadata", metadata)
        found = {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}
    else:
        adapters = sorted(file.parent for file in directory.glob("*/adapter_config.json"))
        found = set()
        for files in (TensorFiles(directory), *(TensorFiles(folder, "adapter_model") for folder in adapters)):
            with files.open(list(files.shapes)) as tensors:
                found |= {tensor.get_dtype() for tensor in tensors.values()}
        found = {_SAFETENSORS_DTYPES.get(name, name) for name in found if not name.startswith(("I", "U", "BOOL"))}
    unknown = sorted(found - set(_SAFETENSORS_DTYPES.values()))
    if unknown or not found:
        raise UsageError(f"{directory} holds {', '.join(unknown) or 'no numbers'}; say --dtype float32 or bfloat16")
    return jnp.dtype(found.pop() if len(found) == 1 else jnp.float32)


def _refuse_existing(output: Path) -> None:
    """Refuse before the source is read, which takes a while."""
    if output.exists():
        raise UsageError(f"{output} exists; delete it or choose another name")


def _describe(output: Path, layout: str, dtype: str, model: jina_jax.Model, variables: Mapping[str, Any]) -> None:
    tasks = ", ".join(model.config.tasks) or "no adapters"
    tokenizer = [name for name in TOKENIZER_FILES if (output / name).exists()]
    print(f"wrote {output}: {layout} layout, {count_parameters(variables):,} parameters in {dtype}; {tasks}")
    print(f"tokenizer: {', '.join(tokenizer) or 'none in the source'}")


def _left_out(directory: Path) -> int:
    if (directory / "orbax").is_dir():
        return 0
    return sum("lm_head." in name for name in TensorFiles(directory).shapes)


def _read_back(output: Path, model: jina_jax.Model, variables: Mapping[str, Any], whose: str) -> None:
    """Load what was written and compare it with what was to be written, bit for bit."""
    expected = flatten(variables)
    again, loaded = jina_jax.load(output, param_dtype=expected["embed/words/embedding"].dtype)
    found = flatten(loaded)
    wrong = [path for path in expected if path not in found or not _same_bits(expected[path], found[path])]
    wrong += sorted(found.keys() - expected.keys())
    ours, theirs = (vars(config.replace(param_dtype=jnp.float32)) for config in (model.config, again.config))
    wrong += [f"config.{name} ({ours[name]!r} became {theirs[name]!r})" for name in ours if ours[name] != theirs[name]]
    if wrong:
        raise RuntimeError(f"{output} does not read back as what was written; these differ: {', '.join(wrong)}")
    print(f"read back: the configuration and all {len(expected)} parameters equal {whose}, bit for bit")


def _same_bits(one: jax.Array, other: jax.Array) -> bool:
    a, b = np.asarray(one), np.asarray(other)
    bits = {2: np.uint16, 4: np.uint32}[a.dtype.itemsize]
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a.view(bits), b.view(bits))
