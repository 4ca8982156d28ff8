"""Parameters and activations over a mesh of devices: `make_mesh`, `shardings`, `use`.

A mesh has four axes. Over "data" only rows of a batch are split. Over "fsdp" rows are split as well, and parameters, of
which each device gathers a layer at a time (Zhao et al., 2023). Over "tensor" heads and the mlp are split, with their
parameters (Shoeybi et al., 2019). Over "sequence" the tokens of a row are split, for texts beyond the memory of one
device. One table, `RULES`, says which axis of an array goes where; the rest is done by the compiler.
"""

import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jina_jax import layouts
from jina_jax.config import Config

AnyMesh = Mesh | jax.sharding.AbstractMesh

AXES = ("data", "fsdp", "tensor", "sequence")
# Axis letters of arrays, and the axes of the mesh over which they are split; G are batch rows of all devices that share
# the width of a table.
RULES = {
    "N": ("tensor",),
    "F": ("tensor",),
    "V": ("tensor",),
    "E": ("tensor",),
    "D": ("fsdp",),
    "B": ("data", "fsdp"),
    "G": ("data",),
    "T": ("sequence",),
}
# Parameters that are left whole in D: to gather so few numbers would cost more than it saves.
SMALL = r"embed/types/.*|embed/words/lora_b|.*/(scale|bias)"


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, sequence: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh with the axes "data", "fsdp", "tensor" and "sequence".

    Args:
        data: Devices along the axis; -1, for one of the axes, takes all that are left.
        fsdp: Devices along the axis.
        tensor: Devices along the axis; divides the number of heads.
        sequence: Devices along the axis; a power of two.
        devices: The devices; None means all, those of other processes included.

    Returns:
        The mesh, with axes of type Auto: the compiler places what nobody places.

    Raises:
        ValueError: If the product is not the number of devices.
    """
    count = len(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "sequence": sequence}
    asked = ", ".join(f"{name}={size}" for name, size in sizes.items())
    open_axes = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(open_axes) > 1 or fixed < 1 or min(sizes.values()) < -1:
        raise ValueError(f"axes must be at least 1, or -1 for one of them: {asked}")
    if count % fixed or (not open_axes and fixed != count):
        raise ValueError(f"{asked} does not make a mesh of {count} devices; give devices=, or -1 for one of the axes")
    sizes |= dict.fromkeys(open_axes, count // fixed)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def use(mesh: Mesh) -> AbstractContextManager[Any]:
    """A context in which the activations of models are split over a mesh.

    It counts when a function is compiled, as in `with use(mesh): jax.jit(model.apply)(...)`. Contexts belong to their
    thread.

    Args:
        mesh: The mesh.

    Returns:
        The context.

    Raises:
        ValueError: If an axis of ours is not of type Auto: the parts of Linen know nothing of types with shardings.
    """
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True):
        if name in AXES and kind != AxisType.Auto:
            raise ValueError(f"axis {name!r} of the mesh is of type {kind.name}, must be Auto; see make_mesh")
    return jax.set_mesh(mesh)


def padded(config: Config, mesh: AnyMesh) -> Config:
    """The configuration with as many rows in the vocabulary's tables as the mesh splits evenly."""
    return config.replace(vocab_multiple=math.lcm(config.vocab_multiple, size_over(mesh, ("fsdp", "tensor"))))


def shardings(model: Any, mesh: Mesh) -> dict[str, Any]:
    """Where a model's parameters go: every matrix over "fsdp" and "tensor", vectors over "tensor" alone.

    Args:
        model: The model.
        mesh: The mesh.

    Returns:
        A tree of `NamedSharding` like its variables, for `jax.device_put`, `jax.jit` and `load`.

    Raises:
        ValueError: If parameters cannot be split evenly; lists all of them.
    """
    config: Config = model.config
    size, tree, problems = config.axis_sizes, {}, []
    for path in layouts.parameters(config):
        spec, wrong = _parameter_spec(path, size, mesh)
        problems += wrong
        tree[path] = NamedSharding(mesh, spec)
    if problems:
        raise ValueError("this mesh does not fit this model:\n  " + "\n  ".join(sorted(set(problems))))
    return {"params": layouts.nest(tree)}


def _parameter_spec(path: str, size: dict[str, int], mesh: AnyMesh) -> tuple[PartitionSpec, list[str]]:
    """How a parameter is split, and what stands against it."""
    letters, small = layouts.PARAMETERS[path].split(), re.fullmatch(SMALL, path) is not None
    over: dict[str, tuple[str, ...]] = {}
    problems = []
    for letter in letters:
        for name in () if small and letter == "D" else RULES.get(letter, ()):
            if mesh.shape.get(name, 1) > 1 and not any(name in taken for taken in over.values()):
                over[letter] = (*over.get(letter, ()), name)
                if size[letter] % size_over(mesh, over[letter]):
                    hint = "; see Config.vocab_multiple" if letter == "V" else ""
                    problems.append(f"{_MEANS[letter]}: {size[letter]} cannot be split over {name}{hint}")
    # Where an array has none of the letters of "tensor" or "fsdp", one that is split already is split further.
    for name in () if small else ("fsdp", "tensor"):
        if mesh.shape.get(name, 1) > 1 and not any(name in taken for taken in over.values()):
            # In the order of the axes: every process must choose alike, and sets of strings have an order of their own.
            able = [letter for letter in letters if letter in RULES or letter == "H"]
            for letter in sorted(able, key=lambda letter: letter not in over):
                wanted = (*over.get(letter, ()), name)
                if size[letter] % size_over(mesh, wanted) == 0:
                    over[letter] = wanted
                    break
    return PartitionSpec(*(over.get(letter) for letter in letters)), problems


_MEANS = {"N": "heads", "F": "mlp width", "V": "rows of the vocabulary", "E": "width", "D": "width"}


def constrain(x: Array, axes: str) -> Array:
    """Tell the compiler how an array is split over the mesh in context; without one, nothing.

    Args:
        x: The array.
        axes: Its axis letters, one for each axis: those of `RULES` are split where that goes evenly; others, such
            as "_", are whole.

    Returns:
        The array.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = free_axes(mesh)
    if not free & set(AXES):
        return x
    over: dict[int, tuple[str, ...]] = {}
    for letter, names in RULES.items():
        for at in (i for i, axis in enumerate(axes.split()) if axis == letter):
            left = tuple(name for name in names if name in free)
            over[at] = fitting(mesh, left, x.shape[at])
            free -= set(over[at])
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(over.get(at) or None for at in range(x.ndim))))


def parts(mesh: AnyMesh) -> tuple[int, int]:
    """Into how many parts a mesh splits the rows of a batch, and the tokens of a row."""
    return size_over(mesh, RULES["B"]), size_over(mesh, RULES["T"])


def put(mesh: Mesh, x: np.ndarray, axes: str) -> Array:
    """An array that every process has, split over a mesh.

    Args:
        mesh: The mesh.
        x: The array.
        axes: Its axis letters, as for `constrain`.

    Returns:
        The array, of which every process holds its parts.
    """
    return jax.make_array_from_callback(x.shape, placed(mesh, axes), lambda index: x[index])


def placed(mesh: Mesh, axes: str) -> NamedSharding:
    """Where an input goes whose axis letters are all split evenly."""
    return NamedSharding(mesh, PartitionSpec(*(RULES.get(letter) for letter in axes.split())))


def free_axes(mesh: AnyMesh) -> set[str]:
    """Axes with more than one device that no `shard_map` around us has taken."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in kinds if kind != AxisType.Manual and mesh.shape[name] > 1}


def fitting(mesh: AnyMesh, names: Sequence[str], count: int) -> tuple[str, ...]:
    """Those axes of a mesh, in order, over which so many things can be split evenly."""
    chosen: list[str] = []
    for name in names:
        if count % mesh.shape[name] == 0:
            chosen.append(name)
            count //= mesh.shape[name]
    return tuple(chosen)


def size_over(mesh: AnyMesh, names: Sequence[str]) -> int:
    """Number of devices along some axes; one along axes that the mesh has not."""
    return math.prod(mesh.shape.get(name, 1) for name in names)
