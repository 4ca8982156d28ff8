"""Two processes that train, are killed and go on; and what other devices make of their checkpoints."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import training

from jina_jax.train import loop
from jina_jax.train.recipe import Log, Mesh

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


class Job:
    """Two processes with four simulated devices each, on a model and records."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base, self.data = training.model(folder / "base"), training.data(folder)

    def __call__(self, run: Path, *kills: str) -> list[int]:
        """Start both; if one dies, the other is killed as well. Returns their exit codes."""
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
        environment |= {"PYTHONPATH": str(HERE.parent), "JINA_JAX_CACHE": str(self.folder / "cache")}
        command = [sys.executable, str(HERE / "training_driver.py"), str(run), str(self.base), str(self.data)]
        command += ["--coordinator", f"127.0.0.1:{port}"]
        with contextlib.ExitStack() as stack:
            both = []
            for number in range(2):
                log = stack.enter_context((self.folder / f"{number}.log").open("wb"))
                kill = ["--kill", kills[number]] if kills and kills[number] else []
                one = [*command, "--process", str(number), *kill]
                both.append(stack.enter_context(subprocess.Popen(one, env=environment, stdout=log, stderr=log)))
                stack.callback(both[-1].kill)
            if kills:
                both[0 if kills[0] else 1].wait(timeout=300)
                for process in both:
                    process.kill()
            codes = [process.wait(timeout=300) for process in both]
        if not kills:
            assert codes == [0, 0], (self.folder / "0.log").read_text()[-4000:]
        return codes


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return Job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def whole(job):
    """A run of two processes that nothing interrupted."""
    job(job.folder / "whole")
    return job.folder / "whole"


def test_a_run_that_was_killed_three_times_ends_in_the_same_bits(job, whole):
    """T10: once at a random step, once in the middle of a save, once while the other process was writing."""
    run = job.folder / "killed"
    rng = np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    first, third = int(rng.integers(2, 6)), int(rng.integers(10, 15))
    kills = [(f"row:{first}", ""), ("save:9", ""), ("", f"save:{12 if third < 12 else 15}")]
    for kill in kills:
        codes = job(run, *kill)
        assert -9 in codes, (kill, (job.folder / "0.log").read_text()[-2000:])
        there = [path.name for path in (run / "checkpoints").iterdir()] if (run / "checkpoints").exists() else []
        if kill[0] == "save:9":
            # The save had begun; the checkpoint before is there.
            assert "6" in there
    job(run)
    assert training.rows(run) == training.rows(whole), kills
    ours, theirs = training.exported(run), training.exported(whole)
    assert ours.keys() == theirs.keys()
    for path, value in theirs.items():
        assert ours[path].tobytes() == value.tobytes(), (path, kills)
    for name in ("MODEL_CARD.md", "recipe.json", "config.json"):
        assert (run / "export" / name).exists()


@pytest.fixture(scope="module")
def alone(job, whole):
    """The same recipe by one process with eight devices."""
    run = job.folder / "alone"
    quiet = {"log": Log(every=1, tensorboard=False)}
    assert loop.train(training.short(job.base, job.data, **quiet), run).finished
    return run


def compare(run: Path, other: Path) -> None:
    rows, others = (list(filter(lambda row: "loss" in row, training.rows(one))) for one in (run, other))
    for one, two in zip(rows, others, strict=True):
        assert abs(one["loss"] - two["loss"]) <= 1e-5 * two["loss"]
        assert one["tokens"] == two["tokens"]
        assert (one["step"], one["dataset"], one["lr"]) == (two["step"], two["dataset"], two["lr"])


def test_two_processes_train_as_one_does(whole, alone):
    """T9: the same data, and a loss within 1e-5."""
    compare(alone, whole)


def test_a_checkpoint_of_two_processes_goes_on_in_one_on_another_mesh(job, whole, tmp_path):
    """T11: it loads, and the steps after it are the same to rounding."""
    run, mesh = tmp_path / "run", Mesh(data=2, fsdp=2, tensor=2)
    shutil.copytree(whole, run)
    shutil.rmtree(run / "export")
    quiet = {"log": Log(every=1, tensorboard=False)}
    assert loop.train(training.short(job.base, job.data, mesh=mesh, **quiet), run, resume="12").finished
    compare(run, whole)
