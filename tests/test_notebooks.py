"""The notebooks run, and each is the same as its pair."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.py"))


def cells_of_script(text):
    """Pairs of type and source, of a script in jupytext's percent format."""
    _, *parts = re.split(r"^# %%(?: (\[markdown\]))?\n", text, flags=re.MULTILINE)
    for marker, source in zip(parts[::2], parts[1::2], strict=True):
        source = source.strip("\n")
        if marker:
            yield "markdown", re.sub("^# ?", "", source, flags=re.MULTILINE)
        else:
            yield "code", source


def test_there_are_notebooks():
    assert NOTEBOOKS


# As a user runs them: on one device, without the checks of this session.
RUN = """
import runpy, sys
import matplotlib
matplotlib.use("Agg")
from matplotlib import pyplot
runpy.run_path(sys.argv[1])
assert pyplot.get_fignums()
"""


# What this one does, `test_new_adapter.py` does as well, in every run.
NIGHTLY = ("new_adapter",)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.nightly] * (path.stem in NIGHTLY), id=path.stem) for path in NOTEBOOKS],
)
def test_notebook_runs(path, tmp_path):
    pytest.importorskip("matplotlib")
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"MPLBACKEND": "Agg"}
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", RUN, str(path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_pair_is_the_same_and_was_run(path):
    pair = path.with_suffix(".ipynb")
    assert pair.stat().st_size < 400_000
    cells = json.loads(pair.read_text(encoding="utf-8"))["cells"]
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    assert found == list(cells_of_script(path.read_text(encoding="utf-8")))
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell["outputs"])
    assert not any(output["output_type"] == "error" for cell in code for output in cell["outputs"])
