"""From the tensors of safetensors files to parameters, as the tables of `layouts` say."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from safetensors import SafetensorError, safe_open

from jina_jax import layouts
from jina_jax.config import Config, read_json
from jina_jax.lora import axis_sizes

CHUNK_BYTES = 4 << 20  # small enough for the allocator to reuse, rather than to fault in afresh
TILE = 16  # elements of float32 in a cache line
THREADS = min(8, os.cpu_count() or 1)


class CheckpointError(ValueError):
    """A checkpoint that cannot be this model; the message lists everything that is wrong with it."""


class TensorFiles:
    """The tensors of a directory's safetensors files, read piece by piece from the mapped files.

    Attributes:
        shapes: Shape of every tensor by name.
    """

    def __init__(self, directory: Path, stem: str = "model") -> None:
        self._paths: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in _weight_files(directory, stem):
            with _open(path) as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    self._paths[name] = path
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())

    @contextlib.contextmanager
    def open(self, names: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        """Some tensors, to be sliced; leaving the block unmaps the files, so that their pages stop counting."""
        with contextlib.ExitStack() as stack:
            files = {path: stack.enter_context(_open(path)) for path in {self._paths[name] for name in names}}
            yield {name: files[self._paths[name]].get_slice(name) for name in names}


@dataclasses.dataclass(frozen=True)
class Match:
    """A tensor and where it goes.

    Attributes:
        name: The tensor's name in the file.
        rule: The rule that it follows.
        fixed: Axes of the parameter that are fixed, such as the layer.
    """

    name: str
    rule: layouts.Rule
    fixed: Mapping[str, int]


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter that a model of this configuration has, by path."""
    size = axis_sizes(config)
    return {
        path: tuple(size[axis] for axis in axes.split())
        for path, axes in layouts.PARAMETERS.items()
        if (config.tasks or "lora" not in path)
        and (config.pooler or not path.startswith("pooler"))
        and (config.mlm_head or not path.startswith("mlm_head"))
    }


def match(
    layout: str, rules: Sequence[layouts.Rule], config: Config, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[list[Match], list[str]]:
    """Match a checkpoint's tensors with rules.

    Args:
        layout: Name of the layout, for its spellings.
        rules: What the model needs.
        config: The model's configuration.
        shapes: What the checkpoint has.

    Returns:
        A match for every tensor that is needed, and every problem: missing (-), misshapen (!) and extra (+).
    """
    size, matches, used = axis_sizes(config), [], set()
    missing, misshapen = [], []
    found = {layouts.canonical(layout, name): name for name in shapes}
    for rule in rules:
        shape = tuple(int(np.prod([size[axis] for axis in group])) for group in layouts.groups(rule.axes))
        for layer in range(config.num_hidden_layers) if "{L}" in rule.source else (None,):
            canonical = rule.source.replace("{L}", str(layer))
            used.add(canonical)
            if canonical not in found:
                missing.append(f"- {canonical} {list(shape)}: in model, not in checkpoint")
                continue
            name = found[canonical]
            if shapes[name] != shape:
                misshapen.append(f"! {name}: has shape {list(shapes[name])}, the model needs {list(shape)}")
            matches.append(Match(name, rule, dict(rule.at) | ({} if layer is None else {"L": layer})))
    extra = [
        f"+ {found[canonical]} {list(shapes[found[canonical]])}: in checkpoint, not in model"
        for canonical in sorted(found.keys() - used)
        if not any(re.fullmatch(pattern, canonical) for pattern in layouts.IGNORED[layout])
    ]
    return matches, missing + misshapen + extra


def fill(
    shape: tuple[int, ...], dtype: np.dtype, matches: Sequence[Match], files: TensorFiles, config: Config
) -> np.ndarray:
    """One parameter from its tensors, copied and converted in pieces of bounded size.

    Args:
        shape: Shape of the parameter.
        dtype: Type of the parameter.
        matches: All tensors that go there.
        files: The files they are in.
        config: The model's configuration.

    Returns:
        The parameter, aligned so that a CPU device takes it over without a copy.
    """
    array = _aligned(shape, dtype)
    with files.open([match.name for match in matches]) as tensors, ThreadPoolExecutor(THREADS) as pool:
        jobs = [
            pool.submit(_copy_rows, array, tensors[match.name], match, config, rows)
            for match in matches
            for rows in _row_chunks(tensors[match.name], match.rule)
        ]
        for job in jobs:
            job.result()
    return array


def _row_chunks(tensor: Any, rule: layouts.Rule) -> list[slice]:
    """Cuts along the first axis, unless that axis is several joined, so that no piece is large."""
    shape = tensor.get_shape()
    if rule.axes.startswith("("):
        return [slice(None)]
    rows = max(1, CHUNK_BYTES // (4 * int(np.prod(shape[1:]))))
    return [slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]


def _copy_rows(array: np.ndarray, tensor: Any, match: Match, config: Config, rows: slice) -> None:
    """Copy some rows of a tensor into their place, converting the type on the way."""
    index, axes = layouts.region(match.rule.target, match.fixed)
    region, pattern = array[index], f"{match.rule.axes} -> {axes}"
    if rows != slice(None):
        region = region[(slice(None),) * axes.split().index(match.rule.axes.split()[0]) + (rows,)]
    sizes = layouts.joined_sizes(match.rule.axes, axis_sizes(config))
    source = tensor[rows]
    turned = rearrange(source, pattern, **sizes)
    if region.ndim < 2 or turned.strides[-1] == turned.itemsize:
        region[...] = turned
        return
    source = rearrange(source.astype(array.dtype, copy=False), pattern, **sizes)
    for start in range(0, region.shape[-1], TILE):  # a transpose: three times faster by cache lines
        cut = (..., slice(start, start + TILE))
        region[cut] = source[cut]


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array on a 64-byte boundary."""
    count = int(np.prod(shape)) * dtype.itemsize
    buffer = np.empty(count + 64, np.uint8)
    offset = -buffer.ctypes.data % 64
    return buffer[offset : offset + count].view(dtype).reshape(shape)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    """Open one safetensors file; a damaged one is a CheckpointError that says so."""
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except SafetensorError as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({size} bytes; {error}); download or copy it again"
        ) from error


def _weight_files(directory: Path, stem: str) -> list[Path]:
    """The file, or the files that an index names."""
    single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing = [name for name in names if not (directory / name).exists()]
        if missing or not names:
            raise CheckpointError(f"{index} names files that are not there: {', '.join(missing) or '(none at all)'}")
        return [directory / name for name in names]
    if list(directory.glob("*.bin")):
        raise CheckpointError(
            f"{directory} has only a .bin file, which needs torch to read. Convert it once:\n"
            f"  python -m convert to-jax {directory} OUTPUT"
        )
    raise FileNotFoundError(f"no {single.name} in {directory}; a checkpoint needs config.json and {single.name}")
