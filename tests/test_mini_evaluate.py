"""What the measures of the bundled model say of vectors that are known, and that the card tells all of it."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from configs.mini.evaluation import __main__ as evaluate
from configs.mini.evaluation import card, long_context, measures, results, systems
from configs.mini.evaluation.measures import FAMILIES, Set, difference, with_means
from jina_jax import Chunks, examples, hub
from jina_jax.config import TASKS
from jina_jax.records import InputError
from jina_jax.tokenizer import load_tokenizer

WORDS = ["river", "stone", "market", "winter", "glass", "copper", "train", "garden", "harbour", "violin"]
DIMENSIONS = 64


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(hub.find("mini"))


def encode(texts, task=None):
    """Bags of words as vectors: each word has a direction of its own, whatever its case."""
    rows = []
    for text in texts:
        words = [np.random.default_rng(list(word.encode())).normal(size=DIMENSIONS) for word in text.lower().split()]
        rows.append(np.sum(words, axis=0) if words else np.zeros(DIMENSIONS))
    found = np.array(rows, np.float32)
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)


def collapsed(texts, task=None):
    return np.tile(np.eye(1, DIMENSIONS, dtype=np.float32), (len(texts), 1))


def pairs(count, seed=0, apart=1):
    """Queries of one word less than their passages."""
    rng = np.random.default_rng(seed)
    drawn = [" ".join(rng.choice(WORDS, 4)) + f" {number}" for number in range(count)]
    return [{"query": " ".join(text.split()[apart:]).upper(), "positive": text, "lang": "en"} for text in drawn]


def of(*records):
    return Set([examples.parse(json.dumps(record), "here") for record in records])


def write(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


# ---- Measures --------------------------------------------------------------------------------------------------


def test_rankings_count_ties_against_the_model():
    given = of(*pairs(20))
    for measure in (measures.bitext, measures.retrieval):
        assert measure(given, encode, DIMENSIONS).value > 0.95
        assert measure(given, collapsed, DIMENSIONS).value < 0.05
    assert measures.ndcg(np.array([0.9, 0.8, 0.1]), [1], 10) == pytest.approx(1 / np.log2(3))
    assert measures.ndcg(np.array([0.9, 0.8, 0.1]), [1], 1) == 0


def test_smaller_sizes_are_measured_at_unit_length():
    vectors = encode(["river stone", "market"])
    np.testing.assert_allclose(np.linalg.norm(systems.cut(vectors, 7), axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(systems.cut(vectors, 7)[0] > 0, vectors[0, :7] > 0)


def test_similarity_is_spearmans_and_pairs_that_share_texts_are_resampled_by_texts():
    texts = [" ".join(WORDS[: n + 1]) for n in range(8)]
    both = [(a, b) for number, a in enumerate(texts) for b in texts[number + 1 :]]
    cosines = [float(encode([a])[0] @ encode([b])[0]) for a, b in both]
    given = of(*({"a": a, "b": b, "score": score**3} for (a, b), score in zip(both, cosines, strict=True)))
    score = measures.sts(given, encode, DIMENSIONS)
    assert score.value == pytest.approx(1)
    assert score.again(np.random.default_rng(0)) == pytest.approx(1)


def test_classes_and_clusters_of_separate_words_are_told():
    records = [{"text": f"{word} {word} {word} {n}", "label": word} for word in WORDS[:3] for n in range(12)]
    given = of(*records)._replace(fitted=of(*records).records)
    assert measures.classification(given, encode, DIMENSIONS).value == 1
    assert measures.clustering(given, encode, DIMENSIONS).value > 0.6
    assert measures.clustering(given, collapsed, DIMENSIONS).value < 0.05


def test_v_measure_is_that_of_scikit_learn():
    from sklearn.metrics import v_measure_score

    rng = np.random.default_rng(0)
    labels, clusters = rng.integers(4, size=50), rng.integers(5, size=50)
    assert measures.v_measure(labels, clusters) == pytest.approx(v_measure_score(labels, clusters))


def test_differences_are_taken_on_the_same_resamples():
    values = np.random.default_rng(0).random(50)
    a, b = measures.mean_of(values), measures.mean_of(values - 0.1)
    found = difference(a, b, resamples=50)
    assert [found[name] for name in ("difference", "low", "high")] == pytest.approx([0.1] * 3)
    noisy = difference(a, measures.mean_of(values[::-1]), resamples=50)
    assert noisy["low"] < 0 < noisy["high"]


def test_the_mean_is_that_of_the_sources_not_of_the_sets():
    given = {"help.de": 0.2, "help.fr": 0.4, "udhr.de": 0.9}
    scores = with_means({name: measures.mean_of(np.full(3, value)) for name, value in given.items()})
    assert scores["help"].value == pytest.approx(0.3)
    assert scores["mean"].value == pytest.approx(0.6)
    assert scores["mean"].again(np.random.default_rng(0)) == pytest.approx(0.6)


def test_texts_are_encoded_once():
    calls = []
    again = systems.remembering(lambda texts, task: calls.append(list(texts)) or encode(texts))
    found = again(["river", "stone", "river"], None)
    np.testing.assert_array_equal(found[0], found[2])
    again(["stone", "glass"], None)
    assert calls == [["river", "stone"], ["glass"]]


# ---- Long texts ------------------------------------------------------------------------------------------------


def articles(count, words):
    rng = np.random.default_rng(1)
    found = []
    for number in range(count):
        parts = [" ".join(f"{a} {b}." for a, b in rng.choice(WORDS, (words // 6, 2))) for _ in range(3)]
        text = "\n\n".join(parts)
        cuts = [text.index(part) for part in parts]
        sections = [
            {"title": name, "start": start, "end": start + len(part)}
            for name, start, part in zip((f"Title {number}", "History", "Trade"), cuts, parts, strict=True)
        ]
        found.append({"id": str(number), "title": f"Title {number}", "text": text, "sections": sections})
    return found


def test_haystacks_have_exactly_the_length_asked_for(tokenizer):
    prompt, documents = "Represent the document for retrieval: ", articles(3, 400)
    for length in (64, 300):
        found = long_context.haystacks(documents, tokenizer, length, prompt)
        assert [len(tokenizer.encode(prompt + one.text).ids) for one in found] == [length] * 3
        for one in found:
            assert one.text[slice(*one.needle)].startswith("The pass key of the ")
    with pytest.raises(InputError, match="too short"):
        long_context.haystacks(documents, tokenizer, 5000, prompt)


def test_questions_ask_for_the_chunks_of_whole_sections(tokenizer):
    [one, _] = long_context.chunked(articles(2, 300), tokenizer, "")
    assert [text for text, _ in one.queries] == ["Title 0: History", "Title 0: Trade"]
    for text, within in one.queries:
        assert within == list(range(within[0], within[-1] + 1)), text
    assert one.queries[0][1][-1] < one.queries[1][1][0]


# ---- All of it -------------------------------------------------------------------------------------------------


def stub(tokenizer):
    """What the measures need of an embedder."""

    def encode_documents(documents, task=None, truncate=True):
        for text, spans in documents:
            vectors = encode([text[start:end] for start, end in spans])
            yield Chunks(vectors, np.array(spans), np.ones(len(spans), int), ("whole",) * len(spans))

    config = SimpleNamespace(hidden_size=DIMENSIONS, tasks=TASKS, prompts=("",) * 5, rope_base=2e4)
    return SimpleNamespace(config=config, tokenizer=tokenizer, encode_documents=encode_documents, encode=None)


@pytest.fixture
def given(tmp_path, tokenizer, monkeypatch):
    """Test sets of every kind, and models whose vectors are bags of words."""
    monkeypatch.setattr(measures, "RESAMPLES", 20)
    monkeypatch.setattr(long_context, "LENGTHS", (64, 128))
    monkeypatch.setattr(evaluate, "DIMENSIONS", (16, 64))
    test = tmp_path / "test"
    for name in ("bitext/udhr.de", "bitext/udhr.sw", "bitext/help.de", "retrieval/help.de", "retrieval/glosses.en"):
        write(test / f"{name}.jsonl", *pairs(12, seed=len(name)))
    write(
        test / "sts" / "lee.jsonl",
        *({"a": a, "b": f"{a} {b}", "score": n} for n, (a, b) in enumerate(itertools.pairwise(WORDS))),
    )
    labelled = [{"text": f"{word} {n}", "label": f"spam:{word}"} for word in WORDS[:3] for n in range(8)]
    for part in ("train", "test"):
        write(test / "labelled" / f"spam.{part}.jsonl", *labelled)
    write(test / "long" / "documents.jsonl", *articles(4, 300))
    worse = systems.remembering(lambda texts, task: encode([text.replace("river", "stone") for text in texts]))
    embedder = stub(tokenizer)
    return evaluate.Given(
        tmp_path,
        lambda base: embedder,
        {"adapters": worse, "bare": systems.remembering(encode)},
        {"start": lambda: collapsed},
    )


@pytest.fixture
def written(given, monkeypatch):
    """The file of all results. The model's facts are those of the bundled one."""
    (given.work / "start").mkdir()
    (given.work / "start" / "model.safetensors").write_bytes(b"start")
    monkeypatch.setattr(evaluate, "given", lambda *_, **__: given)
    output = given.work / "runs" / "0" / "results.json"
    evaluate.evaluate(given.work, hub.find("mini"), evaluate.MEASURES, output, limit=None)
    return output


@pytest.fixture
def measured(written):
    return results.read(written)["measures"]


def test_what_was_measured_is_not_measured_again(given, written, monkeypatch):
    before = written.read_bytes()
    monkeypatch.setattr(evaluate, "MEASURES", dict.fromkeys(evaluate.MEASURES))
    evaluate.evaluate(given.work, hub.find("mini"), evaluate.MEASURES, written, limit=None)
    assert written.read_bytes() == before
    with pytest.raises(TypeError):  # other options, other results
        evaluate.evaluate(given.work, hub.find("mini"), evaluate.MEASURES, written, limit=5)


def test_every_measure_finds_what_is_there(measured):
    for name in FAMILIES:
        columns = measured[name]["columns"]
        assert set(columns) == {"adapters", "bare", "start"}
        assert name == "sts" or columns["bare"]["mean"] > columns["start"]["mean"]
    assert measured["bitext"]["counts"] == {
        "udhr.de": 12,
        "udhr.sw": 12,
        "help.de": 12,
        "udhr": 24,
        "help": 12,
        "mean": 36,
    }
    shares = measured["matryoshka"]["retrieval"]["shares"]
    assert shares["64"] == {"share": 1, "low": 1, "high": 1}
    assert measured["passkey"]["columns"]["bare"]["128"]["alone"] > 0
    assert measured["late"]["columns"]["bare, late"] == measured["late"]["columns"]["bare, naive"]


def test_what_start_and_teacher_reach_is_measured_anew_only_where_texts_change(given):
    (given.work / "start").mkdir()
    (given.work / "start" / "model.safetensors").write_bytes(b"start")
    calls = []

    def once():
        return results.kept(given.work, "start", "sts", "sts", "", lambda: calls.append(1) or {"mean": 0.5})

    assert once() == once() == {"mean": 0.5}
    assert len(calls) == 1
    write(given.work / "test" / "sts" / "lee.jsonl", {"a": "x", "b": "y", "score": 1})
    once()
    assert len(calls) == 2


def test_missing_sets_are_named(tmp_path):
    with pytest.raises(InputError, match=r"bitext holds no test sets; make them with .*corpus"):
        measures.sets(tmp_path, "bitext")


REPORT = {
    "packages": {"udhr": "MIT", "wesnoth-1.16-data": "GPL-2.0-or-later"},
    "test": {"bitext/udhr.de": 30, "bitext/udhr.sw": 30, "labelled/spam.test": 20},
    "train": {"distill": {"records": 1000, "dropped": 7, "by_language": {"de": 600, "en": 400}}},
    "leaks": {"distill.jsonl": 0},
}


def test_the_card_tells_all_of_it(given, written, tmp_path):
    own = results.read(written)
    other = own | {"model": own["model"] | {"sha256": "f00d"}}
    results.write(tmp_path / "runs" / "1" / "results.json", other)
    results.write(tmp_path / "report.json", REPORT)
    model = hub.find("mini")
    with pytest.raises(InputError, match="none of the models measured"):
        card.write(tmp_path, [1], model, tmp_path)
    assert card.write(tmp_path, [1, 0], model, tmp_path) == 0
    text = (tmp_path / "MODEL_CARD.md").read_text()
    assert "$" not in text
    weights = own["model"]["sha256"]
    for said in (weights, "pieces of XLM-R", "the second is of seed 1", "GPL-2.0-or-later", "found 0 more", "udhr 60"):
        assert said in text
    for row in text.splitlines():
        assert not row.startswith("|") or row.endswith("|"), row
    figure = (tmp_path / "matryoshka.png").read_bytes()
    assert figure.startswith(b"\x89PNG")
    assert len(figure) < card.PLOT_BYTES
