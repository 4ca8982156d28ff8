"""Who may import whom, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jina_jax"

# Each room and the rooms of ours that it may import : data flows one way.
MAY_IMPORT = {
    "_version": set(),
    "config": set(),
    "rope": set(),
    "pooling": set(),
    "distributed": set(),
    "sharding": {"config", "layouts"},
    "kernels": {"rope", "sharding"},
    "tokenizer": set(),
    "batching": set(),
    "hub": set(),
    "lora": {"config", "sharding"},
    "layouts": {"config"},
    "model": {"config", "lora", "rope", "pooling", "kernels", "sharding"},
    "tensors": {"config", "layouts"},
    "peft": {"config", "layouts", "tensors"},
    "checkpoint": {"config", "hub", "layouts", "model", "peft", "sharding", "tensors"},
    "chunking": {"batching", "tokenizer"},
    "quantization": set(),
    "pipeline": {"batching"},
    "embedder": {
        *("config", "model", "tokenizer", "batching", "chunking", "pooling", "quantization", "pipeline", "checkpoint"),
        *("hub", "lora", "sharding"),
    },
    "corpus": {"checkpoint", "embedder", "hub", "records"},
    "ray": {"embedder"},
    "examples": {"records"},
    "eval": {"embedder", "examples", "records"},
    "serve": {
        *(
            "config",
            "embedder",
            "tokenizer",
            "batching",
            "chunking",
            "quantization",
            "pipeline",
            "sharding",
            "hub",
            "model",
        ),
        *("arguments", "records", "compilation", "_version"),
    },
    "train": {
        *(
            "arguments",
            "compilation",
            "config",
            "model",
            "tokenizer",
            "embedder",
            "checkpoint",
            "hub",
            "layouts",
            "lora",
        ),
        *("peft", "pooling", "sharding", "distributed", "tensors", "examples", "eval", "records", "_version"),
    },
}
# The command line may use everything.
LATE = {"bench", "records", "compilation", "info", "arguments", "cli", "__main__"}
NEVER = {"torch", "transformers", "peft", "convert", "sentence_transformers"}
# Frameworks that one room alone may know.
ONLY = {"fastapi": "serve", "starlette": "serve", "uvicorn": "serve", "prometheus_client": "serve"}
# Outside modules that a room must do without.
WITHOUT = {
    "rope": {"flax"},
    "pooling": {"flax"},
    "kernels": {"flax"},
    "tokenizer": {"jax", "flax"},
    "batching": {"jax", "flax"},
    "chunking": {"jax", "flax"},
    "quantization": {"jax", "flax"},
    "pipeline": {"jax", "flax"},
    "layouts": {"jax", "flax", "numpy"},
    "examples": {"jax", "flax", "numpy"},
    "eval": {"flax"},
}


def imports(file: Path) -> set[str]:
    """Every module that a file imports anywhere, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms() -> dict[str, list[Path]]:
    """Room names and their files."""
    files = [file for file in sorted(PACKAGE.rglob("*.py")) if file != PACKAGE / "__init__.py"]
    names: dict[str, list[Path]] = {}
    for file in files:
        names.setdefault(file.relative_to(PACKAGE).parts[0].removesuffix(".py"), []).append(file)
    return names


@pytest.mark.parametrize("room", sorted(rooms()))
def test_imports_go_one_way(room):
    for file in rooms()[room]:
        modules = imports(file)
        assert not NEVER & {module.split(".")[0] for module in modules}, file
        assert not {name for name, owner in ONLY.items() if room != owner} & {one.split(".")[0] for one in modules}, (
            file
        )
        assert not WITHOUT.get(room, set()) & {module.split(".")[0] for module in modules}, file
        if room in LATE:
            continue
        ours = {module.split(".")[1] for module in modules if module.startswith("jina_jax.")}
        assert ours <= MAY_IMPORT[room] | {room}, f"{file} imports {sorted(ours - MAY_IMPORT[room])}"


def test_the_rule_can_fail(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from jina_jax.model import Model\n    import torch.nn\n")
    assert imports(file) == {"jina_jax.model.Model", "torch.nn"}


def test_importing_is_light_and_pulls_in_no_framework_but_jax():
    code = "import sys, jina_jax; print(*sorted(name for name in sys.modules if '.' not in name))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    loaded = set(output.split())
    assert "jina_jax" in loaded
    heavy = {"torch", "transformers", "tensorflow", "fastapi", "uvicorn", "huggingface_hub", "pandas", "pyarrow", "ray"}
    assert not heavy & loaded, heavy & loaded


def test_every_public_name_exists_and_is_documented():
    import jina_jax

    for name in jina_jax.__all__:
        value = getattr(jina_jax, name)
        assert callable(value) is False or value.__doc__, name
