from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jina_jax import chunking
from jina_jax.tokenizer import Tokens

TEXT = st.text(st.sampled_from("ab .!?…\n。！」\"') 12é"), max_size=60)


class Characters:
    """A tokenizer whose tokens are characters, blanks excepted."""

    vocab_size, pad_id = 2**16, 1

    def encode(self, text, max_tokens=None):
        places = [i for i, char in enumerate(text) if not char.isspace()]
        ids = np.array([0, *(ord(text[i]) + 4 for i in places), 2], np.int32)
        spans = np.array([(0, 0), *((i, i + 1) for i in places), (0, 0)], np.int32)
        if max_tokens is not None and len(ids) > max_tokens:
            keep = [*range(max_tokens - 1), -1]
            return Tokens(ids[keep], spans[keep], len(ids))
        return Tokens(ids, spans, len(ids))

    def encode_batch(self, texts, max_tokens=None, *, offsets=True):
        return [self.encode(text, max_tokens) for text in texts]


# ---- Chunkers --------------------------------------------------------------------------------------------------


@given(text=TEXT, count=st.integers(1, 4))
def test_sentences_cover_the_text_in_order(text, count):
    spans = chunking.sentences(text, count)
    assert "".join(text[start:stop] for start, stop in spans).split() == text.split()
    assert all(before[1] <= after[0] for before, after in pairwise(spans))
    assert all(text[start:stop].strip() for start, stop in spans)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three?", ["One. ", "Two! ", "Three?"]),
        ('He said "No." Then he left.', ['He said "No." ', "Then he left."]),
        ("It costs 3.50 today. Yes.", ["It costs 3.50 today. ", "Yes."]),
        ("一つ目。二つ目！「三つ目。」終わり", ["一つ目。", "二つ目！", "「三つ目。」", "終わり"]),
        ("क्या हुआ? कुछ नहीं। ठीक है।", ["क्या हुआ? ", "कुछ नहीं। ", "ठीक है।"]),
        ("A heading\n\nA paragraph.", ["A heading\n\n", "A paragraph."]),
        ("no end", ["no end"]),
        ("Wait... What?!  Yes.\n", ["Wait... ", "What?!  ", "Yes.\n"]),
        ("", []),
        ("  \n ", []),
    ],
)
def test_sentences(text, expected):
    assert [text[start:stop] for start, stop in chunking.sentences(text)] == expected


def test_several_sentences_in_a_chunk():
    text = "One. Two. Three. Four. Five."
    found = [text[start:stop] for start, stop in chunking.sentences(text, 2)]
    assert found == ["One. Two. ", "Three. Four. ", "Five."]


@given(text=TEXT, size=st.integers(1, 9))
def test_fixed_tokens_cover_the_text_with_so_many_each(text, size):
    spans, tokenizer = chunking.fixed_tokens(text, Characters(), size), Characters()
    counts = [len(tokenizer.encode(text[start:stop]).ids) - 2 for start, stop in spans]
    assert "".join(text[start:stop] for start, stop in spans).split() == text.split()
    assert all(count == size for count in counts[:-1])
    assert all(1 <= count <= size for count in counts[-1:])


@pytest.mark.parametrize("chunk", [chunking.sentences, lambda text, n: chunking.fixed_tokens(text, Characters(), n)])
def test_chunks_of_nothing_are_refused(chunk):
    with pytest.raises(ValueError, match="must be at least 1"):
        chunk("text", 0)


def test_joined_chunks_stand_where_they_should():
    text, spans = chunking.join(["one", "", "two three"])
    assert text == "one  two three"
    assert [text[start:stop] for start, stop in spans] == ["one", "", "two three"]
    assert chunking.join([]) == ("", [])


def test_chunks_are_found_in_order():
    text = "the cat and the dog and the cat"
    assert chunking.locate(text, ["the cat", "the", "and the cat"]) == [(0, 7), (12, 15), (20, 31)]
    assert chunking.locate(text, ["the cat and", "cat and the"]) == [(0, 11), (4, 15)]
    with pytest.raises(ValueError, match="chunk 1 does not stand in the document after chunk 0: 'the cat and'"):
        chunking.locate(text, ["the dog", "the cat and"])


# ---- Documents -------------------------------------------------------------------------------------------------


def read(document, chunker=None):
    text, spans = chunking.read_document(document, chunker, Characters())
    return text, spans.tolist()


def test_documents_in_every_form():
    text = "One. Two."
    assert read((text, [(0, 4), (5, 9)])) == (text, [[0, 4], [5, 9]])
    assert read((text, np.array([[0, 4]]))) == (text, [[0, 4]])
    assert read((text, ["One.", "Two."])) == (text, [[0, 4], [5, 9]])
    assert read((None, ["One.", "Two."])) == (text, [[0, 4], [5, 9]])
    assert read(text, "sentences") == (text, [[0, 5], [5, 9]])
    assert read(text, 3) == (text, [[0, 3], [3, 7], [7, 9]])
    assert read(text, lambda text: [(1, 2)]) == (text, [[1, 2]])
    assert read((text, [])) == (text, [])


@pytest.mark.parametrize(
    ("document", "chunker", "message"),
    [
        ("text", None, "needs chunks"),
        ((None, None), "sentences", "needs chunks"),
        (("text", [(0, 1)]), "sentences", "not both"),
        ("text", "paragraphs", "must be 'sentences', a number of tokens or a function"),
        (("text", [(0, 5)]), None, r"span 0 is \(0, 5\), but the document has 4 characters"),
        (("text", [(0, 1), (-1, 2)]), None, "span 1"),
        (("text", [(3, 1)]), None, "span 0"),
        (("text", np.array([[0, 1, 2]])), None, "pairs of character positions"),
        (("text", np.array([[0.5, 1.0]])), None, "pairs of character positions"),
    ],
)
def test_what_is_wrong_with_a_document_is_said(document, chunker, message):
    with pytest.raises(ValueError, match=message):
        read(document, chunker)


# ---- Tokens ----------------------------------------------------------------------------------------------------


@given(text=TEXT.filter(str.strip), data=st.data())
def test_every_token_is_in_the_chunk_of_its_last_character(text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    spans = np.array(list(zip([0, *cuts], [*cuts, len(text)], strict=True)))
    tokens = Characters().encode("Q:" + text)
    ranges = chunking.token_ranges(tokens, spans, 2, pool_specials=False)
    for (start, stop), (first, after) in zip(spans, ranges, strict=True):
        ends = tokens.offsets[first:after, 1] - 2
        assert ((start < ends) & (ends <= stop)).all()
    assert (ranges[:, 1] - ranges[:, 0]).sum() == len(tokens.ids) - 4
    whole = chunking.token_ranges(tokens, np.array([[0, len(text)]]), 2, pool_specials=True)
    assert whole.tolist() == [[0, len(tokens.ids)]]


def test_the_first_chunk_takes_the_prompt_and_the_last_the_end():
    tokens, spans = Characters().encode("Q:abcdef"), np.array([[0, 2], [2, 4], [4, 6]])
    assert chunking.token_ranges(tokens, spans, 2, True).tolist() == [[0, 5], [5, 7], [7, 10]]
    assert chunking.token_ranges(tokens, spans, 2, False).tolist() == [[3, 5], [5, 7], [7, 9]]


def test_status_of_chunks():
    spans = np.array([[0, 2], [2, 2], [2, 6], [6, 8]])
    tokens = Characters().encode("Q:abcdefgh", 8)
    ranges = chunking.token_ranges(tokens, spans, 2, True)
    assert ranges.tolist() == [[0, 5], [5, 5], [5, 7], [7, 7]]
    assert chunking.statuses(tokens, spans, ranges, 2) == ("whole", "empty", "cut", "truncated")
    whole = Characters().encode("Q:abcdefgh")
    ranges = chunking.token_ranges(whole, spans, 2, True)
    assert chunking.statuses(whole, spans, ranges, 2) == ("whole", "empty", "whole", "whole")


# ---- Windows ---------------------------------------------------------------------------------------------------


@given(length=st.integers(1, 500), size=st.integers(1, 100), overlap=st.integers(0, 99))
def test_every_token_is_taken_once_with_enough_before_it(length, size, overlap):
    if overlap >= size:
        with pytest.raises(ValueError, match="less than the window"):
            chunking.windows(length, size, overlap)
        return
    found = chunking.windows(length, size, overlap)
    assert [i for window in found for i in range(window.first, window.stop)] == list(range(length))
    for window in found[1:]:
        assert window.first - window.start == overlap
        assert window.stop - window.start <= size
    assert len(found) == 1 + max(0, -(-(length - size) // (size - overlap)))
