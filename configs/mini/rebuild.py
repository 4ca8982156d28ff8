"""Make the bundled model again: corpus, the teacher's vectors, three stages of training, evaluation.

    python -m configs.mini.rebuild --work build/mini --seed 0

takes some hours on two cores, and some 3 GB of disk. What is done already is not done again: a run that was
interrupted goes on, and another seed shares corpus, teacher and start. The model is WORK/runs/SEED/model, what was
measured WORK/runs/SEED/results.json. Needs `pip install -e '.[train,notebooks]'` and the package registries.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import jina_jax
from jina_jax import checkpoint

HERE = Path(__file__).parent
# In the order in which they train, and what they learn from.
ADAPTERS = {
    "retrieval": "RUN/mined",
    "separation": "TRAIN/separation",
    "classification": "TRAIN/classification",
    "text-matching": "TRAIN/scored",
}
# The nearest passages are mostly other names for the same thing, and the farther ones teach nothing.
MINING = ("--query-task", "none", "--passage-task", "none", "--negatives", "3", "--range-min", "2", "--range-max", "40")


class Step(NamedTuple):
    """Something to do.

    Attributes:
        name: Its name.
        makes: What is there once it is done.
        command: Arguments of Python.
    """

    name: str
    makes: Path
    command: tuple[str, ...]


def steps(work: Path, seed: int) -> list[Step]:
    """All that is to be done, in order.

    Args:
        work: Directory of everything.
        seed: Of the order of records, and of new adapters.

    Returns:
        The steps; the commands start in the repository's root.
    """
    run, train = work / "runs" / str(seed), work / "train"

    def made(module: str, makes: Path) -> Step:
        return Step(module, makes, ("-m", f"configs.mini.{module}", "--work", str(work)))

    def trained(name: str, recipe: str, model: Path, data: Path, *options: str) -> Step:
        where = ("--model", str(model), "--data", str(data), "--run-dir", str(run / name), "--set", f"seed={seed}")
        return Step(
            name, run / name / "export", ("-m", "jina_jax", "train", str(HERE / f"{recipe}.py"), *where, *options)
        )

    def mined(name: str) -> Step:
        output, model = run / "mined" / f"{name}.jsonl", str(run / "pairs" / "export")
        command = ("-m", "jina_jax", "data", "mine", str(train / f"{name}.jsonl"), "--output", str(output))
        return Step(f"mine {name}", output, (*command, "--model", model, *MINING))

    found = [
        made("corpus", work / "report.json"),
        made("start.teacher", train / "distill.npy"),
        made("start.student", work / "start"),
        trained("distill", "distill", work / "start", train / "distill.jsonl"),
        trained("pairs", "pairs", run / "distill" / "export", train),
        mined("titles"),
        mined("glosses"),
    ]
    before = run / "pairs" / "export"
    for adapter, where in ADAPTERS.items():
        data = Path(where.replace("RUN", str(run)).replace("TRAIN", str(train)))
        found.append(trained(adapter, "adapters", before, data, "--adapter", adapter))
        before = run / adapter / "export"
    return found


def write_model(export: Path, tokenizer: Path, output: Path) -> None:
    """The model as it is bundled: float16, in the layout of the released model.

    Args:
        export: The export of the last run.
        tokenizer: Directory of its tokenizer.
        output: Directory to create.
    """
    model, variables = jina_jax.load(export)
    halves = jax.tree.map(lambda x: np.asarray(x).astype(np.float16), dict(variables))
    checkpoint.save(output, model, halves, layout="original", tokenizer=tokenizer, overwrite=True)


def main() -> None:
    """Run all steps that are not done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/mini"), help="directory (default: build/mini)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of records (default: 0)")
    args = parser.parse_args()
    run = args.work / "runs" / str(args.seed)
    (run / "mined").mkdir(parents=True, exist_ok=True)
    for step in steps(args.work, args.seed):
        if not step.makes.exists():
            print(f"== {step.name}", flush=True)
            subprocess.run([sys.executable, *step.command], check=True)
    model, results = run / "model", run / "results.json"
    if not model.exists():
        write_model(run / [*ADAPTERS][-1] / "export", args.work / "start", model)
    if not results.exists():
        command = ["-m", "configs.mini.evaluation", "--work", str(args.work), "--model", str(model)]
        subprocess.run([sys.executable, *command, "--output", str(results)], check=True)
    print(f"the model is in {model}; to bundle it, copy it: {', '.join(sorted(one.name for one in model.iterdir()))}")


if __name__ == "__main__":
    main()
