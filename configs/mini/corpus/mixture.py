"""What the student reads while it is distilled, and what the teacher reads for it."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace

from configs.mini.corpus import wordnet
from configs.mini.corpus.heldout import FOREIGN
from configs.mini.corpus.labelled import Rated
from configs.mini.corpus.splits import Held, held_out, number
from configs.mini.corpus.units import Page, Unit, width

Line = tuple[str, str, str, str]  # what it is, language, text, what the teacher reads
# How many English sentences the translations share, by source, and how many texts a language gets, by what they are.
POOL = {
    "wesnoth": 5000,
    "help": 4500,
    "gnome": 1500,
    "mediawiki": 2200,
    "kolibri": 900,
    "django": 200,
    "interface": 2000,
}
QUOTAS = {"translation": 3300, "passage": 420, "title": 260, "word": 300, "keywords": 0, "self": 900}
# Weak languages of the teacher's vocabulary and of the corpus get more, as far as there is more.
MORE = {
    "ar": {"translation": 4800, "passage": 900, "word": 1200, "keywords": 500, "self": 1200},
    "hi": {"translation": 4800, "passage": 900, "word": 1200, "keywords": 500, "self": 1200},
    "sw": {"translation": 4800, "passage": 2600, "word": 4200, "keywords": 2000, "self": 300},
} | {lang: {"translation": 3900, "self": 1000} for lang in ("id", "ja", "ko", "uk", "vi")}  # fmt: skip
ENGLISH = {
    "definition": 3500,
    "example": 2500,
    "lemma": 1000,
    "word": 1500,
    "rated": 4000,
    "body": 1500,
}  # texts of other sorts
JOINED = {"sw": (10, 20, 40), "hi": (25,), "ar": (25,)}  # words of the passages made for a language alone
SCARCE = {"sw": 3, "hi": 2, "ar": 2, "uk": 1, "ko": 0.5, "vi": 0.5}


def quota(lang: str, what: str) -> int:
    """How many texts of one sort a language gets at most."""
    return (QUOTAS | MORE.get(lang, {}))[what]


def trainable(units: Iterable[Unit], held: Held) -> Iterator[Unit]:
    """Units of documents that are not held out, without those whose English is in a test text."""
    for unit in units:
        if not held_out(unit.source, unit.doc) and not held.leaks(unit.texts["en"]):
            yield unit


def passages(units: Iterable[Unit], words: int = 70, long: float = 0.4) -> Iterator[Unit]:
    """Neighbouring texts of a document as one, of about so many words; a share of them of about 200."""
    documents: dict[tuple[str, str], list[Unit]] = defaultdict(list)
    for unit in units:
        if unit.kind in ("text", "message") and width(unit.texts["en"]) >= 4 and unit.source != "interface":
            documents[unit.source, unit.doc].append(unit)
    for (source, doc), parts in documents.items():
        taken: list[Unit] = []
        goal = words
        for part in parts:
            taken.append(part)
            if sum(width(unit.texts["en"]) for unit in taken) >= goal:
                yield _joined(taken)
                goal = 200 if number("long", source, doc, part.texts["en"]) < long else words
                taken = []


def _joined(parts: list[Unit]) -> Unit:
    langs = set.intersection(*(set(part.texts) for part in parts))
    texts = {
        lang: ("" if lang in ("ja", "zh") else " ").join(part.texts[lang] for part in parts) for lang in sorted(langs)
    }
    return replace(parts[0], kind="passage", texts=texts)


def lines(units: list[Unit], held: Held) -> Iterator[Line]:
    """The parallel part of the mixture.

    Args:
        units: All that may be trained on.
        held: The test texts; no line shares a run of tokens with them.

    Yields:
        Lines: translations whose target is their English, English and foreign texts whose target is they themselves.
    """
    joined = [unit for unit in passages(units) if 40 <= width(unit.texts["en"]) <= 300 and len(unit.texts) > 2]
    joined = _first(joined, 1300)
    groups = {
        "translation": _pool([unit for unit in units if unit.kind in ("text", "message")]),
        "passage": joined,
        "title": _first([unit for unit in units if unit.kind in ("title", "heading")], 1500),
        "word": [unit for unit in units if unit.kind == "word" or _label(unit)],
        "keywords": [unit for unit in units if unit.kind == "words"],
    }
    rest = [unit for unit in units if unit.kind == "text" and unit.source in ("help", "wesnoth", "gnome")]
    rest += [unit for unit in units if unit.kind == "message" and width(unit.texts["en"]) >= 8]
    told: set[str] = set()
    for lang in FOREIGN:
        used: set[str] = set()
        if lang in JOINED:  # sentences of which there are few are told once more, in company
            own = [unit for unit in units if lang in unit.texts]
            few = [unit for words in JOINED[lang] for unit in passages(own, words, long=0)]
            groups = groups | {"passage": [*few, *joined]}
        for what, group in groups.items():
            for unit in _take(group, lang, quota(lang, what), used, held, keep_order=what == "word"):
                yield what, lang, unit.texts[lang], unit.texts["en"]
                if unit.texts["en"] not in told and what not in ("word", "keywords"):
                    told.add(unit.texts["en"])
                    yield "english", "en", unit.texts["en"], unit.texts["en"]
        for unit in _take(rest, lang, quota(lang, "self"), used, held):
            yield "self", lang, unit.texts[lang], unit.texts[lang]


def brief(text: str) -> bool:
    """Whether a text is short enough to be read whole by the teacher, which has 512 positions."""
    return width(text) <= 330 and len(text) <= 2000


def _label(unit: Unit) -> bool:
    """Whether a message is a word or two of a user interface that the weakest language has."""
    return (
        unit.kind == "message"
        and unit.source in ("kolibri", "mediawiki")
        and "sw" in unit.texts
        and len(unit.texts["en"]) < 30
    )


def _pool(units: list[Unit]) -> list[Unit]:
    """Sentences of all sources: first those that exist in languages of which there is little."""
    found: dict[str, list[Unit]] = defaultdict(list)
    for unit in units:
        if 4 <= width(unit.texts["en"]) <= 120:
            found[unit.source].append(unit)
    pool = []
    for source, limit in POOL.items():
        rank = {id(unit): sum(SCARCE.get(lang, 0) for lang in unit.texts) for unit in found[source]}
        found[source].sort(key=lambda unit: (-rank[id(unit)], number("pool", unit.texts["en"])))
        pool += found[source][:limit]
    return pool


def _first(units: list[Unit], limit: int) -> list[Unit]:
    """Some units, those of more languages more likely."""
    return sorted(units, key=lambda unit: number("first", unit.texts["en"]) / len(unit.texts))[:limit]


def _take(
    units: list[Unit], lang: str, limit: int, used: set[str], held: Held, keep_order: bool = False
) -> Iterator[Unit]:
    """Units of a language in a fixed random order, no text twice and none that is in a test text."""
    own = [unit for unit in units if lang in unit.texts and unit.texts[lang] not in used]
    # Names come before dictionaries, whose English sides no other language shares.
    own.sort(key=lambda unit: (keep_order and unit.source == "dictionary", number("take", lang, unit.texts["en"])))
    count = 0
    for unit in own:
        text = unit.texts[lang]
        if count < limit and text not in used and brief(text) and brief(unit.texts["en"]) and not held.leaks(text):
            used.add(text)
            count += 1
            yield unit


def english(net: wordnet.WordNet, sentences: list[Rated], pages: list[Page]) -> Iterator[Line]:
    """English texts of other sorts, whose target is they themselves: definitions, words, rated sentences, bodies."""
    meanings = wordnet.glosses(net, tested=False, limit=4500)
    sorts = {
        "definition": [str(record["positive"]) for record in meanings[:3500]],
        "lemma": [str(record["query"]) for record in meanings[3500:]],
        "example": [
            text for synset in net.synsets.values() if not synset.tested for text in synset.examples if width(text) >= 6
        ],
        "word": [word for (_, word), id in net.first.items() if not net.synsets[id].tested],
        "rated": [item.text for item in sentences if not item.tested],
        "body": [
            page.body(int(30 + 90 * number("body", page.doc)))
            for page in pages
            if page.lang == "en" and not held_out(page.source, page.doc)
        ],
    }
    for what, texts in sorts.items():
        for text in sorted(set(texts), key=lambda text: number("english", text))[: ENGLISH[what]]:
            if brief(text):
                yield what, "en", text, text
