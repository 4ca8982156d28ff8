"""The paper's ablations as a grid of runs: its Tables 6, 7 and 8, with the paper's rows beside ours.

Ours are of the size that one gives; only the differences between the columns can be compared.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jina_jax.records import InputError, whole_file
from jina_jax.train import loop
from jina_jax.train.recipe import Recipe, override

PAPER = Path(__file__).parent.parent / "eval" / "paper.json"
# Data sets against known failures, made up or mined (Section 4.3 of the paper): Table 6 is with and without.
FAILURES = ("synthetic_f1", "synthetic_f2", "synthetic_f3", "oasst")

Results = Mapping[str, Any]
Rows = list[list[str]]


class Cell(NamedTuple):
    """A run of a grid.

    Attributes:
        name: Its name in the table, and of its directory.
        changes: Of the recipe, as for `override`.
        adapter: Which recipe of the configuration.
    """

    name: str
    changes: tuple[str, ...] = ()
    adapter: str = "retrieval"


ONE, NO_INSTRUCTIONS, FULL = "adapters.shared=True", "adapters.instructions=False", "loss.dims=None"
GRIDS: dict[str, tuple[Cell, ...]] = {
    "table6": (Cell("without failure data", ("data.exclude=FAILURES",)), Cell("with failure data")),
    "table7": (
        Cell("retrieval"),
        Cell("STS", adapter="text-matching"),
        Cell("retrieval, Matryoshka off", (FULL,)),
        Cell("STS, Matryoshka off", (FULL,), "text-matching"),
    ),
    "table8": (
        Cell("w/ instr 1 adapter", (ONE,)),
        Cell("w/ instr 2 adapters"),
        Cell("w/o instr 1 adapter", (ONE, NO_INSTRUCTIONS)),
        Cell("w/o instr 2 adapters", (NO_INSTRUCTIONS,)),
    ),
}


def ablate(table: str, recipe: Callable[[str], Recipe], run: Path, command: str = "") -> str:
    """Run a grid and tell what came out.

    A grid that was interrupted goes on. What each run gave is in `results.json`, in full.

    Args:
        table: A key of `GRIDS`.
        recipe: The recipe of an adapter, by its name in the configuration.
        run: Directory for the runs.
        command: What started it, for the model cards.

    Returns:
        A table in Markdown, with the paper's numbers.

    Raises:
        InputError: If a recipe cannot be run, or measures nothing that the table shows.
    """
    results = {}
    for cell in GRIDS[table]:
        one = recipe(cell.adapter)
        failures = [name for name in FAILURES if name in {given.name for given in one.data.datasets}]
        if table == "table6" and not failures:
            raise InputError(f"table6 needs data sets named {', '.join(FAILURES)}, or some of them")
        changes = [change.replace("FAILURES", repr(failures)) for change in cell.changes]
        if not one.eval.tasks:
            raise InputError(f"{table} shows evaluations; the recipe has none: give --eval-data")
        folder = run / cell.name.replace(" ", "_").replace("/", "")
        outcome = loop.train(override(one, changes), folder, command=command)
        if not outcome.finished:
            raise SystemExit(75)
        results[cell.name] = outcome.results
    with whole_file(run / "results.json") as file:
        file.write(json.dumps(results, indent=1).encode())
    paper = json.loads(PAPER.read_text(encoding="utf-8"))[table]
    return "\n".join(_markdown(_TABLES[table](results, paper))) + "\n"


def _table6(results: Results, paper: Results) -> Rows:
    """Failure cases, in nDCG@10: F1 to F4 by our data sets, before any adapter, without and with failure data."""
    names = [name for name in FAILURES if name in results["with failure data"]["after"]]
    if not names:
        raise InputError(f"table6 measures tasks named {', '.join(FAILURES)}; the recipe has none of them")
    columns = [f"F{FAILURES.index(name) + 1}" for name in names]
    rows = [["ours, nDCG@10", *columns]]
    before = results["with failure data"]["before"]
    rows.append(["before", *(_main(before, name) for name in names)])
    rows += [[label, *(_main(one["after"], name) for name in names)] for label, one in results.items()]
    for kind, title in (("hand_selected_mAP", "the paper's, mAP"), ("synthetic_nDCG@10", "the paper's, nDCG@10")):
        rows.append([title, *(["" for _ in names])])
        for label, values in paper[kind].items():
            chosen = [values[FAILURES.index(name)] for name in names]
            rows.append([label, *("–" if value is None else f"{value:.2f}" for value in chosen)])
    return rows


def _table7(results: Results, paper: Results) -> Rows:
    """Matryoshka sizes."""
    cells = [cell.name for cell in GRIDS["table7"]]
    found = {cell: _by_size(results[cell]["after"]) for cell in cells}
    rows = [["dim", *cells]]
    for size in sorted(found[cells[0]]):
        rows.append([str(size), *(f"{found[cell][size]:.2f}" for cell in cells)])
    rows.append(["the paper's", "", "", "", ""])
    rows += [[str(size), f"{retrieval:.2f}", f"{sts:.2f}", "", ""] for size, retrieval, sts in paper["rows"]]
    return rows


def _table8(results: Results, paper: Results) -> Rows:
    """One or two adapters, with and without instructions."""
    columns = [cell.name for cell in GRIDS["table8"]]
    names = list(results[columns[0]]["after"])
    rows = [["ours, nDCG@10", *columns]]
    rows += [[name, *(_main(results[cell]["after"], name) for cell in columns)] for name in names]
    rows.append(["average", *(f"{_average(results[cell]['after']):.2f}" for cell in columns)])
    rows.append(["the paper's", "", "", "", ""])
    rows += [[name, *(f"{value:.2f}" for value in values)] for name, values in paper["rows"].items()]
    return rows


_TABLES: dict[str, Callable[[Results, Results], Rows]] = {"table6": _table6, "table7": _table7, "table8": _table8}


def _sizes(tasks: Results, name: str) -> dict[int, float]:
    """The main metric of a task by size, in percent."""
    one = tasks[name]
    return {int(size): 100 * value for size, value in one["metrics"][one["main"]].items()}


def _main(tasks: Results, name: str) -> str:
    sizes = _sizes(tasks, name)
    return f"{sizes[max(sizes)]:.2f}"


def _average(tasks: Results) -> float:
    return sum(float(_main(tasks, name)) for name in tasks) / len(tasks)


def _by_size(tasks: Results) -> dict[int, float]:
    """The mean over tasks by size."""
    every = [_sizes(tasks, name) for name in tasks]
    return {size: sum(one[size] for one in every) / len(every) for size in every[0]}


def _markdown(rows: Rows) -> list[str]:
    """Rows as a table whose columns are aligned."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) if not at else cell.rjust(width) for at, (cell, width) in
                          enumerate(zip(row, widths, strict=True))) + " |"
        for row in rows
    ]  # fmt: skip
    rule = "|" + "|".join("-" * (width + 1) + (":" if at else "-") for at, width in enumerate(widths)) + "|"
    return [lines[0], rule, *lines[1:]]
