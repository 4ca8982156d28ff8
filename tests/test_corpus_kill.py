"""Nothing is lost, doubled or half-written, whenever the processes of a corpus job are killed."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import corpora
import pyarrow.parquet as pq
import pytest

import jina_jax

ROOT = Path(__file__).parent.parent
ROWS = (80_000, 70_000, 50_000)
SHARDS = 20 + 18 + 13


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A directory with three inputs, a model and an uninterrupted run; how to start a process; that run's peak."""
    place = tmp_path_factory.mktemp("kill")
    corpora.save_small(place / "small")
    for name, count in zip(("a.parquet", "b.jsonl", "c.txt.gz"), ROWS, strict=True):
        records = [{"id": f"{name[0]}{index}", "text": f"{name[0]} {index}"} for index in range(count)]
        corpora.write(place / "in" / name, records)

    def start(output, process, processes, *options, fault=(), source="in"):
        """A process, which dies at a fault if it has one."""
        program = [str(ROOT / "tests" / "corpus_driver.py"), *map(str, fault)] if fault else ["-m", "jina_jax"]
        arguments = ["embed-corpus", source, "--output", output, "--model", "small", "--shard-rows", "4096", *options]
        return subprocess.Popen(
            [sys.executable, *program, *arguments, "--num-processes", str(processes), "--process-id", str(process)],
            cwd=place,
            env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JINA_JAX_CACHE": str(place / "cache")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    corpora.write(place / "few" / "a.parquet", [{"id": f"a{n}", "text": f"a {n}"} for n in range(10_000)])
    corpora.write(place / "few" / "b.jsonl", [{"id": f"b{n}", "text": f"b {n}"} for n in range(10_000)])
    finish(start("compiled", 0, 1, source="few"))  # compiling takes memory, too
    out, peak = finish(start("whole", 0, 1, "--verify"))
    assert b"every id once" in out
    return place, start, peak


@pytest.mark.slow
def test_killed_at_ten_moments(job):
    place, start, _ = job
    draw = random.Random(5)
    # The manifest is written by process 0; each process writes a few shards in a round.
    faults = [(0, when, "manifest.json", 0) for when in ("middle", "before", "after")]
    faults += [(draw.randrange(2), when, "shards/", draw.randrange(3)) for when in ("middle", "before", "after") * 2]
    for moment, fault in enumerate([*faults, None]):
        resume = ("--resume",) if moment else ()
        victim, *what = fault or (0,)
        processes = [start("out", one, 2, *resume, fault=what if one == victim else ()) for one in range(2)]
        if fault is None:  # at no particular point
            wait_for(lambda: len(shards(place)) > before, processes)  # noqa: B023
            time.sleep(draw.random())
            processes[victim].send_signal(signal.SIGKILL)
        _, err = processes[victim].communicate(timeout=300)
        assert (processes[victim].returncode, err) == (-signal.SIGKILL, b"")
        time.sleep(draw.random() / 4)
        processes[1 - victim].kill()  # the other at any moment, too
        processes[1 - victim].communicate(timeout=300)
        before = len(shards(place))
        assert before < SHARDS
        assert (place / "out" / "manifest.json").exists() == (moment >= 2)
    assert before > 6

    processes = [start("out", one, 2, "--resume", "--verify") for one in range(2)]
    (out, err), nothing = (one.communicate(timeout=300) for one in processes)
    assert [one.returncode for one in processes] == [0, 0]
    assert (err, nothing) == (b"", (b"", b""))
    assert b"every id once" in out
    assert not list((place / "out").rglob(".*"))
    assert corpora.files(place / "out") == corpora.files(place / "whole")
    ids = [id for file in shards(place) for id in pq.read_table(file).column("id").to_pylist()]
    assert ids == [f"a{n}" for n in range(ROWS[0])] + [f"b{n}" for n in range(ROWS[1])] + [
        f"c.txt.gz:{n}" for n in range(ROWS[2])
    ]


@pytest.mark.slow
def test_signals_and_another_number_of_processes(job):
    """SIGTERM and SIGINT end with their codes; other numbers of processes go on."""
    place, start, _ = job
    for count, number in ((2, signal.SIGTERM), (3, signal.SIGINT)):
        shutil.rmtree(place / "other" / "progress", ignore_errors=True)
        processes = [start("other", one, count, "--resume") for one in range(count)]
        wait_for(lambda: len(list((place / "other" / "progress").glob("?.json"))) == count, processes)  # noqa: B023
        time.sleep(1)
        for one in processes:
            one.send_signal(number)
        for one in processes:
            assert one.communicate(timeout=300) == (b"", b"")
            assert one.returncode == 128 + number
        assert not list((place / "other").rglob(".*"))
    out, _ = finish(start("other", 0, 1, "--resume", "--verify"))
    assert b"every id once" in out
    assert corpora.files(place / "other") == corpora.files(place / "whole")


@pytest.mark.slow
def test_embeddings_are_those_of_the_embedder(job):
    place, *_ = job
    texts = [f"b {index}" for index in range(4096)]
    table = pq.read_table(place / "whole" / "shards" / "000020.parquet")
    assert table.column("id").to_pylist() == [f"b{index}" for index in range(4096)]
    expected = jina_jax.Embedder.load(place / "small").encode(texts)
    found = table.column("embedding").combine_chunks().flatten().to_numpy().reshape(expected.shape)
    assert abs(found - expected).max() <= 1e-6


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(job):
    """Ten times the rows: their texts, ids and embeddings alone would be 60 MB."""
    _, start, peak = job
    _, few = finish(start("fewer", 0, 1, "--verify", source="few"))
    assert peak - few < 32 * 2**20, (peak, few)


@pytest.mark.slow
def test_nobody_falls_with_another(job):
    """Processes that a coordinator told their numbers go on without it."""
    place, start, _ = job
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    processes = [start("told", one, 2, "--coordinator", coordinator) for one in range(2)]
    wait_for(lambda: len(shards(place, "told")) > 3, processes)
    processes[0].kill()
    processes[0].communicate(timeout=300)
    assert processes[1].communicate(timeout=300) == (b"", b"")
    assert processes[1].returncode == 0
    finish(start("told", 0, 1, "--resume"))
    assert corpora.files(place / "told") == corpora.files(place / "whole")


def finish(process):
    """What a process that ends well has said, and the bytes that it held at most."""
    out, err = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.communicate()
    assert (process.returncode, err) == (0, b"")
    return out, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def shards(place, output="out"):
    return sorted((place / output / "shards").glob("[!.]*"))


def wait_for(condition, processes):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        assert all(one.poll() is None for one in processes)
        time.sleep(0.01)
