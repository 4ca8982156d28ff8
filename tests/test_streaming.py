"""Packed, bucketed, streamed and one by one; order, memory, errors and interruption of streams."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import EMBEDDING, assert_close
from test_chunking import Characters
from test_embedder import MINI, TASKS, draw_texts, make_config

import jina_jax
from jina_jax import batching


class Words(Characters):
    """Tokens are characters, cut down to the vocabulary."""

    vocab_size = 1000

    def encode(self, text, max_tokens=None):
        tokens = super().encode(text, max_tokens)
        tokens.ids[1:-1] %= 990
        tokens.ids[1:-1] += 5
        return tokens


@pytest.fixture(scope="module")
def long_embedder():
    """One that takes 8192 tokens, small enough for many of them."""
    from conftest import random_variables

    config = make_config(
        hidden_size=32, num_attention_heads=2, intermediate_size=64, max_position_embeddings=8194, vocab_size=1000,
        matryoshka_dimensions=(32,), num_hidden_layers=1,
    )  # fmt: skip
    model = jina_jax.Model(config)
    return jina_jax.Embedder(model, random_variables(model), Words())


@pytest.fixture(scope="module")
def embedder():
    from conftest import random_variables

    model = jina_jax.Model(make_config())
    return jina_jax.Embedder(model, random_variables(model), jina_jax.tokenizer.load_tokenizer(MINI))


def drain(stream, found):
    for vector in stream:
        found.append(vector)


lengths = st.one_of(st.integers(0, 40), st.integers(0, 600), st.integers(0, 8190))


@settings(max_examples=8)
@given(lengths=st.lists(lengths, min_size=1, max_size=8), seed=st.integers(0, 99))
def test_packed_bucketed_streamed_and_alone(long_embedder, lengths, seed):
    rng = np.random.default_rng(seed)
    texts = ["".join(map(chr, rng.integers(0x4E00, 0x9000, length))) for length in lengths]
    tasks = [TASKS[i] for i in rng.integers(0, len(TASKS), len(texts))]
    packed = long_embedder.encode(texts, task=tasks)
    assert_close(long_embedder.encode(texts, task=tasks, pack=False), packed, EMBEDDING)
    assert_close(np.stack(list(long_embedder.encode_stream(iter(texts), task=iter(tasks)))), packed, EMBEDDING)
    for i in rng.integers(0, len(texts), 2):
        assert_close(long_embedder.encode(texts[i], task=tasks[i]), packed[i], EMBEDDING)


def test_a_stream_reads_ahead_only_so_far(embedder, monkeypatch):
    monkeypatch.setattr("jina_jax.pipeline.WINDOW_TEXTS", 10)
    read = 0

    def texts():
        nonlocal read
        for text in itertools.cycle(draw_texts(7)):
            read += 1
            yield text

    stream = embedder.encode_stream(texts())
    for count in range(1, 100):
        next(stream)
        assert read <= count + 40
    stream.close()


def test_order_is_kept_over_windows(embedder, monkeypatch):
    texts = draw_texts(95)
    expected = embedder.encode(texts)
    monkeypatch.setattr("jina_jax.pipeline.WINDOW_TEXTS", 10)
    assert_close(np.stack(list(embedder.encode_stream(texts))), expected, EMBEDDING)
    assert_close(embedder.encode(texts), expected, EMBEDDING)


def test_what_came_before_an_error_comes_out(embedder, monkeypatch):
    monkeypatch.setattr("jina_jax.pipeline.WINDOW_TEXTS", 10)
    texts = draw_texts(34)

    def failing():
        yield from texts
        raise OSError("the disk is gone")

    found, before = [], threading.active_count()
    with pytest.raises(OSError, match="the disk is gone"):
        drain(embedder.encode_stream(failing()), found)
    assert_close(np.stack(found), embedder.encode(texts), EMBEDDING)
    assert threading.active_count() == before


def test_a_text_that_is_too_long_or_none_is_told_after_those_before(embedder, monkeypatch):
    monkeypatch.setattr("jina_jax.pipeline.WINDOW_TEXTS", 10)
    found = []
    with pytest.raises(ValueError, match="text 20 has"):
        drain(embedder.encode_stream([*draw_texts(20), "of " * 500], truncate="error"), found)
    assert_close(np.stack(found), embedder.encode(draw_texts(20)), EMBEDDING)
    with pytest.raises(TypeError, match=r"texts\[3\] is int, must be str"):
        list(embedder.encode_stream(iter(["a", "b", "c", 3])))


def test_another_number_of_tasks(embedder):
    with pytest.raises(ValueError, match="shorter"):
        list(embedder.encode_stream(iter("abc"), task=iter(["separation"])))


def test_a_stream_that_is_left_leaves_no_thread(embedder, monkeypatch):
    monkeypatch.setattr("jina_jax.pipeline.WINDOW_TEXTS", 10)
    before = threading.active_count()
    stream = embedder.encode_stream(itertools.repeat("a text"))
    next(stream)
    stream.close()
    assert threading.active_count() == before


INTERRUPTED = """
import itertools, sys, numpy as np, jina_jax
embedder = jina_jax.Embedder.load("mini")
found = []
try:
    for vector in embedder.encode_stream(f"text {i}" for i in itertools.count()):
        found.append(vector)
        if len(found) == 1:
            print("started", flush=True)
except KeyboardInterrupt:
    some = [0, len(found) // 2, len(found) - 1]
    alone = embedder.encode([f"text {i}" for i in some])
    print("right" if np.abs(np.stack([found[i] for i in some]) - alone).max() < 1e-6 else "wrong", flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_interruption_stops_at_once_and_what_was_given_is_right():
    with subprocess.Popen([sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "started\n"
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert output == "right\n"
    assert process.returncode == 0


def test_warmup_compiles_everything_that_texts_need(embedder):
    fresh = jina_jax.Embedder(embedder.model, embedder.variables, embedder.tokenizer)
    assert fresh.warmup() == fresh.programs == 2  # one row of 128 = max_tokens, and eight of these
    rng = np.random.default_rng(0)
    for seed in range(10):
        texts = draw_texts(int(rng.integers(1, 60)), seed, longest=80)
        fresh.encode(texts, task=TASKS[1:][seed % 5])
        fresh.encode(texts, task=[None] * len(texts))
        list(fresh.encode_groups([texts]))
    assert fresh.programs == 2
    assert fresh.warmup(adapters=False) == 2
    fresh.encode(texts)
    list(fresh.encode_documents(texts, chunker=8, task=None))
    assert fresh.programs == 4


def test_without_a_task_there_is_no_trace_of_adapters(embedder):
    texts = draw_texts(9)
    bare = jina_jax.Embedder(embedder.model, embedder.variables, embedder.tokenizer)
    found = bare.encode(texts)
    assert_close(found, embedder.encode(texts, task=[None] * 9), EMBEDDING)
    nothing = batching.fill(batching.Batch((), 1, 64, 16), [], 1, adapters=False)
    text = bare._means.lower(bare._held, *nothing).as_text()
    rank = f"x5x{embedder.config.lora_rank}xf32"
    assert "dot_general" in text
    assert not any(rank in line for line in text.splitlines() if "dot_general" in line)


def test_groups_of_texts_do_not_know_of_each_other(embedder, monkeypatch):
    monkeypatch.setattr("jina_jax.pipeline.WINDOW_TEXTS", 10)
    texts = draw_texts(57)
    groups = [texts[:23], [], texts[23:24], [(text, "text-matching") for text in texts[24:]]]
    found = list(embedder.encode_groups(map(iter, groups), dimensions=8))
    assert [len(one) for one in found] == [23, 0, 1, 33]
    tasks = [None] * 24 + ["text-matching"] * 33
    assert_close(np.concatenate(found), embedder.encode(texts, task=tasks, dimensions=8), EMBEDDING)
    for group, one in zip(groups, found, strict=True):  # bit for bit, whatever came before
        [alone] = embedder.encode_groups([group], dimensions=8)
        np.testing.assert_array_equal(alone, one)


def test_a_group_is_not_held_before_it_is_needed(embedder, monkeypatch):
    monkeypatch.setattr("jina_jax.pipeline.WINDOW_TEXTS", 4)
    read = []

    def group(number):
        for text in draw_texts(8):
            read.append(number)
            yield text

    results = embedder.encode_groups(group(number) for number in range(50))
    next(results)
    assert max(read) <= 2
    results.close()


def test_groups_of_documents(embedder):
    texts = [" ".join(draw_texts(5, seed)) for seed in range(4)]
    groups = [[texts[0], (texts[1], None)], [], [(texts[2], None, "separation"), texts[3]]]
    found = list(embedder.encode_document_groups(groups, task=None, chunker=16))
    assert [len(group) for group in found] == [2, 0, 2]
    expected = list(embedder.encode_documents(texts, task=[None, None, "separation", None], chunker=16))
    for index, one in ((0, found[0][0]), (1, found[0][1]), (2, found[2][0]), (3, found[2][1])):
        assert_close(one.embeddings, expected[index].embeddings, EMBEDDING)
        np.testing.assert_array_equal(one.spans, expected[index].spans)
