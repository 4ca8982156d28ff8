"""What a run tells: `metrics.jsonl`, TensorBoard, Weights & Biases, and lines or a progress bar for people."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jina_jax.records import InputError
from jina_jax.train.recipe import Log, Recipe

# Rows that differ between two runs of the same recipe differ in these alone.
TIMES = ("seconds", "tokens_per_second")


class Journal:
    """The records of a run, written by its first process; a context."""

    def __init__(self, directory: Path, recipe: Recipe, step: int, *, writes: bool) -> None:
        self._every, self._writes, self._file, self._board, self._wandb = recipe.log.every, writes, None, None, None
        self._bar: Any = None
        if not writes:
            return
        path = directory / "metrics.jsonl"
        keep_until(path, step or -1)  # without a checkpoint, what was measured before the first step is measured again
        self._file = path.open("a", encoding="utf-8")
        self._board = _tensorboard(directory / "tensorboard", step) if recipe.log.tensorboard else None
        self._wandb = _wandb(recipe.log, directory)
        if sys.stderr.isatty():
            form = "{percentage:3.0f}%|{bar:8}| {n}/{total} [{elapsed}<{remaining}] {postfix}"
            self._bar = tqdm(total=recipe.steps, initial=step, dynamic_ncols=True, bar_format=form)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        for one in (self._bar, self._file, self._board):
            if one is not None:
                one.close()
        if self._wandb is not None:
            self._wandb.finish()

    def say(self, line: str) -> None:
        """A line for people, on stderr."""
        if self._writes:
            tqdm.write(line, file=sys.stderr)
            sys.stderr.flush()

    def row(self, row: Mapping[str, Any]) -> None:
        """A row of numbers: of a step, or with "eval" of an evaluation."""
        if self._file is None:
            return
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        numbers = {
            name: value for name, value in row.items() if isinstance(value, int | float) and name not in ("step",)
        }
        prefix = "eval" if "eval" in row else "train"
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(f"{prefix}/{row.get('eval', '')}{name}", value, row["step"])
        if self._wandb is not None:
            self._wandb.log({f"{prefix}/{row.get('eval', '')}{name}": value for name, value in numbers.items()})

    def progress(self, row: Mapping[str, Any], steps: int) -> None:
        """Show how it goes: on a terminal a bar, elsewhere a line now and then."""
        parts = [f"loss {row['loss']:.4f}"]
        parts += [f"acc@1 {row['accuracy']:.2f}"] if "accuracy" in row else []
        parts += [f"lr {row['lr']:.2e}", f"gnorm {row['gradient_norm']:.2f}"]
        parts += [f"dup {row['masked']:.0f}"] if row.get("masked") else []
        parts += [f"pad {100 * row['padding']:.0f}%", f"{_short(row['tokens_per_second'])} tok/s", row["dataset"]]
        if self._bar is not None:
            self._bar.update(row["step"] - self._bar.n)
            self._bar.set_postfix_str(" ".join(parts))
        elif row["step"] % self._every == 0 or row["step"] == steps:
            self.say(f"{row['step']:>{len(str(steps))}}/{steps} {' '.join(parts)}")

    def sync(self) -> None:
        """Bring all rows to the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())


def keep_until(path: Path, step: int) -> None:
    """Drop the rows of steps after one, which will be done again, and a last line that is not whole.

    Args:
        path: The file; it may be missing.
        step: The step.
    """
    if not path.exists():
        return
    kept = 0
    with path.open("rb+") as handle:
        for line in handle:
            try:
                row = json.loads(line) if line.endswith(b"\n") else {"step": step + 1}
            except ValueError:
                break
            if row["step"] > step:
                break
            kept += len(line)
        handle.truncate(kept)


def _tensorboard(directory: Path, step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise InputError(
            "TensorBoard's files need tensorboardX: pip install 'jina-jax[train]', or --set log.tensorboard=False"
        ) from error
    return SummaryWriter(str(directory), purge_step=step + 1 if step else None)


def _wandb(log: Log, directory: Path) -> Any:
    if log.wandb is None:
        return None
    try:
        import wandb
    except ImportError as error:
        raise InputError("log.wandb is set, but there is no wandb: pip install wandb") from error
    return wandb.init(project=log.wandb, name=directory.name, dir=str(directory), resume="allow")


def _short(number: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
