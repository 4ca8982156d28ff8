"""The kernels and the model through a real TPU compiler, which needs no TPU; tests/benchmarks/compiles.py has more."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.compiles import GENERATIONS

pytest.importorskip("libtpu")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent


def run(module: str, *arguments: str) -> str:
    """What a benchmark says, from a process of its own: libtpu reads its flags once."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-m", f"tests.benchmarks.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("generation", GENERATIONS)
def test_kernels_compile(generation, tmp_path):
    """Forward and backward; float32 at a length that takes several spans of keys in the backward pass."""
    for dtype, length in (("bfloat16", "128"), ("float32", "16384")):
        file = tmp_path / f"{dtype}.json"
        run("compiles", "--generations", generation, "--types", dtype, "--lengths", length, "--json", str(file))
        [row] = json.loads(file.read_text())
        assert row["kernels"] == 2


def test_the_whole_model_fits(tmp_path):
    """One text of 8192 tokens, with a task for each text, in 1.15 GiB."""
    file = tmp_path / "aot.json"
    run("aot", "forward", "--json", str(file))
    rows = json.loads(file.read_text())
    assert len(rows) == 2
    for row in rows:
        assert row["kernels"] == 1
        assert row["bytes"] <= 1.15 * 2**30
