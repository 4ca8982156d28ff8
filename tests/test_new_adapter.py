"""A new user's walk: pairs of a language that nobody knows, a sixth adapter, and everything else as it was."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import jina_jax

ROOT = Path(__file__).parent.parent
DATA = ROOT / "configs" / "data"
TEXTS = ["besa miku, in the hall?", "Clock in the hall is dirty: wait.", "Wo ist die Bibliothek?", ""]


def run(*arguments: str, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], env=environment, cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """What the README says; the directory, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("walk")
    began = time.monotonic()
    files = ["--data", str(DATA / "jargon.jsonl"), "--eval-data", str(DATA / "jargon.eval.jsonl")]
    run("jina_jax", "train", str(ROOT / "configs" / "new_adapter.py"), *files, "--task", "my-domain", cwd=folder)
    return folder, time.monotonic() - began


@pytest.mark.slow
def test_500_pairs_make_an_adapter_that_finds_held_out_ones(walk):
    folder, seconds = walk
    assert len((DATA / "jargon.jsonl").read_text().splitlines()) == 500
    results = json.loads((folder / "runs" / "new_adapter" / "export" / "training.json").read_text())["results"]
    before, after = (results[when]["jargon"]["metrics"]["ndcg@10"] for when in ("before", "after"))
    assert after["384"] >= before["384"] + 0.10
    assert seconds < 300


@pytest.mark.slow
def test_the_other_tasks_give_what_they_gave_to_the_bit(walk):
    export = walk[0] / "runs" / "new_adapter" / "export"
    base, ours = jina_jax.Embedder.load("mini"), jina_jax.Embedder.load(export)
    assert ours.config.tasks == (*base.config.tasks, "my-domain")
    for task in base.config.tasks:
        np.testing.assert_array_equal(ours.encode(TEXTS, task=task), base.encode(TEXTS, task=task))
    bare = base.encode(TEXTS)
    np.testing.assert_array_equal(ours.encode(TEXTS), bare)
    new = ours.encode(TEXTS, task="my-domain")
    assert np.abs(new - bare).max() > 0.01
    # Mixed with others in one batch, too.
    mixed = ours.encode(TEXTS, task=["my-domain", None, "separation", "my-domain"])
    np.testing.assert_allclose(mixed[[0, 3]], new[[0, 3]], atol=1e-6)


@pytest.mark.slow
def test_it_goes_into_both_public_layouts(walk):
    """The export is the one; `convert` makes the other."""
    folder = walk[0]
    export = folder / "runs" / "new_adapter" / "export"
    run("convert", "to-torch", str(export), str(folder / "original"), "--layout", "original", cwd=ROOT)
    ours, other = (jina_jax.Embedder.load(path) for path in (export, folder / "original"))
    for task in ours.config.tasks:
        np.testing.assert_array_equal(ours.encode(TEXTS, task=task), other.encode(TEXTS, task=task))
