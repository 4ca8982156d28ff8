"""Runs of training in this process: what they leave behind, how they stop and go on, and how they fail."""

import json
import os
import resource
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import training

import jina_jax
from jina_jax.cli import main
from jina_jax.records import InputError
from jina_jax.train import journal, loop
from jina_jax.train.recipe import Data, Dataset, Eval, EvalTask, Init, Log, Optim, Phase, Recipe, Save, override

QUIET = {"log": Log(every=1, tensorboard=False)}


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Programs are compiled once for all runs of this file."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = [jax.config.values[name] for name in names]
    for name, value in zip(names, (str(tmp_path_factory.mktemp("cache")), 0.0, -1), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return training.model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return training.data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def recipe(base, folder):
    return training.recipe(base, folder)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """A run that nothing interrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    outcome = loop.train(recipe, run, command="jina-jax train x")
    assert outcome.finished
    assert outcome.step == 15
    return run


@pytest.fixture
def on_row(monkeypatch):
    """Call a function after the row of a step was written."""

    def install(step, call):
        row = journal.Journal.row

        def told(self, one):
            row(self, one)
            if one["step"] == step and "loss" in one:
                call()

        monkeypatch.setattr(journal.Journal, "row", told)

    return install


def steps(run):
    return [row for row in training.rows(run) if "loss" in row]


# ---- What a run leaves behind ----------------------------------------------------------------------------------


def test_a_run_leaves_metrics_checkpoints_and_a_model(whole):
    rows = steps(whole)
    assert [row["step"] for row in rows] == list(range(1, 16))
    assert [row["dataset"] for row in rows] == ["triplets"] * 7 + ["pairs"] * 8
    assert {"loss", "accuracy", "positive", "hardest", "gradient_norm", "lr", "tokens", "padding"} <= rows[0].keys()
    measured = {row["step"] for row in training.rows(whole) if "eval" in row}
    assert measured == {0, 5, 10, 15}
    kept = {int(path.name) for path in (whole / "checkpoints").iterdir()}
    assert {12, 15} <= kept
    assert 3 not in kept
    assert list((whole / "tensorboard").iterdir())
    card = (whole / "export" / "MODEL_CARD.md").read_text()
    assert "jina-jax train x" in card


def test_the_backbone_and_the_other_adapters_do_not_move_by_a_bit(whole, base):
    """T12: byte-identical before and after."""
    model, variables = jina_jax.load(base)
    before = {path: np.asarray(x) for path, x in jina_jax.checkpoint.flatten(variables).items()}
    after = training.exported(whole)
    trained = [model.config.task_id(task) for task in ("retrieval.query", "retrieval.passage")]
    for path, value in before.items():
        if "lora" not in path:
            assert after[path].tobytes() == value.tobytes(), path
            continue
        if path.startswith("pooler"):  # no loss touches it
            continue
        axis = jina_jax.layouts.PARAMETERS[path].split().index("K")
        for task in range(5):
            same = np.take(after[path], task, axis).tobytes() == np.take(value, task, axis).tobytes()
            assert same == (task not in trained), (path, task)


def test_evaluation_takes_nothing_from_the_run(whole, recipe, tmp_path):
    loop.train(recipe.replace(eval=Eval(), **QUIET), tmp_path / "run")
    assert steps(tmp_path / "run") == steps(whole)
    for path, value in training.exported(whole).items():
        assert training.exported(tmp_path / "run")[path].tobytes() == value.tobytes()


def test_what_is_done_is_not_done_again(whole, recipe, on_row):
    on_row(15, lambda: pytest.fail("a step was taken"))
    before = (whole / "metrics.jsonl").read_bytes()
    outcome = loop.train(recipe, whole)
    assert (outcome.step, outcome.finished) == (15, True)
    assert (whole / "metrics.jsonl").read_bytes() == before
    assert "after" in outcome.results


# ---- How it stops and goes on ----------------------------------------------------------------------------------


def test_a_run_that_fell_before_its_first_checkpoint_starts_anew(whole, recipe, tmp_path, on_row, monkeypatch):
    def fall():
        raise RuntimeError("the power")

    on_row(2, fall)
    with pytest.raises(RuntimeError, match="the power"):
        loop.train(recipe.replace(**QUIET), tmp_path / "run")
    monkeypatch.undo()
    assert loop.train(recipe.replace(**QUIET), tmp_path / "run").finished
    assert training.rows(tmp_path / "run") == training.rows(whole)


@pytest.mark.parametrize(("asked", "at"), [(signal.SIGTERM, 7), (signal.SIGINT, 9)])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_as_if_nothing_had_happened(
    whole, recipe, tmp_path, on_row, monkeypatch, asked, at
):
    run = tmp_path / "run"
    on_row(at, lambda: os.kill(os.getpid(), asked))
    outcome = loop.train(recipe.replace(**QUIET), run)
    assert not outcome.finished
    # Rows are written a step late: at that time the next one is under way.
    assert outcome.step in (at, at + 1)
    assert not (run / "export").exists()
    monkeypatch.undo()
    assert loop.train(recipe.replace(**QUIET), run).finished
    assert training.rows(run) == training.rows(whole)
    for path, value in training.exported(whole).items():
        assert training.exported(run)[path].tobytes() == value.tobytes()


def test_a_checkpoint_can_be_chosen_and_drops_the_future(whole, recipe, tmp_path, on_row, monkeypatch):
    run = tmp_path / "run"
    on_row(10, lambda: os.kill(os.getpid(), signal.SIGTERM))
    stopped = loop.train(recipe.replace(**QUIET), run).step
    monkeypatch.undo()
    with pytest.raises(InputError, match=rf"--resume 5: must be auto, never or one of .*: .*9, {stopped}"):
        loop.train(recipe, run, resume="5")
    with pytest.raises(InputError, match="which --resume never would overwrite"):
        loop.train(recipe, run, resume="never")
    outcome = loop.train(recipe.replace(**QUIET), run, resume="9")
    assert outcome.finished
    assert training.rows(run) == training.rows(whole)


def test_another_recipe_or_other_records_do_not_go_on(whole, recipe, folder, base, tmp_path):
    """T17: what has changed is said, and nothing is touched."""
    before = (whole / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"optim.b1: 0.9 -> 0.5"):
        loop.train(override(recipe, ["optim.b1=0.5"]), whole)
    records = training.data(tmp_path)
    with (records / "pairs.jsonl").open("a") as file:
        file.write('{"query": "one more", "pos": "record"}\n')
    with pytest.raises(InputError, match="plan of phase 1: the records, their order or the tokenizer are others"):
        loop.train(training.recipe(base, records), whole)
    assert (whole / "metrics.jsonl").read_bytes() == before
    # Where records lie, what is measured and what is logged may change.
    same = training.data(tmp_path / "elsewhere") if (tmp_path / "elsewhere").mkdir() is None else None
    changed = override(training.recipe(base, same), ["save.every=4", "eval.every=2", "data.threads=1"])
    assert loop.train(changed, whole).finished


def test_rows_of_the_future_and_torn_ones_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 6)]
    for torn in ('{"step": 3, "lo', "\0\0\0\0\n", ""):
        path.write_text("".join(rows[:3]) + torn)
        journal.keep_until(path, 4)
        assert path.read_text() == "".join(rows[:3])
    path.write_text("".join(rows))
    journal.keep_until(path, 2)
    assert path.read_text() == "".join(rows[:2])
    journal.keep_until(tmp_path / "none.jsonl", 2)


# ---- How it fails ----------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_ends_the_run_and_names_the_records(recipe, tmp_path, capfd):
    broken = override(recipe.replace(**QUIET), ["phases.0.lr=1e30", "optim.clip=None", "max_bad_steps=2"])
    with pytest.raises(loop.DivergedError, match=r"2 steps in a row were not finite.*in triplets: triplets:\d+, "):
        loop.train(broken, tmp_path / "run")
    assert "left out" in capfd.readouterr().err
    assert not (tmp_path / "run" / "export").exists()
    assert all(row["loss"] is None or np.isfinite(row["loss"]) for row in steps(tmp_path / "run"))


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(recipe, tmp_path, on_row):
    """T17: a limit on the size of files stands in for the disk."""
    run, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        while not (run / "checkpoints" / "3").exists():
            time.sleep(0.1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, limits[1]))

    on_row(5, fill)
    try:
        with pytest.raises((OSError, ValueError), match=r"(?i)too large|no space|write"):
            loop.train(recipe.replace(**QUIET), run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name.isdecimal()] == ["3"]
    assert not (run / "export").exists()


@pytest.fixture
def command(base, folder, tmp_path):
    """A configuration file, and a function that runs the command line on it."""
    path = tmp_path / "small.py"
    path.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nimport training\n\n"
        f"def get_config(data: str = {str(folder)!r}):\n"
        f"    return training.recipe({str(base)!r}, training.Path(data))\n"
    )
    run = tmp_path / "run"

    def call(*arguments):
        return main(["train", str(path), "--run-dir", str(run), *arguments])

    return call


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--set", "optim.b3=1"), 2, "there is no 'b3'; there are: b1, b2"),
        (("--set", "phases.0.steps=many"), 2, "must be int, not 'many'"),
        (("--task", "x"), 2, "takes no --task; it takes: --data, and --set"),
        (("--set", "mesh.data=3"), 2, "does not make a mesh of 8 devices"),
        (("--set", "phases.0.batch=20"), 2, "batch=20 must be a multiple of 8 devices"),
        (("--set", "init.model=/no/such/model"), 2, "no directory '/no/such/model'"),
        (("--set", "phases.0.batch=64"), 3, "48 records do not make a batch of 64"),
        (("--data", "/nowhere"), 3, "/nowhere/triplets.jsonl"),
        (("--set", "phases.0.lr=1e30", "--set", "optim.clip=None"), 4, "3 steps in a row were not finite"),
    ],
)
def test_the_exit_code_and_the_message_of_a_mistake(command, capfd, arguments, code, message):
    """T17: of the command line."""
    assert command(*arguments) == code
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_malformed_records_end_the_command_with_their_line(command, tmp_path, capfd):
    records = training.data(tmp_path)
    with (records / "pairs.jsonl").open("a") as file:
        file.write('{"query": "one more", "pos": ""}\n')
    assert command("--data", str(records)) == 3
    assert "pairs.jsonl:65" in capfd.readouterr().err


def test_a_dry_run_says_what_would_be_done_and_does_nothing(command, tmp_path, capfd):
    assert command("--dry-run") == 0
    output = capfd.readouterr().out
    assert "trainable" in output
    assert "first 0  triplets" in output
    assert "MiB for activations" in output
    assert not (tmp_path / "run").exists()


def test_a_command_that_is_asked_to_stop_says_so_by_its_exit_code(command, tmp_path, on_row, monkeypatch, capfd):
    on_row(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert command() == 75
    assert "the same command goes on from there" in capfd.readouterr().err
    monkeypatch.undo()
    assert command() == 0
    assert (tmp_path / "run" / "export" / "MODEL_CARD.md").exists()


# ---- That it learns --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_small_model_learns_64_pairs_by_heart(base, folder, tmp_path):
    """T14: below 0.05 in 200 steps; here in 100."""
    wanted = Recipe(
        stage="pairs",
        phases=(Phase("all", 100, 64, 16, 1e-2, tau=0.05),),
        data=Data((Dataset("pairs", str(folder / "pairs.jsonl")),)),
        init=Init(str(base)),
        dropout=0.0,
        save=Save(every=1000),
        **QUIET,
    )
    loop.train(wanted, tmp_path / "run")
    losses = [row["loss"] for row in steps(tmp_path / "run")]
    assert losses[0] > 5
    assert losses[-1] < 0.05


@pytest.mark.slow
def test_masked_words_become_less_of_a_surprise_and_similarity_ranks_better(base, tmp_path):
    """T14: perplexity falls; STS Spearman rises on a held-out toy set."""
    rows = training.pairs(96, 3)
    texts = training.write(tmp_path / "texts.jsonl", [{"text": row["pos"]} for row in rows[:64]])
    held = training.write(tmp_path / "held.jsonl", [{"text": row["pos"]} for row in rows[64:]])
    wanted = Recipe(
        stage="mlm",
        phases=(Phase("all", 15, 32, 32, 1e-2),),
        data=Data((Dataset("texts", str(texts)),)),
        init=Init(str(base)),
        eval=Eval((EvalTask("held", "mlm", str(held)),)),
        save=Save(every=1000),
        **QUIET,
    )
    results = loop.train(wanted, tmp_path / "mlm").results
    before, after = (results[when]["held"]["metrics"]["perplexity"] for when in ("before", "after"))
    assert max(after.values()) < 0.5 * max(before.values())
    assert (tmp_path / "mlm" / "export" / "config.json").exists()

    def scored(start, count):
        result = []
        for number in range(start, start + count):
            one, other = training.pairs(1, number)[0], training.pairs(1, number + 1000)[0]
            same = number % 2 == 0
            result.append({"a": one["query"], "b": (one if same else other)["pos"], "score": float(same)})
        return result

    held = training.write(tmp_path / "sts.jsonl", scored(5000, 64))
    wanted = Recipe(
        stage="adapter",
        phases=(Phase("all", 30, 32, 32, 1e-2, tau=0.05),),
        data=Data((Dataset("scored", str(training.write(tmp_path / "scored.jsonl", scored(0, 64)))),)),
        init=Init(str(base)),
        adapters=training.Adapters(("text-matching",)),
        eval=Eval(
            (EvalTask("sts", "sts", str(training.write(tmp_path / "sts.jsonl", scored(5000, 64))), "text-matching"),)
        ),
        optim=Optim(warmup=2.0),
        save=Save(every=1000),
        **QUIET,
    )
    results = loop.train(wanted, tmp_path / "sts").results
    before, after = (results[when]["sts"]["metrics"]["spearman"] for when in ("before", "after"))
    assert after[32] > before[32] + 0.1
