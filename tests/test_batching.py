import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jina_jax import batching


@given(
    lengths=st.lists(st.integers(1, 300), max_size=200),
    max_tokens=st.sampled_from((300, 512, 8192)),
    batch_tokens=st.sampled_from((1, 100, 1024, 32_768)),
)
def test_every_text_is_in_one_batch_that_holds_it(lengths, max_tokens, batch_tokens):
    batches = batching.plan(lengths, max_tokens, batch_tokens)
    found = np.concatenate([np.zeros(0, np.int64), *(batch.indices for batch in batches)])
    assert sorted(found.tolist()) == list(range(len(lengths)))
    possible = set(batching.shapes(max_tokens, batch_tokens))
    for batch in batches:
        assert (batch.rows, batch.length) in possible
        assert 1 <= len(batch.indices) <= batch.rows
        assert max(lengths[i] for i in batch.indices) <= batch.length
        assert batch.rows == 1 or batch.rows * batch.length <= batch_tokens
    assert [batch.length for batch in batches] == sorted((batch.length for batch in batches), reverse=True)


@given(lengths=st.lists(st.integers(1, 8192), min_size=1, max_size=300), batch_tokens=st.sampled_from((1024, 32_768)))
def test_a_call_meets_at_most_two_row_counts_a_length(lengths, batch_tokens):
    rows = {}
    for batch in batching.plan(lengths, 8192, batch_tokens):
        rows.setdefault(batch.length, set()).add(batch.rows)
    assert max(map(len, rows.values())) <= 2


@given(lengths=st.lists(st.integers(1, 2000), min_size=1, max_size=300))
def test_only_the_last_batch_has_rows_without_a_text_and_at_most_half(lengths):
    *others, last = batching.plan(lengths, 8192, 1024)
    assert all(len(batch.indices) == batch.rows for batch in others)
    assert 2 * len(last.indices) > last.rows


@pytest.mark.parametrize(("batch_tokens", "bound"), [(1024, 55), (32_768, 138)])
def test_the_bound_on_shapes_that_is_documented(batch_tokens, bound):
    assert len(batching.buckets(8192)) == 19
    found = batching.shapes(8192, batch_tokens)
    assert len(found) == len(set(found)) == bound
    rng = np.random.default_rng(0)
    met = set()
    for _ in range(300):
        lengths = np.exp(rng.uniform(0, np.log(8192), rng.integers(1, 200))).astype(int) + 1
        met |= {(batch.rows, batch.length) for batch in batching.plan(np.minimum(lengths, 8192), 8192, batch_tokens)}
    assert met <= set(found)


@given(max_tokens=st.integers(1, 10_000))
def test_buckets_ascend_to_the_limit_without_wide_gaps(max_tokens):
    found = batching.buckets(max_tokens)
    assert found[-1] == max_tokens
    assert all(a < b <= 3 * a // 2 for a, b in itertools.pairwise(found))
    assert found[0] <= batching.SHORTEST


def test_padding_share_that_is_documented():
    lengths = np.exp(np.random.default_rng(0).uniform(np.log(16), np.log(8192), 20_000)).astype(int)
    shapes = batching.plan(lengths, 8192, 1024)
    computed = sum(batch.rows * batch.length for batch in shapes)
    assert 0.13 < 1 - lengths.sum() / computed < 0.17


def test_long_texts_first_and_equal_ones_in_their_order():
    batches = batching.plan([5, 40, 5, 5, 200], 512, 64)
    assert [(batch.indices.tolist(), batch.rows, batch.length) for batch in batches] == [
        ([4], 1, 256),
        ([1], 1, 48),
        ([0, 2, 3], 4, 16),
    ]


def test_free_rows_take_shorter_texts():
    (batch,) = batching.plan([20, 20, 20, 3], 512, 1024)
    assert (batch.indices.tolist(), batch.rows, batch.length) == ([0, 1, 2, 3], 4, 24)


def test_fill():
    ids = [np.array([0, 7, 2], np.int32), np.array([0, 8, 9, 2], np.int32), np.array([0, 2], np.int32)]
    tokens, mask = batching.fill(batching.Batch(np.array([1, 0]), 4, 5), ids, pad_id=1)
    assert tokens.dtype == np.int32
    assert mask.dtype == bool
    np.testing.assert_array_equal(tokens, [[0, 8, 9, 2, 1], [0, 7, 2, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(mask.sum(axis=1), [4, 3, 0, 0])


def test_nothing_to_plan():
    assert batching.plan([], 512, 1024) == []


def test_wrong_limits():
    with pytest.raises(ValueError, match="text 1 has 600 tokens, more than max_tokens=512"):
        batching.plan([3, 600], 512, 1024)
    with pytest.raises(ValueError, match="batch_tokens=0 must be at least 1"):
        batching.plan([3], 512, 0)
    with pytest.raises(ValueError, match="max_tokens=0 must be at least 1"):
        batching.buckets(0)


def test_a_million_texts_are_planned_in_seconds():
    lengths = np.random.default_rng(0).integers(3, 600, 1_000_000)
    batches = batching.plan(lengths, 8192, 32_768)
    assert sum(len(batch.indices) for batch in batches) == len(lengths)
