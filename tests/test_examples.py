"""Records of the five kinds: every field and alias, every way of being wrong, every kind of file."""

import gzip
import json
import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jina_jax import examples
from jina_jax.examples import parse, read, to_json
from jina_jax.records import InputError

RECORDS = {
    "text": {"text": "one", "lang": "en", "id": "7"},
    "pair": {"query": "q", "pos": "p", "lang": "de", "id": "1", "query_id": "q1", "pos_id": "p1", "group": "g"},
    "triplet": {
        **{"query": "q", "pos": ["p", "p2"], "neg": ["n1", "n2"], "neg_ids": ["a", "b"]},
        **{"pos_scores": [1.0, 0.5], "neg_scores": [0.25, 0.0], "group": "g"},
    },
    "scored": {"a": "x", "b": "y", "score": 0.5, "lang": "en"},
    "labelled": {"text": "t", "label": "sports", "id": "9"},
}


def line(**fields: object) -> str:
    return json.dumps(fields)


@pytest.mark.parametrize("kind", RECORDS)
def test_every_field_is_read_and_written_again(kind):
    example = parse(json.dumps(RECORDS[kind]), "f.jsonl:1")
    assert example.kind == kind
    assert example.where == "f.jsonl:1"
    assert to_json(example) == RECORDS[kind]
    assert parse(json.dumps(to_json(example)), "f.jsonl:1") == example


def test_texts_stand_in_one_order():
    assert parse(line(**RECORDS["scored"]), "").texts == ("x", "y")
    triplet = parse(line(**RECORDS["triplet"]), "")
    assert (triplet.texts, triplet.more) == (("q", "p", "n1", "n2"), ("p2",))
    assert (triplet.positives, triplet.negatives) == (("p", "p2"), ("n1", "n2"))
    assert (triplet.neg_ids, triplet.pos_scores) == (("a", "b"), (1.0, 0.5))


@pytest.mark.parametrize(
    ("fields", "kind", "texts"),
    [
        ({"anchor": "q", "positive": "p"}, "pair", ("q", "p")),
        ({"anchor": "q", "positive": "p", "negative": "n"}, "triplet", ("q", "p", "n")),
        ({"anchor": "q", "positive": "p", "negative": ["n", "m"]}, "triplet", ("q", "p", "n", "m")),
        (
            {"anchor": "q", "positive": "p", "negative_2": "m", "negative_10": "o", "negative_1": "n"},
            "triplet",
            ("q", "p", "n", "m", "o"),
        ),
        ({"anchor": "q", "positive": "p", "negative": "n", "negative_1": "m"}, "triplet", ("q", "p", "n", "m")),
        ({"sentence1": "x", "sentence2": "y", "score": 1}, "scored", ("x", "y")),
        ({"sentence1": "x", "sentence2": "y", "label": 0.5}, "scored", ("x", "y")),
        ({"query": "q", "pos": ["p"], "neg": ["n", "m"]}, "triplet", ("q", "p", "n", "m")),
        (
            {
                "query_id": 3,
                "query": "q",
                "positive_passages": [{"docid": 5, "title": "T", "text": "p"}],
                "negative_passages": [{"docid": "6", "title": "", "text": "n"}, {"docid": "7", "text": "m"}],
            },
            "triplet",
            ("q", "T p", "n", "m"),
        ),
        ({"query": "q", "response": "p"}, "pair", ("q", "p")),
        ({"query": "q", "response": "p", "rejected_response": "n"}, "triplet", ("q", "p", "n")),
        ({"query": "q", "response": "p", "rejected_response": ["n", "m"]}, "triplet", ("q", "p", "n", "m")),
        ({"text": "t", "label": 3}, "labelled", ("t",)),
        ({"text": "t", "label": None, "lang": None}, "text", ("t",)),
    ],
)
def test_names_that_others_give_are_understood(fields, kind, texts):
    example = parse(line(**fields), "f.jsonl:1")
    assert (example.kind, example.texts) == (kind, texts)


def test_ids_of_passages_that_are_objects_are_kept():
    example = parse(
        line(
            query_id=3,
            query="q",
            positive_passages=[{"docid": 5, "text": "p"}],
            negative_passages=[{"docid": "6", "text": "n"}],
        ),
        "",
    )
    assert (example.query_id, example.pos_id, example.neg_ids) == ("3", "5", ("6",))


PAIR = {"query": "q", "pos": "p"}
TRIPLET = PAIR | {"neg": ["n", "m"]}


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("pair", line(query="q", pos=""), '"pos" is empty'),
        ("pair", line(query="q", pos=" \n"), '"pos" is empty'),
        ("pair", line(query="q", positive=" "), '"positive" is empty'),
        ("pair", line(query="q"), '"pos" is missing; a record of the kind pair has query, pos'),
        ("pair", line(query="q", pos=None), '"pos" is missing; a record of the kind pair has query, pos'),
        ("pair", line(query=3, pos="p"), '"query" must be a string, not 3'),
        ("pair", line(query="q", pos=["p", ""]), '"pos[1]" is empty'),
        ("pair", line(query="q", pos=[]), '"pos" is empty'),
        ("pair", line(**PAIR, group=["g"]), '"group" must be a string or a whole number, not ["g"]'),
        ("pair", line(**PAIR, id=True), '"id" must be a string or a whole number, not true'),
        ("triplet", line(query="q", pos="p", neg=[]), '"neg" is empty'),
        ("triplet", line(query="q", pos="p", neg=["n", 5]), '"neg[1]" must be a string, not 5'),
        (
            "triplet",
            line(**TRIPLET, neg_ids=["a"]),
            '"neg_ids" must be a list of 2, one for each negative, not ["a"]',
        ),
        (
            "triplet",
            line(**TRIPLET, pos_scores=[1, 2]),
            '"pos_scores" must be a list of 1 numbers, one for each text, not [1, 2]',
        ),
        ("triplet", line(**TRIPLET, neg_scores=[1, "2"]), '"neg_scores[1]" must be a finite number, not "2"'),
        (
            "triplet",
            line(query="q", pos="p", negative_passages=[{"docid": 1}]),
            '"negative_passages.text" must be a string, not null',
        ),
        ("scored", line(a="x", b="y"), '"score" is missing; a record of the kind scored has a, b, score'),
        ("scored", line(a="x", b="y", score="1"), '"score" must be a finite number, not "1"'),
        ("scored", line(a="x", b="y", score=True), '"score" must be a finite number, not true'),
        ("scored", '{"a": "x", "b": "y", "score": NaN}', '"score" must be a finite number, not NaN'),
        ("scored", '{"a": "x", "b": "y", "label": 1e999}', '"label" must be a finite number, not Infinity'),
        ("scored", '{"a": "x", "b": "y", "score": 1' + "0" * 400 + "}", '"score" must be a finite number, not 1000'),
        ("labelled", line(text="t", label=""), '"label" is empty'),
        ("labelled", line(text="t", label=0.5), '"label" must be a string or a whole number, not 0.5'),
        ("text", line(text=None), '"text" is missing; a record of the kind text has text'),
        (None, line(title="t"), "no kind of record has these fields (title); there are text: text; pair: query, pos;"),
        (None, "[1]", "must be an object with fields, not [1]"),
        (None, "{", "not JSON (Expecting property name"),
        (None, "[" * 100_000, "not JSON ("),
    ],
)
def test_what_is_wrong_is_told_with_file_line_and_field(kind, content, message):
    """T17: bad records."""
    with pytest.raises(InputError) as error:
        parse(content, "f.jsonl:17", kind)
    assert str(error.value).startswith(f"f.jsonl:17: {message}")


def test_bytes_that_are_no_utf8_are_told():
    with pytest.raises(InputError, match=re.escape("f.jsonl:2: not UTF-8 at byte 10; convert the file")):
        parse(b'{"text": "\xff"}', "f.jsonl:2")


def test_a_kind_that_there_is_not():
    with pytest.raises(InputError, match="kind='pairs' must be one of text, pair, triplet, scored, labelled"):
        parse(line(**PAIR), "f.jsonl:1", "pairs")


# ---- Files -----------------------------------------------------------------------------------------------------

LINES = b'\xef\xbb\xbf{"query": "q1", "pos": "p1"}\r\n\r\n  \n{"query": "q2", "pos": "p\xc3\xa4"}'


def pack(path: Path, content: bytes) -> Path:
    match path.suffix:
        case ".gz":
            path.write_bytes(gzip.compress(content[:30]) + gzip.compress(content[30:]))
        case ".zst":
            path.write_bytes(b"".join(pa.compress(part, "zstd", asbytes=True) for part in (content[:30], content[30:])))
        case _:
            path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_byte_order_mark_blank_lines_and_line_ends(tmp_path, suffix):
    path = pack(tmp_path / f"f{suffix}", LINES)
    found = list(read(path))
    assert [one.texts for one in found] == [("q1", "p1"), ("q2", "pä")]
    assert [one.where for one in found] == [f"{path}:1", f"{path}:4"]


def test_parquet_is_read_as_lines_are(tmp_path):
    path = tmp_path / "f.parquet"
    rows = [RECORDS["triplet"], {"query": "q", "pos": ["p"], "neg": ["n"]}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    first, second = read(path)
    assert to_json(first) == RECORDS["triplet"]
    assert (second.texts, second.group, second.where) == (("q", "p", "n"), None, f"{path}, row 2")


def test_errors_in_parquet_name_the_row(tmp_path):
    path = tmp_path / "f.parquet"
    pq.write_table(pa.table({"a": ["x", "x"], "b": ["y", "z"], "score": [1.0, float("nan")]}), path)
    with pytest.raises(InputError) as error:
        list(read(path))
    assert str(error.value) == f'{path}, row 2: "score" must be a finite number, not NaN'


def test_the_first_record_tells_the_kind(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text(line(**TRIPLET) + "\n" + line(**PAIR))
    with pytest.raises(InputError, match=r'f.jsonl:2: "neg" is missing; a record of the kind triplet has'):
        list(read(path))
    assert [one.kind for one in read(path, "pair")] == ["pair", "pair"]


def test_negatives_are_not_lost_because_the_first_record_has_none(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text(line(**PAIR) + "\n" + line(**TRIPLET))
    with pytest.raises(InputError, match=r"f.jsonl:2: has negatives, unlike the records before; say which kind"):
        list(read(path))
    assert [one.texts for one in read(path, "pair")] == [("q", "p"), ("q", "p")]


def test_bad_records_can_be_left_out_and_are_counted(tmp_path, capsys):
    """T17: bad records."""
    path = tmp_path / "f.jsonl"
    path.write_text("{\n" + line(**PAIR) + "\n" + line(query="q") + "\n" + line(**PAIR))
    assert [one.where for one in read(path, on_bad="skip")] == [f"{path}:2", f"{path}:4"]
    error = capsys.readouterr().err
    assert error.startswith(f"jina-jax: note: {path}: 2 bad records left out; the first: {path}:1: not JSON")
    bad: list[str] = []
    assert len(list(read(path, on_bad="skip", bad=bad))) == 2
    assert bad[1].startswith(f'{path}:3: "pos" is missing')
    assert capsys.readouterr().err == ""


def test_files_that_cannot_be_read(tmp_path):
    """T17: missing file."""
    with pytest.raises(InputError, match=r"no file .*none.jsonl; check the path"):
        list(read(tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match=r"no file .*none.parquet; check the path"):
        list(read(tmp_path / "none.parquet"))
    with pytest.raises(InputError, match=r"a file of records must end in .jsonl, .jsonl.gz, .jsonl.zst, .parquet"):
        list(read(tmp_path / "f.csv"))
    cut = {name: pack(tmp_path / name, LINES * 100).read_bytes()[:-9] for name in ("f.jsonl.gz", "f.jsonl.zst")}
    for name, content in (*cut.items(), ("f.jsonl.zst", b"{}"), ("f.jsonl.gz", b"{}"), ("f.parquet", b"{}")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}: cannot be read \("):
            list(read(tmp_path / name, on_bad="skip"))


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".parquet"])
def test_packages_that_are_not_there_are_named(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"f{suffix}"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'jina-jax\[train\]'"):
        list(examples.lines(path))
