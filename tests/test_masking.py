"""Whole words are hidden, as many as asked for, and what is hidden can be told from what is given."""

import numpy as np
import pytest

from jina_jax import hub
from jina_jax.tokenizer import EOS, UNK, load_tokenizer
from jina_jax.train import masking
from jina_jax.train.masking import mask_words, places, words_of

TEXTS = [
    "Unbelievable circumstances, extraordinarily internationalization!",
    "今日は東京へ行きます。明日も天気がいいでしょう、きっと。",
    "ภาษาไทยไม่มีการเว้นวรรคระหว่างคำ",
    "Привет, мир! Hello, world! 2024年",
    "a",
    "",
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(hub.find("mini"))


@pytest.fixture(scope="module")
def words(tokenizer):
    return words_of(tokenizer)


@pytest.fixture(scope="module")
def batch(tokenizer):
    return fill(tokenizer, TEXTS)


def fill(tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    ids = [one.ids for one in tokenizer.encode_batch(texts)]
    lengths = np.array([len(one) for one in ids], np.int32)
    tokens = np.full((len(ids), lengths.max()), tokenizer.pad_id, np.int32)
    tokens[np.arange(tokens.shape[1]) < lengths[:, None]] = np.concatenate(ids)
    return tokens, lengths


def noise(tokens: np.ndarray, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((3, *tokens.shape))


def in_words(tokenizer, words, text: str) -> list[str]:
    """The text with a bar between its words."""
    tokens, lengths = fill(tokenizer, [text])
    place = np.arange(tokens.shape[1])
    content = (place > 0) & (place < lengths[:, None] - 1)
    numbers = masking._number_words(tokens, content, words)[0][content[0]]
    pieces = tokenizer.pieces()
    found = [""] * (numbers.max(initial=-1) + 1)
    for number, token in zip(numbers, tokens[0][content[0]], strict=True):
        found[number] += pieces[token]
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("internationalization matters", ["▁internationalization", "▁matters"]),
        ("don't stop, it's", ["▁don't", "▁stop,", "▁it's"]),
        ("мирworld", ["▁мир", "world"]),
        ("東京タワーへ", ["▁東京", "タワー", "へ"]),
        ("", []),
    ],
)
def test_words_are_pieces_that_belong_together(tokenizer, words, text, expected):
    assert in_words(tokenizer, words, text) == expected


def test_words_are_not_longer_than_eight_pieces(tokenizer, words):
    text = "的一是不在人有我他这中大来上国个到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后"
    found = in_words(tokenizer, words, text)
    assert "".join(found) == "▁" + text
    count = len(tokenizer.encode(text).ids) - 2
    assert len(found) == -(-count // 8) > 3


def test_specials_are_words_of_their_own(tokenizer, words):
    found = in_words(tokenizer, words, "one<mask>two <unk>x")
    assert "<mask>" in found
    assert "<unk>" in found


def test_both_kinds_of_tokenizer_know_their_pieces(tokenizer):
    pieces = tokenizer.pieces()
    assert len(pieces) == tokenizer.vocab_size
    assert pieces[:4] == ["<s>", "<pad>", "</s>", "<unk>"]
    assert pieces[tokenizer.mask_id] == "<mask>"
    assert "".join(pieces[i] for i in tokenizer.encode("Hello world").ids[1:-1]) == "▁Hello▁world"
    assert tokenizer.fingerprint() == load_tokenizer(hub.find("mini")).fingerprint()


def test_whole_words_are_hidden_or_shown(batch, words):
    tokens, lengths = batch
    place = np.arange(tokens.shape[1])
    content = (place > 0) & (place < lengths[:, None] - 1)
    numbers = masking._number_words(tokens, content, words)
    for seed in range(20):
        found = mask_words(tokens, lengths, words, 0.3, noise(tokens, seed))
        hidden = np.zeros(tokens.shape, bool)
        row, column = np.nonzero(found["weights"])
        hidden[row, found["positions"][row, column]] = True
        assert not np.any(hidden & ~content)
        for r in range(len(tokens)):
            for number in np.unique(numbers[r][content[r]]):
                assert len(set(hidden[r][content[r] & (numbers[r] == number)].tolist())) == 1
        assert np.array_equal(found["tokens"][~hidden], tokens[~hidden])


def test_targets_are_the_tokens_that_were_there(batch, words):
    tokens, lengths = batch
    found = mask_words(tokens, lengths, words, 0.3, noise(tokens))
    row, column = np.nonzero(found["weights"])
    at = found["positions"][row, column]
    assert np.array_equal(found["targets"][row, column], tokens[row, at])
    for r in range(len(tokens)):
        there = found["positions"][r][found["weights"][r] > 0]
        assert np.all(np.diff(there) > 0)
    none = found["weights"] == 0
    assert not found["targets"][none].any()
    assert not found["positions"][none].any()
    assert {name: array.dtype for name, array in found.items()} == {
        "tokens": np.int32,
        "positions": np.int32,
        "targets": np.int32,
        "weights": np.float32,
    }
    assert found["positions"].shape[1] == places(tokens.shape[1], 0.3)


def test_a_text_has_one_word_hidden_at_least_and_the_empty_text_none(batch, words):
    tokens, lengths = batch
    for seed in range(10):
        weights = mask_words(tokens, lengths, words, 0.01, noise(tokens, seed))["weights"]
        assert np.all(weights[:-1].sum(1) >= 1)
        assert weights[-1].sum() == 0
        assert np.all(weights.sum(1) <= masking.LONGEST)


@pytest.mark.parametrize("rate", [0.15, 0.3])
def test_shares_are_those_asked_for(tokenizer, words, rate):
    """40 rows of 500 tokens: 6,000 of 20,000 are hidden, with a deviation below 100 by words that do not fit."""
    rng = np.random.default_rng(0)
    vocabulary = [piece for piece in tokenizer.pieces() if piece.isalpha() or piece.startswith("▁")][500:20_000]
    texts = ["".join(rng.choice(vocabulary, 900)).replace("▁", " ") for _ in range(40)]
    tokens, lengths = fill(tokenizer, texts)
    tokens, lengths = tokens[:, :500].copy(), np.minimum(lengths, 500)
    tokens[:, -1] = np.where(lengths == 500, EOS, tokens[:, -1])
    found = mask_words(tokens, lengths, words, rate, noise(tokens))
    count = found["weights"].sum()
    assert abs(count / (lengths - 2).sum() - rate) < 0.005
    row, column = np.nonzero(found["weights"])
    at = found["positions"][row, column]
    seen, true = found["tokens"][row, at], tokens[row, at]
    # Four standard deviations of a share in 3,000 tokens.
    assert abs((seen == words.mask_id).mean() - 0.8) < 0.03
    assert abs((seen == true).mean() - 0.1) < 0.025
    others = seen[(seen != words.mask_id) & (seen != true)]
    assert others.min() > UNK
    assert others.max() < words.mask_id
    assert len(np.unique(others)) > 0.9 * len(others)


def test_places_are_enough_for_any_text(tokenizer, words):
    rng = np.random.default_rng(1)
    for T in (4, 9, 16, 33, 64):
        tokens = rng.integers(4, tokenizer.vocab_size - 1, (200, T)).astype(np.int32)
        lengths = rng.integers(2, T + 1, 200).astype(np.int32)
        for rate in (0.05, 0.3, 0.9):
            found = mask_words(tokens, lengths, words, rate, noise(tokens))
            hidden = (found["tokens"] != tokens).sum(1)
            assert found["positions"].shape == (200, places(T, rate))
            assert np.all(hidden <= found["weights"].sum(1))
