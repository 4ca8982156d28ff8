"""From the tensors of safetensors files to parameters, as the tables of `layouts` say."""

import contextlib
import dataclasses
import itertools
import math
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

CHUNK_BYTES = 4 << 20  # small enough for the allocator to reuse, rather than to fault in afresh
TILE = 16  # elements of float32 in a cache line
THREADS = min(8, os.cpu_count() or 1)

Range = tuple[int, int]
Box = tuple[Range, ...]
Piece = tuple[tuple[slice, ...], dict[str, Range]]


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
    size, matches, used = config.axis_sizes, [], set()
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
    path: str, box: Box, dtype: np.dtype, matches: Sequence[Match], files: TensorFiles, config: Config
) -> np.ndarray:
    """A part of a parameter from its tensors, copied and converted in pieces of bounded size.

    Args:
        path: The parameter.
        box: First index of the part, and the one after the last, of each axis; rows beyond the table are zeros.
        dtype: Type of the parameter.
        matches: All tensors that go there.
        files: The files they are in; nothing is read that the part does not need.
        config: The configuration of what is stored.

    Returns:
        The part, aligned so that a CPU device takes it over without a copy.
    """
    size, axes = config.axis_sizes, layouts.PARAMETERS[path].split()
    array = _aligned(tuple(stop - start for start, stop in box), dtype)
    if any(stop > size[axis] for axis, (_, stop) in zip(axes, box, strict=True)):
        array[...] = 0
    bounds = {axis: (start, min(stop, size[axis])) for axis, (start, stop) in zip(axes, box, strict=True)}
    matches = [
        match for match in matches if all(bounds[axis][0] <= at < bounds[axis][1] for axis, at in match.fixed.items())
    ]
    with files.open([match.name for match in matches]) as tensors, ThreadPoolExecutor(THREADS) as pool:
        jobs = [
            pool.submit(_copy, array, tensors[match.name], match, bounds, piece)
            for match in matches
            for piece in _pieces(match.rule.axes, bounds, size)
        ]
        for job in jobs:
            job.result()
    return array


def _pieces(axes: str, bounds: Mapping[str, Range], size: Mapping[str, int]) -> Iterator[Piece]:
    """Parts of a tensor that together are what is needed of it, none of them large."""
    groups = layouts.groups(axes)
    runs = [list(_runs(group, bounds, size)) for group in groups]
    if len(groups[0]) == 1:
        [(taken, (start, stop))] = [(cut, ranges[groups[0][0]]) for cut, ranges in runs[0]]
        others = math.prod(cut.stop - cut.start for run in runs[1:] for cut, _ in run[:1])
        rows = max(1, CHUNK_BYTES // (4 * max(1, others)))
        cuts = [(first, min(first + rows, stop)) for first in range(start, taken.stop, rows)]
        runs[0] = [(slice(*cut), {groups[0][0]: cut}) for cut in cuts]
    for chosen in itertools.product(*runs):
        ranges: dict[str, Range] = {}
        for _, found in chosen:
            ranges |= found
        yield tuple(cut for cut, _ in chosen), ranges


def _runs(
    axes: list[str], bounds: Mapping[str, Range], size: Mapping[str, int]
) -> Iterator[tuple[slice, dict[str, Range]]]:
    """Stretches of an axis of a tensor, which several of ours may be joined to, that hold what is needed."""
    parted = [at for at, axis in enumerate(axes) if bounds[axis] != (0, size[axis])]
    last = parted[-1] if parted else 0
    inner = math.prod(size[axis] for axis in axes[last + 1 :])
    start, stop = bounds[axes[last]]
    for at in itertools.product(*(range(*bounds[axis]) for axis in axes[:last])):
        before = 0
        for axis, index in zip(axes, at, strict=False):
            before = before * size[axis] + index
        before *= size[axes[last]]
        ranges = {axis: (index, index + 1) for axis, index in zip(axes, at, strict=False)}
        ranges |= {axis: bounds[axis] for axis in axes[last:]}
        yield slice((before + start) * inner, (before + stop) * inner), ranges


def _copy(array: np.ndarray, tensor: Any, match: Match, bounds: Mapping[str, Range], piece: Piece) -> None:
    """Copy a piece of a tensor into its place, converting the type on the way."""
    cuts, ranges = piece
    index, axes = layouts.region(match.rule.target, match.fixed)
    places = []
    for axis, at in zip(layouts.PARAMETERS[match.rule.target].split(), index, strict=True):
        first = bounds[axis][0]
        places.append(at - first if isinstance(at, int) else slice(ranges[axis][0] - first, ranges[axis][1] - first))
    region, pattern = array[tuple(places)], f"{match.rule.axes} -> {axes}"
    sizes = layouts.joined_sizes(match.rule.axes, {axis: stop - start for axis, (start, stop) in ranges.items()})
    source = tensor[cuts]
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
