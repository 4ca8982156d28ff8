import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import corpora
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numerics import EMBEDDING, assert_close

import jina_jax
from jina_jax import cli
from jina_jax.corpus import inputs, plan, progress, shards, store, verification
from jina_jax.records import HOST, whole_file

EMBEDDERS = {}
LOAD, LOCAL_MESH = jina_jax.Embedder.load, cli._local_mesh


@pytest.fixture(autouse=True)
def _environment(monkeypatch, tmp_path):
    """No settings from outside, files in a place of their own, nobody waited for, every model loaded once."""
    for name in list(os.environ):
        if name.startswith("JINA_JAX_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("JINA_JAX_CACHE", "off")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.0)
    monkeypatch.setattr(cli, "_local_mesh", lambda: None)

    def load(name, dtype="float32", mesh=None):
        key = Path(name).resolve(), dtype, mesh
        return EMBEDDERS.get(key) or EMBEDDERS.setdefault(key, LOAD(name, dtype=dtype, mesh=mesh))

    monkeypatch.setattr(jina_jax.Embedder, "load", load)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return corpora.save_small(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def embed(capsys, small):
    """Embed a corpus to "out"; gives the exit code, stdout and stderr."""

    def call(*arguments, output="out"):
        code = cli.main(["embed-corpus", "--output", output, "--model", small, *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def done(embed):
    """Embed a corpus well; gives its rows."""

    def call(*arguments, output="out"):
        code, out, err = embed(*arguments, output=output)
        assert (code, err) == (0, "")
        assert out.startswith(f"{output}: ")
        return corpora.read(output)

    return call


@pytest.fixture
def fails(embed):
    """Embed what must fail; gives the message."""

    def call(*arguments, code=2, output="out"):
        found, out, err = embed(*arguments, output=output)
        assert (found, out) == (code, "")
        assert err.startswith("jina-jax: error: ")
        assert "Traceback" not in err
        return err

    return call


def numbers(table):
    return np.stack(table.column("embedding").to_pylist())


# ---- Input -----------------------------------------------------------------------------------------------------

RECORDS = corpora.rows(30)


@pytest.mark.parametrize("shard_rows", ["1", "7", "1000"])
@pytest.mark.parametrize("ending", [*inputs.ENDINGS, "dataset", "splits"])
def test_every_format(done, small, ending, shard_rows):
    if ending == "dataset":
        name = corpora.save_dataset("d", RECORDS)
    elif ending == "splits":
        corpora.save_dataset("d/train", RECORDS[15:])
        corpora.save_dataset("d/test", RECORDS[:15], files=1)
        Path("d/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
        name = "d"
    else:
        options = {"row_group_size": 11} if ending == ".parquet" else {}
        name = corpora.write(f"c{ending}", RECORDS, **options)
    table = done(name, "--shard-rows", shard_rows, "--verify")
    texts = [one["text"] for one in RECORDS]
    ids = [f"{name}:{row}" for row in range(30)] if ".txt" in ending else [one["id"] for one in RECORDS]
    assert table.column("id").to_pylist() == ids
    assert table.schema.field("embedding").type == pa.list_(pa.field("element", pa.float32(), nullable=False), 32)
    assert_close(numbers(table), jina_jax.Embedder.load(small).encode(texts), EMBEDDING)


def test_a_directory_a_glob_and_urls(done):
    parts = [RECORDS[:10], RECORDS[10:20], RECORDS[20:]]
    for name, part in zip(("b/x.jsonl", "a.parquet", "c.txt"), parts, strict=True):
        corpora.write(f"d/{name}", part)
    for name in ("_SUCCESS.txt", ".hidden.txt", "README.md", ".git/x.txt"):
        Path("d", name).parent.mkdir(exist_ok=True)
        Path("d", name).write_text("not a part of it\n")
    first = done("d", output="o1")
    ids = [one["id"] for one in (*parts[1], *parts[0])] + [f"c.txt:{row}" for row in range(10)]
    assert first.column("id").to_pylist() == ids
    for number, arguments in enumerate((["d/*", "--shard-rows", "8192"], [f"file://{Path('d').resolve()}"]), 2):
        assert done(*arguments, output=f"o{number}").equals(first)
        assert corpora.files(f"o{number}") == corpora.files("o1")
    assert done("d/c.txt", "d/b", output="o4").column("id").to_pylist()[:2] == ["c.txt:0", "c.txt:1"]


def test_object_stores(embed):
    """On another file system, in and out; nothing is renamed there."""
    memory = fsspec.filesystem("memory")
    for name in ("c.jsonl.gz", "c.parquet", "d/c.txt", "d/c.txt.zst"):
        memory.pipe_file(f"/in/{name}", Path(corpora.write(name, corpora.rows(30, name))).read_bytes())
    try:
        code, out, err = embed("memory://in/", "--shard-rows", "8", "--verify", output="memory://out")
        assert (code, err) == (0, "")
        found = {Path(path).name: memory.cat_file(path) for path in memory.find("/out/shards")}
        assert len(found) == 16
        assert "problems" not in out
        memory.rm_file("/out/shards/000002.parquet")
        memory.pipe_file("/out/shards/000005.parquet", b"half")
        assert embed("memory://in/", "--shard-rows", "8", "--resume", output="memory://out")[0] == 0
        assert {Path(path).name: memory.cat_file(path) for path in memory.find("/out/shards")} == found
        Path("in").mkdir()
        memory.get("/in", ".", recursive=True)
        assert embed("in", "--shard-rows", "8")[0] == 0
        assert {name: content for name, content in corpora.files("out").items() if name != "manifest.json"} == found
    finally:
        memory.rm("/", recursive=True)


def test_ids(done):
    """As given, as strings; otherwise the input below what all inputs share, and the row."""
    corpora.write("d/a/x.parquet", [{"key": 7, "text": "a"}, {"key": None, "text": "b"}])
    corpora.write("d/b/x.jsonl", [{"key": "k", "text": "c"}, {"text": "d"}, {"key": -3, "text": "e"}])
    Path("d/b/y.jsonl").write_text('\n"bare"\n\n{"text": "f"}\n')
    assert done("d/a/x.parquet", "d/b", "--id-column", "key", output="o1").column("id").to_pylist() == [
        *("7", "a/x.parquet:1", "k", "b/x.jsonl:1", "-3", "b/y.jsonl:0", "b/y.jsonl:1"),
    ]
    assert done("d/b/x.jsonl", output="o2").column("id").to_pylist() == ["x.jsonl:0", "x.jsonl:1", "x.jsonl:2"]


def test_tasks(done, small):
    """Of the row, else of the option; from a column "task" unless another is named."""
    embedder = jina_jax.Embedder.load(small)
    records = [{"text": "a", "task": "separation", "kind": "text-matching"}, {"text": "b", "kind": "classification"}]
    files = [corpora.write("r.jsonl", records), corpora.write("r.parquet", records)]
    for number, (options, tasks) in enumerate(
        (
            ([], ["separation", None]),
            (["--task", "retrieval.query"], ["separation", "retrieval.query"]),
            (["--task-column", "kind"], ["text-matching", "classification"]),
            (["--task-column", "", "--task", "retrieval.passage"], ["retrieval.passage", "retrieval.passage"]),
        )
    ):
        expected = embedder.encode(["a", "b"] * 2, task=tasks * 2)
        assert_close(numbers(done(*files, *options, output=f"o{number}")), expected, EMBEDDING)


def test_options_reach_the_embedder(done, small):
    embedder = jina_jax.Embedder.load(small)
    long = {"text": "of " * 60}
    name = corpora.write("c.jsonl", [*RECORDS, long])
    texts = [one["text"] for one in RECORDS] + [long["text"]]
    ranges = jina_jax.calibrate(embedder.encode(texts, dimensions=16))
    np.save("ranges.npy", ranges)
    for number, (options, expected) in enumerate(
        (
            (["--task", "retrieval.query", "--no-prompts"], {"task": "retrieval.query", "prompts": False}),
            (["--dimensions", "5"], {"dimensions": 5}),
            (["--no-normalize", "--batch-tokens", "64"], {"normalize": False}),
            (["--long", "windows"], {"truncate": False}),
            (["--precision", "float16"], {"precision": "float16"}),
            (["--precision", "int8"], {"precision": "int8"}),
            (["--precision", "uint8", "--dimensions", "8"], {"precision": "uint8", "dimensions": 8}),
            (["--precision", "binary"], {"precision": "binary"}),
            (["--precision", "ubinary", "--dimensions", "20"], {"precision": "ubinary", "dimensions": 20}),
            (
                ["--precision", "int8", "--dimensions", "16", "--ranges", "ranges.npy"],
                {"precision": "int8", "dimensions": 16, "ranges": ranges},
            ),
        )
    ):
        table = done(name, *options, "--verify", output=f"o{number}")
        expected = embedder.encode(texts, **expected)
        found = numbers(table).astype(expected.dtype)
        assert table.schema.field("embedding").type.value_type == pa.from_numpy_dtype(expected.dtype)
        if expected.dtype == np.float32:
            scale = np.abs(expected).max() if "--no-normalize" in options else 1
            assert_close(found, expected, EMBEDDING * scale)
        else:  # a last bit of the float32 numbers may turn a step
            assert np.mean(found != expected) < 0.01


def test_chunks(done, small):
    embedder = jina_jax.Embedder.load(small)
    texts = ["One two. Three four. Five.", "", "Six.", " ", "of. " * 60, "Seven. Eight."]
    tasks = ["separation", None, None, "separation", None, "retrieval.passage"]
    pairs = enumerate(zip(texts, tasks, strict=True))
    records = [{"id": f"d{number}", "text": text, "task": task} for number, (text, task) in pairs]
    table = done(corpora.write("c.jsonl", records), "--chunks", "sentences", "--shard-rows", "4", "--verify")
    assert table.column_names == ["id", "chunk", "start", "end", "status", "embedding"]
    expected = [
        (f"d{number}", chunk, start, end, status)
        for number, (text, task) in enumerate(zip(texts, tasks, strict=True))
        for one in [embedder.encode_chunks(text, chunker="sentences", task=task, truncate=True)]
        for chunk, ((start, end), status) in enumerate(zip(one.spans.tolist(), one.status, strict=True))
    ]
    found = table.drop_columns("embedding").to_pylist()
    assert [tuple(row.values()) for row in found] == expected
    assert {"whole", "truncated"} <= {row[-1] for row in expected}
    vectors = [
        embedder.encode_chunks(text, chunker="sentences", task=task, truncate=True).embeddings
        for text, task in zip(texts, tasks, strict=True)
    ]
    assert_close(numbers(table), np.concatenate(vectors), EMBEDDING)
    assert len(done(corpora.write("e.txt", [{"text": ""}]), "--chunks", "4", "--verify", output="o2")) == 0


def test_output_within_input(done):
    corpora.write("c.jsonl", RECORDS)
    first = done(".", output="out")
    Path("out/shards/000000.parquet").unlink()
    assert done(".", "--resume", output="out").equals(first)


def test_all_devices_of_a_process(monkeypatch, done, small):
    monkeypatch.setattr(cli, "_local_mesh", LOCAL_MESH)
    table = done(corpora.write("c.jsonl", RECORDS), "--task", "retrieval.passage")
    [split] = [embedder for (_, _, mesh), embedder in EMBEDDERS.items() if mesh is not None]
    assert split.mesh.size == 8
    expected = jina_jax.Embedder.load(small).encode([one["text"] for one in RECORDS], task="retrieval.passage")
    assert_close(numbers(table), expected, EMBEDDING)


def test_an_empty_corpus(embed):
    Path("e.jsonl").touch()
    assert embed("e.jsonl", "--verify")[0] == 0
    assert os.listdir("out/shards") == []


def test_compiled_options_have_environment_variables(embed, monkeypatch):
    corpora.write("c.jsonl", [{"body": "a", "key": 1}])
    monkeypatch.setenv("JINA_JAX_TEXT_COLUMN", "body")
    monkeypatch.setenv("JINA_JAX_ID_COLUMN", "key")
    monkeypatch.setenv("JINA_JAX_SHARD_ROWS", "5")
    assert embed("c.jsonl")[0] == 0
    assert json.loads(Path("out/manifest.json").read_text())["shard_rows"] == 5
    monkeypatch.setenv("JINA_JAX_RESUME", "1")
    assert embed("c.jsonl")[0] == 0


# ---- Several processes, and going on -----------------------------------------------------------------------------


@pytest.fixture
def corpus():
    """Three inputs of different formats, and the options that cut them into 12 shards."""
    corpora.write("in/a.parquet", corpora.rows(37, "a"), row_group_size=9)
    corpora.write("in/b.jsonl", corpora.rows(41, "b"))
    corpora.write("in/c.txt.gz", corpora.rows(20, "c"))
    return ["in", "--shard-rows", "9"]


def test_processes_share_the_work(done, embed, corpus):
    whole = done(*corpus, output="whole")
    assert embed(*corpus, "--num-processes", "3", "--process-id", "0", output="out")[0] == 0
    assert sorted(os.listdir("out/shards")) == [f"00000{n}.parquet" for n in (0, 3, 6, 9)] + ["000012.parquet"]
    code, out, _ = embed(*corpus, "--num-processes", "3", "--process-id", "2", output="out")
    assert (code, out) == (0, "")  # process 0 speaks for all
    code, out, _ = embed(*corpus, "--num-processes", "3", "--process-id", "0", "--resume", output="out")
    assert "; 4 shards are left to processes that have not begun" in out
    assert embed(*corpus, "--num-processes", "3", "--process-id", "1", output="out")[0] == 0
    assert corpora.read("out").equals(whole)
    assert corpora.files("out") == corpora.files("whole")
    assert embed(*corpus, "--num-processes", "5", "--process-id", "0", "--resume", "--verify", output="out")[0] == 0


def test_a_shard_depends_on_nothing_outside_it(done, corpus):
    done(*corpus, output="whole")
    expected = corpora.files("whole")
    for number in range(13):
        shutil.copytree("whole", "out")
        for file in sorted(Path("out/shards").iterdir()):
            if file.name != f"{number:06d}.parquet":
                file.unlink()
        done(*corpus, "--resume")
        assert corpora.files("out") == expected
        shutil.rmtree("out")


def test_what_is_not_whole_is_done_again(done, corpus):
    done(*corpus)
    expected = corpora.files("out")
    kept = Path("out/shards/000003.parquet")
    before = kept.stat().st_mtime_ns
    Path("out/shards/000000.parquet").unlink()
    Path("out/shards/000001.parquet").write_bytes(expected["000001.parquet"][:-20])
    Path("out/shards/000002.parquet").write_bytes(b"")
    Path("out/shards/000004.parquet").write_bytes(expected["000005.parquet"])
    pq.write_table(pa.table({"x": [1]}), "out/shards/000006.parquet")
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    leftovers = [
        Path(f"out/shards/.000000.parquet.{HOST}.{int(dead.stdout)}.tmp"),
        Path(f"out/.manifest.json.{HOST}.{os.getpid()}.tmp"),
        Path("out/progress/.1.json.elsewhere.1.tmp"),
    ]
    living = [
        Path(f"out/shards/.000007.parquet.{HOST}.{os.getppid()}.tmp"),
        Path("out/shards/.000008.parquet.elsewhere.1.tmp"),
    ]
    for file in (*leftovers, *living):
        file.write_bytes(b"half")
    os.utime(leftovers[2], (0, 0))
    done(*corpus, "--resume")
    assert not any(file.exists() for file in leftovers)
    assert all(file.exists() for file in living)
    for file in living:
        file.unlink()
    assert corpora.files("out") == expected
    assert kept.stat().st_mtime_ns == before


def test_an_earlier_run_is_not_written_over(done, fails, corpus):
    done(*corpus)
    assert "out holds an earlier run; finish it with --resume, or choose another directory" in fails(*corpus)
    Path("out/manifest.json").unlink()
    assert "out holds an earlier run" in fails(*corpus)
    done(*corpus, "--resume")


def test_what_was_begun_differently_is_refused_with_the_differences(done, fails, corpus, tmp_path):
    done(*corpus)
    expected = corpora.files("out")
    for options, difference in (
        (["--dimensions", "8"], "! dimensions: was null, now 8"),
        (["--task", "separation"], '! task: was null, now "separation"'),
        (["--chunks", "4"], "! chunks: was null, now 4"),
        (["--no-normalize"], "! normalize: was true, now false"),
        (["--precision", "int8"], '! precision: was "float32", now "int8"'),
        (["--dtype", "bfloat16"], '! dtype: was "float32", now "bfloat16"'),
        (["--shard-rows", "8"], "! shard_rows: was 9, now 8"),
        (["--id-column", "id"], '! columns: was {"text": "text", "id": null'),
    ):
        message = fails(*corpus, "--resume", *options)
        assert difference in message
        assert message.count("\n") == 2
    message = fails("in/a.parquet", "in/b.jsonl", "--shard-rows", "9", "--resume")
    assert "- c.txt.gz: was an input, is none now" in message
    message = fails("in/b.jsonl", "in/a.parquet", "in/c.txt.gz", *corpus[1:], "--resume")
    assert "another order" in message
    corpora.write("in/d.txt", RECORDS)
    assert "+ d.txt: is an input now, was none" in fails(*corpus, "--resume")
    Path("in/d.txt").unlink()
    # One letter, in the middle of a file of the same size.
    for name, change in (("b.jsonl", b"b word 1"), ("a.parquet", b"")):
        file = Path("in", name)
        content = file.read_bytes()
        if change:
            assert change in content
            file.write_bytes(content.replace(change, b"B word 1", 1))
        else:
            corpora.write(file, corpora.rows(36, "a"), row_group_size=9)
        assert f"! {name}: has changed (" in fails(*corpus, "--resume")
        file.write_bytes(content)
    # The same content elsewhere and later is the same.
    shutil.copytree("in", "moved")
    done("moved", *corpus[1:], "--resume")
    assert corpora.files("out") == expected


def test_another_model_is_refused(embed, fails, corpus, small, tmp_path):
    assert embed(*corpus)[0] == 0
    shutil.copytree(small, "other")
    file = Path("other/tokenizer.json")
    file.write_text(file.read_text() + "\n")
    assert "! model: was " in fails(*corpus, "--resume", "--model", "other")
    file.write_bytes(Path(small, "tokenizer.json").read_bytes())
    assert embed(*corpus, "--resume", "--model", "other")[0] == 0


def test_process_0_plans_and_the_others_wait(monkeypatch, embed, corpus, small):
    monkeypatch.setattr(plan, "POLL_SECONDS", 0.01)
    written = store.Store.write

    def late(self, name, content):
        """The other process is there before the manifest."""
        if name == "manifest.json":
            assert waited.wait(60)
        return written(self, name, content)

    waited, results = threading.Event(), []
    monkeypatch.setattr(store.Store, "write", late)
    monkeypatch.setattr(plan.time, "sleep", lambda _: waited.set())
    monkeypatch.setattr(cli, "_termination", cli.contextlib.nullcontext)  # signals are for the main thread

    def other():
        options = ("--output", "out", "--model", small, "--num-processes", "2", "--process-id", "1")
        results.append(cli.main(["embed-corpus", *corpus, *options]))

    thread = threading.Thread(target=other)
    thread.start()
    assert embed(*corpus, "--num-processes", "2", "--process-id", "0")[0] == 0
    thread.join()
    assert results == [0]
    assert len(os.listdir("out/shards")) == 13


def test_progress(monkeypatch, capsys):
    """Process 0 adds up what all tell in this run, and knows who is silent."""
    from jina_jax.embedder import Usage

    monkeypatch.setattr(progress, "SILENT_SECONDS", 60.0)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    place = store.Store("out")
    place.make()
    place.write("progress/2.json", b'{"rows": 99, "tokens": 99, "truncated": 99, "done": 99}')
    usages = [Usage(), Usage(), Usage()]
    told = [progress.Progress(place, process, [10, 0, 5], 100, usages[process]) for process in range(3)]
    usages[0].texts, usages[1].texts, usages[1].tokens = 4, 6, 60
    with told[1].shown(), told[0].shown():
        pass
    assert told[0].sum() == {"rows": 10, "tokens": 60, "truncated": 0}
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("jina-jax: 25 of 100 rows, ")
    assert told[0].alive(1)
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.0)
    assert not told[0].alive(1)
    assert set(told[0].seen) == {0, 1}


def test_a_bar_at_a_terminal(monkeypatch, embed, corpus):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, out, err = embed(*corpus)
    assert code == 0
    assert "98/98" in err
    assert out.startswith("out: 98 rows; in this run 98 rows, ")
    Path("out/shards/000000.parquet").unlink()
    code, out, err = embed(*corpus, "--resume")
    assert "| 89/98" in err
    assert "98/98" in err
    assert out.startswith("out: 98 rows; in this run 9 rows, ")


def test_a_process_that_fell_silent_is_missed(monkeypatch, embed, fails, corpus):
    """A process that told something in this run and left shards undone has died."""
    assert embed(*corpus, "--num-processes", "2", "--process-id", "0")[0] == 0
    looked = progress.Progress._look

    def dying(self, other):
        self._store.write(f"progress/{other}.json", b'{"rows": 1, "tokens": 1, "truncated": 0, "done": 1}')
        looked(self, other)

    monkeypatch.setattr(progress.Progress, "_look", dying)
    message = fails(*corpus, "--num-processes", "2", "--process-id", "0", "--resume", code=1)
    assert "process 1: not heard of any more" in message


# ---- When things go wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_tidily(monkeypatch, embed, done, corpus, number):
    done(*corpus, output="whole")
    written = store.Store.write

    def interrupted(self, name, content):
        written(self, name, content)
        if name == "shards/000004.parquet":
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "write", interrupted)
        assert embed(*corpus) == (128 + number, "", "")
    assert len(os.listdir("out/shards")) in (5, 6)
    done(*corpus, "--resume")
    assert corpora.files("out") == corpora.files("whole")


@pytest.mark.parametrize("name", ["manifest.json", "000005.parquet"])
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk(monkeypatch, done, fails, corpus, name, call):
    done(*corpus, output="whole")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(*_):
        raise full

    class Full:
        def __init__(self, handle):
            self.handle = handle

        def __getattr__(self, key):
            return getattr(self.handle, key)

        def write(self, content):
            self.handle.write(content[: len(content) // 2])
            raise full

    @cli.contextlib.contextmanager
    def file(path):
        if path.name != name:
            with whole_file(path) as handle:
                yield handle
            return
        with monkeypatch.context() as patch:
            if call != "write":
                patch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), refuse)
            with whole_file(path) as handle:
                yield Full(handle) if call == "write" else handle

    with monkeypatch.context() as patch:
        patch.setattr(store, "whole_file", file)
        message = fails(*corpus, code=1)
    folder = "out" if name == "manifest.json" else "out/shards"
    expected = f"{folder}/{name}: No space left on device; what is finished is kept, --resume goes on from there\n"
    assert message == f"jina-jax: error: {expected}"
    assert list(Path("out").rglob("*.tmp")) == []
    done(*corpus, "--resume")
    assert corpora.files("out") == corpora.files("whole")


def test_a_write_that_fails_in_the_middle(done, corpus, small):
    """Files of at most 4 KiB: a real error of the system, half-way through a shard."""
    done(*corpus, output="whole")
    command = [sys.executable, "-m", "jina_jax", "embed-corpus", *corpus, "--output", "out", "--model", small]
    environment = os.environ | {"PYTHONPATH": str(corpora.MINI.parent.parent), "JINA_JAX_NUM_PROCESSES": "1"}
    failed = subprocess.run(
        ["sh", "-c", 'ulimit -f 4; exec "$@"', "sh", *command, "--process-id", "0"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "out/shards/000000.parquet: File too large; what is finished is kept" in failed.stderr
    assert os.listdir("out/shards") == []
    done(*corpus, "--resume")
    assert corpora.files("out") == corpora.files("whole")


def test_a_directory_that_cannot_be_written(monkeypatch, done, fails, corpus):
    done(*corpus, output="whole")
    read_only = OSError(errno.EROFS, os.strerror(errno.EROFS), "out")

    def refuse(*_, **__):
        raise read_only

    with monkeypatch.context() as patch:
        patch.setattr(fsspec.implementations.local.LocalFileSystem, "makedirs", refuse)
        assert fails(*corpus, code=1) == "jina-jax: error: out: Read-only file system\n"
    with monkeypatch.context() as patch:
        patch.setattr(store, "whole_file", refuse)
        assert "out/manifest.json: Read-only file system; what is finished" in fails(*corpus, code=1)
    done(*corpus)
    Path("out/shards/000001.parquet").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(store, "whole_file", refuse)
        assert "out/shards/000001.parquet: Read-only file system" in fails(*corpus, "--resume", code=1)
    done(*corpus, "--resume")
    assert corpora.files("out") == corpora.files("whole")
    Path("file").touch()
    assert "file is a file; --output takes a directory" in fails(*corpus, output="file")
    assert fails(*corpus, output="file/below", code=2)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON"),
        ('{"title": "no text"}', 'must be a string or an object with a string "text"'),
        ('{"text": "a", "id": 1.5}', '"id" must be a string or a whole number, not 1.5'),
        ('{"text": "a", "id": "\\ud800"}', "the id '\\ud800' is not valid Unicode"),
        ('{"text": "a", "task": "nope"}', "unknown task 'nope'; this model has: retrieval.query"),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
def test_malformed_records_are_told_before_anything_is_done(fails, line, problem, ending):
    content = ('{"text": "fine"}\n\n' * 20 + line + "\n").encode()
    name = f"r.{ending}"
    Path(name).write_bytes(gzip.compress(content) if ending == "jsonl.gz" else content)
    message = fails(name, "--shard-rows", "4")
    assert f"{name}:41: " in message
    assert problem in message
    assert os.listdir("out/shards") == []


def test_files_that_cannot_be_read(fails):
    for name, content, problem in (
        ("a.txt", b"fine\ncaf\xe9\n", "a.txt:2: not UTF-8 at byte 3"),
        ("b.jsonl.gz", b"not packed", "b.jsonl.gz: cannot be read"),
        ("c.txt.zst", pa.compress(b"text\n" * 1000, "zstd", asbytes=True)[:-4], "c.txt.zst: cannot be read (Truncated"),
        ("d.txt.gz", gzip.compress(b"text\n" * 1000)[:-12], "d.txt.gz: cannot be read (Truncated"),
        ("e.parquet", b"not a table", "e.parquet: cannot be read"),
        ("f.parquet", b"", "f.parquet: cannot be read"),
        ("g.csv", b"a,b\n", "g.csv: not a format that is read; there are .txt"),
    ):
        Path(name).write_bytes(content)
        assert problem in fails(name)
    assert "nope.txt: no such input" in fails("nope.txt")
    assert "*.jsonl: no such input" in fails("*.jsonl")
    Path("empty").mkdir()
    assert "empty: no such input" in fails("empty")
    Path("z.txt").write_text("z\n")
    assert "z.txt is given twice" in fails("z.txt", "z*.txt")


def test_columns_that_are_not_there(fails):
    records = [{"body": "a", "key": 1.5, "number": 3, "task": "nope"}]
    for ending in ("parquet", "jsonl"):
        name = corpora.write(f"c.{ending}", records)
        there = "there are: body, key, number, task"
        assert f"no column 'text'; {there}" in fails(name)
        assert f"no column 'id'; {there}" in fails(name, "--text-column", "body", "--id-column", "id")
        assert f"no column 'kind'; {there}" in fails(name, "--text-column", "body", "--task-column", "kind")
        message = fails(name, "--text-column", "body")
        assert "unknown task 'nope'" in message
        assert "--task-column names another column, or '' none" in message
    assert "column 'number' holds int64, but must hold strings" in fails("c.parquet", "--text-column", "number")
    message = fails("c.parquet", "--text-column", "body", "--id-column", "key")
    assert "column 'key' holds double, but must hold strings or whole numbers" in message
    records = [{"text": "a"}, {"text": None}]
    assert "n.parquet: column 'text' has 1 rows without a text" in fails(corpora.write("n.parquet", records))
    name = corpora.write("n.parquet", records, write_statistics=False)
    assert "n.parquet, row 1: has no text" in fails(name)


def test_mistakes_in_options(fails, corpus, small):
    corpora.write("c.jsonl", [{"text": "fine"}, {"text": "of " * 60}])
    assert "dimensions=33 must be a whole number from 1 to 32" in fails(*corpus, "--dimensions", "33")
    assert "unknown task 'nope'" in fails(*corpus, "--task", "nope")
    assert "c.jsonl, from row 0: text 1 has 62 tokens, the model takes 48" in fails("c.jsonl", "--long", "error")
    np.save("r.npy", np.zeros((2, 3)))
    assert "ranges have shape (2, 3), not (2, 32)" in fails(*corpus, "--precision", "int8", "--ranges", "r.npy")
    Path("r.npy").write_bytes(b"no array")
    assert "r.npy: not an array of numbers" in fails(*corpus, "--precision", "int8", "--ranges", "r.npy")
    assert "No such file" in fails(*corpus, "--precision", "int8", "--ranges", "nope.npy")
    assert "nothing to embed; pass files" in fails()
    assert "--num-processes and --process-id go together" in fails(*corpus, "--num-processes", "2")
    assert "--process-id 2 must be less than" in fails(*corpus, "--num-processes", "2", "--process-id", "2")
    assert "'x' is not a whole number of at least 0" in fails(*corpus, "--process-id", "x")


def test_an_input_that_changes_meanwhile(monkeypatch, fails):
    corpora.write("c.jsonl", RECORDS)
    settled = plan.settle

    def changing(*arguments, **options):
        manifest = settled(*arguments, **options)
        corpora.write("c.jsonl", corpora.rows(29))
        return manifest

    monkeypatch.setattr(plan, "settle", changing)
    assert "c.jsonl: changed while it was read" in fails("c.jsonl")


def test_numbers_that_are_not_finite(monkeypatch, fails):
    corpora.write("c.jsonl", RECORDS)
    encode = jina_jax.Embedder.encode_groups
    monkeypatch.setattr(jina_jax.Embedder, "encode_groups", lambda *a, **b: (x * np.nan for x in encode(*a, **b)))
    assert "not finite" in fails("c.jsonl", code=1)
    assert os.listdir("out/shards") == []


def test_the_extra_is_named_where_it_is_missing(small):
    Path("c.txt").write_text("a\n")
    code = (
        "import sys; sys.modules['pyarrow'] = None; from jina_jax.cli import main;"
        f"sys.exit(main(['embed-corpus', 'c.txt', '--output', 'out', '--model', {small!r}]))"
    )
    environment = os.environ | {"PYTHONPATH": str(corpora.MINI.parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("jina-jax: error: ")
    assert done.stderr.endswith("pip install 'jina-jax[corpus]'\n")


# ---- Verification ----------------------------------------------------------------------------------------------


def test_verify_finds_what_is_wrong(embed, done, corpus):
    done(*corpus)
    expected = corpora.files("out")
    code, out, err = embed("--verify")
    assert (code, err) == (0, "")
    assert out.startswith("out: 98 rows in 13 shards, ")
    assert out.endswith(": all there, whole, and every id once\n")

    def rewrite(name, change):
        """A shard with other rows, whose footer says what it said."""
        table = pq.read_table(f"out/shards/{name}")
        facts = json.loads(table.schema.metadata[shards.KEY])
        table = change(table)
        content = bytes(shards.pack(table, facts))
        Path("out/shards", name).write_bytes(content)

    def scaled(table):
        return shards.texts(table.column("id").to_pylist(), numbers(table).astype(np.float32) * 1.01)

    def not_finite(table):
        return shards.texts(table.column("id").to_pylist(), numbers(table).astype(np.float32) * np.float32(np.nan))

    def same_ids(table):
        return shards.texts(["b1"] * len(table), numbers(table).astype(np.float32))

    Path("out/shards/000000.parquet").unlink()
    Path("out/shards/000001.parquet").write_bytes(expected["000001.parquet"][:100])
    Path("out/shards/000002.parquet").write_bytes(expected["000003.parquet"])
    damaged = bytearray(expected["000003.parquet"])
    damaged[len(damaged) // 3] ^= 1
    Path("out/shards/000003.parquet").write_bytes(damaged)
    rewrite("000004.parquet", scaled)
    rewrite("000005.parquet", not_finite)
    rewrite("000006.parquet", lambda table: table.slice(1))
    rewrite("000007.parquet", same_ids)
    Path("out/shards/000099.parquet").write_bytes(b"")
    code, out, err = embed("--verify")
    assert (code, err) == (1, "")
    head, *problems = out.splitlines()
    assert head.endswith(f": {len(problems)} problems")
    for problem in (
        "000000.parquet: missing",
        "000001.parquet: not readable",
        "000002.parquet: not of this manifest",
        "000003.parquet: its rows are not those that were written",
        "000004.parquet: 1 embeddings have not unit length",
        "000005.parquet: holds numbers that are not finite",
        "000006.parquet: has 8 rows instead of 9",
        "000099.parquet: not in the manifest",
        "id 'b1' stands more than once",
    ):
        assert problem in out
    assert len(problems) == 9


def test_duplicate_ids(embed, monkeypatch):
    """Found at verification, over all inputs, in as many passes as it takes."""
    for ending in ("parquet", "jsonl"):
        corpora.write(f"in/c.{ending}", corpora.rows(40))
    monkeypatch.setattr(verification, "IDS_AT_ONCE", 7)
    code, out, _ = embed("in", "--verify", "--shard-rows", "16")
    assert code == 1
    *listed, total = [line for line in out.splitlines() if "more than once" in line]
    assert len(listed) == 5
    assert all(line.startswith("id 't") for line in listed)
    assert total == "40 ids in all stand more than once"
    assert embed("in", "--chunks", "2", "--verify", output="o2")[0] == 1
    assert embed("in/c.jsonl", "--chunks", "2", "--verify", output="o3")[0] == 0


def test_verify_without_a_corpus(embed):
    assert "no manifest.json" in embed("--verify", output="nowhere")[2]
    assert not Path("nowhere").exists()
    Path("out").mkdir()
    Path("out/manifest.json").write_text("{")
    assert "manifest.json is damaged" in embed("--verify")[2]
    Path("out/manifest.json").write_text('{"version": 99}')
    assert "is of version 99, but this program reads 1" in embed("--verify")[2]
