"""Tables and sentences of the card about what was measured."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Results of the measures by name, and these by seed.
Measures = Mapping[str, Any]
BySeed = Mapping[int, Measures]
NAMES = {
    "udhr": "Universal Declaration of Human Rights",
    "quran": "Quran, verses",
    "wesnoth": "Wesnoth, campaigns held out",
    "help": "LibreOffice help, pages held out",
    "gnome": "GNOME help, pages held out",
    "glosses": "WordNet: word, gloss",
    "vader_sentiment": "sentiment of rated sentences",
    "vader_domain": "domain of rated sentences",
    "spam": "spam or not",
    "lexnames": "WordNet lexicographer files of glosses",
    "modules": "LibreOffice module of a help page",
    "mean": "**mean**",
}
# Each adapter's measure.
ADAPTERS = {
    "retrieval": ["retrieval"],
    "text-matching": ["sts", "bitext"],
    "classification": ["classification"],
    "separation": ["clustering"],
}
WEAK = 0.8


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown: the first column is text, the others are numbers."""
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def number(value: float | None) -> str:
    """A value; a dash for none."""
    return "–" if value is None else f"{value:.3f}"


def interval(found: Mapping[str, float]) -> str:
    """A difference with its interval."""
    return f"{found['difference']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"


def order(by_seed: BySeed, shipped: int) -> list[int]:
    """The seeds, the shipped one first."""
    return sorted(by_seed, key=lambda seed: seed != shipped)


def sources(found: Mapping[str, Any]) -> list[str]:
    """Sources of a measure, their mean last if there are several."""
    names = [name for name in found["counts"] if "." not in name and name != "mean"]
    return [*names, "mean"] if len(names) > 1 else names


def cell(by_seed: BySeed, shipped: int, measure: str, column: str, row: str) -> str:
    """A number of each seed."""
    values = [by_seed[seed][measure]["columns"].get(column, {}).get(row) for seed in order(by_seed, shipped)]
    return " / ".join(map(number, values))


def other(found: Mapping[str, Any], column: str, row: str) -> str:
    """A number of start or teacher, if it was there."""
    return number(found["columns"].get(column, {}).get(row))


def facts(model: Mapping[str, Any]) -> str:
    """What the model is, in rows of a table."""
    million, backbone = 1e6, model["parameters"] - model["of_adapters"]
    prompts = "; ".join(f'{task}: "{text}"' for task, text in model["tasks"].items() if text)
    rows = {
        "Parameters": f"{backbone / million:.1f} M, and {model['of_adapters'] / million:.1f} M of five adapters",
        "Size": f"{model['bytes'] / million:.0f} MB ({model['stored_as']})",
        "Layers": f"{model['layers']} of width {model['width']}, {model['heads']} heads, mlp {model['mlp_width']}",
        "Positions": f"rotary, base {model['rope_base']:,.0f} at inference; at most {model['max_tokens']:,} tokens",
        "Vocabulary": f"{model['vocabulary']:,} pieces of XLM-RoBERTa's",
        "Pooling": "mean over all tokens, unit length",
        "Dimensions": f"{model['dimensions']}, trained for {', '.join(map(str, model['trained_for']))}",
        "Tasks": ", ".join(model["tasks"]),
        "Prompts": prompts or "none",
    }
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def bitext(by_seed: BySeed, shipped: int) -> str:
    """Translations by source."""
    found, rows = by_seed[shipped]["bitext"], []
    for row in sources(found):
        bare, teacher = found["columns"]["bare"][row], found["columns"].get("teacher", {}).get(row)
        ours = [cell(by_seed, shipped, "bitext", column, row) for column in ("bare", "adapters")]
        ratio = number(bare / teacher if teacher else None)
        name, count = NAMES.get(row, row), f"{found['counts'][row]:,}"
        rows.append([name, count, *ours, other(found, "start", row), number(teacher), ratio])
    return table(["Source", "Texts", "bare", "text-matching", "start", "teacher", "bare ÷ teacher"], rows)


def family(by_seed: BySeed, shipped: int, measure: str) -> str:
    """A measure by source, with what the adapters add."""
    found, rows = by_seed[shipped][measure], []
    for row in sources(found):
        ours = [cell(by_seed, shipped, measure, column, row) for column in ("adapters", "bare")]
        others = [other(found, column, row) for column in ("start", "teacher")]
        name, count = NAMES.get(row, row), f"{found['counts'][row]:,}"
        rows.append([name, count, *ours, *others, interval(found["adapters - bare"][row])])
    return table(["Set", "Texts", "adapter", "bare", "start", "teacher", "adapter − bare"], rows)


def by_language(found: Mapping[str, Any], columns: Sequence[str]) -> str:
    """Languages against sources."""
    sets = [name for name in found["counts"] if "." in name]
    names = list(dict.fromkeys(name.split(".")[0] for name in sets))
    # A source of one language needs no table of languages.
    names = [name for name in names if sum(one.startswith(f"{name}.") for one in sets) > 1]
    spoken = sorted({one.split(".")[1] for one in sets if one.split(".")[0] in names})
    rows = []
    for language in spoken:
        values = [[found["columns"].get(one, {}).get(f"{name}.{language}") for one in columns] for name in names]
        rows.append([language, *("" if cells[0] is None else " / ".join(map(number, cells)) for cells in values)])
    return table(["", *names], rows)


def verdicts(by_seed: BySeed, shipped: int) -> str:
    """What each adapter adds to the backbone on its own measure, and where it adds nothing."""
    lines = []
    for adapter, chosen in ADAPTERS.items():
        for measure in chosen:
            gains = {seed: by_seed[seed][measure]["adapters - bare"] for seed in order(by_seed, shipped)}
            told = "; ".join(f"{interval(found['mean'])} (seed {seed})" for seed, found in gains.items())
            lines.append(
                f"- **{adapter}**, {measure}, mean: {told}. {_where(gains[shipped], sources_of(gains[shipped]))}"
            )
    return "\n".join(lines)


def sources_of(gains: Mapping[str, Any]) -> list[str]:
    """Sources that were compared."""
    return [name for name in gains if "." not in name and name != "mean"]


def _where(gains: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> str:
    worse = [name for name in names if gains[name]["high"] < 0]
    same = [name for name in names if gains[name]["low"] <= 0 <= gains[name]["high"]]
    told = ["It gains on every set." if not worse + same else ""]
    told.append(f"No difference can be told (the interval holds 0) on {', '.join(same)}." if same else "")
    told.append(f"**It loses on {', '.join(worse)}.**" if worse else "")
    return " ".join(filter(None, told))


def matryoshka(found: Measures) -> str:
    """Values at each size, and how much is left of that at full size."""
    rows = []
    for size in reversed(found["retrieval"]["shares"]):
        row = [size]
        for one in found.values():
            left = one["shares"][size]
            value, share = number(one["columns"][one["own"]][size]), f"{100 * left['share']:.1f}%"
            row.append(f"{value} ({share} [{100 * left['low']:.1f}, {100 * left['high']:.1f}])")
            row += [
                number(one["columns"].get("start", {}).get(size)),
                number(one["columns"].get("teacher", {}).get(size)),
            ]
        rows.append(row)
    header = [f"{name}, {one['unit']}" for name, one in found.items()]
    return table(["Dimensions", *(x for name in header for x in (name, "start", "teacher"))], rows)


def passkey(found: Measures) -> str:
    """What was found at each length."""
    names, rows = ("title", "document", "sentence", "alone"), []
    for column, lengths in found["columns"].items():
        for length, values in lengths.items():
            cells = (values.get(name) for name in names)
            reciprocal = [values.get(f"{name} mrr") for name in ("document", "sentence")]
            rows.append([column, length, *map(number, cells), *map(number, reciprocal)])
    header = ["Model", "Tokens", *(f"{name}, top-1" for name in names), "document, MRR", "sentence, MRR"]
    return table(header, rows)


def rope(found: Measures) -> str:
    """Both rotary bases."""
    rows = []
    for name, one in found.items():
        for row, gain in one["difference"].items():
            values = (one["columns"][base][row] for base in ("10000", "20000"))
            rows.append([f"{name}, {NAMES.get(row, row)}", *map(number, values), interval(gain)])
    return table(["", "10,000", "20,000", "difference"], rows)


def late_sizes(found: Measures) -> str:
    """How much was chunked."""
    return f"{found['articles']} articles, {found['chunks']:,} chunks, {found['queries']:,} questions."


def late(found: Measures) -> str:
    """Late and naive chunking."""
    rows = [[name, number(value)] for name, value in found["columns"].items()]
    rows += [[name.replace(" - ", " − "), interval(gain)] for name, gain in found["differences"].items()]
    return table(["", found["unit"]], rows)


def limits(found: Measures) -> str:
    """What the model cannot do, as far as it was measured."""
    total: dict[str, list[float]] = {}
    for name, value in found["bitext"]["columns"]["bare"].items():
        if "." in name:
            total.setdefault(name.split(".")[1], []).append(value)
    means = {language: sum(values) / len(values) for language, values in total.items()}
    weak = [f"{name} ({means[name]:.2f})" for name in sorted(means, key=means.__getitem__) if means[name] < WEAK]
    lines = [
        f"- Weak languages (top-1 of translations, mean of the sets there are): {', '.join(weak) or 'none below 0.8'}. "
        "Not every language has every set, and the sets differ in difficulty. Languages not listed were not measured.",
        "- It was trained on manuals, a game, a dictionary and the like, for hours rather than weeks, on short texts. "
        "Ask more of it than that and it will disappoint; it is no rival of the released model.",
        "- No public benchmark (MTEB, STS-B, Tatoeba) was at hand where it was made; its numbers compare with nothing "
        "but the columns beside them.",
        "- Test sets of manuals and of the game are of the same sources as training texts, other pages and campaigns; "
        "the Declaration, the Quran and the human judgements are of sources that were not trained on.",
    ]
    return "\n".join(lines)
