"""Whole words to be told from the others: what masked language modelling learns from."""

import unicodedata
from typing import NamedTuple

import numpy as np

from jina_jax.tokenizer import UNK, TrainingTokenizer

# Pieces of a word at most: languages that write no blanks would have whole sentences as words.
LONGEST = 8
# Of the pieces to be told, those that <mask> stands for, and those that another piece does; the rest stay.
MASKED, REPLACED = 0.8, 0.1
START = "▁"


class Words(NamedTuple):
    """What tells words apart.

    Attributes:
        starts: Whether a piece begins a word, bool [V].
        scripts: Number of the script of a piece's first letter, int32 [V]; 0 for pieces without letters.
        mask_id: Id of `<mask>`, which is the last.
    """

    starts: np.ndarray
    scripts: np.ndarray
    mask_id: int


def words_of(tokenizer: TrainingTokenizer) -> Words:
    """The tables of a tokenizer.

    Args:
        tokenizer: The tokenizer.

    Returns:
        The tables.
    """
    numbers: dict[str, int] = {"": 0}
    pieces = tokenizer.pieces()
    scripts = [numbers.setdefault(_script(piece), len(numbers)) for piece in pieces]
    starts = np.array([piece.startswith(START) for piece in pieces])
    return Words(starts, np.array(scripts, np.int32), tokenizer.mask_id)


def _script(piece: str) -> str:
    """The script of the first letter: the first word of its name in Unicode, such as LATIN or HIRAGANA."""
    letter = next((char for char in piece if unicodedata.category(char) in ("Lu", "Ll", "Lt", "Lo")), None)
    return "" if letter is None else unicodedata.name(letter, "").partition(" ")[0].partition("-")[0]


def places(longest: int, rate: float) -> int:
    """How many tokens of a text are to be told at most.

    Args:
        longest: Tokens of a text at most.
        rate: As in `mask_words`.

    Returns:
        Size P.
    """
    return min(longest, max(LONGEST, int(rate * longest) + LONGEST // 2))


def mask_words(
    tokens: np.ndarray, lengths: np.ndarray, words: Words, rate: float, noise: np.ndarray
) -> dict[str, np.ndarray]:
    """Hide whole words.

    Words are hidden in random order while less than `rate` of the tokens between `<s>` and `</s>` are, one at least.
    A word is a piece with the mark of a beginning and those without that follow, up to eight; it ends where the script
    changes. Of the hidden tokens 80% become `<mask>`, 10% any other token, 10% stay.

    Args:
        tokens: int32 [B, T]; a text is `<s> content </s>`.
        lengths: int32 [B], tokens of each text.
        words: Tables of the tokenizer.
        rate: Share of the content to hide.
        noise: Uniform in [0, 1), float64 [3, B, T]: for the order of words, for what becomes of a token, and for the
            token that replaces it.

    Returns:
        "tokens" int32 [B, T] as the model sees them; and for the hidden tokens, in order, "positions" int32 [B, P],
        "targets" int32 [B, P] and "weights" float32 [B, P]: 1, or 0 where there are none left.
    """
    B, T = tokens.shape
    place = np.arange(T)
    content = (place > 0) & (place < lengths[:, None] - 1)
    number = _number_words(tokens, content, words)

    # Words in random order, by the noise of their first piece.
    row = np.arange(B)[:, None]
    sizes = np.zeros((B, T + 1), np.int64)
    np.add.at(sizes, (row, np.where(content, number, T)), 1)
    sizes = sizes[:, :T]
    order = np.argsort(np.where(sizes > 0, noise[0], 2.0), axis=1, kind="stable")
    ordered = np.take_along_axis(sizes, order, axis=1)
    before = np.cumsum(ordered, axis=1) - ordered
    # The last word counts if most of it is within the share: then the share is right on average.
    chosen = (ordered > 0) & ((before + ordered / 2 <= rate * content.sum(1, keepdims=True)) | (place == 0))
    hidden_words = np.zeros((B, T), bool)
    np.put_along_axis(hidden_words, order, chosen, axis=1)
    hidden = content & np.take_along_axis(hidden_words, np.where(content, number, 0), axis=1)

    other = (UNK + 1 + noise[2] * (words.mask_id - UNK - 1)).astype(np.int32)
    seen = np.where(noise[1] < MASKED, np.int32(words.mask_id), other)
    seen = np.where(hidden & (noise[1] < MASKED + REPLACED), seen, tokens)

    P = places(T, rate)
    first = np.argsort(~hidden, axis=1, kind="stable")[:, :P]
    there = np.take_along_axis(hidden, first, axis=1)
    return {
        "tokens": seen.astype(np.int32),
        "positions": np.where(there, first, 0).astype(np.int32),
        "targets": np.where(there, np.take_along_axis(tokens, first, axis=1), 0).astype(np.int32),
        "weights": there.astype(np.float32),
    }


def _number_words(tokens: np.ndarray, content: np.ndarray, words: Words) -> np.ndarray:
    """For each token the number of its word in the text, int64 [B, T], for content from 0."""
    place = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    scripts = np.where(content, words.scripts[tokens], 0)
    # Digits and punctuation have no script of their own: they go on with that of the letters before.
    last = np.maximum.accumulate(np.where(scripts > 0, place, 0), axis=1)
    current = np.take_along_axis(scripts, last, axis=1)
    earlier = np.pad(current[:, :-1], ((0, 0), (1, 0)))
    change = (scripts > 0) & (earlier > 0) & (scripts != earlier)
    special = ~content | (tokens <= UNK) | (tokens == words.mask_id)
    begins = words.starts[tokens] | change | special | np.pad(special[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    since = place - np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    begins = content & (begins | (since % LONGEST == 0))
    return np.cumsum(begins, axis=1) - 1
