"""Metrics against scikit-learn, scipy and hand, and evaluation of an embedder whose vectors are known."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import average_precision_score, ndcg_score

import jina_jax
from jina_jax.eval import metrics, tasks
from jina_jax.records import InputError
from jina_jax.train.recipe import EvalTask

# ---- Metrics ---------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10_000), count=st.integers(2, 40), k=st.integers(1, 12))
def test_retrieval_metrics_are_those_of_scikit_learn_where_nothing_ties(seed, count, k):
    rng = np.random.default_rng(seed)
    scores = rng.permutation(count).astype(np.float64)
    gains = rng.integers(0, 3, count) * rng.integers(0, 2, count)
    gains[rng.integers(count)] = 2
    ranked = metrics.ranked(scores, gains)
    assert metrics.ndcg(ranked, k) == pytest.approx(ndcg_score([gains], [scores], k=k), abs=1e-12)
    assert metrics.average_precision(ranked) == pytest.approx(average_precision_score(gains > 0, scores), abs=1e-12)
    places = np.flatnonzero(gains[np.argsort(-scores)] > 0)
    assert metrics.mrr(ranked, k) == (1 / (places[0] + 1) if places[0] < k else 0)
    assert metrics.recall(ranked, k) == (places < k).sum() / len(places)


def test_retrieval_metrics_by_hand():
    ranked = np.array([0, 1, 0, 2, 0])  # relevant: second, fourth
    assert metrics.mrr(ranked, 10) == 1 / 2
    assert metrics.mrr(ranked, 1) == 0
    assert metrics.recall(ranked, 3) == 1 / 2
    assert metrics.average_precision(ranked) == (1 / 2 + 2 / 4) / 2
    ideal = 2 / np.log2(2) + 1 / np.log2(3)
    assert metrics.ndcg(ranked, 10) == pytest.approx((1 / np.log2(3) + 2 / np.log2(5)) / ideal, abs=1e-15)


def test_ties_count_against_the_model_wherever_the_relevant_one_stands():
    for place in range(4):
        gains = np.eye(4, dtype=int)[place]
        assert metrics.ranked(np.ones(4), gains).tolist() == [0, 0, 0, 1]
    assert metrics.ranked(np.array([0.5, 0.5, 0.9]), np.array([1, 0, 0])).tolist() == [0, 0, 1]


def test_nothing_relevant_scores_nothing():
    for ranked in (np.zeros(0, int), np.zeros(3, int)):
        assert metrics.ndcg(ranked, 10) == metrics.mrr(ranked, 10) == metrics.recall(ranked, 10) == 0
        assert metrics.average_precision(ranked) == 0


def test_nan_scores_rank_last():
    assert metrics.ranked(np.array([np.nan, 0.1, np.nan]), np.array([1, 0, 0])).tolist() == [0, 0, 1]


@given(seed=st.integers(0, 1000))
def test_spearman_is_that_of_scipy_ties_included(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 5, 20).astype(float), rng.normal(size=20)
    a[0] += 9  # not constant
    assert metrics.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_spearman_of_what_has_no_order_is_zero():
    assert metrics.spearman(np.ones(5), np.arange(5.0)) == metrics.spearman(np.zeros(0), np.zeros(0)) == 0
    assert metrics.spearman(np.array([np.nan, 1.0, 2.0]), np.arange(3.0)) == 0


def clouds(count: int, noise: float, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Vectors about three corners, and their labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    return np.eye(3, dtype=np.float32)[labels] + noise * rng.normal(size=(count, 3)).astype(np.float32), [
        "xyz"[label] for label in labels
    ]


def test_clusters_that_lie_apart_are_found_and_noise_is_not():
    assert metrics.v_measure(*clouds(60, 0.05)) == 1
    vectors, labels = clouds(60, 0.4)
    assert 0 < metrics.v_measure(vectors, labels) < 1
    assert metrics.v_measure(vectors, labels) == metrics.v_measure(vectors, labels)
    assert metrics.v_measure(np.ones((9, 3), np.float32), list("xyzxyzxyz")) == 0  # all vectors equal


def test_labels_that_a_line_tells_apart_are_classified_and_strangers_are_not():
    train, held_out = clouds(60, 0.05), clouds(30, 0.05, seed=1)
    assert metrics.classification(*train, *held_out) == {"accuracy": 1.0, "f1": 1.0}
    vectors, labels = held_out
    found = metrics.classification(*train, vectors, ["new" if label == "x" else label for label in labels])
    assert found["accuracy"] == np.mean([label != "x" for label in labels])
    assert metrics.classification(train[0], ["x"] * 60, *held_out)["accuracy"] == np.mean(
        [label == "x" for label in labels]
    )


# ---- Tasks -----------------------------------------------------------------------------------------------------


class Known:
    """Stands for an embedder: a text is its own vector, written as numbers."""

    def __init__(self, size: int = 4) -> None:
        self.config = jina_jax.Config(
            hidden_size=size, num_attention_heads=1, tasks=("a", "b"), prompts=("", ""), matryoshka_dimensions=(1, 2, 4)
        )
        self.calls: list[tuple[list[str], object]] = []

    def encode(self, texts, *, task=None, dimensions=None, normalize=True):
        assert dimensions == self.config.hidden_size
        assert not normalize
        self.calls.append((texts, task))
        return np.array([[float(x) for x in text.split()] for text in texts], np.float32)


def write(path: Path, *records: dict) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def measure(kind: str, path: str, dims: tuple[int, ...] = (4,), **more) -> dict:
    embedder = Known()
    return tasks.evaluate([EvalTask("t", kind, path, **more)], embedder, dims)["t"]


EAST, NORTH, UP = "1 0 0 0", "0 1 0 0", "0 0 1 0"


def test_all_passages_of_all_records_are_the_corpus(tmp_path):
    path = write(
        tmp_path / "x.jsonl",
        {"query": "1 0.1 0 0", "pos": EAST, "neg": [NORTH]},
        {"query": "0.1 1 0 0", "pos": UP, "neg": [EAST]},  # beaten by the other's negative and its own
    )
    found = measure("ir", path)
    assert found["main"] == "ndcg@10"
    assert found["metrics"]["mrr@10"] == {4: (1 + 1 / 3) / 2}
    assert found["metrics"]["ndcg@10"] == {4: pytest.approx((1 + 1 / 2) / 2)}
    assert found["metrics"]["recall@10"] == {4: 1.0}


def test_a_query_has_all_the_positives_of_its_records(tmp_path):
    path = write(
        tmp_path / "x.jsonl",
        {"query": "1 1 0 0", "pos": [EAST, NORTH]},
        {"query": "1 1 0 0", "pos": "1 1 0 0"},
        {"query": "0 0 1 0", "pos": UP},
    )
    assert measure("ir", path)["metrics"]["ndcg@10"] == {4: 1.0}
    ids = write(
        tmp_path / "ids.jsonl",
        {"query": "1 0 0 0", "pos": EAST, "query_id": 7},
        {"query": "1 0 0.1 0", "pos": NORTH, "query_id": 7},
    )
    found = measure("ir", ids)["metrics"]
    assert found["ndcg@10"] == {4: 1.0}  # one query with two relevant passages


def beir(folder: Path) -> Path:
    write(folder / "corpus.jsonl", *({"_id": f"d{i}", "title": "", "text": t} for i, t in enumerate([EAST, NORTH, UP])))
    write(
        folder / "queries.jsonl",
        {"_id": "d0", "text": "1 0 0.5 0"},
        {"_id": "q1", "text": "0.2 1 0.5 0"},
        {"_id": "q2", "text": "not judged, not embedded"},
    )
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\nd0\td2\t1\nq1\td1\t1\nq1\td2\t2\nq1\td0\t0\n"
    )
    return folder


def test_a_beir_directory_is_measured_as_beir_does(tmp_path):
    found = measure("ir", str(beir(tmp_path)))["metrics"]
    # d0 would find itself first; BEIR leaves out the passage that has the query's own id.
    second = (1 / np.log2(2) + 2 / np.log2(3)) / (2 / np.log2(2) + 1 / np.log2(3))
    assert found["ndcg@10"][4] == pytest.approx((1 + second) / 2, abs=1e-12)


def test_judged_passages_that_the_corpus_lacks_count_as_not_found(tmp_path):
    with (beir(tmp_path) / "qrels" / "test.tsv").open("a") as file:
        file.write("q1\tgone\t1\n")
    assert measure("ir", str(tmp_path))["metrics"]["recall@10"] == {4: (1 + 2 / 3) / 2}


def test_similarity_is_compared_by_rank(tmp_path):
    records = [{"a": EAST, "b": b, "score": s} for b, s in ((EAST, 5), ("1 0.1 0 0", 3), (NORTH, 0))]
    assert measure("sts", write(tmp_path / "x.jsonl", *records)) == {
        "main": "spearman",
        "metrics": {"spearman": {4: pytest.approx(1.0)}},
    }


def test_triplets_are_right_if_the_positive_beats_every_negative(tmp_path):
    path = write(
        tmp_path / "x.jsonl",
        {"query": EAST, "pos": "1 0.1 0 0", "neg": [NORTH, UP]},
        {"query": EAST, "pos": "1 0.1 0 0", "neg": [NORTH, EAST]},
        {"query": EAST, "pos": EAST, "neg": [EAST]},  # a tie is no win
    )
    assert measure("triplet", path)["metrics"] == {"accuracy": {4: 1 / 3}}


def test_reranking_orders_each_record_for_itself(tmp_path):
    path = write(
        tmp_path / "x.jsonl",
        {"query": EAST, "pos": ["1 0.1 0 0", "1 2 0 0"], "neg": ["1 1 0 0"]},
        {"query": EAST, "pos": "1 0.1 0 0", "neg": [NORTH]},
    )
    assert measure("reranking", path)["metrics"]["map"] == {4: pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)}


def test_labels_are_fitted_on_every_second_record_of_each_or_another_file(tmp_path):
    records = [{"text": text, "label": label} for _ in range(6) for text, label in ((EAST, "e"), (NORTH, "n"))]
    path = write(tmp_path / "x.jsonl", *records)
    assert measure("classification", path)["metrics"]["accuracy"] == {4: 1.0}
    flipped = write(tmp_path / "y.jsonl", *({"text": r["text"], "label": "en"[r["label"] == "e"]} for r in records))
    assert measure("classification", path, train_path=flipped)["metrics"]["accuracy"] == {4: 0.0}
    assert measure("clustering", path) == {"main": "v_measure", "metrics": {"v_measure": {4: 1.0}}}


def test_every_size_is_measured_from_one_encoding_of_distinct_texts(tmp_path):
    records = [{"a": EAST, "b": b, "score": s} for b, s in (("1 5 0 0", 5), ("1 1 0 0", 3), ("2 1 0 0", 0))]
    task = EvalTask("t", "sts", write(tmp_path / "x.jsonl", *records), task="a")
    embedder = Known()
    found = tasks.evaluate([task], embedder, (1, 2, 4))["t"]["metrics"]["spearman"]
    assert found == {1: 0.0, 2: pytest.approx(-1.0), 4: pytest.approx(-1.0)}
    assert [texts for texts, _ in embedder.calls] == [[EAST, "1 5 0 0", "1 1 0 0", "2 1 0 0"]]
    assert list(tasks.evaluate([task], embedder)["t"]["metrics"]["spearman"]) == [1, 2, 4]  # the model's own sizes


def test_queries_and_passages_have_their_tasks(tmp_path):
    path = write(tmp_path / "x.jsonl", {"query": EAST, "pos": EAST}, {"query": NORTH, "pos": UP})
    embedder = Known()
    one = EvalTask("t", "ir", path, task="a", passage_task="b")
    tasks.evaluate([one, dataclasses.replace(one, passage_task=None), EvalTask("u", "ir", path)], embedder, (4,))
    assert [task for _, task in embedder.calls] == [["a", "a", "b", "b"], ["a", "a", "a"], None]
    # The same text as query and as passage is two texts where their tasks differ.
    assert embedder.calls[0][0] == [EAST, NORTH, EAST, UP]
    assert embedder.calls[1][0] == [EAST, NORTH, UP]


def test_only_the_last_records_are_measured_where_that_is_asked(tmp_path):
    records = [{"a": EAST, "b": b, "score": s} for b, s in ((EAST, 0), (NORTH, 1), (EAST, 1), (NORTH, 0))]
    path = write(tmp_path / "x.jsonl", *records)
    assert measure("sts", path)["metrics"]["spearman"] == {4: 0.0}
    assert measure("sts", path, share=0.5)["metrics"]["spearman"] == {4: pytest.approx(1.0)}


def test_perplexity_is_what_the_caller_says(tmp_path):
    seen = []
    task = EvalTask("t", "mlm", "texts.jsonl")
    found = tasks.evaluate([task], Known(), (1, 4), perplexity=lambda path: seen.append(path) or 12.5)
    assert found == {"t": {"main": "perplexity", "metrics": {"perplexity": {4: 12.5}}}}
    assert seen == ["texts.jsonl"]
    with pytest.raises(InputError, match="t: the masked language model is measured while it trains"):
        tasks.evaluate([task], Known(), (4,))


def test_mistakes_say_what_to_do(tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", {"query": EAST, "pos": EAST})
    empty = write(tmp_path / "empty.jsonl")
    alone = write(tmp_path / "alone.jsonl", {"text": EAST, "label": "x"})
    for kind, path, message in (
        ("sts", pairs, "t: sts measures scored records, and .*pairs.jsonl holds records of the kind pair"),
        ("ir", empty, "t: .*empty.jsonl holds no records"),
        ("ir", str(tmp_path / "no.jsonl"), "no file"),
        ("ir", str(tmp_path), r"t: .* has no corpus.jsonl"),
        ("classification", alone, "t: .* has no two records of one label"),
    ):
        with pytest.raises(InputError, match=message):
            measure(kind, path)
    with pytest.raises(InputError, match="t: the model has no task 'c'"):
        measure("ir", pairs, task="c")
    with pytest.raises(InputError, match=r"eval\.dims: 5"):
        measure("ir", pairs, dims=(5,))


def test_the_files_of_a_directory_that_are_malformed_are_named(tmp_path):
    (beir(tmp_path) / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nd0 d2 1\n")
    with pytest.raises(InputError, match=r"test\.tsv:2: must be a query's id, a passage's id and a score"):
        measure("ir", str(tmp_path))
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nnobody\td2\t1\n")
    with pytest.raises(InputError, match="judges no query"):
        measure("ir", str(tmp_path))
    for broken in ({"_id": "d0"}, {"_id": "d0", "text": None}, ["d0", EAST]):
        write(tmp_path / "corpus.jsonl", broken)
        with pytest.raises(InputError, match=r'corpus\.jsonl:1: must be an object in JSON with "_id"'):
            measure("ir", str(tmp_path))


def test_an_embedder_is_measured(tmp_path):
    embedder = jina_jax.Embedder.load("mini")
    path = write(
        tmp_path / "x.jsonl",
        {"query": "Where do cats sleep?", "pos": "Cats sleep on sofas.", "neg": ["Trains leave at noon."]},
        {"query": "When does the train leave?", "pos": "Trains leave at noon.", "neg": ["A rose is red."]},
    )
    task = EvalTask("t", "ir", path, task="retrieval.query", passage_task="retrieval.passage")
    found = tasks.evaluate([task], embedder)["t"]["metrics"]["ndcg@10"]
    assert list(found) == [24, 48, 96, 192, 288, 384]
    assert found[384] == 1


# ---- The embedder's part ---------------------------------------------------------------------------------------


def test_other_weights_share_the_programs():
    import jax

    embedder = jina_jax.Embedder.load("mini")
    before, programs = embedder.encode("Hello", task="text-matching"), embedder.programs
    other = embedder.with_variables(jax.tree.map(lambda x: x * 0.5, embedder.variables))
    changed = other.encode("Hello", task="text-matching")
    assert np.abs(changed - before).max() > 0.01
    assert (embedder.encode("Hello", task="text-matching") == before).all()
    assert embedder.programs == other.programs == programs  # nothing was compiled again
    fresh = jina_jax.Embedder(other.model, other.variables, other.tokenizer)
    assert (fresh.encode("Hello", task="text-matching") == changed).all()
