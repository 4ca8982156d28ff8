"""Long real articles for tests: the wikitext that gensim ships for its own tests, made plain, with its sections."""

import bz2
import html
import re
import xml.etree.ElementTree as ET
import zipfile
from pathlib import Path

from configs.mini.corpus.splits import number
from configs.mini.corpus.units import cut

DUMP = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
Record = dict[str, object]
# Sections that are lists of links and books.
_LISTS = (
    "references",
    "notes",
    "external links",
    "see also",
    "further reading",
    "bibliography",
    "sources",
    "citations",
    "works",
    "footnotes",
)
_HEADING = re.compile(r"^(==+)\s*(.*?)\s*\1\s*$", re.M)


def plain(text: str) -> str:
    """Wikitext as running text: templates, tables, notes, pictures and lists are left out."""
    text = html.unescape(html.unescape(text))
    text = re.sub(
        r"(?s)<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>|<(math|gallery|code|pre|table|timeline)\b.*?</\1>", "", text
    )
    for pattern in (r"\{\{[^{}]*\}\}", r"(?s)\{\|(?:(?!\{\|).)*?\|\}"):
        before = ""
        while before != text:
            before, text = text, re.sub(pattern, "", text)
    before = ""
    while before != text:  # the innermost links first: captions of pictures have links of their own
        before = text
        text = re.sub(r"\[\[(?:File|Image|Category|[a-z-]{2,12}):[^\[\]]*\]\]", "", text)
        text = re.sub(r"\[\[(?![A-Z]\w+:)(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)
    text = re.sub(r"\[\S+( [^\[\]]*)?\]", r"\1", text)
    text = re.sub(r"<[^<>]*>|'{2,}|__\w+__", "", text)
    lines = [
        " ".join(line.split())
        for line in text.splitlines()
        if not line.startswith(("*", "#", ":", ";", "|", "!", "{", "}"))
    ]
    return "\n".join(line for line in lines if line)


def articles(path: Path, limit: int = 60) -> list[Record]:
    """Articles of at least four sections and a thousand words, with the character spans of their sections.

    Args:
        path: The wheel of gensim.
        limit: How many.

    Returns:
        Records of id, title, text and sections; the first section, before any heading, is named like the article.
    """
    with zipfile.ZipFile(path) as archive:
        dump = bz2.decompress(archive.read(DUMP)).decode("utf-8")
    found: list[Record] = []
    for page in re.findall(r"(?s)<page>.*?</page>", dump):
        root = ET.fromstring(page)
        title, source = root.findtext("title", ""), root.findtext("revision/text", "")
        if source.lower().startswith("#redirect") or ":" in title:
            continue
        record = _article(root.findtext("id", ""), title, source)
        if len(record["sections"]) >= 4 and len(str(record["text"]).split()) >= 1000:  # type: ignore[arg-type]
            found.append(record)
    found.sort(key=lambda record: number("article", record["title"]))
    return found[:limit]


def _article(id: str, title: str, source: str) -> Record:
    parts = _HEADING.split(plain(source))
    texts = [(title, parts[0]), *zip(parts[2::3], parts[3::3], strict=True)]
    text, sections = "", []
    for name, part in texts:
        part = part.strip()
        if len(part.split()) < 30 or name.casefold() in _LISTS:
            continue
        start = len(text)
        text += part
        sections.append({"title": name, "start": start, "end": len(text)})
        text += "\n\n"
    return {"id": id, "title": title, "text": text.rstrip("\n"), "sections": sections}


def openings(documents: list[Record], limit: int = 600) -> list[Record]:
    """Pairs of an article's and a section's title, and the first words of the section."""
    pairs: list[Record] = []
    for record in documents:
        for section in record["sections"]:  # type: ignore[attr-defined]
            if section["title"] != record["title"]:
                body = cut(str(record["text"])[section["start"] : section["end"]], 80)
                pairs.append({"query": f"{record['title']}: {section['title']}", "positive": body, "lang": "en"})
    return sorted(pairs, key=lambda pair: number("opening", pair["query"]))[:limit]
