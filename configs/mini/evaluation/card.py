"""The model card: every number of it comes from files that the measures and the corpus have written.

    python -m configs.mini.evaluation.card --work DIR --seeds 0 1

reads DIR/runs/SEED/results.json of each seed and DIR/report.json, and writes MODEL_CARD.md and matryoshka.png by the
bundled model, which must be that of one of the seeds.
"""

import argparse
import hashlib
import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.mini.evaluation import measures, plot, provenance, results, tables
from jina_jax import hub
from jina_jax.records import InputError, whole_file

HERE = Path(__file__).parent
PLOT_BYTES = 60_000


def fill(found: Mapping[int, dict[str, Any]], shipped: int, report: Mapping[str, Any], training: str) -> str:
    """The card.

    Args:
        found: Results of each seed.
        shipped: The seed of the bundled model.
        report: What the corpus says of itself.
        training: A table of what was trained for how long.

    Returns:
        Markdown.
    """
    model, own = found[shipped]["model"], found[shipped]["measures"]
    by_seed = {seed: one["measures"] for seed, one in found.items()}
    others = [str(seed) for seed in found if seed != shipped]
    second = f"Where there are two numbers, the second is of seed {', '.join(others)}." if others else ""
    template = string.Template((HERE / "card.md").read_text(encoding="utf-8"))
    return template.substitute(
        languages=", ".join(provenance.languages(report)),
        facts=tables.facts(model),
        sha256=model["sha256"],
        shipped=shipped,
        seeds=" ".join(map(str, found)),
        rank=model["adapter_rank"],
        training=training,
        about_seeds=second,
        resamples=f"{measures.RESAMPLES:,}",
        bitext=tables.bitext(by_seed, shipped),
        bitext_languages=tables.by_language(own["bitext"], ("bare", "teacher")),
        retrieval=tables.family(by_seed, shipped, "retrieval"),
        retrieval_languages=tables.by_language(own["retrieval"], ("adapters", "bare", "teacher")),
        **{name: tables.family(by_seed, shipped, name) for name in ("sts", "classification", "clustering")},
        verdicts=tables.verdicts(by_seed, shipped),
        matryoshka=tables.matryoshka(own["matryoshka"]),
        documents=own["passkey"]["documents"],
        chance=f"{1 / own['passkey']['documents']:.2f}",
        passkey=tables.passkey(own["passkey"]),
        rope=tables.rope(own["rope"]),
        late_sizes=tables.late_sizes(own["late"]),
        late=tables.late(own["late"]),
        limits=tables.limits(own),
        licences=provenance.licences(report),
        records=provenance.records(report),
        leaks=provenance.leaks(report),
        tests=", ".join(f"{name} {count:,}" for name, count in sorted(provenance.sizes(report).items())),
    )


def training(run: Path) -> str:
    """What was trained for how long, as far as the exports of a seed's stages are there."""
    rows = []
    for path in sorted(run.glob("*/export/training.json"), key=lambda one: one.stat().st_mtime):
        facts = json.loads(path.read_text(encoding="utf-8"))["facts"]
        rows.append([path.parent.parent.name, f"{facts['steps']:,}", f"{facts['seconds'] / 60:.0f} min"])
    return tables.table(["Stage", "Steps", "Time"], rows) if rows else ""


def write(work: Path, seeds: Sequence[int], model: Path, output: Path) -> int:
    """Write the card and its figure.

    Args:
        work: The work directory.
        seeds: Whose results the card tells.
        model: Directory of the bundled model.
        output: Directory of card and figure.

    Returns:
        The seed of the bundled model.

    Raises:
        InputError: If results are missing, or the bundled model is that of no seed.
    """
    paths = {seed: work / "runs" / str(seed) / "results.json" for seed in seeds}
    for path in [*paths.values(), work / "report.json"]:
        if not path.is_file():
            raise InputError(f"no file {path}; make it with python -m configs.mini.rebuild --work {work} --seed SEED")
    found = {seed: results.read(path) for seed, path in paths.items()}
    with (model / "model.safetensors").open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    shipped = next((seed for seed, one in found.items() if one["model"]["sha256"] == sha256), None)
    if shipped is None:
        raise InputError(f"{model} is none of the models measured; copy one there: {work}/runs/SEED/model")
    text = fill(found, shipped, results.read(work / "report.json"), training(work / "runs" / str(shipped)))
    figure = plot.curve(found[shipped]["measures"]["matryoshka"])
    if len(figure) > PLOT_BYTES:
        raise InputError(f"the figure has {len(figure):,} bytes, more than {PLOT_BYTES:,}; lower plot.DPI")
    for name, content in {"MODEL_CARD.md": text.encode(), "matryoshka.png": figure}.items():
        with whole_file(output / name) as file:
            file.write(content)
    return shipped


def main() -> None:
    """Write the card that the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory of results and corpus")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="seeds (default: 0 1)")
    parser.add_argument("--output", type=Path, help="directory (default: that of the bundled model)")
    args = parser.parse_args()
    model = hub.find("mini")
    output = args.output or model
    shipped = write(args.work, args.seeds, model, output)
    print(f"{output}/MODEL_CARD.md and matryoshka.png, of seed {shipped}")


if __name__ == "__main__":
    main()
