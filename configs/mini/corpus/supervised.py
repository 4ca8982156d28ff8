"""Training sets for the adapters: pairs, scored pairs and labelled texts."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

from configs.mini.corpus import labelled, wordnet
from configs.mini.corpus.heldout import FOREIGN, Record
from configs.mini.corpus.labelled import Rated
from configs.mini.corpus.mixture import MORE, brief
from configs.mini.corpus.splits import held_out, number
from configs.mini.corpus.units import Page, Unit, cut, width

# How many records a language gets.
TRANSLATIONS, TITLES, CROSSED = 1500, 260, 60


def translations(units: Iterable[Unit]) -> Iterator[Record]:
    """Pairs of a text and its translation into English; every eighth into another language."""
    sources = ("wesnoth", "help", "gnome", "mediawiki", "kolibri", "interface")
    found = [
        unit for unit in units if unit.source in sources and width(unit.texts["en"]) >= 4 and brief(unit.texts["en"])
    ]
    for lang in FOREIGN:
        limit = TRANSLATIONS * (2 if lang in MORE else 1)
        own = [unit for unit in found if lang in unit.texts and brief(unit.texts[lang])]
        # The sources have very different sizes: a rank within each mixes them evenly.
        ranks: dict[str, int] = defaultdict(int)
        order = []
        for unit in sorted(own, key=lambda unit: number("translation", lang, unit.texts["en"])):
            ranks[unit.source] += 1
            order.append((ranks[unit.source] / (2 if unit.source in ("wesnoth", "help") else 1), unit))
        for _, unit in sorted(order, key=lambda item: item[0])[:limit]:
            others = [other for other in sorted(unit.texts) if other not in (lang, "en")]
            if others and number("other", lang, unit.texts["en"]) < 0.125:
                other = others[int(number("which", lang, unit.texts["en"]) * len(others))]
                yield {"query": unit.texts[lang], "positive": unit.texts[other], "lang": f"{lang}-{other}"}
            else:
                yield {"query": unit.texts[lang], "positive": unit.texts["en"], "lang": lang}


def titles(pages: Iterable[Page]) -> Iterator[Record]:
    """Pairs of a page's title and its first words, all of English and some of other languages; and across languages."""
    found = [page for page in pages if not held_out(page.source, page.doc) and width(page.body()) >= 12]
    english = {(page.source, page.doc): page for page in found if page.lang == "en"}
    counts: dict[str, int] = defaultdict(int)
    for page in sorted(found, key=lambda page: number("title", page.lang, page.doc)):
        counts[page.lang] += 1
        if page.lang != "en" and counts[page.lang] > TITLES + CROSSED:
            continue
        body = page
        if page.lang != "en" and counts[page.lang] > TITLES:
            body = english.get((page.source, page.doc), page)
        yield {"query": page.title, "positive": body.body(), "lang": page.lang, "group": page.doc}


def scored(units: Iterable[Unit], pages: list[Page], net: wordnet.WordNet, sentences: list[Rated]) -> Iterator[Record]:
    """Pairs of texts and how alike they are."""
    for one, two, score, relation in wordnet.alike(net, 1500):
        yield {"a": one, "b": two, "score": score, "lang": "en", "id": relation}
    found = [unit for unit in units if unit.kind in ("text", "message") and 5 <= width(unit.texts["en"]) <= 60]
    found = sorted(found, key=lambda unit: number("scored", unit.source, unit.texts["en"]))[:2600]
    for number_, unit in enumerate(found):
        lang, other = _two_languages(unit)
        yield {"a": unit.texts[lang], "b": unit.texts["en"], "score": 1.0, "lang": lang, "id": "translation"}
        if other != lang:
            yield {"a": unit.texts[lang], "b": unit.texts[other], "score": 1.0, "lang": lang, "id": "translation"}
        stranger = found[number_ - 1].texts["en"]
        yield {"a": unit.texts[lang], "b": stranger, "score": 0.0, "lang": lang, "id": "unrelated"}
    yield from _neighbours(pages)
    yield from _articles(sentences)


def _two_languages(unit: Unit) -> tuple[str, str]:
    langs = sorted(set(unit.texts) - {"en"}, key=lambda lang: number("two", lang, unit.texts["en"]))
    return langs[0], langs[-1]


def _neighbours(pages: list[Page]) -> Iterator[Record]:
    """Paragraphs in a row, of one page, and of pages of one module, in several languages."""
    found = [page for page in pages if not held_out(page.source, page.doc) and len(page.paragraphs) >= 4]
    found = sorted(found, key=lambda page: number("neighbours", page.lang, page.doc))[:1600]
    for index, page in enumerate(found):
        parts = [cut(text, 60) for text in page.paragraphs if width(text) >= 8]
        if len(parts) < 4:
            continue
        same = [
            other
            for other in found[index + 1 :]
            if other.lang == page.lang and other.doc.split("/")[0] == page.doc.split("/")[0]
        ]
        for text, score, relation in (
            (parts[1], 0.5, "next paragraph"),
            (parts[-1], 0.4, "same page"),
            (same[0].paragraphs[0] if same else "", 0.15, "same module"),
        ):
            if text and text != parts[0]:
                yield {"a": parts[0], "b": cut(text, 60), "score": score, "lang": page.lang, "id": relation}


def _articles(sentences: list[Rated]) -> Iterator[Record]:
    """Halves of newspaper articles and reviews: of the same, of two of a kind, and of two of different kinds."""
    articles: dict[tuple[str, str], list[str]] = defaultdict(list)
    for item in sentences:
        if not item.tested and item.domain in ("editorials", "products"):
            articles[item.domain, item.document].append(item.text)
    whole = sorted((key, parts) for key, parts in articles.items() if len(parts) >= 4)
    whole.sort(key=lambda item: number("halves", *item[0]))
    for index, (key, parts) in enumerate(whole):
        middle = len(parts) // 2
        first, second = cut(" ".join(parts[:middle]), 80), cut(" ".join(parts[middle:]), 80)
        other, rest = whole[index - 1]
        score = 0.1 if other[0] == key[0] else 0.0
        yield {"a": first, "b": second, "score": 0.6, "lang": "en", "id": "same article"}
        yield {"a": first, "b": cut(" ".join(rest), 80), "score": score, "lang": "en", "id": "other article"}


def separation(
    sets: dict[str, list[Record]], units: Iterable[Unit], pages: list[Page], sentences: list[Rated]
) -> Iterator[Record]:
    """Texts labelled by what they are about: modules, topics, kinds of meanings, campaigns and articles."""
    for name in ("modules", "lexnames", "vader_domain"):
        yield from sorted(sets[name], key=_order(name))[:5000]
    yield from labelled.topics(pages)
    campaigns: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for unit in units:
        if unit.source == "wesnoth" and unit.doc.count("-") == 1 and unit.kind == "text":
            for lang in ("en", "de", "fr", "es", "ru", "zh", "ja", "tr", "pl", "vi"):
                if lang in unit.texts and 12 <= width(unit.texts[lang]) <= 80:
                    campaigns[unit.doc, lang].append(
                        {"text": unit.texts[lang], "label": f"campaigns:{unit.doc[8:]}", "lang": lang}
                    )
    for (_, lang), records in campaigns.items():
        yield from sorted(records, key=_order("campaign"))[: 60 if lang == "en" else 15]
    for item in sentences:
        if not item.tested and item.domain == "editorials" and width(item.text) >= 8:
            yield {"text": item.text, "label": f"articles:{item.document}", "lang": "en"}


def _order(name: str) -> Callable[[Record], float]:
    return lambda record: number(name, record["text"])
