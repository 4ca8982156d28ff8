"""The recipe of the bundled model holds together: every step needs only what a step before it makes."""

import importlib
import shlex
from pathlib import Path

import pytest

import jina_jax
from jina_jax.config import PROMPTS, TASKS
from jina_jax.train.cli import load

rebuild = importlib.import_module("configs.mini.rebuild")
MINI = Path(rebuild.__file__).parent
PAIRS = str(MINI.parent / "data" / "pairs.jsonl")


def test_every_step_finds_what_it_needs():
    work = Path("work")
    found = rebuild.steps(work, 3)
    # What the corpus holds; a test of the corpus checks that it does.
    made = {str(work), str(work / "train"), str(work / "train" / "distill.jsonl")}
    made |= {str(work / "train" / name) for name in ("titles.jsonl", "glosses.jsonl")}
    made |= {str(work / "train" / name) for name in ("separation", "classification", "scored")}
    made.add(str(work / "runs" / "3" / "mined"))
    for step in found:
        given = [word for word in step.command if word.startswith("work")]
        outputs = {str(step.makes), str(step.makes.parent)}
        assert not [word for word in given if word not in made | outputs], step.name
        made.add(str(step.makes))
    assert len({step.name for step in found}) == len(found)


@pytest.mark.parametrize("number", range(3))
def test_commands_of_the_docstrings_are_recipes(number):
    name = ("distill", "pairs", "adapters")[number]
    text = (MINI / f"{name}.py").read_text()
    command = shlex.split(next(line for line in text.splitlines() if "jina-jax train" in line))
    flags = dict(zip(command[3::2], command[4::2], strict=True))
    assert command[2] == f"configs/mini/{name}.py"
    flags["--data"] = PAIRS  # adapters look for files
    recipe = load(str(MINI / f"{name}.py"), {key.strip("-"): flags[key] for key in flags if key != "--run-dir"})
    assert recipe.init.rope_base == 10_000
    assert recipe.loss.dims == (24, 48, 96, 192, 384)


def test_the_adapters_are_those_of_the_released_model():
    recipes = [
        load(str(MINI / "adapters.py"), {"data": PAIRS, "model": "mini", "adapter": name}) for name in rebuild.ADAPTERS
    ]
    assert tuple(task for one in recipes for task in one.adapters.trains) == TASKS
    assert tuple(prompt for one in recipes for prompt in one.adapters.prompts or ()) == PROMPTS
    assert {(one.init.rope_base, one.init.export_rope_base) for one in recipes} == {
        (10_000, jina_jax.Config().rope_base)
    }
