"""Two real processes, four simulated devices each, give what one process gives."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from numerics import EMBEDDING, HIDDEN, assert_close
from test_embedder import MINI
from two_processes import MESHES, TASKS, TEXTS

import jina_jax
from jina_jax import distributed

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model with random weights and the bundled model's tokenizer; its vocabulary is split evenly by no mesh."""
    from conftest import random_variables

    config = jina_jax.Config(
        vocab_size=32_003,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=66,
        matryoshka_dimensions=(8, 64),
    )
    model = jina_jax.Model(config)
    path = tmp_path_factory.mktemp("two") / "model"
    return jina_jax.save(path, model, random_variables(model), layout="original", tokenizer=MINI)


@pytest.fixture(scope="module")
def outcome(checkpoint, tmp_path_factory):
    """Results and facts of both processes."""
    output = tmp_path_factory.mktemp("outcome")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, str(HERE / "two_processes.py"), str(port)]
    paths = environment | {"PYTHONPATH": str(HERE.parent)}
    with contextlib.ExitStack() as stack:
        started = []
        for number in range(2):
            log = stack.enter_context((output / f"{number}.log").open("wb"))
            one = [*command, str(number), str(checkpoint), str(output)]
            started.append(stack.enter_context(subprocess.Popen(one, env=paths, stdout=log, stderr=log)))
            stack.callback(started[-1].kill)
        for number, process in enumerate(started):
            assert process.wait(timeout=600) == 0, (output / f"{number}.log").read_text()[-4000:]
    return [(np.load(output / f"{i}.npz"), json.loads((output / f"{i}.json").read_text())) for i in range(2)]


@pytest.fixture(scope="module")
def alone(checkpoint):
    return jina_jax.Embedder.load(checkpoint)


@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "-".join(map(str, sizes)))
def test_two_processes_give_what_one_gives(outcome, alone, sizes):
    name = "-".join(map(str, sizes))
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 400, (8, 24)).astype(np.int32)
    task = np.array([-1, 0, 1, 2, 3, 4, -1, 2], np.int32)
    hidden = jax.jit(alone.model.apply)(alone.variables, tokens, task=task).hidden
    texts = alone.encode(TEXTS, task=TASKS)
    for results, _ in outcome:
        assert_close(results[f"{name} hidden"], hidden, HIDDEN)
        assert_close(results[f"{name} texts"], texts, EMBEDDING)


@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "-".join(map(str, sizes)))
def test_a_process_reads_its_share_of_the_files(outcome, sizes):
    for _, facts in outcome:
        one = facts["-".join(map(str, sizes))]
        assert 0 < one["read"] <= 1.1 * one["share"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 2, 0), "missing: coordinator"),
        (("localhost:1", None, None), "missing: num_processes, process_id"),
        (("localhost:1", 2, 2), "process_id=2 must be at least 0 and less than num_processes=2"),
    ],
)
def test_what_does_not_make_a_job(arguments, message):
    with pytest.raises(ValueError, match=message):
        distributed.start(*arguments)


def test_one_machine_is_a_job_of_one(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM", "OMPI", "TPU", "KUBERNETES")):
            monkeypatch.delenv(name)
    code = "from jina_jax import distributed; print(*distributed.start())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HERE.parent)
    assert ran.stdout.split() == ["0", "1"]
