"""What is held out, and the check that nothing of it is in the training texts."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable

GRAM = 8  # tokens in a row that two different texts are not expected to share
_TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff\u0e00-\u0eff]|[^\W_]+")
# Debian packs every campaign of Wesnoth by itself: these four hold about a tenth of its text.
SHARES = {"help": 0.1, "gnome": 0.2, "wordnet": 0.1, "vader": 0.2, "spam": 0.2}  # of the documents of a source
HELD_OUT_CAMPAIGNS = ("wesnoth-sof", "wesnoth-thot", "wesnoth-tb", "wesnoth-l")


def number(*key: object) -> float:
    """A number of [0, 1) that a key always has, unlike any random one: the same on any machine and in any order."""
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:7]) / 2**56


def held_out(source: str, document: str) -> bool:
    """Whether a document is for testing, in all its languages."""
    if source == "wesnoth":
        return document in HELD_OUT_CAMPAIGNS
    return number("held out", source, document) < SHARES.get(source, 0)


def tokens(text: str) -> list[str]:
    """Words after NFKC and casefold, without punctuation; every character of scripts that have no spaces."""
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())


def grams(text: str) -> set[int]:
    """Hashes of all runs of `GRAM` tokens, or of the whole of a shorter text."""
    words = tokens(text)
    if len(words) < GRAM:
        return {hash((len(words), *words))} if words else set()
    return {hash(tuple(words[at : at + GRAM])) for at in range(len(words) - GRAM + 1)}


class Held:
    """The runs of tokens of all test texts."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self.grams: set[int] = set()
        self.add(texts)

    def add(self, texts: Iterable[str]) -> None:
        """Adds test texts."""
        for text in texts:
            self.grams |= grams(text)

    def leaks(self, text: str) -> bool:
        """Whether a training text shares a run with a test text, or is the same short text."""
        return not self.grams.isdisjoint(grams(text))
