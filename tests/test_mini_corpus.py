"""The corpus of the bundled model: reading packages, holding out, and the check against leaks."""

import gzip
import hashlib
import io
import json
import struct
import tarfile
from pathlib import Path

import pytest

from configs.mini.corpus import __main__ as corpus
from configs.mini.corpus import fetch, heldout, labelled, longdocs, mixture, parse, splits, units, wordnet
from configs.mini.corpus.units import Page, Unit
from jina_jax.records import InputError

HELP = """<title>Naming &amp; Cells</title><h1 id="hd_id1" dir="auto">Naming</h1>
<p id="par_id2" class="paragraph">Choose <span hidden="true" id="MACx" class="MAC"><span class="emph">Preferences</span>
</span><span hidden="true" id="defaultx"><span class="emph">Options</span></span> and <b>name</b> cells.</p>
<p id="par_id3" class="bascode">Sub Main</p>"""
MALLARD = """<page xmlns="http://projectmallard.org/1.0/"><info><desc>About keys.</desc><title type="link">Link</title>
<credit><name>A. Author</name></credit></info><title>Keys</title><p>Turn on <em>keys</em>\n  now.</p></page>"""
NOUNS = """  1 The licence stands first and is indented.
00000001 03 n 01 entity 0 001 ~ 00000002 n 0000 | that which is perceived; "it was full of rackets"
00000002 05 n 02 big_cat 0 cat 0 001 @ 00000001 n 0000 | a feline mammal with thick fur
"""


def packed(path: Path, files: dict[str, bytes]) -> Path:
    """A Debian package (an ar archive with a tar in it), or a `.tgz`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz" if path.suffix == ".deb" else "w:gz") as archive:
        for name, data in files.items():
            item = tarfile.TarInfo(name)
            item.size = len(data)
            archive.addfile(item, io.BytesIO(data))
    data = buffer.getvalue()
    if path.suffix == ".deb":
        parts = {"debian-binary": b"2.0\n\n"[:3], "data.tar.xz": data}  # of odd size, as ar pads those
        data = b"!<arch>\n" + b"".join(
            f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(part):<10}`\n".encode() + part + b"\n" * (len(part) % 2)
            for name, part in parts.items()
        )
    path.write_bytes(data)
    return path


def catalogue(messages: dict[str, str]) -> bytes:
    """A gettext catalogue."""
    texts = [text.encode() + b"\0" for pair in zip(messages, messages.values(), strict=True) for text in pair]
    at, ends = 28 + 16 * len(messages), []
    for text in texts:
        ends.append((len(text) - 1, at))
        at += len(text)
    tables = b"".join(struct.pack("<2I", *end) for end in ends[::2] + ends[1::2])
    header = struct.pack("<7I", 0x950412DE, 0, len(messages), 28, 28 + 8 * len(messages), 0, 0)
    return header + tables + b"".join(texts)


def test_a_package_is_fetched_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    origin = packed(tmp_path / "origin.tgz", {"a/b.txt": b"text", "a/c.txt": b"more"})
    entry = {"name": "one", "file": "one.tgz", "urls": ["file:///nowhere/one.tgz", origin.as_uri()], "licence": "MIT"}
    entry["sha256"] = hashlib.sha256(origin.read_bytes()).hexdigest()
    monkeypatch.setattr(fetch, "SOURCES", tmp_path / "sources.json")
    fetch.SOURCES.write_text(json.dumps([entry, entry | {"name": "two", "file": "two.tgz", "sha256": "0" * 64}]))
    path = fetch.fetch("one", tmp_path / "packages")
    origin.unlink()
    assert fetch.fetch("one", tmp_path / "packages") == path
    assert list(fetch.members(path, lambda name: name.endswith("b.txt"))) == [("a/b.txt", b"text")]
    with pytest.raises(InputError, match="package two: no address"):
        fetch.fetch("two", tmp_path / "packages")


def test_pages_of_help_are_read_by_paragraph(tmp_path: Path) -> None:
    path = packed(tmp_path / "help.deb", {"./help/de/text/scalc/guide/name.html": HELP.encode()})
    assert list(parse.rows("libreoffice-help-de", path)) == [
        ("de", "scalc/guide/name", "title", "title", "Naming & Cells"),
        ("de", "scalc/guide/name", "hd_id1", "heading", "Naming"),
        ("de", "scalc/guide/name", "par_id2", "text", "Choose Options and name cells."),
    ]


def test_pages_of_gnome_are_read_without_credits(tmp_path: Path) -> None:
    path = packed(
        tmp_path / "gnome.deb", {f"./usr/share/help/{locale}/g/keys.page": MALLARD.encode() for locale in ("C", "xx")}
    )
    found = [(lang, kind, text) for lang, _, _, kind, text in parse.rows("gnome-user-docs", path)]
    assert found == [("en", "text", "About keys."), ("en", "title", "Keys"), ("en", "text", "Turn on keys now.")]


def test_catalogues_give_both_sides(tmp_path: Path) -> None:
    data = catalogue({"": "header", "female^Old friend": "x", "weapon\x04great_ sword $name|": "großes Schwert $name|"})
    path = packed(
        tmp_path / "w.deb", {"./locale/de/LC_MESSAGES/wesnoth-l.mo": data, "./locale/pt/LC_MESSAGES/wesnoth-l.mo": data}
    )
    found = [(row[0], row[1], row[4]) for row in parse.rows("wesnoth-1.16-l", path)]
    assert found == [("en", "wesnoth-l", "great_ sword …"), ("de", "wesnoth-l", "großes Schwert …")]


def test_messages_lose_their_markup() -> None:
    text = "'''Warning:''' {{PLURAL:$1|one page|$1 pages}} of [[Special:Log|the log]] on {{SITENAME}}"
    assert parse.message(text) == "Warning: one page of the log on Wiki"
    assert parse.message("Delete %(count)s of {total}") == "Delete … of …"
    assert parse.clean("It costs $16 &amp; more<br/>today") == "It costs $16 & more today"


def test_dictionaries_are_read_by_their_index(tmp_path: Path) -> None:
    entry = 'shati /ʃati/ <n>\n1. shirt\n      "a new shirt"\n2. blouse\n'.encode()
    index = f"00databaseinfo\tA\tA\nshati\tA\t{_digits(len(entry))}\n".encode()
    files = {"./d/f.index": index, "./d/f.dict.dz": gzip.compress(entry)}
    found = list(parse.rows("dict-freedict-swh-eng", packed(tmp_path / "d.deb", files)))
    assert [(row[0], row[4]) for row in found] == [("sw", "shati"), ("en", "shirt, blouse")]


def _digits(value: int) -> str:
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    return (_digits(value // 64) if value > 63 else "") + alphabet[value % 64]


def test_what_is_left_in_english_does_not_count_as_translated() -> None:
    assert not units.translated("de", "Close the File", "close the file")
    assert not units.translated("hi", "Click Find Next फ़ाइल", "Click Find Next in the file")
    assert units.translated("ja", "ファイルを閉じる", "Close the file")
    assert units.usable("Close the file")
    assert not units.usable("{x}")
    assert not units.usable("a = b / 2 * (3)")
    assert units.cut("one two three", 2) == "one two"
    assert units.cut("閉じる閉じる", 2) == "閉じる"


def test_a_leak_is_eight_tokens_in_a_row_or_a_whole_short_text() -> None:
    held = splits.Held(
        ["All human beings are born free and equal in dignity.", "Old friend!", "何人も、奴隷にされ、又は"]
    )
    assert held.leaks("… that ALL human-beings are born free, and equal …")
    assert not held.leaks("All human beings are born free and happy")
    assert held.leaks("old friend")
    assert not held.leaks("my old friend")
    assert held.leaks("「人も奴隷にされ又は」")
    assert not held.leaks("奴隷にされ、又はX")


def test_documents_are_held_out_alike_everywhere() -> None:
    share = sum(splits.held_out("help", f"scalc/{index}") for index in range(2000)) / 2000
    assert 0.07 < share < 0.13
    assert splits.number("a", 1) == splits.number("a", 1) != splits.number("a1")
    assert splits.held_out("wesnoth", "wesnoth-tb")
    assert not splits.held_out("wesnoth", "wesnoth-httt")
    assert not splits.held_out("mediawiki", "anything")


def test_no_line_of_the_mixture_is_in_a_test_text() -> None:
    found = [
        Unit(
            "wesnoth",
            "wesnoth-httt",
            "text",
            {"en": f"the {word} rode far into the dark forest", "de": f"{word} ritt weit hinein"},
        )
        for word in ("king", "queen", "elf", "orc")
    ]
    found.append(Unit("wesnoth", "wesnoth-tb", "text", {"en": "a held out text of some words", "de": "zurückgehalten"}))
    held = splits.Held(["It is said that the king rode far into the dark forest", "orc ritt weit hinein"])
    lines = list(mixture.lines(list(mixture.trainable(found, held)), held))
    assert {(lang, text.split()[-5 if lang == "en" else 0]) for _, lang, text, _ in lines} >= {
        ("de", "queen"),
        ("de", "elf"),
    }
    assert not any(held.leaks(text) or held.leaks(target) or "held" in target for _, _, text, target in lines)
    assert all(target.startswith("the ") for what, _, _, target in lines if what == "translation")


def test_records_that_leak_or_were_judged_are_dropped(tmp_path: Path) -> None:
    held = splits.Held(["one two three four five six seven eight"])
    records = [
        {"a": "tiger", "b": "cat", "score": 1.0},
        {"a": "tiger", "b": "animal", "score": 0.7},
        {"text": "zero one two three four five six seven eight nine"},
    ]
    counts = corpus.write_clean(tmp_path / "train" / "x.jsonl", records, held, {frozenset(("cat", "tiger"))})
    assert (counts["records"], counts["dropped"]) == (1, 2)
    assert corpus.leaks(tmp_path, held) == {"x.jsonl": 0}


def test_titles_of_held_out_pages_come_with_what_only_they_say() -> None:
    docs = [f"scalc/{index}" for index in range(800)]
    shared = "Open the dialog that all of the pages speak of."
    body = "Page {} says something, at a length of at least twenty words, " + "so that it can be found " * 3
    pages = [Page("help", doc, "en", f"Title {doc}", [shared, body.format(doc)]) for doc in docs]
    (records,) = heldout.pages(pages, "help").values()
    assert {record["id"] for record in records} <= {doc for doc in docs if splits.held_out("help", doc)}
    assert len(records) >= heldout.FEWEST
    assert not any(shared in str(record["positive"]) for record in records)


def test_wordnet_is_read_with_its_structure(tmp_path: Path) -> None:
    index = "  1 licence\ncat n 1 1 @ 1 1 00000002\nentity n 1 1 ~ 1 0 00000001\n"
    net = wordnet.read(
        packed(tmp_path / "w.deb", {"./wordnet/data.noun": NOUNS.encode(), "./wordnet/index.noun": index.encode()})
    )
    cat = net.synsets["n00000002"]
    assert (cat.words, cat.kind, cat.gloss) == (("big cat", "cat"), "05", "a feline mammal with thick fur")
    assert cat.links == (("@", "n00000001"),)
    assert net.synsets["n00000001"].examples == ("it was full of rackets",)
    assert net.first == {("n", "cat"): "n00000002"}


def test_mail_and_wikitext_become_plain(tmp_path: Path) -> None:
    body = (
        "Subject: Re: [list] Old news\nContent-Type: text/html\n\n<p>Buy <b>now</b> and "
        + "save a lot of money " * 4
        + "</p>\n> quoted"
    )
    path = packed(tmp_path / "s.tgz", {"p/data/spam-1/1.json": json.dumps({"text": body, "group": "spam-1"}).encode()})
    ((text, kind, _),) = labelled.mail(path)
    assert kind == "spam"
    assert text.startswith("Old news. Buy now and save")
    assert "quoted" not in text
    wiki = "'''Acid''' is {{lang|x|{{y}}}}a [[Base (c)|base]]<ref>z</ref>.[[File:a.png|thumb|with [[it]]]]\n* list"
    assert longdocs.plain(wiki) == "Acid is a base."
