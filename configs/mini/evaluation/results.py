"""Results in files: what was found, and by which texts and code, so that nothing is measured twice."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from configs.mini.evaluation import measures, systems
from jina_jax.records import whole_file

CODE, LONG_CODE = ("measures", "systems"), ("measures", "systems", "long_context")
# Measures of several families; the others are of their own, or of long texts.
USED = {"matryoshka": ("retrieval", "sts", "bitext"), "rope": ("retrieval", "bitext")}
LONG = ("passkey", "late")


def read(path: Path) -> dict[str, Any]:
    """Results in a file; none if it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write results, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def inputs(work: Path, name: str) -> str:
    """A hash of the texts of a measure, and of the code that measures."""
    code = LONG_CODE if name in LONG else CODE
    if name in LONG:
        paths = [work / "test" / "long" / "documents.jsonl"]
    else:
        families = USED.get(name, (name,))
        paths = [path for one in families for pair in measures.files(work, one).values() for path in pair]
    return systems.digest([*(Path(__file__).with_name(f"{one}.py") for one in code), *paths])


def kept(work: Path, column: str, name: str, family: str, key: str, make: Callable[[], Any]) -> Any:
    """What a model that does not change reached, made if it is not there for the same texts, code and key.

    Args:
        work: The work directory.
        column: "start" or "teacher", which is also the directory of the file.
        name: What is measured.
        family: Whose texts it is measured on.
        key: Whatever else it depends on.
        make: Measures it.

    Returns:
        What `make` gave.
    """
    path, found = work / column / "results.json", read(work / column / "results.json")
    parts = [inputs(work, family), key]
    if column == "start":
        parts.append(systems.digest([work / "start" / "model.safetensors"]))
    state = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    if found.get(name, {}).get("inputs") != state:
        found[name] = {"inputs": state, "values": make()}
        write(path, found)
    return found[name]["values"]
