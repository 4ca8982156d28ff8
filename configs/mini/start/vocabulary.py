"""A smaller vocabulary: the pieces of XLM-R's tokenizer that our languages need, in a `tokenizer.json` like it."""

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

SPECIAL = 4  # <s>, <pad>, </s> and <unk> come first, <mask> last
STEPS = (4.0, 2.0, 1.4, 1.0)  # the cut is made in several, as multiples of the size: what is left is counted anew
EVEN = 0.3  # power of a language's number of pieces that its weight is: 0 would give all the same
GENERAL = 1.0  # weight of XLM-R's own frequencies, which are of the web, beside those of our texts
SINGLE = 8.0  # a character that is missing is lost, while a longer piece that is missing is only cut
META = "▁"  # begins words


def choose(full: Mapping[str, Any], texts: Mapping[str, Sequence[str]], size: int) -> dict[str, Any]:
    """Cut a tokenizer to the pieces that texts need most.

    Args:
        full: Content of a `tokenizer.json` of XLM-R's kind.
        texts: Texts of each language.
        size: Pieces to keep, special ones included.

    Returns:
        The content of the smaller one; see `cut`.
    """
    found = dict(full)
    for step in STEPS:
        pieces = found["model"]["vocab"]
        if len(pieces) > size * step:
            kept = np.argsort(-worth(found, texts), kind="stable")[: int(size * step)]
            found = cut(found, np.sort(kept))
    return found


def worth(content: Mapping[str, Any], texts: Mapping[str, Sequence[str]]) -> np.ndarray:
    """How much each piece of a tokenizer is needed.

    Args:
        content: The tokenizer.
        texts: Texts of each language.

    Returns:
        Float64 [V]: the share of the pieces that it is, over languages and the web at large; infinite for special ones.
    """
    vocabulary = content["model"]["vocab"]
    by_language = counts(content, texts)
    totals = by_language.sum(axis=1, keepdims=True)
    weights = totals**EVEN / (totals**EVEN).sum()
    own = (weights * by_language / np.maximum(totals, 1)).sum(axis=0)
    single = np.array([len(piece.lstrip(META)) <= 1 for piece, _ in vocabulary])
    general = np.exp([score for _, score in vocabulary]) * (single | (own > 0))
    found = (own + GENERAL * general) * np.where(single, SINGLE, 1.0)
    found[[*range(SPECIAL), len(vocabulary) - 1]] = np.inf
    return found


def counts(content: Mapping[str, Any], texts: Mapping[str, Sequence[str]]) -> np.ndarray:
    """How often each piece occurs in each language.

    Args:
        content: The tokenizer.
        texts: Texts of each language.

    Returns:
        Float64 [languages, V], in the order of `texts`.
    """
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    size = tokenizer.get_vocab_size()
    rows = []
    for part in texts.values():
        encoded = tokenizer.encode_batch_fast(list(part), add_special_tokens=False)
        rows.append(np.bincount([index for one in encoded for index in one.ids], minlength=size))
    return np.array(rows, np.float64)


def cut(content: Mapping[str, Any], ids: Sequence[int] | np.ndarray) -> dict[str, Any]:
    """A tokenizer with some of the pieces.

    Args:
        content: The tokenizer.
        ids: The pieces to keep, in rising order: `SPECIAL` ones and the last, <mask>, among them.

    Returns:
        The content of the smaller one, whose piece i is piece `ids[i]` of the larger one, with its score.
    """
    found = {key: value if key == "normalizer" else copy.copy(value) for key, value in content.items()}
    vocabulary = content["model"]["vocab"]
    found["model"] = content["model"] | {"vocab": [vocabulary[index] for index in ids]}
    place = {int(index): at for at, index in enumerate(ids)}
    found["added_tokens"] = [token | {"id": place[token["id"]]} for token in content["added_tokens"]]
    return found


def rows(smaller: Mapping[str, Any], full: Mapping[str, Any]) -> np.ndarray:
    """Where the pieces of a smaller tokenizer are in the full one, [v]."""
    place = {piece: index for index, (piece, _) in enumerate(full["model"]["vocab"])}
    return np.array([place[piece] for piece, _ in smaller["model"]["vocab"]])
