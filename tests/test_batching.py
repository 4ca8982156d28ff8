import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jina_jax import batching
from jina_jax.batching import Text


def make(lengths, means=None):
    """Texts of given lengths, each with so many means over random spans; ids tell them apart."""
    rng, texts, target = np.random.default_rng(0), [], 0
    for index, length in enumerate(lengths):
        count = 1 if means is None else means[index]
        spans = np.sort(rng.integers(0, length + 1, (count, 2)), axis=1) if means else np.array([[0, length]])
        targets = np.arange(target, target + count)
        texts.append(
            Text(np.full(length, index + 5, np.int32), index % 6 - 1, spans, targets, np.ones(count, np.float32))
        )
        target += count
    return texts


splits = st.builds(batching.Split, rows=st.sampled_from((1, 2, 8)), tokens=st.sampled_from((1, 4)))
drawn = st.lists(st.integers(1, 300), max_size=200)
arrangements = pytest.mark.parametrize("arrange", [batching.pack, batching.bucket])


@arrangements
@given(
    lengths=drawn,
    max_tokens=st.sampled_from((300, 512, 8192)),
    batch_tokens=st.sampled_from((1, 100, 1024, 32_768)),
    split=splits,
)
def test_every_text_is_in_one_row_that_holds_it(arrange, lengths, max_tokens, batch_tokens, split):
    batches = arrange(make(lengths), max_tokens, batch_tokens, split)
    rows = [row for batch in batches for row in batch.members]
    assert sorted(itertools.chain.from_iterable(row.tolist() for row in rows)) == list(range(len(lengths)))
    for batch in batches:
        assert 1 <= len(batch.members) <= batch.rows
        assert batch.rows == split.rows or batch.rows * batch.length <= batch_tokens
        assert batch.rows % split.rows == 0
        assert batch.length % split.tokens == 0
        for row in batch.members:
            assert sum(lengths[i] for i in row) <= batch.length
            assert 1 <= len(row) <= batch.places


@given(
    lengths=drawn,
    max_tokens=st.sampled_from((300, 512, 8192)),
    batch_tokens=st.sampled_from((1, 100, 1024, 32_768)),
    split=splits,
)
def test_packed_shapes_are_those_promised(lengths, max_tokens, batch_tokens, split):
    batches = batching.pack(make(lengths), max_tokens, batch_tokens, split)
    shapes = {(batch.rows, batch.length) for batch in batches}
    assert shapes <= set(batching.row_shapes(max_tokens, batch_tokens, split))
    assert [batch.length for batch in batches] == sorted((batch.length for batch in batches), reverse=True)


def test_the_number_of_shapes_that_is_documented():
    assert len(batching.row_shapes(8192, 1024)) == 8
    assert len(batching.row_shapes(8192, 32_768)) == 8
    assert batching.row_lengths(8192, 1024) == (64, 128, 256, 512, 1024, 2048, 4096, 8192)
    assert batching.row_shapes(8192, 32_768)[-2:] == [(1, 8192), (4, 8192)]
    assert batching.row_lengths(130, 1) == (64, 128, 130)
    assert batching.row_lengths(20, 1024) == (20,)
    spread = batching.Split(rows=8, tokens=4)
    assert len(batching.row_shapes(8192, 8 * 4 * 32_768, spread)) == 8
    assert batching.row_shapes(8192, 8 * 4 * 32_768, spread)[-2:] == [(8, 8192), (128, 8192)]
    assert batching.row_lengths(130, 1, spread) == (64, 128, 132)


@pytest.mark.parametrize("batch_tokens", [1024, 32_768])
def test_little_is_padding(batch_tokens):
    """Three length profiles, in windows as the embedder makes them."""
    rng = np.random.default_rng(0)
    mix = np.clip(np.exp(rng.normal(5, 1.3, 8000)), 4, 8192)
    for lengths in (rng.integers(4, 33, 8000), rng.integers(64, 513, 8000), mix):
        lengths = lengths.astype(int)
        tokens = computed = 0
        total = 0
        for window in np.split(lengths, np.flatnonzero(np.diff(np.cumsum(lengths) // (32 * batch_tokens))) + 1):
            batches = batching.pack(make(window), 8192, batch_tokens)
            tokens, computed = tokens + window.sum(), computed + sum(b.rows * b.length for b in batches)
            total += len(window)
        assert total == 8000
        assert 1 - tokens / computed < 0.05


@given(lengths=st.lists(st.integers(1, 2000), min_size=1, max_size=300))
def test_only_the_last_bucket_has_rows_without_a_text_and_at_most_half(lengths):
    *others, last = batching.bucket(make(lengths), 8192, 1024)
    assert all(len(batch.members) == batch.rows for batch in others)
    assert 2 * len(last.members) > last.rows


@given(lengths=st.lists(st.integers(1, 8192), min_size=1, max_size=300), batch_tokens=st.sampled_from((1024, 32_768)))
def test_a_call_meets_at_most_two_row_counts_a_bucket(lengths, batch_tokens):
    rows = {}
    for batch in batching.bucket(make(lengths), 8192, batch_tokens):
        rows.setdefault(batch.length, set()).add(batch.rows)
    assert max(map(len, rows.values())) <= 2


@given(max_tokens=st.integers(1, 10_000))
def test_buckets_ascend_to_the_limit_without_wide_gaps(max_tokens):
    found = batching.bucket_lengths(max_tokens)
    assert found[-1] == max_tokens
    assert all(a < b <= 3 * a // 2 for a, b in itertools.pairwise(found))
    assert found[0] <= batching.SHORTEST_BUCKET


def test_share_of_padding_in_buckets_that_is_documented():
    lengths = np.exp(np.random.default_rng(0).uniform(np.log(16), np.log(8192), 20_000)).astype(int)
    computed = sum(batch.rows * batch.length for batch in batching.bucket(make(lengths), 8192, 1024))
    assert 0.13 < 1 - lengths.sum() / computed < 0.17


@arrangements
@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=40), seed=st.integers(0, 9), data=st.integers(1, 25))
def test_means_come_back_to_their_texts(arrange, lengths, seed, data):
    """Fill, take the means of the ids by hand, collect: each vector is the id of its text."""
    rng = np.random.default_rng(seed)
    texts = make(lengths, rng.integers(1, data + 1, len(lengths)).tolist())
    vectors = np.zeros((sum(len(text.targets) for text in texts), 1), np.float32)
    for batch in arrange(texts, 128, 128):
        arrays = batching.fill(batch, texts, 1)
        assert arrays.tokens.shape == arrays.segments.shape == (batch.rows, batch.length)
        assert arrays.task.shape == (batch.rows, batch.places)
        np.testing.assert_array_equal(arrays.tokens == 1, arrays.segments == 0)
        for row, members in enumerate(batch.members):
            for place, index in enumerate(members):
                assert (arrays.tokens[row][arrays.segments[row] == place + 1] == index + 5).all()
                assert arrays.task[row, place] == texts[index].task
        means = np.zeros((batch.rows, batch.places, 1), np.float32)
        for row, place in np.ndindex(batch.rows, batch.places):
            start, stop = arrays.spans[row, place]
            means[row, place] = arrays.tokens[row, start:stop].mean() if stop > start else 0
        batching.collect(batch, texts, means, vectors)
    expected = [(index + 5) * (stop > start) for index, text in enumerate(texts) for start, stop in text.spans]
    np.testing.assert_array_equal(vectors[:, 0], expected)


def test_parts_of_a_mean_add_up():
    ids, spans = np.full(4, 7, np.int32), np.array([[0, 4]])
    texts = [Text(ids, -1, spans, np.array([0]), np.array([share], np.float32)) for share in (0.25, 0.75)]
    [batch] = batching.pack(texts, 64, 64)
    vectors = np.zeros((1, 2), np.float32)
    means = np.zeros((1, batch.places, 2), np.float32)
    means[0, :2] = [[8, 4], [4, 8]]
    batching.collect(batch, texts, means, vectors)
    np.testing.assert_array_equal(vectors, [[5, 7]])


@arrangements
def test_nothing_to_do(arrange):
    assert arrange([], 512, 64) == []


@arrangements
@pytest.mark.parametrize(
    ("lengths", "limits", "message"),
    [
        ([5, 600, 7], (512, 64), "text 1 has 600 tokens, more than max_tokens=512"),
        ([5], (512, 0), "batch_tokens=0 must be at least 1"),
        ([5], (0, 64), "max_tokens=0"),
    ],
)
def test_limits_are_checked(arrange, lengths, limits, message):
    with pytest.raises(ValueError, match=message):
        arrange(make(lengths), *limits)
