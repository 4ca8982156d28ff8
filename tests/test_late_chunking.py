"""Late chunking against goldens in float64, and its laws."""

import jax
import numpy as np
import pytest
from numerics import EMBEDDING, assert_close
from test_chunking import Characters

import jina_jax
from jina_jax.tokenizer import Tokens

FIRST = 0x4E00


class Ids(Characters):
    """Characters for token ids: every character is a token, and says which."""

    vocab_size = 400

    def encode(self, text, max_tokens=None):
        tokens = super().encode(text, max_tokens)
        tokens.ids[1:-1] -= FIRST + 4
        return tokens


class CutIds(Ids):
    """Truncation cuts, and nothing else."""

    def encode(self, text, max_tokens=None):
        tokens = super().encode(text)
        return Tokens(tokens.ids[:max_tokens], tokens.offsets[:max_tokens], len(tokens.ids))


def spell(ids):
    return "".join(chr(FIRST + i) for i in ids)


@pytest.fixture(scope="module")
def goldens(data):
    return dict(np.load(data / "late_goldens.npz"))


def load(data, goldens, **overrides):
    """The small checkpoint with the goldens' instruction as a prompt."""
    model, variables = jina_jax.load(data / "tiny_checkpoints" / "original", **overrides)
    prompt = spell(goldens["ids"][0, 1 : 1 + goldens["n_instr"]])
    prompts = tuple(prompt if task == "retrieval.passage" else "" for task in model.config.tasks)
    return jina_jax.Embedder(jina_jax.Model(model.config.replace(prompts=prompts)), variables, Ids())


@pytest.fixture(scope="module")
def embedder(data, goldens):
    return load(data, goldens)


@pytest.fixture(scope="module")
def document(goldens):
    return spell(goldens["ids"][0, 1 + goldens["n_instr"] : -1])


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def draw(count, seed=0):
    """Documents with chunks of all kinds: empty, overlapping, with gaps."""
    rng, documents = np.random.default_rng(seed), []
    for length in rng.integers(1, 90, count):
        spans = np.sort(rng.integers(0, length + 1, (rng.integers(1, 30), 2)), axis=1)
        documents.append((spell(rng.integers(5, 400, length)), [tuple(span) for span in spans.tolist()]))
    return documents


# ---- Goldens ---------------------------------------------------------------------------------------------------


def test_chunks_of_a_document(embedder, document, goldens):
    found = embedder.encode_chunks(document, goldens["spans"])
    assert_close(found.embeddings, unit(goldens["chunks"]), EMBEDDING)
    assert found.tokens.tolist() == (goldens["ext"][:, 1] - goldens["ext"][:, 0]).tolist()
    assert found.status == ("whole",) * 4


def test_a_truncated_document(data, document, goldens):
    """The goldens were cut without putting `</s>` back to the end, where nobody pools it but all tokens see it."""
    embedder = load(data, goldens, max_position_embeddings=34)
    cut = jina_jax.Embedder(embedder.model, embedder.variables, CutIds())
    found = cut.encode_chunks(document, goldens["spans"], truncate=True)
    assert_close(found.embeddings, unit(goldens["chunks_trunc32"]), EMBEDDING)
    assert found.status == ("whole", "whole", "whole", "cut")
    found = embedder.encode_chunks(document, goldens["spans"], truncate=True)
    assert found.tokens.tolist() == [17, 1, 12, 1]


@pytest.mark.parametrize(("window", "overlap"), [(16, 4), (20, 10), (12, 1)])
def test_a_document_in_windows(embedder, document, goldens, window, overlap):
    found = embedder.encode_chunks(document, goldens["spans"], window=window, overlap=overlap)
    assert_close(found.embeddings, unit(goldens[f"long_{window}_{overlap}_chunks"]), EMBEDDING)
    every = [(i, i + 1) for i in range(len(document))]
    hidden = embedder.encode_chunks(
        document, every, window=window, overlap=overlap, pool_specials=False, normalize=False
    )
    expected = goldens[f"long_{window}_{overlap}_hidden"][1 + goldens["n_instr"] : -1]
    assert_close(unit(hidden.embeddings), unit(expected), EMBEDDING)


# ---- Laws ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [None, "retrieval.passage", "separation"])
def test_one_chunk_over_everything_is_the_embedding(embedder, document, task):
    found = embedder.encode_chunks(document, [(0, len(document))], task=task)
    assert_close(found.embeddings[0], embedder.encode(document, task=task), EMBEDDING)


def test_a_window_that_holds_the_document_is_no_window(embedder, document, goldens):
    found = embedder.encode_chunks(document, goldens["spans"], window=len(goldens["ids"][0]), overlap=5)
    np.testing.assert_array_equal(found.embeddings, embedder.encode_chunks(document, goldens["spans"]).embeddings)


@pytest.mark.parametrize("batch_tokens", [64, 256, None])
def test_neighbours_change_nothing(embedder, batch_tokens):
    documents = draw(30)
    found = list(embedder.encode_documents(documents, batch_tokens=batch_tokens, window=60, overlap=20))
    assert len(found) == len(documents)
    for one, (text, spans) in zip(found, documents, strict=True):
        alone = embedder.encode_chunks(text, spans, window=60, overlap=20)
        assert_close(one.embeddings, alone.embeddings, EMBEDDING)
        assert one.status == alone.status
        np.testing.assert_array_equal(one.tokens, alone.tokens)
        np.testing.assert_array_equal(one.spans, spans)


def test_chunks_are_means_of_token_vectors(embedder):
    """Overlapping, empty and blank chunks, against the model itself."""
    run = jax.jit(lambda v, tokens, mask: embedder.model.apply(v, tokens, mask, "retrieval.passage").hidden)
    for text, spans in draw(6, seed=1):
        prompt = embedder.config.prompts[1]
        ids = Ids().encode(prompt + text).ids
        padded = np.pad(ids, (0, 128 - len(ids)))[None]
        hidden = np.asarray(run(embedder.variables, padded, np.arange(128)[None] < len(ids)))
        found = embedder.encode_chunks(text, spans, pool_specials=False, normalize=False)
        for vector, (start, stop), status in zip(found.embeddings, spans, found.status, strict=True):
            if start == stop:
                assert status == "empty"
                assert not vector.any()
            else:
                mean = hidden[0, 1 + len(prompt) + start : 1 + len(prompt) + stop].astype(np.float64).mean(axis=0)
                assert_close(vector / np.linalg.norm(mean), mean / np.linalg.norm(mean), EMBEDDING)


def test_chunks_alone_are_joined_by_a_space(embedder):
    chunks = [spell([7, 8, 9]), "", spell([10, 11])]
    found = embedder.encode_chunks(chunks=chunks)
    by_hand = embedder.encode_chunks(" ".join(chunks), [(0, 3), (4, 4), (5, 7)])
    np.testing.assert_array_equal(found.embeddings, by_hand.embeddings)
    assert found.status == ("whole", "empty", "whole")


def test_more_chunks_than_a_row_has_places(embedder):
    text = spell(range(5, 45))
    spans = [(i, j) for i in range(40) for j in range(i + 1, 41)]  # 820 for a row that has 128 places at most
    found = embedder.encode_chunks(text, spans, normalize=False)
    some = [0, 17, 400, 818]
    alone = embedder.encode_chunks(text, [spans[0], *(spans[i] for i in some), spans[-1]], normalize=False)
    assert_close(found.embeddings[some[1:]], alone.embeddings[2:-1], 1e-5)


def test_usage_counts_windows_and_padding(embedder, document):
    usage = jina_jax.Usage()
    embedder.encode_chunks(document, [(0, 30)], usage=usage)
    assert (usage.texts, usage.tokens, usage.computed_tokens, usage.batches) == (1, 41, 128, 1)
    assert usage.truncated == usage.cut_tokens == 0


def test_truncation_of_documents_is_counted_or_refused(data, document, goldens):
    embedder, usage = load(data, goldens, max_position_embeddings=34), jina_jax.Usage()
    embedder.encode_chunks(document, [(0, 30)], truncate=True, usage=usage)
    assert (usage.truncated, usage.cut_tokens, usage.tokens) == (1, 9, 32)
    with pytest.raises(ValueError, match="text 0 has 41 tokens, the model takes 32"):
        embedder.encode_chunks(document, [(0, 30)], truncate="error")
    whole = embedder.encode_chunks(document, [(0, 10), (20, 30)])
    assert whole.status == ("whole", "whole")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 513}, "window=513 tokens must be at least 1 and at most 512"),
        ({"window": 10, "overlap": 10}, "overlap=10 tokens must be at least 0 and less than the window"),
        ({"task": "nope"}, "unknown task"),
        ({"dimensions": 0}, "must be a whole number"),
        ({"precision": "int4"}, "precision='int4' must be one of"),
    ],
)
def test_arguments_are_checked(embedder, arguments, message):
    with pytest.raises(ValueError, match=message):
        embedder.encode_chunks("a", [(0, 1)], **arguments)


def test_outputs_in_fewer_bits(embedder, document, goldens):
    found = embedder.encode_chunks(document, goldens["spans"], dimensions=32, precision="ubinary")
    exact = embedder.encode_chunks(document, goldens["spans"], dimensions=32)
    np.testing.assert_array_equal(found.embeddings, np.packbits(exact.embeddings > 0, axis=1))


def test_positions_of_documents_in_errors_count_on(data, goldens, monkeypatch):
    monkeypatch.setattr("jina_jax.pipeline.WINDOW_TEXTS", 2)
    embedder = load(data, goldens, max_position_embeddings=34)
    documents = [(spell([7]), [(0, 1)])] * 5 + [(spell([7] * 60), [(0, 60)])]
    with pytest.raises(ValueError, match="text 5 has 71 tokens"):
        list(embedder.encode_documents(documents, truncate="error"))
