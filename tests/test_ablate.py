"""The paper's ablations at a very small size: the same table twice, with the paper's rows."""

import json
from pathlib import Path

import pytest

from jina_jax.cli import main
from jina_jax.records import InputError
from jina_jax.train import ablate
from jina_jax.train.cli import load
from jina_jax.train.recipe import Recipe, override

CONFIG = str(Path(__file__).parent.parent / "configs" / "adapters.py")
PAPER = json.loads(ablate.PAPER.read_text())


def fake(monkeypatch, score):
    """Replace training by a function of the recipe; what is under test is the grid and the table."""
    ran = []

    def train(recipe: Recipe, run: Path, command: str):
        ran.append((run.name, recipe))
        run.mkdir(parents=True)
        measured = {
            task.name: {"main": "ndcg@10", "metrics": {"ndcg@10": {16: score(recipe) / 2, 64: score(recipe)}}}
            for task in recipe.eval.tasks
        }
        return ablate.loop.Outcome(1, True, None, {"before": measured, "after": measured})

    monkeypatch.setattr(ablate.loop, "train", train)
    return ran


def test_table_8_is_one_or_two_adapters_with_and_without_instructions(monkeypatch, tmp_path, capsys):
    ran = fake(monkeypatch, lambda recipe: 0.1 + 0.4 * recipe.adapters.shared + 0.2 * recipe.adapters.instructions)
    command = ["ablate", "table8", "--config", CONFIG, "--preset", "tiny", "--run-dir", str(tmp_path)]
    assert main(command) == 0
    table = capsys.readouterr().out
    cells = {name: (recipe.adapters.shared, recipe.adapters.instructions) for name, recipe in ran}
    assert sorted(cells.values()) == [(False, False), (False, True), (True, False), (True, True)]
    (average,) = [line for line in table.splitlines() if line.startswith("| average")]
    assert [float(cell) for cell in average.split("|")[2:6]] == [70.0, 30.0, 50.0, 10.0]
    for name, values in PAPER["table8"]["rows"].items():
        (row,) = [line for line in table.splitlines() if line.startswith(f"| {name} ")]
        assert [float(cell) for cell in row.split("|")[2:6]] == values
    assert len(json.loads((tmp_path / "results.json").read_text())) == 4


def test_table_6_is_failure_data_in_and_out(monkeypatch, tmp_path, capsys):
    ran = fake(monkeypatch, lambda recipe: len(recipe.datasets) / 10)
    assert main(["ablate", "table6", "--config", CONFIG, "--preset", "tiny", "--run-dir", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    (_, without), (_, all_in) = ran
    assert {one.name for one in all_in.datasets} - {one.name for one in without.datasets} == set(ablate.FAILURES)
    assert [cell.strip() for cell in table.splitlines()[0].split("|")[2:6]] == ["F1", "F2", "F3", "F4"]
    for kind in ("hand_selected_mAP", "synthetic_nDCG@10"):
        for name, values in PAPER["table6"][kind].items():
            rows = [line for line in table.splitlines() if line.startswith(f"| {name} ")]
            shown = [[None if cell.strip() == "–" else float(cell) for cell in row.split("|")[2:6]] for row in rows]
            assert values in shown, name


def test_table_7_is_every_size_with_matryoshka_on_and_off(monkeypatch, tmp_path, capsys):
    ran = fake(monkeypatch, lambda recipe: 0.8 if recipe.loss.dims else 0.4)
    assert main(["ablate", "table7", "--config", CONFIG, "--preset", "tiny", "--run-dir", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    trained = [(recipe.adapters.trains[-1], recipe.loss.dims) for _, recipe in ran]
    assert len(set(trained)) == 4
    rows = [[cell.strip() for cell in line.split("|")[1:6]] for line in table.splitlines()]
    assert ["64", "80.00", "80.00", "40.00", "40.00"] in rows
    for size, retrieval, sts in PAPER["table7"]["rows"]:
        assert [str(size), f"{retrieval:.2f}", f"{sts:.2f}", "", ""] in rows


@pytest.mark.nightly
def test_an_ablation_gives_the_same_table_twice(tmp_path, capsys):
    """T16: real runs, of a few steps."""
    data = Path(CONFIG).parent / "data"
    command = ["ablate", "table6", "--config", CONFIG, "--preset", "tiny"]
    command += ["--data", str(data / "search.jsonl"), "--data", str(data / "synthetic_f1.jsonl")]
    command += ["--eval-data", str(data / "synthetic_f1.eval.jsonl")]
    for change in ("phases.0.steps=4", "phases.0.lr=0.1", "log.tensorboard=False", "loss.dims=None"):
        command += ["--set", change]
    tables = []
    for number in (0, 1, 0):  # the third time a grid that is done trains nothing
        assert main([*command, "--run-dir", str(tmp_path / str(number))]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] == tables[2]
    for name in ("before", "without failure data", "with failure data", "jina-embeddings-v3 retrieval adapter"):
        assert any(line.startswith(f"| {name} ") for line in tables[0].splitlines()), tables[0]


def test_an_ablation_needs_a_configuration_with_something_to_measure(tmp_path, capsys):
    assert main(["ablate", "table8"]) == 2
    assert "--config" in capsys.readouterr().err
    blind = override(load(CONFIG, {"preset": "tiny"}), ["eval.tasks=()"])
    with pytest.raises(InputError, match="give --eval-data"):
        ablate.ablate("table8", lambda _: blind, tmp_path)
