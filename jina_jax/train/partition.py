"""Which parameters train: a trainable and a frozen tree, how they make a model, and what becomes of them at the end.

Adapters train as a dictionary by task, each a dictionary by parameter without the axis K: an optimizer that saw the
stack of all would move those that have no gradient, by weight decay and by momentum.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jina_jax import checkpoint, hub, layouts, peft, sharding
from jina_jax.config import Config
from jina_jax.model import Model
from jina_jax.records import InputError
from jina_jax.tensors import TensorFiles
from jina_jax.train.recipe import Recipe

Tree = dict[str, Any]
# So that checkpoints have one shape whatever the mesh; any sensible one divides it.
VOCAB_MULTIPLE = 128


class Parts(NamedTuple):
    """A model to train.

    Attributes:
        model: The model that a step runs; its tasks are those that train.
        trainable: What has gradients, float32: parameters by path, or for adapters such a tree for each task.
        frozen: Parameters by path that have none.
        aside: Parameters by path that no loss touches (the pooler, and the adapters of a random model that do not
            train); the export gets them as they are.
        base: Directory of the model that it came from.
        prompts: What texts of each task that trains get in front; none for a backbone.
        notes: Lines for the log.
    """

    model: Model
    trainable: Tree
    frozen: Tree
    aside: Tree
    base: Path
    prompts: tuple[str, ...] = ("",)
    notes: tuple[str, ...] = ()


def prepare(recipe: Recipe, mesh: jax.sharding.Mesh) -> Parts:
    """Load or create what a recipe trains, on the devices of a mesh.

    Args:
        recipe: The recipe.
        mesh: The mesh.

    Returns:
        The parts.

    Raises:
        InputError: If the recipe asks for something that the model has not.
        CheckpointError: If the model's files are damaged.
        FileNotFoundError: If there is no such model.
    """
    base = hub.find(recipe.init.model)
    compute: dict[str, Any] = {"remat": recipe.remat, "vocab_multiple": VOCAB_MULTIPLE}
    if recipe.init.rope_base is not None:
        compute["rope_base"] = recipe.init.rope_base
    if recipe.init.max_tokens is not None:
        compute["max_position_embeddings"] = recipe.init.max_tokens + 2
    if recipe.dropout is not None:
        compute |= {"hidden_dropout_prob": recipe.dropout, "attention_probs_dropout_prob": recipe.dropout}
    mlm, adapting = recipe.stage == "mlm", recipe.stage == "adapter"
    key, notes = jax.random.fold_in(jax.random.key(recipe.seed), 0x1A17), []

    if recipe.init.config is not None:
        given = recipe.init.config.replace(dtype=recipe.dtype, param_dtype="float32", **compute)
        tasks = given.tasks if adapting else ()
        full = given.replace(mlm_head=mlm, tasks=tasks, prompts=given.prompts[: len(tasks)])
        model = Model(sharding.padded(full, mesh))
        flat = _created(model, mesh, key)
    else:
        dtype = recipe.backbone_dtype if adapting else "float32"
        head = mlm and any("lm_head" in name for name in TensorFiles(base).shapes)
        model, variables = checkpoint.load(
            base, dtype=recipe.dtype, param_dtype=dtype, mesh=mesh, mlm_head=head, **compute
        )
        flat = checkpoint.flatten(variables)
        if mlm and not head:
            model = Model(model.config.replace(mlm_head=True))
            flat |= {path: x for path, x in _created(model, mesh, key).items() if path.startswith("mlm_head")}
            notes.append("the model had no MLM head; it got a new one")

    config = model.config.replace(pooler=False, mlm_head=mlm)
    backbone = {path: x for path, x in flat.items() if "lora" not in path}
    aside = {path: backbone.pop(path) for path in list(backbone) if path.startswith("pooler")}
    if not adapting:
        if config.tasks:
            notes.append(f"adapters are left out: {', '.join(config.tasks)}")
        config = config.replace(tasks=(), prompts=())
        return Parts(Model(config), backbone, {}, aside, base, notes=tuple(notes))
    trained = _adapter_config(recipe, config)
    adapters = _adapters(recipe, config, trained, flat, key)
    whole = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda x: _everywhere(x, whole), adapters)
    if recipe.init.config is not None:
        aside |= {path: x for path, x in flat.items() if "lora" in path}
    return Parts(Model(trained), placed, backbone, aside, base, prompts_of(recipe, config), tuple(notes))


def _created(model: Model, mesh: jax.sharding.Mesh, key: jax.Array) -> Tree:
    """Fresh parameters by path."""
    init = jax.jit(model.init, out_shardings=sharding.shardings(model, mesh))
    return checkpoint.flatten(init(key, np.zeros((1, 4), np.int32)))


def _everywhere(x: np.ndarray, whole: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(x.shape, whole, lambda index: x[index])


# ---- Adapters --------------------------------------------------------------------------------------------------


def _adapter_config(recipe: Recipe, config: Config) -> Config:
    """The configuration with those adapters alone that train."""
    wanted = recipe.adapters
    prompts = prompts_of(recipe, config)
    rank = wanted.rank or config.lora_rank
    scale = config.lora_scale if wanted.alpha is None else wanted.alpha / rank
    tasks = wanted.trains[:1] if wanted.shared else wanted.trains
    return config.replace(
        tasks=tasks,
        prompts=prompts[: len(tasks)],
        lora_rank=rank,
        lora_alpha=scale * rank,
        lora_dropout=wanted.dropout,
    )


def prompts_of(recipe: Recipe, config: Config) -> tuple[str, ...]:
    """The prompt of each task that trains, by the configuration of the whole model."""
    if not recipe.adapters.instructions:
        return ("",) * len(recipe.adapters.trains)
    if recipe.adapters.prompts is not None:
        return recipe.adapters.prompts
    known = dict(zip(config.tasks, config.prompts, strict=True))
    return tuple(known.get(task, "") for task in recipe.adapters.trains)


def _adapters(recipe: Recipe, config: Config, trained: Config, flat: Tree, key: jax.Array) -> Tree:
    """Where each adapter starts, float32, on the host."""
    start, known = recipe.adapters.start, config.tasks
    result = {}
    for number, task in enumerate(trained.tasks):
        source = task if start == "model" else start
        if start == "fresh":
            result[task] = fresh(trained, jax.random.fold_in(key, number))
            continue
        if source not in known:
            raise InputError(f"adapters.start={start!r}: the model has no adapter {source!r}; it has: "
                             f"{', '.join(known) or 'none'}; use adapters.start=fresh")  # fmt: skip
        if (trained.lora_rank, trained.lora_scale) != (config.lora_rank, config.lora_scale):
            raise InputError(
                "adapters.rank and adapters.alpha are for fresh adapters; leave them out or set start=fresh"
            )
        result[task] = {
            path: np.asarray(host(flat[path])).take(known.index(source), axis).astype(np.float32)
            for path, (axis, _) in _slices(config).items()
        }
    return result


def _slices(config: Config) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Of each adapted parameter that a loss can touch, the place of its axis K, and its shape without it."""
    result = {}
    for path, shape in layouts.parameter_shapes(config).items():
        if "lora" in path and not path.startswith("pooler"):
            axis = layouts.PARAMETERS[path].split().index("K")
            result[path] = axis, (*shape[:axis], *shape[axis + 1 :])
    return result


def fresh(config: Config, key: jax.Array) -> Tree:
    """An adapter that changes nothing yet, as the published model's code makes them.

    For matrices A is uniform within 1 / sqrt(inputs) and B zero; for tables A is zero and B normal.

    Args:
        config: The configuration with the adapter's rank.
        key: For random numbers.

    Returns:
        Parameters by path, float32, without the axis K, on the host.
    """
    result = {}
    for number, (path, (_, shape)) in enumerate(_slices(config).items()):
        one = jax.random.fold_in(key, number)
        table, is_a = path.startswith("embed/"), path.endswith("lora_a")
        if table == is_a:
            value = np.zeros(shape, np.float32)
        elif table:
            value = np.asarray(jax.random.normal(one, shape, jnp.float32))
        else:
            axes = layouts.PARAMETERS[path].replace(" K", "").split()
            inputs = np.prod([size for axis, size in zip(axes, shape, strict=True) if axis not in "LR"])
            bound = float(inputs) ** -0.5
            value = np.asarray(jax.random.uniform(one, shape, jnp.float32, -bound, bound))
        result[path] = value
    return result


def assemble(model: Model, trainable: Tree, frozen: Tree) -> Tree:
    """Variables of the model that a step runs.

    Args:
        model: `Parts.model`.
        trainable: As `Parts.trainable`.
        frozen: `Parts.frozen`.

    Returns:
        Variables for `model.apply`.
    """
    config = model.config
    if not config.tasks:
        return {"params": layouts.nest(frozen | trainable)}
    stacked = {
        path: jnp.stack([trainable[task][path] for task in config.tasks], axis)
        for path, (axis, _) in _slices(config).items()
    }
    return {"params": layouts.nest(frozen | stacked)}


def finish(recipe: Recipe, parts: Parts, trainable: Tree) -> tuple[Model, Tree]:
    """The model that a run gives: for adapters, the whole base model as its files have it, with these in their places.

    Args:
        recipe: The recipe.
        parts: What `prepare` gave.
        trainable: The trained parameters, on the host.

    Returns:
        The model, and its variables on the host, float32.
    """
    rope = recipe.init.export_rope_base
    if recipe.stage != "adapter":
        config = parts.model.config.replace(pooler=bool(parts.aside), remat="none", dtype="float32", attention=None)
        config = config if rope is None else config.replace(rope_base=rope)
        config = config.replace(matryoshka_dimensions=recipe.loss.dims or config.matryoshka_dimensions)
        return Model(config), {"params": layouts.nest(trainable | jax.tree.map(host, parts.aside))}
    if recipe.init.config is None:
        model, variables = checkpoint.load(parts.base)
        config, flat = model.config, {path: np.asarray(x) for path, x in checkpoint.flatten(variables).items()}
    else:  # no file has this backbone
        config, flat = recipe.init.config, jax.tree.map(host, parts.frozen | parts.aside)
        config = config.replace(vocab_multiple=parts.model.config.vocab_multiple)
    config = config if rope is None else config.replace(rope_base=rope)
    return with_adapters(recipe, config, flat, parts.model.config, trainable)


def with_adapters(recipe: Recipe, config: Config, flat: Tree, trained: Config, trainable: Tree) -> tuple[Model, Tree]:
    """A model with adapters put into their places: over those of the same task, or after all others.

    Args:
        recipe: The recipe.
        config: The model's configuration.
        flat: Its parameters by path.
        trained: The configuration of the adapters.
        trainable: The adapters.

    Returns:
        The model and its variables.
    """
    asked = recipe.adapters.trains
    source = {task: trained.tasks[0] if recipe.adapters.shared else task for task in asked}
    prompts = dict(zip(config.tasks, config.prompts, strict=True))
    prompts |= dict(zip(asked, prompts_of(recipe, config), strict=True))
    tasks = (*config.tasks, *(task for task in asked if task not in config.tasks))
    rank = max(config.lora_rank, trained.lora_rank) if config.tasks else trained.lora_rank
    scale = config.lora_scale if config.tasks else trained.lora_scale
    result = config.replace(
        tasks=tasks, prompts=tuple(prompts[task] for task in tasks), lora_rank=rank, lora_alpha=scale * rank
    )
    leaves = {path: x for path, x in flat.items() if "lora" not in path}
    for path, shape in layouts.parameter_shapes(result).items():
        if "lora" not in path:
            continue
        axes = layouts.PARAMETERS[path].split()
        axis, stack = axes.index("K"), np.zeros(shape, np.float32)
        if path in flat:
            stack[_at(axis, slice(len(config.tasks)))] = peft.pad_rank(flat[path], axes, rank)
        for task in asked:
            one = trainable[source[task]].get(path)
            if one is not None:
                factor = np.float32(trained.lora_scale / scale) if path.endswith("lora_b") else np.float32(1)
                one = peft.pad_rank(np.expand_dims(one * factor, axis), axes, rank)
                cut = tuple(slice(size) for size in np.delete(shape, axis))  # without the rows that nobody reads
                stack[_at(axis, tasks.index(task))] = one.squeeze(axis)[cut]
            elif task in config.tasks and recipe.adapters.start == "fresh" and path.endswith("lora_b"):
                stack[_at(axis, tasks.index(task))] = 0  # the pooler: a fresh adapter has no effect on it
        leaves[path] = stack
    return Model(result), {"params": layouts.nest(leaves)}


def whole_set(recipe: Recipe, parts: Parts, trainable: Tree) -> tuple[Model, Tree]:
    """The model that trains with an adapter for every task that has been asked for, be it shared or not.

    Args:
        recipe: The recipe.
        parts: What trains.
        trainable: As `Parts.trainable`.

    Returns:
        The model, and its variables.
    """
    model = parts.model
    if recipe.stage == "adapter":
        (first, *_), tasks = model.config.tasks, recipe.adapters.trains
        trainable = {task: trainable.get(task, trainable[first]) for task in tasks}
        model = Model(model.config.replace(tasks=tasks, prompts=parts.prompts))
    return model, assemble(model, trainable, parts.frozen)


def _at(axis: int, index: int | slice) -> tuple[Any, ...]:
    return (*(slice(None),) * axis, index)


# ---- On the host -----------------------------------------------------------------------------------------------


def host(x: Any) -> np.ndarray:
    """An array on the host, whole, whichever processes hold its parts."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def fingerprint(tree: Mapping[str, Any], gather: Callable[[Any], np.ndarray] = host) -> str:
    """SHA-256 of parameters, names and types included.

    Args:
        tree: Parameters by path, or trees of them.
        gather: How to get one on the host.

    Returns:
        Hexadecimal digits.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(jax.tree_util.tree_flatten_with_path(tree)[0], key=lambda item: str(item[0])):
        array = gather(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def count(tree: Any) -> int:
    """Number of parameters of a tree."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))
