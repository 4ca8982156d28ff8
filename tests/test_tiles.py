"""The lists of tiles that the TPU kernel works on."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jina_jax.kernels import tiles


@given(length=st.integers(1, 40_000), tile=st.sampled_from([128, 256, 512]), span=st.sampled_from([128, 1024, 8192]))
def test_a_length_is_cut_into_equal_tiles_and_spans(length, tile, span):
    side = tiles.cut(length, tile, span)
    assert side.tile % tiles.LANES == 0
    assert side.tile <= tile
    assert side.span % side.tile == 0
    assert side.span <= max(span, side.tile)
    assert side.padded >= length
    # Never more padding than a tile for each span.
    assert side.padded - length < side.tile * (side.spans + 1)


@given(
    seed=st.integers(0, 1000),
    sorted_=st.booleans(),
    turn=st.integers(1, 3),
    spans=st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 3)]),
)
def test_every_visible_pair_is_in_one_item_and_marked(seed, sorted_, turn, spans):
    rng = np.random.default_rng(seed)
    size, rows, columns = 4, 6, 6
    segments = rng.integers(0, 4, (2, rows * size))
    if sorted_:
        segments = np.sort(segments, axis=1)[:, ::-1]
    segments = np.ascontiguousarray(segments).astype(np.int32)
    visit, full = map(np.asarray, tiles.compare(jnp.asarray(segments), jnp.asarray(segments), size, size))
    lists = np.asarray(tiles.pack(jnp.asarray(visit), jnp.asarray(full), spans, turn))
    np.testing.assert_array_equal(lists, tiles.pack(visit, full, spans, turn, np))

    visible = (segments[:, :, None] == segments[:, None]) & (segments > 0)[:, :, None]
    blocks = visible.reshape(2, rows, size, columns, size)
    any_visible, all_visible = blocks.any(axis=(2, 4)), blocks.all(axis=(2, 4))
    for b in range(2):
        seen = np.zeros((rows, columns), bool)
        firsts = np.zeros(rows, int)
        for index, words in enumerate(lists[b]):
            i, j = divmod(index, spans[1])
            turns, items = words[0], words[1:]
            for word in items[turns * turn :]:
                assert word >> 30  # nothing but filling behind the end
            for word in items[: turns * turn]:
                if word >> 30:
                    continue
                query = (word & 0x3FFF) + i * rows // spans[0]
                key = (word >> 14 & 0x3FFF) + j * columns // spans[1]
                assert not seen[query, key]
                seen[query, key] = True
                firsts[query] += word >> 28 & 1
                assert (word >> 29 & 1) == (not all_visible[b, query, key])
        assert not (any_visible[b] & ~seen).any()
        np.testing.assert_array_equal(firsts, seen.any(axis=1))
        if sorted_:  # descending, so segments stand side by side
            np.testing.assert_array_equal(seen, any_visible[b])


def test_packed_texts_visit_only_their_own_tiles():
    segments = np.repeat(np.arange(1, 17), 512)[None].astype(np.int32)
    visit, full = map(np.asarray, tiles.compare(jnp.asarray(segments), jnp.asarray(segments), 512, 512))
    np.testing.assert_array_equal(visit[0], np.eye(16, dtype=bool))
    np.testing.assert_array_equal(full[0], np.eye(16, dtype=bool))


@pytest.mark.parametrize("kind", sorted(tiles._blocks()))
def test_sizes_of_every_device_are_consistent(kind):
    for sizes in tiles._blocks()[kind].values():
        sizes = tiles.Sizes(**sizes)
        assert sizes.query % sizes.chunk == sizes.chunk % tiles.LANES == sizes.key % sizes.part == 0
        assert sizes.queries % sizes.query == sizes.keys % sizes.key == 0
