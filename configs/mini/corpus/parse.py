"""What the packages say, as rows of one shape: (language, document, key, kind, text).

Rows of one document and key are translations of each other, English among them. Kinds: "title", "heading", "text"
(running text), "message" (of a user interface), "word" (names and entries of dictionaries), "words" (a name and words
that go with it).
"""

import base64
import gzip
import hashlib
import html
import json
import re
import struct
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

from configs.mini.corpus.fetch import members, sources

LANGS = [
    "en", "ar", "cs", "de", "es", "fr", "hi", "hu", "id", "it", "ja", "ko", "nl", "pl", "pt", "ru", "sv", "sw", "tr",
    "uk", "vi", "zh",
]  # fmt: skip
# The names that packages have for our languages; where there are two Portugueses or Chineses, only one is taken.
LOCALES = {name: name for name in LANGS if name not in ("pt", "zh")} | {
    "C": "en", "en-US": "en", "en-us": "en", "pt_BR": "pt", "pt-BR": "pt", "pt-br": "pt", "zh_CN": "zh", "zh-CN": "zh",
    "zh-cn": "zh", "zh_Hans": "zh", "zh-hans": "zh", "es_ES": "es", "fr_FR": "fr", "hi_IN": "hi", "sw_TZ": "sw",
}  # fmt: skip
Row = tuple[str, str, str, str, str]

_TAG = re.compile(r"<[^<>]*>")
_HIDDEN = re.compile(r'<span hidden="true" id="MAC[^>]*>(?:[^<]|<span[^>]*>[^<]*</span>|<(?!/?span)[^>]*>)*</span>')
_HELP = re.compile(r'<(h[1-6]|p)\b([^>]*?\bid="((?:par|hd)_[^"]+)"[^>]*)>(.*?)</\1>', re.S)
_PLURAL = re.compile(
    r"\{\{(?:PLURAL|plural|GENDER|gender|formatnum|FORMATNUM)[:|][^{}|]*\|?([^{}|]*)(?:\|[^{}|]*)*\}\}"
)
_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]|\[\S+ ([^\[\]]*)\]")
_GAP = re.compile(r"%\(\w+\)[sd]|%\d*\$?[sdif]|\$\w+\|?|\{\s*\w+(?:, \w+)?\s*\}|%[A-Z][A-Z_]+\b")


def clean(text: str) -> str:
    """Text without tags, entities and invisible characters, on one line."""
    text = html.unescape(_TAG.sub("", text.replace("<br", "\n<br")))
    return " ".join(text.replace("\xad", "").replace("\u200b", "").split())


def message(text: str) -> str:
    """A message of a program without wiki markup; gaps to be filled in become "…"."""
    text = _PLURAL.sub(r"\1", text.replace("{{SITENAME}}", "Wiki").replace("'''", "").replace("''", ""))
    text = _LINK.sub(lambda found: found[1] or found[2] or "", text)
    return _GAP.sub("…", clean(text))


def rows(name: str, path: Path) -> Iterator[Row]:
    """The rows of a package.

    Args:
        name: Its name in sources.json.
        path: Its file.

    Yields:
        Row after row; those of a page in the order of the page.
    """
    for start, read in READERS.items():
        if name.startswith(start):
            yield from read(name, path)


def cached_rows(name: str, path: Path, cache: Path) -> list[Row]:
    """The same, read from a file of the cache if one is there for this very package and code."""
    version = hashlib.sha256((sources()[name]["sha256"] + Path(__file__).read_text(encoding="utf-8")).encode())
    file = cache / f"{name}.{version.hexdigest()[:8]}.json.gz"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        found = list(dict.fromkeys(rows(name, path)))
        draft = file.with_suffix(".tmp")
        with gzip.open(draft, "wt", encoding="utf-8", compresslevel=1) as handle:
            json.dump(found, handle, ensure_ascii=False)
        draft.replace(file)
    with gzip.open(file, "rt", encoding="utf-8") as handle:
        return [tuple(row) for row in json.load(handle)]


# ---- One reader per kind of package ----------------------------------------------------------------------------


def _help(name: str, path: Path) -> Iterator[Row]:
    lang = LOCALES[name.removeprefix("libreoffice-help-")]
    for file, data in members(path, lambda name: "/text/" in name and name.endswith(".html")):
        page, doc = data.decode("utf-8"), file.split("/text/", 1)[1].removesuffix(".html")
        title = re.search(r"<title>(.*?)</title>", page, re.S)
        if title:
            yield lang, doc, "title", "title", clean(title[1])
        page = _HIDDEN.sub("", page)
        for tag, attributes, key, inner in _HELP.findall(page):
            text = clean(inner)
            if text and "code" not in attributes:
                yield lang, doc, key, "text" if tag == "p" else "heading", text


def _mallard(name: str, path: Path) -> Iterator[Row]:
    for file, data in members(path, lambda name: name.endswith(".page")):
        locale, doc = file.split("/help/", 1)[1].removesuffix(".page").split("/", 1)
        if locale not in LOCALES:
            continue
        number = 0
        root = ET.fromstring(data)
        for node in root.iter():
            tag = node.tag.rsplit("}", 1)[-1]
            if tag in ("title", "desc", "p") and "mallard" in node.tag:
                text = " ".join("".join(node.itertext()).split())
                kind = "text" if tag != "title" else "title" if node in root else "heading"
                number += 1
                plain = tag != "title" or "type" not in node.attrib  # sort, link and text variants of a title
                if text and plain:
                    yield LOCALES[locale], doc, f"{kind}{number}", kind, text


def catalogue(data: bytes) -> Iterator[tuple[str, str]]:
    """The messages of a gettext catalogue (.mo): English and translation, of plurals the first forms."""
    order = "<" if data[:4] == b"\xde\x12\x04\x95" else ">"
    count, ours, theirs = struct.unpack(f"{order}3I", data[8:20])
    for index in range(count):
        pair = []
        for table in (ours, theirs):
            size, at = struct.unpack(f"{order}2I", data[table + 8 * index : table + 8 * index + 8])
            pair.append(data[at : at + size].decode("utf-8", "replace").split("\0")[0])
        if pair[0] and pair[1]:
            yield pair[0].rsplit("\x04", 1)[-1], pair[1]


def _gettext(name: str, path: Path) -> Iterator[Row]:
    start = name if name.startswith("libreoffice") else ""  # of these, catalogues of one name are one document
    for file, data in members(path, lambda name: name.endswith(".mo") and "/LC_MESSAGES/" in name):
        folder, domain = file.split("/LC_MESSAGES/")
        locale = folder.rsplit("/", 1)[-1]
        if LOCALES.get(locale, "en") == "en":
            continue
        if "/dist/" in file:  # Django and its like, packed into another package
            domain = folder.split("/dist/")[1].rsplit("/", 2)[0]
        doc = f"{'lo-' if start else ''}{domain.removesuffix('.mo')}"
        for english, foreign in catalogue(data):
            if english.startswith(("female^", "male^")) or re.search(r"[<>]\w+=|\\\w", english):
                continue
            kind = "message" if start or "/dist/" in file else "text"
            texts = [message(re.sub(r"^[^\s^]{0,40}\^|[~_](?=\w)", "", text)) for text in (english, foreign)]
            if all(texts):
                yield "en", doc, english, kind, texts[0]
                yield LOCALES[locale], doc, english, kind, texts[1]


def _kolibri(name: str, path: Path) -> Iterator[Row]:
    for file, data in members(path, lambda name: name.endswith("-messages.json") and "/locale/" in name):
        locale, _, doc = file.split("/locale/", 1)[1].split("/")
        if locale in LOCALES:
            for key, text in json.loads(data).items():
                if "plural," not in text and "select," not in text:
                    yield LOCALES[locale], f"kolibri-{doc.split('-messages')[0]}", key, "message", message(text)
    yield from _gettext(name, path)


def _mediawiki(name: str, path: Path) -> Iterator[Row]:
    for file, data in members(path, lambda name: "/i18n/" in name and name.endswith(".json")):
        folder, locale = file.removesuffix(".json").rsplit("/", 1)
        if locale in LOCALES and "tests" not in folder:
            doc = folder.split("/mediawiki/")[-1]
            for key, text in json.loads(data).items():
                text = message(text) if isinstance(text, str) else ""
                if text and not re.search(r"\{\{|\[\[|\]\]|\}\}|__|//", text):
                    yield LOCALES[locale], doc, key, "message", text


def _cldr(name: str, path: Path) -> Iterator[Row]:
    wanted = re.compile(r".*/(?:annotations|main)/(\w\w)/(annotations|languages|territories|scripts)\.json")
    for file, data in members(path, lambda name: wanted.fullmatch(name) is not None):
        lang, table = wanted.fullmatch(file).groups()  # type: ignore[union-attr]
        if lang in LANGS:
            for key, text in _names(json.loads(data), table).items():
                yield lang, f"cldr-{table}", key, "words" if key.endswith(" keywords") else "word", text


def _names(data: dict, table: str) -> dict[str, str]:
    if table == "annotations":
        found = data["annotations"]["annotations"]
        named = {key: entry for key, entry in found.items() if "tts" in entry}
        words = {
            f"{key} keywords": ", ".join([entry["tts"][0], *entry.get("default", [])]) for key, entry in named.items()
        }
        return words | {key: entry["tts"][0] for key, entry in named.items()}
    (only,) = data["main"].values()
    return {key: text for key, text in only["localeDisplayNames"][table].items() if "-alt-" not in key}


def _dictionary(name: str, path: Path) -> Iterator[Row]:
    """Entries of a dictd database: a head word and its translations, in the order of the index."""
    files = dict(members(path, lambda name: name.endswith((".index", ".dict.dz"))))
    index = next(data for name, data in files.items() if name.endswith(".index")).decode("utf-8")
    text = gzip.decompress(next(data for name, data in files.items() if name.endswith(".dz")))
    source, target = name.removeprefix("dict-freedict-").split("-")
    codes = {"swh": "sw", "eng": "en", "hin": "hi", "ara": "ar"}
    for line in index.splitlines():
        head, at, size = line.split("\t")[:3]
        if head.startswith("00database"):
            continue
        entry = text[_number(at) : _number(at) + _number(size)].decode("utf-8", "replace").split("\n")
        word = re.sub(r"\s*(/[^/]*/|<[^>]*>).*", "", entry[0]).strip()
        found = [re.sub(r"^\d+\.\s*", "", line).strip() for line in entry[1:]]
        found = [line for line in found if line and not line.startswith(('"', "[", "(", "Note"))]
        if word and found:
            key = f"{word}|{found[0]}"
            yield codes[source], name, key, "word", word
            yield codes[target], name, key, "word", ", ".join(dict.fromkeys(found[:3]))


def _number(text: str) -> int:
    """A number as dictd writes it: base 64, the digits being those of the usual encoding."""
    value = 0
    for digit in base64.b64decode("".join(["A" * (-len(text) % 4), text])):
        value = value << 8 | digit
    return value


READERS = {
    "libreoffice-help-": _help, "libreoffice-l10n-": _gettext, "wesnoth-": _gettext, "gnome-user-docs": _mallard,
    "kolibri": _kolibri, "mediawiki": _mediawiki, "cldr-": _cldr, "dict-freedict-": _dictionary,
}  # fmt: skip
