"""The recipes in configs/ have the paper's numbers, their tiny presets can be run, the bundled data is what it says."""

import dataclasses
import json
import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest

import jina_jax
from jina_jax import cli, examples
from jina_jax.config import PROMPTS, TASKS
from jina_jax.eval import tasks
from jina_jax.records import InputError
from jina_jax.tokenizer import load_tokenizer
from jina_jax.train import plan
from jina_jax.train.cli import load
from jina_jax.train.recipe import Recipe, datasets, eval_tasks

ROOT = Path(__file__).parent.parent
CONFIGS, DATA = ROOT / "configs", ROOT / "configs" / "data"
PAPER = json.loads((ROOT / "jina_jax" / "eval" / "paper.json").read_text())
ADAPTERS = ("retrieval", "separation", "classification", "text-matching")
JARGON = runpy.run_path(str(DATA / "jargon.py"))
FAILURES = ("synthetic_f1", "synthetic_f2", "synthetic_f3", "oasst")
TINY = [("mlm", {}), ("pairs", {}), *(("adapters", {"adapter": name}) for name in ADAPTERS)]


def recipe(name: str, **given: object) -> Recipe:
    return load(str(CONFIGS / f"{name}.py"), given)


def write(path: Path, *records: dict) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(Path(jina_jax.__file__).parent / "mini")


# ---- The paper's numbers ---------------------------------------------------------------------------------------

ROWS = {
    "pretrain_short": ("mlm", 0, {}),
    "pretrain_long": ("mlm", 1, {}),
    "pair_short": ("pairs", 0, {}),
    "pair_long": ("pairs", 1, {}),
    **{f"adapter_{name.replace('-', '_')}": ("adapters", 0, {"adapter": name}) for name in ADAPTERS},
}


@pytest.mark.parametrize("row", ROWS)
def test_presets_of_the_paper_have_the_numbers_of_its_table(row):
    name, number, given = ROWS[row]
    phase = recipe(name, data=str(DATA / "pairs.jsonl"), **given).phases[number]
    _, steps, batch, length, lr, tau = PAPER["tableA1"][row]
    product = np.prod([int(factor) for factor in batch.split("x")])
    assert (phase.steps, phase.batch, phase.max_length, phase.lr) == (steps, product, length, lr)
    assert tau is None or phase.tau == tau


def test_every_row_of_the_table_has_a_recipe():
    assert {*ROWS, "columns", "note"} == {*PAPER["tableA1"]}
    assert PAPER["tableA1"]["columns"] == ["devices", "steps", "batch", "seq_len", "max_lr", "tau"]


def test_the_adapters_in_their_order_are_those_of_the_released_model():
    made = [recipe("adapters", adapter=name, data=str(DATA / "pairs.jsonl")).adapters for name in ADAPTERS]
    assert tuple(task for one in made for task in one.trains) == TASKS
    assert tuple(prompt for one in made for prompt in one.prompts or ()) == PROMPTS
    released = jina_jax.Config()
    assert {(one.rank, one.alpha) for one in made} == {(released.lora_rank, released.lora_alpha)}


def test_the_rotary_base_is_the_smaller_one_until_the_model_is_used():
    data = str(DATA / "pairs.jsonl")
    inits = [recipe(name, data=data).init for name in ("mlm", "pairs", "adapters")]
    assert [init.rope_base for init in inits] == [10_000.0] * 3
    assert [init.export_rope_base for init in inits] == [None, None, jina_jax.Config().rope_base]
    assert inits[0].max_tokens == jina_jax.Config().max_tokens


def test_negatives_of_the_paper():
    classification, retrieval = (
        recipe("adapters", adapter=name, data=str(DATA / "labelled.jsonl")) for name in ("classification", "retrieval")
    )
    assert classification.loss.false_negatives == "unique_id"
    assert classification.data.negatives == retrieval.data.negatives == 7
    assert [one.loss for one in classification.datasets] == ["info_nce"]


def test_the_average_of_the_paper_is_that_of_its_rows():
    rows = dict(PAPER["table8"]["rows"])
    average = rows.pop("Average")
    assert np.round(np.mean(list(rows.values()), axis=0), 2) == pytest.approx(average, abs=0.011)
    assert [row[0] for row in PAPER["table7"]["rows"]] == list(jina_jax.Config().matryoshka_dimensions)
    assert PAPER["table6"]["columns"] == ["F1", "F2", "F3", "F4"]


# ---- Recipes can be run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "given"), TINY, ids=str)
def test_tiny_presets_have_batches_and_something_to_measure(name, given, tmp_path, tokenizer):
    one = recipe(name, preset="tiny", **given)
    config = one.init.config
    assert (config.num_hidden_layers, config.hidden_size) == (2, 64)
    assert config.vocab_size >= tokenizer.vocab_size
    one = one.replace(data=dataclasses.replace(one.data, index=str(tmp_path)))
    for phase in one.phases:
        made = plan.make(one, phase, tokenizer, ("", ""), config.max_tokens)
        batch = made.batch(0)
        assert batch.arrays["tokens"].shape[0] == phase.batch
        assert batch.arrays["tokens"].max() < config.vocab_size
    assert one.eval.tasks
    assert all(Path(task.path).is_file() for task in one.eval.tasks)
    assert not {task.path for task in one.eval.tasks} & {given.path for given in one.datasets}


def test_failure_cases_have_the_names_that_the_ablation_leaves_out():
    one = recipe("adapters", preset="tiny")
    assert {*FAILURES} < {given.name for given in one.datasets}
    assert {*FAILURES} < {task.name for task in one.eval.tasks}
    left = one.replace(data=dataclasses.replace(one.data, exclude=FAILURES)).datasets
    assert [given.name for given in left] == ["search"]


def commands() -> list[str]:
    """The commands in the docstrings of the recipes."""
    lines = (line for file in sorted(CONFIGS.glob("*.py")) for line in file.read_text().split('"""')[1].splitlines())
    return [line.strip() for line in lines if line.startswith("    jina-jax ")]


@pytest.mark.parametrize("command", commands())
def test_commands_in_docstrings_are_understood(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    parsed = cli._parsers()[0].parse_args(shlex.split(command)[1:])
    flags = {name: getattr(parsed, name) for name in ("preset", "data", "eval_data", "model", "task", "adapter")}
    if parsed.preset == "tiny" or parsed.recipe.endswith("new_adapter.py"):
        if parsed.data == ["my_pairs.jsonl"]:
            flags |= {"data": ["configs/data/jargon.jsonl"], "model": None}
        assert load(parsed.recipe, flags).datasets


def test_every_recipe_shows_its_command():
    files = {f"configs/{file.name}" for file in CONFIGS.glob("*.py")}
    assert {shlex.split(command)[2] for command in commands()} == files


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("mlm", {}, "give --data"),
        ("pairs", {"preset": "huge"}, "--preset must be paper or tiny"),
        ("adapters", {"adapter": "x"}, "--adapter x must be one of retrieval, text-matching"),
        ("adapters", {"preset": "tiny", "data": "nowhere/"}, "nowhere/: no file that ends in .jsonl"),
    ],
)
def test_mistakes_in_flags_are_told(name, given, message):
    with pytest.raises(InputError, match=re.escape(message)):
        recipe(name, **given)


# ---- An adapter of one's own -----------------------------------------------------------------------------------


def test_the_last_tenth_is_measured_and_the_rest_trained_on(tmp_path, tokenizer):
    path = write(tmp_path / "my_pairs.jsonl", *JARGON["pairs"](405))
    one = recipe("new_adapter", data=[path], task="mine")
    assert one.adapters.trains == ("mine",)
    assert one.loss.dims == (24, 48, 96, 192, 288, 384)
    (task,) = one.eval.tasks
    assert (task.kind, task.task, task.path) == ("ir", "mine", path)
    measured = {record.texts[0] for record in tasks._records(task, "pair")}
    made = plan.make(one, one.phases[0], tokenizer)
    (source,) = made.sources
    trained = {source.index[int(number)].texts[0] for number in source.records}
    everything = {record.texts[0] for record in examples.read(path)}
    assert measured | trained == everything
    assert not measured & trained
    assert len(measured) == round(405 * 0.1)


def test_other_records_to_measure_leave_all_for_training(tmp_path):
    path = write(tmp_path / "my_pairs.jsonl", *JARGON["pairs"](64))
    held_out = write(tmp_path / "held_out.jsonl", *JARGON["pairs"](5, seed=1))
    one = recipe("new_adapter", data=path, eval_data=held_out)
    assert [given.hold_out for given in one.datasets] == [0]
    assert [(task.path, task.share) for task in one.eval.tasks] == [(held_out, 1)]


def test_more_records_take_more_and_smaller_steps(tmp_path):
    few, many = (
        recipe("new_adapter", data=write(tmp_path / f"{count}.jsonl", *[{"query": "a", "pos": "b"}] * count)).phases[0]
        for count in (100, 20_000)
    )
    assert (few.steps, few.lr) == (60, 5e-3)
    assert many.steps == 2000
    assert 5e-4 < many.lr < 1e-3


def test_adapters_for_similarity_and_labels_are_measured_as_such(tmp_path):
    for name, kind in (("scored", "sts"), ("labelled", "classification"), ("search", "ir")):
        one = recipe("new_adapter", data=str(DATA / f"{name}.jsonl"))
        assert [task.kind for task in one.eval.tasks] == [kind]


# ---- From paths to data sets -----------------------------------------------------------------------------------


def test_files_directories_and_globs_become_data_sets(tmp_path):
    pair = {"query": "a", "pos": "b"}
    a, b = write(tmp_path / "x" / "a.jsonl", pair), write(tmp_path / "x" / "deep" / "b.jsonl", pair)
    (tmp_path / "x" / "notes.txt").touch()
    write(tmp_path / "x" / ".hidden.jsonl", pair)
    assert [(one.name, one.path) for one in datasets(a)] == [("a", a)]
    assert [one.path for one in datasets(str(tmp_path / "x"))] == [a, b]
    assert [one.path for one in datasets(str(tmp_path / "x" / "*.jsonl"))] == [a]
    assert [one.path for one in datasets([a, str(tmp_path / "x"), b])] == [a, b]  # each once
    other = write(tmp_path / "y" / "a.jsonl", pair)
    assert [one.name for one in datasets([a, other, b])] == ["x/a.jsonl", "y/a.jsonl", "b"]
    for wrong in (str(tmp_path / "no.jsonl"), str(tmp_path / "x" / "notes.txt"), str(tmp_path / "*.gz")):
        with pytest.raises(InputError, match="no file that ends in"):
            datasets(wrong)


def test_what_is_measured_follows_from_the_kind(tmp_path):
    text = write(tmp_path / "text.jsonl", {"text": "a"})
    labelled = write(tmp_path / "labels.jsonl", {"text": "a", "label": 1})
    assert [task.kind for task in eval_tasks([text, labelled])] == ["mlm", "classification"]
    (task,) = eval_tasks(labelled, "q", "p", labelled="clustering")
    assert (task.kind, task.task, task.passage_task) == ("clustering", "q", None)
    assert eval_tasks(None) == ()
    write(tmp_path / "beir" / "corpus.jsonl", {"_id": "1", "text": "a"})
    (task,) = eval_tasks(str(tmp_path / "beir"), "q", "p")
    assert (task.name, task.kind, task.passage_task) == ("beir", "ir", "p")
    with pytest.raises(InputError, match="holds no records"):
        eval_tasks(write(tmp_path / "empty.jsonl"))


# ---- The bundled data ------------------------------------------------------------------------------------------


def test_the_bundled_files_are_what_their_script_makes(tmp_path):
    made = runpy.run_path(str(DATA / "make.py"))["make"](tmp_path)
    assert {file.name for file in made} == {file.name for file in DATA.glob("*.jsonl")}
    for file in made:
        assert file.read_bytes() == (DATA / file.name).read_bytes(), file.name
    assert sum(file.stat().st_size for file in made) < 600_000


KINDS = {"texts": "text", "scored": "scored", "labelled": "labelled", "pairs": "pair", "translations": "pair"}


@pytest.mark.parametrize("file", sorted(DATA.glob("*.jsonl")), ids=lambda file: file.stem)
def test_bundled_records_are_well_formed_and_differ(file):
    name = file.name.split(".")[0]
    kind = KINDS.get(name, "pair" if name == "jargon" else "triplet")
    records = list(examples.read(file))
    assert {record.kind for record in records} == {kind}
    for record in records:
        assert len({*record.texts}) == len(record.texts), record
    if name in ("search", *FAILURES):
        assert {len(record.negatives) for record in records} == {7}
    if ".eval" in file.name:
        trained = {record.texts for record in examples.read(DATA / f"{name}.jsonl")}
        assert not trained & {record.texts for record in records}
        queries = {texts[0] for texts in trained}
        assert kind == "scored" or not queries & {record.texts[0] for record in records}


def test_the_jargon_tells_nothing_but_the_place():
    made = JARGON["pairs"](650)
    assert len({record["query"] for record in made}) == len({record["pos"] for record in made}) == 650
    places = {word for place in JARGON["PLACES"] for word in place.split()}
    for record in made:
        query, passage = ({*re.findall(r"\w+", record[side].lower())} for side in ("query", "pos"))
        assert query & passage <= places
        assert any(place in record["query"] and place in record["pos"].lower() for place in JARGON["PLACES"])
    assert JARGON["pairs"](650) == made
    assert JARGON["pairs"](650, seed=1) != made
