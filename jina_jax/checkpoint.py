"""Reading and writing checkpoints: every published layout, and our own."""

import contextlib
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jina_jax import hub, layouts, peft, sharding
from jina_jax.config import OWN_MODEL_TYPE, PROMPTS, TASKS, Config, read_json
from jina_jax.layouts import nest, parameter_shapes
from jina_jax.model import Model
from jina_jax.tensors import Box, CheckpointError, TensorFiles, fill, match

Variables = dict[str, Any]
TABLES = {
    "original": layouts.ORIGINAL,
    "hf": layouts.HF,
    "xlm-roberta": layouts.XLM_ROBERTA,
    "own": layouts.OWN,
}
WRITABLE = ("own", "original", "hf", "orbax")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "sentencepiece.bpe.model",
)


# ---- Loading ---------------------------------------------------------------------------------------------------


def load(
    name_or_path: str | Path = "mini",
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    mlm_head: bool | None = None,
    mesh: jax.sharding.Mesh | None = None,
    shardings: Any = None,
    revision: str | None = None,
    **overrides: Any,
) -> tuple[Model, Variables]:
    """Load a checkpoint in any layout: the original, `-hf`, XLM-RoBERTa, or our own.

    Args:
        name_or_path: A directory, a name on the Hugging Face hub such as "jinaai/jina-embeddings-v3", or "mini" for
            the small bundled model.
        dtype: Type to compute in; float32 is exact.
        param_dtype: Type to hold the weights in; None means `dtype`.
        adapters: PEFT adapter directories to add as further tasks, by task name.
        mlm_head: Whether to load the masked-language-model head as well; None loads it from our own layout only.
        mesh: Mesh to split the parameters over, see `make_mesh`. Every process reads its own parts of the files, and
            the vocabulary's tables get as many rows as can be split evenly (`Config.vocab_multiple`).
        shardings: Instead of a mesh, where parameters go: one `jax.sharding.Sharding` for all, or a tree of them like
            the variables. None puts them on the default device.
        revision: Branch, tag or commit on the hub.
        **overrides: Attributes of `Config` to change, such as `remat="full"` or `rope_base=10_000.0`.

    Returns:
        The model and its variables: `model.apply(variables, tokens, mask, task)`.

    Raises:
        CheckpointError: If the files are not this model, damaged or incomplete; lists every problem.
        FileNotFoundError: If there is no such directory and the hub cannot be reached; says what to place where.
        ValueError: If the mesh does not fit the model, or there are both `mesh` and `shardings`.
    """
    if mesh is not None and shardings is not None:
        raise ValueError("give mesh or shardings, not both")
    directory = hub.find(name_or_path, revision)
    raw = read_json(directory / "config.json")
    param_dtype = jnp.dtype(dtype if param_dtype is None else param_dtype)
    overrides = {"dtype": dtype, "param_dtype": param_dtype} | overrides
    overrides |= {} if mlm_head is None else {"mlm_head": mlm_head}
    multiple = overrides.pop("vocab_multiple", None)  # of the tables held, not of those stored
    config = Config.from_json(directory / "config.json", **overrides)
    if (directory / "orbax").is_dir():
        return _load_orbax(directory, config, sharding.shardings(Model(config), mesh) if mesh else shardings)

    files = TensorFiles(directory)
    layout = detect_layout(raw, files.shapes)
    folders = {task: Path(path) for task, path in (adapters or {}).items()}
    prompts = dict(zip(config.tasks or TASKS, config.prompts or PROMPTS, strict=True))
    table = TABLES[layout]
    if layout == "hf":
        folders = peft.find(directory, config.tasks) | folders
        config = config.replace(tasks=(), prompts=())
        if not any("Wqkv" in name for name in files.shapes):
            table = layouts.HF_SPLIT
    config = config.replace(pooler=holds_pooler(config, layout, files.shapes))

    shapes = parameter_shapes(config)
    matches, problems = match(layout, [rule for rule in table if rule.target in shapes], config, files.shapes)
    full, added, wrong = peft.read(folders, config, prompts)
    if problems + wrong:
        listed = "\n  ".join(problems + wrong)
        raise CheckpointError(f"{directory} is not a whole checkpoint of the {layout} layout:\n  {listed}")

    if multiple is not None:
        full = full.replace(vocab_multiple=multiple)
    if mesh is not None:
        full = sharding.padded(full, mesh)
        shardings = sharding.shardings(Model(full), mesh)
    wanted = parameter_shapes(full)

    def part(path: str, box: Box) -> np.ndarray:
        """A part of a parameter: of the checkpoint, with the adapters that were added."""
        pieces = [found for found in matches if found.rule.target == path]
        if path not in added:
            return fill(path, box, param_dtype, pieces, files, config)
        # Adapters are small, and made for the whole.
        axes = layouts.PARAMETERS[path].split()
        parts = [added[path]]
        if path in shapes:
            parts = [fill(path, tuple((0, size) for size in shapes[path]), param_dtype, pieces, files, config), *parts]
        whole = np.concatenate([peft.pad_rank(one, axes, full.lora_rank) for one in parts], axis=axes.index("K"))
        whole = np.pad(whole, [(0, size - given) for size, given in zip(wanted[path], whole.shape, strict=True)])
        return np.ascontiguousarray(whole[tuple(slice(*cut) for cut in box)].astype(param_dtype))

    # Largest first: what is still to come while a parameter is filled is then never larger than what is there.
    leaves = {}
    for path in sorted(wanted, key=lambda path: -np.prod(shapes.get(path, 1))):
        leaves[path] = _place(wanted[path], _pick(shardings, path), functools.partial(part, path))
    return Model(full), {"params": nest(leaves)}


def _place(
    shape: tuple[int, ...], target: jax.sharding.Sharding | None, part: Callable[[Box], np.ndarray]
) -> jax.Array:
    """An array on its devices, made of the parts that this process holds, each made once."""
    if target is None:
        return jax.device_put(part(tuple((0, size) for size in shape)))
    devices: dict[Box, list[jax.Device]] = {}
    for device, index in target.addressable_devices_indices_map(shape).items():
        box = tuple(cut.indices(size)[:2] for cut, size in zip(index or (), shape, strict=True))
        devices.setdefault(box, []).append(device)
    shards = []
    for box, owners in devices.items():
        array = part(box)
        shards += [jax.device_put(array, device) for device in owners]
    return jax.make_array_from_single_device_arrays(shape, target, shards)


def detect_layout(raw: Mapping[str, Any], names: Mapping[str, Any]) -> str:
    """Which layout a checkpoint has, by the names of its tensors; config.json does not always say."""
    if raw.get("model_type") == OWN_MODEL_TYPE:
        return "own"
    if any(".parametrizations." in name for name in names):
        return "original"
    if raw.get("model_type") == "xlm-roberta" or any(".encoder.layer." in f".{name}" for name in names):
        return "xlm-roberta"
    return "hf"


def _load_orbax(directory: Path, config: Config, shardings: Any) -> tuple[Model, Variables]:
    import orbax.checkpoint as ocp  # a third of the time that importing this package would take

    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {
        path: jax.ShapeDtypeStruct(shape, jnp.dtype(config.param_dtype), sharding=_pick(shardings, path) or default)
        for path, shape in parameter_shapes(config).items()
    }
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            variables = checkpointer.restore((directory / "orbax").absolute(), {"params": nest(abstract)})
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise CheckpointError(f"{directory}: not a whole checkpoint of this model: {error}") from error
    return Model(config), variables


def _pick(shardings: Any, path: str) -> jax.sharding.Sharding | None:
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        return shardings
    return functools.reduce(lambda tree, key: tree[key], path.split("/"), shardings["params"])


def flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
    """{"params": {"a": {"b": x}}} to {"a/b": x}.

    Args:
        variables: What `load` or `Model.init` gave, or a tree like it.

    Returns:
        Parameters, or what stands for them, by path.
    """
    flat = jax.tree_util.tree_flatten_with_path(variables["params"])[0]
    return {"/".join(str(entry.key) for entry in path): leaf for path, leaf in flat}


def holds_pooler(config: Config, layout: str, names: Iterable[str]) -> bool:
    """Whether a checkpoint has the pooler: models saved for masked language modelling do without it."""
    if layout in ("hf", "xlm-roberta"):
        return any("pooler." in name for name in names)
    return config.pooler


# ---- Saving ----------------------------------------------------------------------------------------------------


def save(
    path: str | Path,
    model: Model,
    variables: Variables,
    *,
    layout: str = "own",
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint.

    The directory appears whole or not at all: files are written under a temporary name beside it and renamed last.

    Args:
        path: Directory to create.
        model: The model.
        variables: Its variables; their type is kept.
        layout: "own", "original" or "hf" (both public layouts), or "orbax" for trees that are sharded.
        tokenizer: Directory whose tokenizer files are copied along.
        overwrite: Whether an existing directory may be replaced.

    Returns:
        The directory.

    Raises:
        FileExistsError: If the directory exists and `overwrite` is False.
        ValueError: If the variables are not this model's, or the layout is unknown or cannot hold them.
    """
    path = Path(path).absolute()
    if layout not in WRITABLE:
        raise ValueError(f"unknown {layout=}; choose from: {', '.join(WRITABLE)}")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another name or pass overwrite=True")
    flat, config = flatten(variables), model.config
    _check_variables(flat, config)
    config = config.replace(param_dtype=flat["embed/words/embedding"].dtype)
    if layout != "orbax":  # the files hold the rows that are read
        config = config.replace(vocab_multiple=1)

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        content = config.to_json("own" if layout == "orbax" else layout)
        (temporary / "config.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        if layout == "orbax":
            import orbax.checkpoint as ocp

            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(temporary / "orbax", {"params": variables["params"]})
        elif layout == "hf":
            _write(temporary / "model.safetensors", flat, config, layouts.HF)
            for index, task in enumerate(config.tasks):
                folder = temporary / peft.folder_name(task)
                folder.mkdir()
                (folder / "adapter_config.json").write_text(json.dumps(peft.adapter_config(config), indent=3) + "\n")
                _write(folder / "adapter_model.safetensors", flat, config, layouts.HF_ADAPTER, {"K": index})
        else:
            prefix = "roberta." if layout == "original" else ""
            _write(temporary / "model.safetensors", flat, config, TABLES[layout], prefix=prefix)
        for name in TOKENIZER_FILES if tokenizer is not None else ():
            source = Path(tokenizer or "") / name
            if source.exists():
                shutil.copyfile(source, temporary / name)
    return path


def _check_variables(flat: Mapping[str, Any], config: Config) -> None:
    shapes = parameter_shapes(config)
    problems = [f"- {path} {list(shapes[path])}: in model, not in variables" for path in shapes.keys() - flat.keys()]
    problems += [f"+ {path}: in variables, not in model" for path in flat.keys() - shapes.keys()]
    problems += [
        f"! {path}: has shape {list(flat[path].shape)}, the model needs {list(shapes[path])}"
        for path in shapes.keys() & flat.keys()
        if tuple(flat[path].shape) != shapes[path]
    ]
    if problems:
        raise ValueError("these variables are not this model's:\n  " + "\n  ".join(sorted(problems)))


def _write(
    file: Path,
    flat: Mapping[str, Any],
    config: Config,
    table: Sequence[layouts.Rule],
    at: Mapping[str, int] | None = None,
    prefix: str = "",
) -> None:
    """Write the tensors of a table to one safetensors file."""
    tensors = {prefix + name: np.ascontiguousarray(tensor) for name, tensor in as_stored(flat, config, table, at)}
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, among others, is no OSError there
        raise OSError(f"{file}: cannot be written ({error})") from error


def as_stored(
    flat: Mapping[str, Any], config: Config, table: Sequence[layouts.Rule], at: Mapping[str, int] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Parameters cut and turned into the tensors of a layout, one at a time.

    Args:
        flat: Parameters by path.
        config: The configuration of what is to be stored.
        table: Rules of the layout.
        at: Axes that are fixed for all tensors, such as {"K": 2} for the third adapter.

    Yields:
        The tensor's canonical name, and its values: a view wherever that can be.
    """
    size = config.axis_sizes
    for rule in table:
        if rule.target not in flat:
            continue
        stored = tuple(slice(size[axis]) for axis in layouts.PARAMETERS[rule.target].split())
        value = np.asarray(flat[rule.target])[stored]
        for layer in range(config.num_hidden_layers) if "{L}" in rule.source else (None,):
            fixed = dict(rule.at) | ({} if layer is None else {"L": layer}) | dict(at or {})
            index, axes = layouts.region(rule.target, fixed)
            tensor = rearrange(value[index], f"{axes} -> {rule.axes}", **layouts.joined_sizes(rule.axes, size))
            yield rule.source.replace("{L}", str(layer)), tensor


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary directory beside `path` that takes its name once the block ends without an error."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        temporary.chmod(0o755)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            path.rename(old / path.name)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
