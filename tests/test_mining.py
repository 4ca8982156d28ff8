"""Negatives that are hard and no positives; pairs that say the same; conversations; and `jina-jax data`."""

import argparse
import errno
import gzip
import json
import math
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest

from jina_jax import Embedder, Model, examples
from jina_jax.arguments import Parser
from jina_jax.examples import Example, to_json
from jina_jax.records import InputError
from jina_jax.train import data_cli, filtering, mining
from jina_jax.train.mining import BM25, Mining, nearest


class Table(Embedder):
    """An embedder without a model: the vector of a text is looked up."""

    def __init__(self, vectors: dict[str, list[float]]) -> None:
        self.vectors, self.model = vectors, Model()

    def encode(self, texts, task=None, progress=False):
        assert task in ("retrieval.query", "retrieval.passage", None)
        found = np.array([self.vectors[text] for text in texts], np.float32).reshape(len(texts), -1)
        return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.fixture(scope="session")
def embedder():
    return Embedder.load("mini")


def pair(query: str, *positives: str, **fields) -> Example:
    return Example("pair", (query, positives[0]), more=positives[1:], **fields)


def angles(**degrees: float) -> Table:
    """Texts on a circle."""
    return Table({text: [math.cos(math.radians(d)), math.sin(math.radians(d))] for text, d in degrees.items()})


# Cosines to q at 0 degrees: p .985, a .966, b .940, c .906, d .866, far .0
CIRCLE = angles(q=0, p=10, a=15, b=20, c=25, d=30, far=90, r=180, s=175)
PAIRS = [pair("q", "p"), pair("r", "a"), pair("r", "b"), pair("r", "c"), pair("r", "d"), pair("r", "far")]


def negatives(table: Table = CIRCLE, pairs: list[Example] = PAIRS, row: int = 0, **options) -> list[str]:
    options = {"relative_margin": None} | options
    found = {one.texts[1]: one for one in mining.mine(pairs, table, Mining(**options))}
    return list(found[pairs[row].texts[1]].negatives) if pairs[row].texts[1] in found else []


def test_the_nearest_that_are_no_positives_are_taken():
    assert negatives() == ["a", "b", "c", "d", "far"]
    assert negatives(negatives=2) == ["a", "b"]


def test_what_is_too_near_or_too_far_is_left():
    assert negatives(range_min=2) == ["c", "d", "far"]
    assert negatives(range_max=2) == ["a", "b"]
    assert negatives(range_min=1, range_max=3, negatives=1) == ["b"]
    assert negatives(max_score=0.91) == ["c", "d", "far"]
    assert negatives(absolute_margin=0.1) == ["d", "far"]
    assert negatives(relative_margin=0.05) == ["c", "d", "far"]  # .936 at most
    assert negatives(relative_margin=0.05, absolute_margin=0.1, max_score=0.5) == ["far"]
    assert negatives(max_score=-0.5) == []


def test_margins_count_below_positives_that_are_far_away():
    """The positive's cosine is -.17; 5% below it is -.18, not -.16."""
    table = angles(q=0, p=100, a=99.8, b=120, r=180)
    pairs = [pair("q", "p"), pair("r", "a"), pair("r", "b")]
    assert negatives(table, pairs, relative_margin=0.05) == ["b"]


def test_random_ones_are_drawn_from_those_that_fit():
    drawn = {tuple(negatives(strategy="random", negatives=2, seed=seed)) for seed in range(30)}
    assert len(drawn) > 5
    assert {text for found in drawn for text in found} == {"a", "b", "c", "d", "far"}
    assert negatives(strategy="random", negatives=2, seed=3) == negatives(strategy="random", negatives=2, seed=3)
    assert set(negatives(strategy="random", negatives=3, range_max=3)) == {"a", "b", "c"}


def test_positives_of_the_same_query_are_never_negatives():
    table = angles(q=0, p=10, a=15, b=20, c=25, q2=1)
    table.vectors[" a "] = table.vectors["a"]
    for pairs in (
        [pair("q", "p"), pair("q", "a"), pair("x", "b"), pair("x", "c")],
        [pair("q", "p", " a "), pair("x", "b"), pair("x", "c"), pair("x", "a")],
        [pair("q", "p", query_id="1"), pair("q2", "a", query_id="1"), pair("x", "b"), pair("x", "c")],
        [pair("q", "p", query_id="1"), pair("q2", "a", query_id="1"), pair("q", "b", query_id="2"), pair("x", "c")],
    ):
        table.vectors["x"] = [-1.0, 0.0]
        expected = ["c"] if pairs[2].texts[0] == "q" else ["b", "c"]
        assert negatives(table, pairs) == expected


def test_the_query_itself_is_no_negative():
    table = angles(q=0, p=10, a=15, r=180)
    assert negatives(table, [pair("q", "p"), pair("r", "q"), pair("r", "a")]) == ["a"]


def test_further_passages_can_be_negatives():
    found = list(mining.mine([pair("q", "p")], CIRCLE, Mining(relative_margin=None), corpus=["b", "a", "p", "q"]))
    assert found[0].negatives == ("a", "b")


def test_triplets_keep_what_pairs_had_and_tell_the_cosines():
    one = pair("q", "p", id="7", lang="en", query_id="1", where="f:1")
    found = next(iter(mining.mine([one, *PAIRS[1:]], CIRCLE, Mining(negatives=2, relative_margin=None))))
    assert to_json(found) == {
        **{"query": "q", "pos": "p", "neg": ["a", "b"], "id": "7", "lang": "en", "query_id": "1"},
        **{"pos_scores": [0.9848], "neg_scores": [0.9659, 0.9397]},
    }
    assert examples.parse(json.dumps(to_json(found)), "f:1") == found
    assert list(mining.mine([], CIRCLE, Mining())) == []
    with pytest.raises(InputError, match="g:2: negatives are for pairs, not for records of the kind text"):
        list(mining.mine([Example("text", ("t",), "g:2")], CIRCLE, Mining()))


def test_lexical_ones_take_turns():
    words = {"q": "red fox", "p": "crimson fox", "a": "near one", "b": "red car", "c": "near two", "d": "red wine"}
    circle = angles(q=0, p=10, a=15, b=60, c=25, d=70, r=180).vectors
    table = Table({words.get(name, name): vector for name, vector in circle.items()})
    pairs = [pair("red fox", "crimson fox"), *(pair("r", words[name]) for name in "abcd")]
    assert negatives(table, pairs) == ["near one", "near two", "red car", "red wine"]
    assert negatives(table, pairs, lexical=True) == ["near one", "red car", "near two", "red wine"]
    assert negatives(table, pairs, lexical=True, max_score=0.4) == ["red wine"]


def test_options_that_leave_nothing():
    with pytest.raises(InputError, match="range_min=5 and range_max=5 leave nothing to take"):
        Mining(range_min=5, range_max=5)
    with pytest.raises(InputError, match="strategy='hardest' must be one of top, random"):
        Mining(strategy="hardest")


@pytest.mark.parametrize("block", [(512, 16_384), (7, 13), (1, 5), (64, 100)])
def test_search_is_exact_whatever_is_held_at_once(block):
    """Small whole numbers: every product is exact, and there are many ties."""
    rng = np.random.default_rng(0)
    queries = rng.integers(-2, 3, (20, 4)).astype(np.float32)
    passages = rng.integers(-2, 3, (100, 4)).astype(np.float32)
    products = queries @ passages.T
    expected = np.argsort(-products, axis=1, kind="stable")
    assert np.array_equal(nearest(queries, passages, 17, block), expected[:, :17])
    assert np.array_equal(nearest(queries, passages[:5], 17, block).shape, (20, 5))


def test_bm25_is_what_its_formula_says():
    passages = ["The red fox, the RED fox!", "a fox", "red wine and red meat", "猫は犬", ""]
    queries = ["red fox fox", "wine", "犬と猫", "nothing"]
    tokens = [re.findall(r"[a-z]+|[猫は犬と]", text.lower()) for text in passages]
    mean = sum(map(len, tokens)) / len(tokens)

    def score(query: str, found: list[str]) -> float:
        total = 0.0
        for word in re.findall(r"[a-z]+|[猫は犬と]", query):
            holding = sum(word in one for one in tokens)
            idf = math.log(1 + (len(tokens) - holding + 0.5) / (holding + 0.5))
            count = found.count(word)
            total += idf * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * len(found) / mean))
        return total

    ranking = BM25(passages).nearest(queries, 3)
    for query, row in zip(queries, ranking, strict=True):
        scores = [score(query, found) for found in tokens]
        expected = [place for place in np.argsort([-s for s in scores], kind="stable") if scores[place] > 0][:3]
        assert row.tolist() == expected + [-1] * (3 - len(expected))


def test_a_real_model_finds_what_is_near(embedder):
    facts = {
        "what is the capital of france": "Paris is the capital of France.",
        "what is the capital of spain": "Madrid is the capital of Spain.",
        "how do cats sleep": "Cats sleep for most of the day.",
        "how do dogs sleep": "Dogs sleep less than cats do.",
    }
    pairs = [pair(query, passage) for query, passage in facts.items()]
    wanted = Mining(negatives=1, relative_margin=None)
    found = list(mining.mine(pairs, embedder, wanted, tasks=("retrieval.query", "retrieval.passage")))
    near = {"Paris": "Madrid", "Madrid": "Paris", "Cats": "Dogs", "Dogs": "Cats"}
    assert [one.negatives[0].split()[0] for one in found] == [near[one.texts[1].split()[0]] for one in found]


# ---- Filters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("one two three four", "zero one two three four five", True),
        ("one two three", "zero one two three four five", False),  # three words only
        ("one two three four five", "one two three four and much more", True),  # 4 of 5
        ("one two three four x y", "one two three four and much more", False),  # 4 of 6
        ("on tw thre four", "one two three fourteen and more", True),  # substrings
        ("zero one two three four five", "one two three four", True),  # whichever is shorter
        ("", "one two three four", False),
    ],
)
def test_texts_that_share_their_words_overlap(a, b, expected):
    assert filtering.overlaps(a, b) is expected
    assert filtering.overlaps(b, a) is expected


def test_any_positive_that_overlaps_counts():
    assert filtering.differs(pair("one two three four", "else"))
    assert not filtering.differs(pair("one two three four", "else", "one two three four five"))
    with pytest.raises(InputError, match="f:1: a record of the kind text has but one text"):
        filtering.differs(Example("text", ("t",), "f:1"))


def message(number: str, parent: str | None, text: str, quality: float | None = None, **fields) -> dict:
    role = "prompter" if parent is None else "assistant"
    labels = {} if quality is None else {"labels": {"quality": {"value": quality, "count": 3}}}
    return {"message_id": number, "parent_id": parent, "text": text, "role": role, "lang": "en"} | labels | fields


CHAT = [
    message("1", None, "How are you?"),
    message("1a", "1", "Fine.", 0.9),
    message("1b", "1", "Bad.", 0.6),
    message("1c", "1", "So so.", 0.61),
    message("1d", "1", "Go away!", 0.1),
    message("1e", "1", "Gone.", 0.0, deleted=True),
    message("1f", "1", "Who knows?"),
    message("1g", "1a", "And you?", role="prompter"),
    message("2", None, "Where?"),
    message("2a", "2", "Here.", 0.5),
    message("3", None, "When?"),
    message("3a", "3", "Now.", 0.5),
    message("3b", "3", "Later.", 0.4),
    message("4", None, "Wo?", lang="de"),
    message("4a", "4", "Hier.", 0.5, lang="de"),
]


def conversations(tmp_path: Path, messages: list[dict], **options) -> list[Example]:
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, messages)))
    return list(filtering.conversations(path, **options))


def test_answers_become_triplets(tmp_path):
    first, second = conversations(tmp_path, CHAT)
    assert first.texts[:4] == ("How are you?", "Fine.", "Go away!", "Bad.")  # .6 is lower by .3, .61 is not
    assert set(first.negatives[2:]) == {"Here.", "Now.", "Later."}
    assert (first.lang, first.query_id, first.where) == ("en", "1", f"{tmp_path}/chat.jsonl:1")
    assert second.texts[:2] == ("When?", "Now.")
    assert set(second.negatives) == {"Fine.", "Bad.", "So so.", "Go away!", "Who knows?", "Here."}
    assert conversations(tmp_path, CHAT) == [first, second]
    seeds = {tuple(conversations(tmp_path, CHAT, seed=seed, negatives=3)[0].negatives) for seed in range(20)}
    assert len(seeds) == 3
    assert all(found[:2] == ("Go away!", "Bad.") and len(found) == 3 for found in seeds)
    assert conversations(tmp_path, CHAT, margin=0.1)[1].negatives[0] == "Later."


def test_trees_are_read_as_messages_are(tmp_path):
    messages = conversations(tmp_path, CHAT)
    trees = []
    for question in (one for one in CHAT if one["parent_id"] is None):
        replies = [one for one in CHAT if one["parent_id"] == question["message_id"]]
        prompt = {name: value for name, value in question.items() if name != "parent_id"}
        replies = [{name: value for name, value in one.items() if name != "parent_id"} for one in replies]
        trees.append({"message_tree_id": question["message_id"], "prompt": prompt | {"replies": replies}})
    assert [one.texts for one in conversations(tmp_path, trees)] == [one.texts for one in messages]


def test_labels_of_tables_are_read(tmp_path):
    table = [dict(one) for one in CHAT]
    for one in table:
        quality = one.pop("labels", {}).get("quality")
        one["labels"] = {"name": ["spam", "quality"], "value": [0.0, quality["value"]]} if quality else None
    assert [one.texts for one in conversations(tmp_path, table)] == [one.texts for one in conversations(tmp_path, CHAT)]


def test_what_is_no_conversation_is_told(tmp_path):
    for content, problem in (
        ({"text": "x"}, "chat.jsonl:1: is no message of a conversation; it needs message_id, parent_id, role and"),
        ([1], "chat.jsonl:1: is no message of a conversation"),
        (message("1a", "1", "x"), "chat.jsonl: has no conversations"),
    ):
        with pytest.raises(InputError, match=problem):
            conversations(tmp_path, [content])


# ---- Command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def data_command(monkeypatch, tmp_path, capsys):
    """Run `jina-jax data ...` in an empty directory; gives what it prints."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("JINA_JAX_")]:
        monkeypatch.delenv(name)

    def run(*arguments: str) -> str:
        parser = Parser(prog="jina-jax")
        data_cli.add(parser.add_subparsers(), argparse.RawDescriptionHelpFormatter)
        args = parser.parse_args(["data", *arguments])
        args.run(args)
        return capsys.readouterr().out

    return run


def save(name: str, rows: list[dict]) -> list[dict]:
    Path(name).write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return rows


def load(name: str) -> list[dict]:
    content = Path(name).read_bytes()
    return [json.loads(line) for line in (gzip.decompress(content) if name.endswith(".gz") else content).splitlines()]


def test_check_tells_all_that_is_wrong(data_command, capsys):
    save("good.jsonl", [{"query": "q", "pos": "p"}])
    save("bad.jsonl", [{"query": "q", "pos": "p"}, {"query": "q"}, {"pos": ""}])
    assert data_command("check", "good.jsonl") == "good.jsonl: 1 good pair records, 0 bad\n"
    with pytest.raises(SystemExit) as stop:
        data_command("check", "bad.jsonl", "good.jsonl")
    assert stop.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('bad.jsonl:2: "pos" is missing')
    assert lines[1].startswith('bad.jsonl:3: "query" is missing')
    assert lines[2:] == ["bad.jsonl: 1 good pair records, 2 bad", "good.jsonl: 1 good pair records, 0 bad"]
    save("many.jsonl", [{}] * 30)
    with pytest.raises(SystemExit):
        data_command("check", "many.jsonl")
    assert capsys.readouterr().out.splitlines()[20:] == ["... and 10 more", "many.jsonl: 0 good records, 30 bad"]
    with pytest.raises(InputError, match=r"no file none.jsonl"):
        data_command("check", "none.jsonl")


def test_stats_are_a_table(data_command):
    rng = random.Random(0)
    rows = [
        {
            "query": "word " * rng.randint(1, 9),
            "pos": "word " * rng.randint(20, 99) + str(i % 90),
            "neg": ["word"] * (i % 3 + 1),
            "lang": "en" if i % 4 else "de",
        }
        for i in range(100)
    ]
    save("t.jsonl", rows)
    lines = data_command("stats", "t.jsonl", "--model", "mini").splitlines()
    assert lines[:3] == [
        "t.jsonl",
        "  records     100 of the kind triplet",
        "  tokens                     texts     min  median     p95     max           sum",
    ]
    assert [line.split()[:3] for line in lines[3:6]] == [
        ["query", "100", "3"],
        ["pos", "100", "23"],
        ["neg", "199", "3"],
    ]
    assert lines[5].split() == ["neg", "199", "3", "3", "3", "3", "597"]
    assert lines[6] == "  languages   en 75 (75.0%), de 25 (25.0%)"
    assert lines[7].startswith("  duplicates  records 0 (0.0%), query 91 (91.0%), pos ")
    save("l.jsonl", [{"text": "word", "label": label} for label in (1, "b", 1)])
    assert "  labels      1 2 (66.7%), b 1 (33.3%)" in data_command("stats", "l.jsonl", "--model", "mini").splitlines()


def test_indexes_are_made_where_they_are_wanted(data_command):
    save("t.jsonl", [{"text": "word"}, {}, {"text": "word word"}])
    with pytest.raises(InputError, match=r"t.jsonl:2: no kind of record|t.jsonl:2: \"text\" is missing"):
        data_command("index", "t.jsonl")
    assert data_command("index", "t.jsonl", "--on-bad-record", "skip", "--index", "kept") == (
        "t.jsonl: 2 text records, 7 tokens\n"
    )
    assert [name.endswith(".idx.npz") for name in os.listdir("kept")] == [True]


def test_convert_writes_our_names(data_command):
    save(
        "a.jsonl",
        [{"anchor": "q", "positive": "pä", "negative": "n"}, {"anchor": "r", "positive": "s", "negative": "\x85"}],
    )
    with pytest.raises(InputError, match=r'a.jsonl:2: "negative" is empty'):
        data_command("convert", "a.jsonl", "--output", "b.jsonl")
    assert os.listdir() == ["a.jsonl"]
    assert data_command("convert", "a.jsonl", "--output", "b.jsonl.gz", "--on-bad-record", "skip") == (
        "b.jsonl.gz: 1 records\n"
    )
    assert load("b.jsonl.gz") == [{"query": "q", "pos": "pä", "neg": ["n"]}]
    assert data_command("convert", "b.jsonl.gz", "--kind", "pair", "--output", "c.jsonl") == "c.jsonl: 1 records\n"
    assert load("c.jsonl") == [{"query": "q", "pos": "pä"}]


def test_filter_leaves_out_what_overlaps(data_command):
    rows = save("a.jsonl", [{"query": "a b c d", "pos": "x a b c d"}, {"query": "a b c d", "pos": "else"}])
    done = data_command("filter", "a.jsonl", "--output", "b.jsonl")
    assert done == "b.jsonl: 1 of 2 records kept, 1 overlap\n"
    assert load("b.jsonl") == rows[1:]
    data_command("filter", "a.jsonl", "--output", "b.jsonl", "--min-words", "5")
    assert load("b.jsonl") == rows
    with pytest.raises(InputError, match="'0' is not a number above 0 and at most 1"):
        data_command("filter", "a.jsonl", "--output", "b.jsonl", "--overlap", "0")
    with pytest.raises(InputError, match=r"'b.txt' must end in .jsonl or .jsonl.gz"):
        data_command("filter", "a.jsonl", "--output", "b.txt")
    with pytest.raises(InputError, match="there is no directory 'none'; create it first"):
        data_command("filter", "a.jsonl", "--output", "none/b.jsonl")


def test_oasst_makes_triplets(data_command):
    save("chat.jsonl", CHAT)
    assert data_command("oasst", "chat.jsonl", "--output", "f4.jsonl", "--negatives", "4") == "f4.jsonl: 2 triplets\n"
    assert [len(row["neg"]) for row in load("f4.jsonl")] == [4, 4]


def test_mine_makes_triplets_or_nothing(data_command, monkeypatch):
    rows = save("a.jsonl", [{"query": f"what is {i}", "pos": f"it is the number {i}"} for i in range(12)])
    save("more.jsonl", [{"text": "it is something else"}])
    texts = [text for row in rows for text in row.values()] + ["it is something else"]
    table = Table(dict(zip(texts, np.random.default_rng(0).normal(size=(25, 8)).tolist(), strict=True)))
    monkeypatch.setattr(Embedder, "load", lambda *_: table)
    options = ("--output", "b.jsonl", "--relative-margin", "-1", "--model", "mini", "--negatives", "3")
    assert data_command("mine", "a.jsonl", *options) == "b.jsonl: 12 of 12 pairs have negatives now\n"
    found = load("b.jsonl")
    assert [row["query"] for row in found] == [row["query"] for row in rows]
    assert all(row["pos"] not in row["neg"] and len(set(row["neg"])) == 3 for row in found)
    data_command("mine", "a.jsonl", *options, "--corpus", "more.jsonl", "--bm25", "--strategy", "random")
    assert load("b.jsonl") != found
    with pytest.raises(InputError, match="name others with --query-task and --passage-task"):
        data_command("mine", "a.jsonl", *options, "--query-task", "unknown")
    assert data_command("mine", "a.jsonl", *options, "--query-task", "none", "--passage-task", "none")
    before = Path("b.jsonl").read_bytes()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(*_):
        raise full

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left on device"):
        data_command("mine", "a.jsonl", *options)
    assert Path("b.jsonl").read_bytes() == before
    assert sorted(os.listdir()) == ["a.jsonl", "b.jsonl", "more.jsonl"]
