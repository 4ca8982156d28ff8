import errno
import functools
import gzip
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import random_variables
from numerics import EMBEDDING, assert_close

import jina_jax
from jina_jax import cli, hub, records

MINI = Path(jina_jax.__file__).parent / "mini"

SENTENCE = "The library opens at nine in the morning and is closed on Sundays."
TRANSLATIONS = {
    "German": "Die Bibliothek öffnet um neun Uhr morgens und ist sonntags geschlossen.",
    "Chinese": "图书馆早上九点开门,星期天不开放。",
    "Arabic": "تفتح المكتبة أبوابها في التاسعة صباحًا وتغلق أيام الأحد.",
}
DISTRACTORS = (
    "The restaurant serves breakfast until eleven on weekdays.",
    "My brother repairs old bicycles in his garage.",
    "The parliament voted on the new budget late at night.",
    "Water boils at a lower temperature in the mountains.",
    "Das Museum zeigt im Herbst eine Ausstellung über die Römer.",
    "Der Zug nach Hamburg hat heute zwanzig Minuten Verspätung.",
    "医生建议他每天散步半个小时。",
    "这家商店出售新鲜的水果和蔬菜。",
    "أعلنت الحكومة عن خطة جديدة لتحسين التعليم.",
    "سافرت العائلة إلى البحر في عطلة الصيف.",
)
LOAD = functools.cache(jina_jax.Embedder.load)


@pytest.fixture(autouse=True)
def _environment(monkeypatch, tmp_path):
    """No settings from outside, no compilation cache for the whole session, files in a place of their own."""
    for name in list(os.environ):
        if name.startswith("JINA_JAX_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("JINA_JAX_CACHE", "off")
    monkeypatch.chdir(tmp_path)
    # Every model is loaded, and every shape compiled, once for all tests rather than once for each.
    monkeypatch.setattr(jina_jax.Embedder, "load", LOAD)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint whose adapters differ, with prompts."""
    config = jina_jax.Config.from_json(
        MINI / "config.json",
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=50,
        prompts=("Find: ", "A document: ", "", "", ""),
    )
    model = jina_jax.Model(config)
    path = tmp_path_factory.mktemp("models") / "small"
    return str(jina_jax.save(path, model, random_variables(model), layout="original", tokenizer=MINI))


@pytest.fixture
def run(capsys):
    """Run the command line; gives the exit code, stdout and stderr."""

    def call(*arguments):
        code = cli.main(arguments)
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def fails(run):
    """Run what must fail; gives the message, one line without a traceback."""

    def call(*arguments, code=2):
        found, out, err = run(*arguments)
        assert (found, out) == (code, "")
        lines = [line for line in err.splitlines() if not line.startswith("jina-jax: note:")]
        assert len(lines) == 1
        assert lines[0].startswith("jina-jax: error: ")
        return lines[0]

    return call


SMALL_FILES_ONLY = ("sh", "-c", 'ulimit -f 8; exec "$@"', "sh")


def start(*arguments, prefix=(), **environment):
    """The command in a process of its own, as users start it."""
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "jina_jax", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(MINI.parent.parent), "HF_HUB_OFFLINE": "1", "XLA_FLAGS": ""} | environment,
    )


def finish(process, stdin=b""):
    out, err = process.communicate(stdin, timeout=300)
    return process.returncode, out.decode(), err.decode()


def parse(out):
    return [json.loads(line) for line in out.splitlines()]


def vectors(out):
    return np.array([row["embedding"] for row in parse(out)], np.float32)


# ---- What it is for --------------------------------------------------------------------------------------------


def test_translations_rank_above_distractors_offline():
    texts = [SENTENCE, *TRANSLATIONS.values(), *DISTRACTORS]
    code, out, err = finish(start("embed", *texts, "--similarity"))
    assert code == 0
    assert hub.BUNDLED_NOTE in err
    header, first, *_ = out.splitlines()
    assert header.split() == [str(index) for index in range(14)]
    cosines = [float(value) for value in first.split()[1:15]]
    translations, distractors = cosines[1:4], cosines[4:]
    assert len(distractors) == 10
    assert min(translations) > max(distractors) + 0.02, dict(zip(texts, cosines, strict=True))


def test_json_lines(run, small):
    code, out, err = run("embed", "Hello", "Grüße 你好", "--model", small)
    assert (code, err) == (0, "")
    assert [list(row) for row in parse(out)] == [["index", "text", "embedding"]] * 2
    assert [(row["index"], row["text"]) for row in parse(out)] == [(0, "Hello"), (1, "Grüße 你好")]
    assert "你好" in out
    np.testing.assert_array_equal(vectors(out), jina_jax.Embedder.load(small).encode(["Hello", "Grüße 你好"]))


def test_options_reach_the_embedder(run, small):
    embedder = jina_jax.Embedder.load(small)
    long = "of " * 60
    for options, expected in (
        (["--task", "retrieval.query"], {"task": "retrieval.query"}),
        (["--task", "retrieval.query", "--no-prompts"], {"task": "retrieval.query", "prompts": False}),
        (["--dimensions", "5"], {"dimensions": 5}),
        (["--no-normalize", "--dimensions", "5"], {"dimensions": 5, "normalize": False}),
        (["--batch-tokens", "16"], {"batch_tokens": 16}),
        (["--long", "windows"], {"truncate": False}),
        (["--precision", "binary"], {"precision": "binary"}),
    ):
        code, out, _ = run("embed", "one", "--model", small, *options, long)  # options may stand between texts
        assert code == 0
        np.testing.assert_array_equal(vectors(out), embedder.encode(["one", long], **expected))
    code, out, _ = run("embed", "one", "--model", small, "--dtype", "bfloat16")
    assert 1e-4 < np.abs(vectors(out)[0] - embedder.encode("one")).max() < 0.1


def test_late_chunking(run, small):
    embedder = jina_jax.Embedder.load(small)
    Path("documents.jsonl").write_text(
        '{"id": "x", "text": "One two. Three four. Five.", "task": "separation"}\n"Six."\n{"text": "", "id": 3}\n'
    )
    code, out, _ = run("embed", "documents.jsonl", "--model", small, "--chunks", "sentences")
    rows = parse(out)
    assert code == 0
    assert [list(row) for row in rows[:3]] == [["index", "id", "chunk", "start", "end", "text", "embedding"]] * 3
    assert [row.get("id") for row in rows] == ["x", "x", "x", None]
    assert [(row["index"], row["chunk"], row["start"], row["end"]) for row in rows[:3]] == [
        (0, 0, 0, 9),
        (1, 1, 9, 21),
        (2, 2, 21, 26),
    ]
    assert [row["text"] for row in rows] == ["One two. ", "Three four. ", "Five.", "Six."]
    expected = embedder.encode_chunks("One two. Three four. Five.", chunker="sentences", task="separation")
    np.testing.assert_array_equal(vectors(out)[:3], expected.embeddings)
    assert run("embed", "documents.jsonl", "--model", small, "--chunks", "2", "--output", "o.npy")[0] == 0
    assert np.load("o.npy").shape[0] > 5


def test_bench(run, small):
    code, out, _ = run("bench", "--model", small, "--tokens", "500", "--rounds", "1", "--json")
    assert code == 0
    about = json.loads(out)
    assert [row["profile"] for row in about["profiles"]] == ["queries", "passages", "mix"]
    for row in about["profiles"]:
        assert row["texts_per_second"] > 0
        assert 0 <= row["padding"] < 1
        assert row["longest"] <= 48
        assert row["peak_bytes"] > 2**20
        assert row["programs"] <= 8
    code, out, _ = run("bench", "--model", small, "--tokens", "300", "--rounds", "1", "--profile", "queries")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["profile", "queries"]


def test_bench_refuses(fails, small):
    assert "'long' is not one of queries, passages, mix" in fails("bench", "--profile", "long")
    assert "unknown task 'nope'" in fails("bench", "--model", small, "--task", "nope")


def test_every_option_has_an_environment_variable(run, small, monkeypatch):
    settings = {
        "MODEL": small,
        "TASK": "retrieval.passage",
        "PROMPTS": "0",
        "DIMENSIONS": "7",
        "NORMALIZE": "no",
        "BATCH_TOKENS": "64",
        "LONG": "error",
        "PRECISION": "float32",
        "DTYPE": "float32",
        "OUTPUT": "out.npy",
        "SIMILARITY": "true",
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"JINA_JAX_{name}", value)
    code, out, err = run("embed", "a", "b")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 3
    expected = {"task": "retrieval.passage", "prompts": False, "dimensions": 7, "normalize": False}
    np.testing.assert_array_equal(np.load("out.npy"), jina_jax.Embedder.load(small).encode(["a", "b"], **expected))
    # The command line has the last word.
    code, out, _ = run("embed", "a", "--dimensions", "3", "--no-similarity", "--output", "other.npy", "--normalize")
    assert np.load("other.npy").shape == (1, 3)
    assert_close(np.linalg.norm(np.load("other.npy")), 1, 1e-6)
    _, out, _ = run("embed", "--help")
    assert all(f"JINA_JAX_{name}" in out for name in (*settings, "REVISION", "CHUNKS"))


def test_note_on_the_bundled_model_unless_it_was_asked_for(run):
    code, _, err = run("embed", "a")
    assert code == 0
    assert err.count(hub.BUNDLED_NOTE) == 1
    assert "--model" in err
    assert run("embed", "a", "--model", "mini")[2] == ""


# ---- Input -----------------------------------------------------------------------------------------------------


def test_files_of_lines_keep_their_numbers(run, small):
    Path("a.txt").write_bytes("\ufeffone\r\n\ntwo\u2028still two\nlast".encode())
    with gzip.open("b.txt.gz", "wb") as file:
        file.write(b"packed\n")
    code, out, _ = run("embed", "first", "a.txt", "b.txt.gz", "--model", small)
    assert code == 0
    assert [row["text"] for row in parse(out)] == ["first", "one", "", "two\u2028still two", "last", "packed"]


def test_files_of_records(run, small):
    rows = [
        '{"text": "a", "id": "x-1", "title": "ignored"}',
        "",
        '{"text": "b", "id": 7, "task": "separation"}',
        '"c"',
        '{"text": "d", "task": null}',
    ]
    Path("r.jsonl").write_text("\n".join(rows))
    code, out, _ = run("embed", "r.jsonl", "--model", small, "--task", "classification")
    assert code == 0
    found = parse(out)
    assert [(row["index"], row.get("id"), row["text"]) for row in found] == [
        (0, "x-1", "a"),
        (1, 7, "b"),
        (2, None, "c"),
        (3, None, "d"),
    ]
    tasks = ["classification", "separation", "classification", None]
    np.testing.assert_array_equal(vectors(out), jina_jax.Embedder.load(small).encode(list("abcd"), task=tasks))


@pytest.mark.parametrize("arguments", [["-"], []])
def test_standard_input(run, small, monkeypatch, arguments):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("eins\nzwei ü\n".encode())))
    _, out, _ = run("embed", *arguments, "--model", small)
    assert [row["text"] for row in parse(out)] == ["eins", "zwei ü"]


def test_nothing_given_at_a_terminal(fails, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    assert "nothing to embed; pass texts" in fails("embed")


def test_empty_input_gives_empty_output(run, small):
    Path("e.txt").touch()
    assert run("embed", "e.txt", "--model", small) == (0, "", "")
    assert run("embed", "e.txt", "--model", small, "--output", "e.npy")[0] == 0
    assert np.load("e.npy").shape == (0, 32)


def test_texts_that_begin_with_a_dash(run, small):
    code, out, _ = run("embed", "--model", small, "--", "-a", "--task")
    assert code == 0
    assert [row["text"] for row in parse(out)] == ["-a", "--task"]


def test_lone_surrogates_go_in_and_out(run, small):
    Path("s.jsonl").write_text('{"text": "a\\ud800b", "id": "\\udfff"}')
    code, out, _ = run("embed", "s.jsonl", "--model", small)
    assert code == 0
    assert (parse(out)[0]["text"], parse(out)[0]["id"]) == ("a\ud800b", "\udfff")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON"),
        ("3", 'must be a string or an object with a string "text"'),
        ('{"title": "no text"}', 'must be a string or an object with a string "text"'),
        ('{"text": 3}', 'must be a string or an object with a string "text"'),
        ('{"text": "a", "task": ["separation"]}', '"task" must be a string or null, not ["separation"]'),
        ('{"text": "a", "id": 1.5}', '"id" must be a string or a whole number, not 1.5'),
        ('{"text": "a", "id": true}', '"id" must be a string or a whole number, not true'),
        ('{"text": "a", "task": "nope"}', "unknown task 'nope'; this model has: retrieval.query"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_malformed_records_are_named_by_file_and_line(fails, small, line, problem):
    Path("r.jsonl").write_text(f'{{"text": "fine"}}\n\n{line}\n')
    message = fails("embed", "r.jsonl", "--model", small)
    assert "r.jsonl:3: " in message
    assert problem in message


def test_files_that_cannot_be_read(fails):
    assert "no file a.txt; an argument with this ending names a file" in fails("embed", "a.txt")
    assert "no file b.jsonl.gz" in fails("embed", "b.jsonl.gz")
    Path("c.txt").write_bytes(b"fine\ncaf\xe9\n")
    assert "c.txt:2: not UTF-8 at byte 3" in fails("embed", "c.txt")
    Path("d.txt.gz").write_bytes(b"not packed")
    assert "d.txt.gz: cannot be read" in fails("embed", "d.txt.gz")
    Path("e.txt.gz").write_bytes(gzip.compress(b"text" * 1000)[:-12])
    assert "e.txt.gz: cannot be read" in fails("embed", "e.txt.gz")
    Path("f.txt").mkdir()
    assert "f.txt: cannot be read (Is a directory)" in fails("embed", "f.txt")


# ---- Output ----------------------------------------------------------------------------------------------------


def test_output_files(run, small):
    _, out, _ = run("embed", "a", "b", "--model", small)
    expected = vectors(out)
    assert run("embed", "a", "b", "--model", small, "--output", "o.npy")[:2] == (0, "")
    assert run("embed", "a", "b", "--model", small, "--output", "o.jsonl")[:2] == (0, "")
    assert np.load("o.npy").dtype == np.float32
    np.testing.assert_array_equal(np.load("o.npy"), expected)
    assert Path("o.jsonl").read_text() == out
    assert sorted(os.listdir()) == ["o.jsonl", "o.npy"]


@pytest.mark.parametrize("name", ["o.npy", "o.jsonl"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(fails, small, monkeypatch, name, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)

    Path(name).write_text("old")
    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), full)
    message = fails("embed", "a", "--model", small, "--output", name, code=1)
    assert message == f"jina-jax: error: {Path(name).absolute()}: No space left on device"
    assert os.listdir() == [name]
    assert Path(name).read_text() == "old"


@pytest.mark.parametrize("name", ["o.npy", "o.jsonl"])
def test_a_write_that_fails_in_the_middle(small, name):
    Path("many.txt").write_text("x\n" * 100)
    code, out, err = finish(start("embed", "many.txt", "--model", small, "--output", name, prefix=SMALL_FILES_ONLY))
    assert (code, out) == (1, "")
    assert err == f"jina-jax: error: {Path(name).absolute()}: File too large\n"
    assert os.listdir() == ["many.txt"]


def test_an_interrupt_while_writing_leaves_nothing(run, small, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    assert run("embed", "a", "--model", small, "--output", "o.npy") == (130, "", "")
    assert os.listdir() == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_stdout_without_space(small):
    with open("/dev/full", "wb") as full:
        process = subprocess.run(
            [sys.executable, "-m", "jina_jax", "embed", "a", "--model", small],
            stdout=full,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(MINI.parent.parent)},
            timeout=300,
            check=False,
        )
    assert process.returncode == 1
    assert process.stderr == b"jina-jax: error: output: No space left on device\n"


def test_nobody_reads_the_output(small):
    process = start("embed", *(f"text {index}" for index in range(2000)), "--model", small)
    process.stdin.close()
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(300) == 141
    process.stderr.close()


def test_interrupt(small):
    os.mkfifo("slow.txt")
    process = start("embed", "slow.txt", "--model", small)
    with open("slow.txt", "wb"):  # waits for the reader, which then waits for lines
        process.send_signal(signal.SIGINT)
        assert finish(process) == (130, "", "")


def test_similarity_table(run, small):
    texts = ["Hello", "你好" * 200, "a\n\tb\x1b[31m\u202ec", "مرحبا"]
    code, out, _ = run("embed", *texts, "--model", small, "--similarity", "--no-normalize", "--output", "o.npy")
    assert code == 0
    header, *lines = out.splitlines()
    assert [len(line.split("   ")) >= 2 for line in lines] == [True] * 4
    found = np.array([[float(value) for value in line.split()[1:5]] for line in lines])
    unit = np.load("o.npy").astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    assert_close(found, unit @ unit.T, 6e-4)
    assert lines[0].endswith("   Hello")
    assert lines[1].endswith("你好你…")
    assert lines[2].endswith("   a b\ufffd[31mc")
    assert {line.index(".") for line in lines} == {header.index("0") - 3}


def test_similarity_of_too_many(fails, small):
    Path("many.txt").write_text("x\n" * 51)
    assert "at most 50 texts, not 51; use --output" in fails("embed", "many.txt", "--model", small, "--similarity")


@pytest.mark.parametrize(
    ("text", "columns", "expected"),
    [
        ("short", 10, "short"),
        ("exactly 10", 10, "exactly 10"),
        ("exactly 11c", 10, "exactly 1…"),
        ("图书馆早上", 10, "图书馆早上"),
        ("图书馆早上九", 10, "图书馆早…"),
        ("图书馆早上九", 9, "图书馆早…"),
        ("e\u0301" * 10, 10, "e\u0301" * 10),
        ("cut at a blank", 7, "cut at…"),
        ("", 10, ""),
    ],
)
def test_shorten(text, columns, expected):
    assert records.shorten(text, columns) == expected


# ---- Mistakes --------------------------------------------------------------------------------------------------


def test_usage(fails, small):
    assert "required: COMMAND" in fails()
    assert "invalid choice: 'nope'" in fails("nope")
    assert "unrecognized arguments: --nope" in fails("embed", "a", "--nope")
    assert "'x' is not a whole number" in fails("embed", "a", "--dimensions", "x")
    assert "'0' is not a whole number of at least 1" in fails("embed", "a", "--batch-tokens", "0")
    assert "'float16' is not one of float32, bfloat16" in fails("embed", "a", "--dtype", "float16")
    assert "'cat' is not one of cut, error, windows" in fails("embed", "a", "--long", "cat")
    assert "'int4' is not one of float32, float16, int8" in fails("embed", "a", "--precision", "int4")
    assert "'0' is neither 'sentences' nor a number" in fails("embed", "a", "--chunks", "0")
    assert "'o.csv' must end in .jsonl or .npy" in fails("embed", "a", "--output", "o.csv")
    assert "there is no directory 'nowhere'" in fails("embed", "a", "--output", "nowhere/o.npy")
    Path("d.npy").mkdir()
    assert "'d.npy' is a directory" in fails("embed", "a", "--output", "d.npy")
    assert "dimensions=33 must be a whole number from 1 to 32" in fails(
        "embed", "a", "--model", small, "--dimensions", "33"
    )
    message = fails("embed", "a", "--model", small, "--task", "nope")
    assert "text 1 of the command line: unknown task 'nope'; this model has: retrieval.query" in message
    assert "text 1 has 62 tokens, the model takes 48" in fails(
        "embed", "a", "of " * 60, "--model", small, "--long", "error"
    )


def test_wrong_environment(fails, monkeypatch):
    monkeypatch.setenv("JINA_JAX_PROMPTS", "maybe")
    assert "JINA_JAX_PROMPTS='maybe' must be 1 or 0" in fails("embed", "a")
    monkeypatch.delenv("JINA_JAX_PROMPTS")
    monkeypatch.setenv("JINA_JAX_DIMENSIONS", "many")
    assert "--dimensions: 'many' is not a whole number" in fails("embed", "a")


def test_no_such_model(fails):
    assert "no directory './nope'" in fails("embed", "a", "--model", "./nope")
    assert "no directory 'nope'" in fails("info", "nope")
    Path("empty").mkdir()
    assert "config.json" in fails("embed", "a", "--model", "empty")
    assert "config.json" in fails("info", "empty")


def test_the_real_model_offline_says_how_to_get_it():
    code, out, err = finish(start("embed", "a", "--model", hub.REAL_MODEL, HF_HOME=os.getcwd()))
    assert (code, out) == (2, "")
    assert err.startswith("jina-jax: error: ")
    assert f"hf download {hub.REAL_MODEL}" in err
    assert "Traceback" not in err


def test_damaged_checkpoints(fails, small, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((Path(small) / name).read_bytes())
    weights = (Path(small) / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    for arguments in (["embed", "a", "--model"], ["info"]):
        assert "not a whole safetensors file" in fails(*arguments, str(tmp_path), code=1)
    (tmp_path / "model.safetensors").write_bytes(weights)
    (tmp_path / "tokenizer.json").write_text("{")
    assert "not a readable tokenizer.json" in fails("embed", "a", "--model", str(tmp_path), code=1)


def test_weights_that_are_not_finite(fails, small, tmp_path, monkeypatch):
    monkeypatch.setattr(jina_jax.Embedder, "encode", lambda *_, **__: np.full((1, 4), np.nan, np.float32))
    assert "not finite" in fails("embed", "a", "--model", small, "--output", "o.npy", code=1)
    assert not Path("o.npy").exists()


def test_long_lists_of_problems_are_cut():
    message = cli._message(ValueError("head\n" + "\n".join(f"problem {index}" for index in range(100))))
    assert message.splitlines()[-1] == "  ... and 81 more"
    assert cli._message(RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying")).startswith("out of memory;")


def test_tracebacks_on_demand(run, monkeypatch):
    monkeypatch.setenv("JINA_JAX_DEBUG", "1")
    code, _, err = run("embed", "a.txt")
    assert code == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("jina-jax: error: no file a.txt")


# ---- The rest --------------------------------------------------------------------------------------------------


def test_help_and_version(run):
    code, out, _ = run("--version")
    assert (code, out) == (0, f"jina-jax {jina_jax.__version__}\n")
    code, out, _ = run("--help")
    assert code == 0
    assert all(word in out for word in ("embed", "info", "exit codes", "JINA_JAX_CACHE"))


def test_info(run, small):
    code, out, err = run("info", "mini")
    assert (code, err) == (0, "")
    assert all(word in out for word in ("26M parameters", "384", "retrieval.query", "(no prompt)", "float16", "MIT"))
    code, out, _ = run("info", small, "--json")
    facts = json.loads(out)
    model, variables = jina_jax.load(small)
    assert facts["parameters"] == jina_jax.model.count_parameters(variables)
    assert (facts["layout"], facts["stored_as"]) == ("original", "float32")
    assert facts["tasks"] == dict(zip(model.config.tasks, model.config.prompts, strict=True))
    assert (facts["max_tokens"], facts["width"], facts["note"]) == (48, 32, None)


@pytest.mark.parametrize("layout", ["own", "original", "hf", "orbax"])
def test_info_on_every_layout(run, small, layout):
    model, variables = jina_jax.load(small)
    jina_jax.save("saved", model, variables, layout=layout)
    code, out, _ = run("info", "saved", "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["layout"] == layout
    assert facts["parameters"] == jina_jax.model.count_parameters(variables)


def test_the_licence_of_published_weights(data, tmp_path):
    from jina_jax.info import describe

    config = json.loads((data / "tiny_checkpoints" / "original" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "orbax").mkdir()
    assert "CC BY-NC 4.0" in describe(tmp_path, hub.REAL_MODEL)["licence"]
    assert describe(tmp_path, "of-my-own")["licence"] is None


def test_compiled_programs_are_kept(small, tmp_path):
    arguments = ("embed", "a", "--model", small)
    first = finish(start(*arguments, JINA_JAX_CACHE="", XDG_CACHE_HOME=str(tmp_path)))
    folder = tmp_path / "jina_jax" / "xla"
    kept = sorted(folder.glob("*-cache"))
    assert (first[0], first[2]) == (0, "")
    assert kept
    assert finish(start(*arguments, JINA_JAX_CACHE=str(folder))) == first
    assert sorted(folder.glob("*-cache")) == kept


def test_a_cache_that_cannot_be_written_does_no_harm(small, tmp_path):
    (tmp_path / "file").touch()
    code, out, err = finish(start("embed", "a", "--model", small, JINA_JAX_CACHE=str(tmp_path / "file" / "x")))
    assert (code, err) == (0, "")
    assert_close(vectors(out), jina_jax.Embedder.load(small).encode(["a"]), EMBEDDING)


def test_an_ascii_terminal(small):
    code, out, err = finish(start("embed", "Grüße", "你好", "--model", small, "--similarity", PYTHONIOENCODING="ascii"))
    assert (code, err) == (0, "")
    assert out.splitlines()[1].endswith("Gr\\xfc\\xdfe")
