"""Checks against what others have published about the released weights: values, ids and sha256.

The data is in `anchors.json`, with its sources. A checkpoint that is not the released one is not held to it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert import bits
from convert.report import Check, same, skipped, within
from jina_jax import Model
from jina_jax.tokenizer import load_tokenizer

Anchors = Mapping[str, Any]


def read() -> dict[str, Any]:
    """The published anchors."""
    content: dict[str, Any] = json.loads(Path(__file__).with_name("anchors.json").read_text(encoding="utf-8"))
    return content


def check(directory: Path, model: Model, variables: Mapping[str, Any], anchors: Anchors) -> Iterator[Check]:
    """Hold a checkpoint to what was published, if it is the released one.

    It is if its config.json or model.safetensors is the published file (every other published file that is there
    must then be the published one, too), or if most of the base weights of which a sha256 is known agree: a
    damaged file must still be recognised, while a model that has an adapter folded in shares a tensor or two.

    Args:
        directory: The checkpoint.
        model: The loaded model.
        variables: Its variables, float32.
        anchors: What `read` returns.

    Yields:
        The checks; one that says why there are none if it is another checkpoint.
    """
    files, tensors = anchors["files"]["sha256"], anchors["tensors"]["sha256"]
    hashes = {name: _sha256(directory / name) for name in files if (directory / name).is_file()}
    prints = bits.fingerprints(variables, model.config, list(tensors))
    is_copy = any(name in hashes and hashes[name] == files[name] for name in ("config.json", "model.safetensors"))
    agreeing = sum(prints.get(name) == sha256 for name, sha256 in tensors.items())
    if not is_copy and 2 * agreeing <= len(tensors):
        yield skipped("published values and sha256", "do not apply: these are not the released weights")
        return

    for name, sha256 in files.items() if is_copy else ():
        label = f"sha256 of {name}"
        yield same(label, hashes[name] == sha256) if name in hashes else skipped(label, "not there")
    if not is_copy:
        yield skipped("published sha256 of files", "do not apply: written anew, or another layout")
    for name, sha256 in tensors.items():
        yield same(f"sha256 of {name}", prints.get(name) == sha256)
    for number, case in enumerate(anchors["values"], 1):
        yield from _check_ids(f"published token ids of text {number}", directory, case)
        yield from _check_values(f"published values {number}", model, variables, case)


def _check_ids(label: str, directory: Path, case: Mapping[str, Any]) -> Iterator[Check]:
    """The ids of a text, where both the text and a tokenizer are known."""
    if "text" not in case:
        return
    try:
        tokenizer = load_tokenizer(directory)
    except FileNotFoundError:
        yield skipped(label, "no tokenizer there")
        return
    yield same(label, tokenizer.encode(case["text"]).ids.tolist() == case["input_ids"])


def _check_values(label: str, model: Model, variables: Mapping[str, Any], case: Mapping[str, Any]) -> Iterator[Check]:
    """A corner of the hidden states, for no task and every task, always computed in float32."""
    model = Model(model.config.replace(dtype=jnp.float32))
    ids = jnp.asarray([case["input_ids"]], jnp.int32)
    mask = jnp.asarray([case.get("attention_mask", [1] * ids.shape[1])], jnp.int32)
    apply = jax.jit(model.apply)
    for task, values in case["hidden"].items():
        name = f"{label}, {'no task' if task == 'none' else task}"
        if task != "none" and task not in model.config.tasks:
            yield skipped(name, "no such adapter there")
            continue
        index = None if task == "none" else jnp.asarray([model.config.task_id(task)], jnp.int32)
        hidden = np.asarray(apply(variables, ids, mask, index).hidden)
        ours, theirs = hidden[0, slice(*case["rows"]), slice(*case["columns"])], np.asarray(values)
        # The published test allows this much absolutely and as much again relative to the value.
        yield within(name, float(np.max(np.abs(ours - theirs) / (1 + np.abs(theirs)))), case["tolerance"])


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
