"""PyTorch's `.bin` weight files as safetensors, so that `jina_jax.load` reads them with all its checks."""

from __future__ import annotations

import json
import pickle
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jina_jax import CheckpointError, hub
from jina_jax.config import read_json

BASE, ADAPTER = "pytorch_model", "adapter_model"


@contextmanager
def readable(source: str | Path, beside: Path | None = None) -> Iterator[Path]:
    """A directory that `jina_jax.load` can read, for as long as the block lasts.

    Args:
        source: A directory, a name on the hub, or "mini". If its weights are `.bin` files, a copy with those files
            converted is given; otherwise the directory itself.
        beside: Path beside which such a copy is made; None means the system's place for temporary files.

    Yields:
        The directory.

    Raises:
        FileNotFoundError: If there is no such directory, or it has no config.json.
        CheckpointError: If a `.bin` file is damaged, or holds more than tensors.
    """
    directory = hub.find(source)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"no config.json in {directory}; a checkpoint needs it next to its weights")
    pickled = [*directory.glob(f"{BASE}*.bin"), *directory.glob(f"*/{ADAPTER}.bin")]
    pickled = [file for file in pickled if not _has_safetensors(file)]
    if not pickled:
        yield directory
        return

    if beside is not None:
        beside.parent.mkdir(parents=True, exist_ok=True)
    place, prefix = (None, "jina-jax.") if beside is None else (beside.parent, f".{beside.name}.")
    with tempfile.TemporaryDirectory(prefix=prefix, dir=place) as name:
        copy = Path(name)
        for file in (*directory.glob("*"), *directory.glob("*/adapter_*")):
            target = copy / file.relative_to(directory)
            target.parent.mkdir(exist_ok=True)
            if file in pickled:
                _convert(file, target.with_name(_renamed(file.name)))
            elif file.is_file():
                target.symlink_to(file.resolve())
        index = directory / f"{BASE}.bin.index.json"
        if index.exists():
            files = read_json(index).get("weight_map", {})
            content = {"weight_map": {tensor: _renamed(file) for tensor, file in files.items()}}
            (copy / "model.safetensors.index.json").write_text(json.dumps(content))
        try:
            yield copy
        except CheckpointError as error:  # name what the user knows, not the copy
            raise CheckpointError(str(error).replace(str(copy), str(directory))) from error


def _has_safetensors(file: Path) -> bool:
    stem = ADAPTER if file.name.startswith(ADAPTER) else "model"
    return any((file.parent / f"{stem}.safetensors{ending}").exists() for ending in ("", ".index.json"))


def _renamed(name: str) -> str:
    """pytorch_model-00001-of-00002.bin to model-00001-of-00002.safetensors."""
    return name.replace(BASE, "model").removesuffix(".bin") + ".safetensors"


def _convert(source: Path, target: Path) -> None:
    """Rewrite one file. Only tensors are unpickled: nothing in the file is ever run."""
    import torch
    from safetensors.torch import save_file

    try:
        # Mapped where the format allows it, so that the tensors are in memory once.
        content: Any = torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).partition("WeightsUnpickler error:")[2] or str(error) or "end of file"
        raise CheckpointError(
            f"{source}: damaged, or more than tensors, which could run code and is refused "
            f"({reason.strip().splitlines()[0]}); download it again, or get the safetensors file"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        others = [key for key, value in content.items() if not isinstance(value, torch.Tensor)] if content else []
        raise CheckpointError(f"{source}: expected a dictionary of tensors alone, found {others[:3]}")

    # safetensors takes no two tensors of one memory, such as a tied decoder and its table.
    seen: set[int] = set()
    for name, tensor in content.items():
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes or not tensor.is_contiguous():
            content[name] = tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(tensor.untyped_storage().data_ptr())
    save_file(content, target, metadata={"format": "pt"})
