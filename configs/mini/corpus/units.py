"""Parallel texts and pages, put together from the rows of the packages."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from configs.mini.corpus.fetch import fetch, sources
from configs.mini.corpus.parse import READERS, cached_rows

# Which scripts a text of a language is written in, by the first word of their characters' names; Latin otherwise.
SCRIPTS = {
    "ar": ("ARABIC",), "hi": ("DEVANAGARI",), "ja": ("CJK", "HIRAGANA", "KATAKANA"), "ko": ("HANGUL", "CJK"),
    "ru": ("CYRILLIC",), "uk": ("CYRILLIC",), "zh": ("CJK",),
}  # fmt: skip
SOURCE = {
    "libreoffice-help-": "help", "libreoffice-l10n-": "interface", "wesnoth-": "wesnoth", "gnome-user-docs": "gnome",
    "kolibri": "kolibri", "mediawiki": "mediawiki", "cldr-": "names", "dict-freedict-": "dictionary",
}  # fmt: skip


@dataclass
class Unit:
    """One text in several languages.

    Attributes:
        source: Which kind of package it is from, a value of `SOURCE`.
        doc: The document it stands in.
        kind: As in the rows.
        texts: The text by language, English always among them.
    """

    source: str
    doc: str
    kind: str
    texts: dict[str, str] = field(default_factory=dict)


@dataclass
class Page:
    """A page of a manual in one language.

    Attributes:
        source: "help" or "gnome".
        doc: Its path, the same in all languages.
        lang: Its language.
        title: Its title.
        paragraphs: Its running text.
    """

    source: str
    doc: str
    lang: str
    title: str
    paragraphs: list[str]

    def body(self, words: int = 80) -> str:
        """Its first words."""
        return cut(" ".join(self.paragraphs), words)


def cut(text: str, words: int) -> str:
    """The first words of a text; where words are not set apart by spaces, as many characters as they would have."""
    spaced = text.split()
    if width(text) > 1.5 * len(spaced):
        return text if width(text) <= words else text[: int(words / width(text) * len(text))]
    return " ".join(spaced[:words])


def width(text: str) -> float:
    """About how many words a text has: of scripts without spaces, every two characters count as one."""
    wide = sum(1 for char in text if "\u3040" <= char <= "\u9fff" or "\u0e00" <= char <= "\u0eff")
    return wide / 2 + len(text.split())


def translated(lang: str, text: str, english: str) -> bool:
    """Whether a text is in its language rather than left in English, as far as the writing tells."""
    if text.casefold() == english.casefold():
        return False
    if lang not in SCRIPTS:
        return True
    letters = [char for char in text if char.isalpha()]
    own = sum(unicodedata.name(char, "").startswith(SCRIPTS[lang]) for char in letters)
    return own > 0.5 * len(letters)


def usable(text: str) -> bool:
    """Whether a text is language: not code, an address or mere gaps."""
    letters = sum(char.isalpha() or unicodedata.category(char) == "Mn" for char in text)
    return letters >= 0.6 * len(text.replace(" ", "")) and not re.search(r"[{}\\]|://|\b\w+\(\)|_\w+_", text)


def units_and_pages(work: Path) -> tuple[list[Unit], list[Page]]:
    """Everything parallel in the packages.

    Args:
        work: The work directory; packages are fetched into it, and what is read from them is kept there.

    Returns:
        Texts, each English one once in a document and kind of source; and pages of manuals.
    """
    found: dict[tuple[str, str, str], Unit] = {}
    for name in sources():
        source = next((SOURCE[start] for start in READERS if name.startswith(start)), None)
        if source is None:
            continue
        for lang, doc, key, kind, text in cached_rows(name, fetch(name, work / "packages"), work / "parsed"):
            unit = found.setdefault(
                (source, doc, key), Unit("django" if doc.startswith("django") else source, doc, kind)
            )
            unit.texts.setdefault(lang, text)
    return list(_merged(found.values())), _pages(found.values())


def _pages(units: Iterable[Unit]) -> list[Page]:
    """The pages of manuals, of other languages than English those that are translated for the most part."""
    pages: dict[tuple[str, str, str], Page] = {}
    left: Counter[tuple[str, str, str]] = Counter()  # paragraphs left in English
    for unit in units:
        if unit.source not in ("help", "gnome") or unit.kind not in ("title", "text") or "en" not in unit.texts:
            continue
        for lang, text in unit.texts.items():
            page = pages.setdefault((unit.source, unit.doc, lang), Page(unit.source, unit.doc, lang, "", []))
            if unit.kind == "title":
                page.title = page.title or text
            elif lang != "en" and not translated(lang, text, unit.texts["en"]):
                left[unit.source, unit.doc, lang] += 1
            elif text not in page.paragraphs:
                page.paragraphs.append(text)
    return [page for key, page in pages.items() if page.title and len(page.paragraphs) > 2 * left[key]]


def _merged(units: Iterable[Unit]) -> Iterator[Unit]:
    """Units with their translations alone, those of one English text and source as one (the first)."""
    seen: dict[tuple[str, str], Unit] = {}
    for unit in units:
        english = unit.texts.get("en", "")
        if not usable(english) or len(english) < 2:
            continue
        kept = {
            lang: text
            for lang, text in unit.texts.items()
            if lang == "en" or (len(text) > 1 and usable(text) and translated(lang, text, english))
        }
        first = seen.setdefault((unit.source, english.casefold()), Unit(unit.source, unit.doc, unit.kind))
        first.texts |= {lang: text for lang, text in kept.items() if lang not in first.texts}
    yield from (unit for unit in seen.values() if len(unit.texts) > 1)
