"""What the README says is what happens."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [line for language, code in BLOCKS if language == "bash" for line in code.strip().splitlines()]


def test_the_first_two_commands_set_up_and_run_and_test():
    assert "jina-jax embed" in SHELL[0]
    assert "pytest" in SHELL[1]
    for command in SHELL[:2]:
        assert command.startswith("python3 -m venv ")


def test_ci_runs_the_test_command_word_for_word():
    assert SHELL[1] in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_examples_run(code):
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_command_line_examples_run(tmp_path, monkeypatch, capsys):
    from jina_jax.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("first text\nsecond text\n")
    (tmp_path / "texts.jsonl").write_text('{"id": 7, "text": "a record"}\n')
    ran = 0
    for line in SHELL:
        for command in line.split(" && "):
            words = shlex.split(command)
            if words[0].endswith("/jina-jax") and "jinaai/jina-embeddings-v3" not in words:
                assert main(words[1:]) == 0, command
                ran += 1
    assert ran >= 5
    assert (tmp_path / "embeddings.npy").exists()
    assert capsys.readouterr().out


def test_files_that_the_readme_names_exist():
    for name in re.findall(r"`((?:jina_jax|tests|convert|kernels)/[\w/.]+)`", README):
        assert (ROOT / name).exists() or (ROOT / "jina_jax" / name).exists(), name
