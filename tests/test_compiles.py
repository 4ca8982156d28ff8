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
# An older and a newer one in every run; all of them take minutes.
USUAL = ("v5e", "v6e")
ROOT = Path(__file__).parent.parent


def run(module: str, *arguments: str) -> str:
    """What a benchmark says, from a process of its own: libtpu reads its flags once."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-m", f"tests.benchmarks.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "generation", [pytest.param(name, marks=[pytest.mark.nightly] * (name not in USUAL)) for name in GENERATIONS]
)
def test_kernels_compile(generation, tmp_path):
    """Forward and backward; float32 at a length that takes several spans of keys in the backward pass."""
    for dtype, length in (("bfloat16", "128"), ("float32", "16384")):
        file = tmp_path / f"{dtype}.json"
        run("compiles", "--generations", generation, "--types", dtype, "--lengths", length, "--json", str(file))
        [row] = json.loads(file.read_text())
        assert row["kernels"] == 2


@pytest.mark.nightly
def test_the_whole_model_fits(tmp_path):
    """A text of 8192 tokens with a task, alone on a chip or spread over eight, in 1.15 GiB."""
    file = tmp_path / "aot.json"
    run("aot", "--machines", "v5e-8", "--programs", "long", "--json", str(file))
    rows = json.loads(file.read_text())
    assert [row["mesh"] for row in rows] == ["data=8", "sequence=8"]
    for row in rows:
        assert set(row["kernels"].values()) <= {24, 7 * 24}  # in each layer, and for each step of the ring
        assert row["arguments"] + row["temporary"] <= 1.15 * 2**30
    assert rows[0]["collectives"] == 0
