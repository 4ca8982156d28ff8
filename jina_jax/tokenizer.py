"""Text to token ids with character offsets: the XLM-RoBERTa vocabulary of jina-embeddings-v3.

A `tokenizer.json` is executed by `tokenizers` and is exact: ids and offsets are those of the reference. A
SentencePiece `.model` is executed by `sentencepiece` and differs in rare strings (`SentencePieceTokenizer`
says which). Both give the same `Tokens`, so callers need not know which one runs.

Every text becomes `<s> content </s>`; ids 0 to 3 are `<s>`, `<pad>`, `</s>`, `<unk>`, and the last id is
`<mask>`. These strings are recognised in the text itself, as the reference does. Truncation keeps `<s>`, the
first content tokens and `</s>`. A lone surrogate, which no UTF-8 text can hold, is read as U+FFFD (a blank
to this vocabulary): one character for one, so that offsets still count characters of the text given.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

BOS, PAD, EOS, UNK = range(4)
SPM_NAME = "sentencepiece.bpe.model"

_SURROGATE = re.compile("[\ud800-\udfff]")
_ADDED = re.compile("<(?:s|pad|/s|unk|mask)>")
# Unicode White_Space. `str.isspace` would add U+001C to U+001F.
_BLANKS = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
_SPECIAL_SPAN = np.zeros((1, 2), np.int32)
_NO_SPANS = np.zeros((0, 2), np.int32)


@dataclass(frozen=True, eq=False)
class Tokens:
    """One tokenised text, `<s>` and `</s>` included.

    Attributes:
        ids: int32 [T], after truncation.
        offsets: int32 [T, 2], first character and the one after the last, counted in the text given. The
            enclosing `<s>` and `</s>` have (0, 0). [0, 2] where offsets were not asked for.
        full_length: tokens before truncation, so that a caller can tell and bill what was cut.
    """

    ids: np.ndarray
    offsets: np.ndarray
    full_length: int

    @property
    def truncated(self) -> bool:
        """Whether truncation removed tokens."""
        return len(self.ids) < self.full_length


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the package needs of a tokenizer; instances may be shared by threads."""

    vocab_size: int
    pad_id: int

    def encode(self, text: str, max_tokens: int | None = None) -> Tokens:
        """Tokenise one text.

        Args:
            text: any string; the empty one gives `<s> </s>`.
            max_tokens: keep at most this many tokens, `<s>` and `</s>` included; None keeps all.

        Raises:
            TypeError: `text` is not a string.
            ValueError: `max_tokens` is below 2.
        """

    def encode_batch(
        self, texts: Sequence[str], max_tokens: int | None = None, *, offsets: bool = True
    ) -> list[Tokens]:
        """Tokenise many texts; each result equals that of `encode`.

        Args:
            texts: strings; may be empty.
            max_tokens: as in `encode`, for each text.
            offsets: False leaves `Tokens.offsets` empty, which saves a quarter to a half of the time.

        Raises:
            TypeError: an item is not a string (the message has its index), or `texts` is a string itself.
            ValueError: `max_tokens` is below 2.
        """


@runtime_checkable
class TrainingTokenizer(Tokenizer, Protocol):
    """What training needs besides: words to mask, and to know that it is still the same one."""

    mask_id: int

    def pieces(self) -> list[str]:
        """The string of each id; "▁" at its front marks the beginning of a word."""

    def fingerprint(self) -> str:
        """A hash of all that its results depend on: the same in every process and on every machine."""


def load_tokenizer(path: str | Path) -> TrainingTokenizer:
    """Load the tokenizer of a checkpoint.

    Args:
        path: a directory, or a `*.json` or `*.model` file. Of a directory, its `tokenizer.json`, being exact;
            else `sentencepiece.bpe.model`; else its only `*.model`.

    Returns:
        The tokenizer.

    Raises:
        FileNotFoundError: nothing of that name, or no tokenizer in the directory.
        ValueError: the file is broken, of another kind or family, or the choice is ambiguous.
    """
    path = Path(path)
    file = _find(path) if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no tokenizer at {file}: there is no such file or directory; check the path")
    if file.suffix == ".json":
        return JsonTokenizer(file)
    if file.suffix == ".model":
        return SentencePieceTokenizer(file)
    raise ValueError(f"{file} is neither tokenizer.json nor a SentencePiece .model; pass one, or its folder")


class JsonTokenizer:
    """A `tokenizer.json`, executed by `tokenizers`: exact. See `Tokenizer` for the methods."""

    def __init__(self, file: str | Path) -> None:
        import tokenizers

        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # `tokenizers` raises bare Exception
            raise ValueError(f"{file} is not a readable tokenizer.json ({error}); fetch it again") from error
        # The file may set these for all callers at once; here each call truncates, and its caller pads.
        backend.no_truncation()
        backend.no_padding()
        found = backend.encode("").ids, backend.token_to_id("<pad>"), backend.token_to_id("<unk>")
        if found != ([BOS, EOS], PAD, UNK):
            raise ValueError(
                f"{file} is a tokenizer of another family: the empty text, <pad> and <unk> give {found}, "
                f"XLM-RoBERTa's give {([BOS, EOS], PAD, UNK)}; use the tokenizer.json of jina-embeddings-v3"
            )
        self._backend = backend
        self.vocab_size: int = backend.get_vocab_size()
        self.pad_id = PAD
        self.mask_id = self.vocab_size - 1

    def pieces(self) -> list[str]:
        """The string of each id; see `TrainingTokenizer.pieces`."""
        return [self._backend.id_to_token(index) or "" for index in range(self.vocab_size)]

    def fingerprint(self) -> str:
        """A hash; see `TrainingTokenizer.fingerprint`."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def encode(self, text: str, max_tokens: int | None = None) -> Tokens:
        """Tokenise one text; see `Tokenizer.encode`."""
        _check_max(max_tokens)
        return _from_encoding(self._backend.encode(_clean(text, "text")), max_tokens, offsets=True)

    def encode_batch(
        self, texts: Sequence[str], max_tokens: int | None = None, *, offsets: bool = True
    ) -> list[Tokens]:
        """Tokenise many texts on all cores; see `Tokenizer.encode_batch`."""
        _check_max(max_tokens)
        run = self._backend.encode_batch if offsets else self._backend.encode_batch_fast
        return [_from_encoding(encoding, max_tokens, offsets) for encoding in run(_clean_batch(texts))]


class SentencePieceTokenizer:
    """A SentencePiece `.model`, executed by `sentencepiece`. See `Tokenizer` for the methods.

    Ids are shifted to fairseq's order, in which the model was trained: piece i has id i + 1, the unknown
    piece id 3. It takes a fifth of the memory that `tokenizers` does.

    Not exact, and cannot be: `sentencepiece` adds scores in float32, so that it breaks near-ties between
    segmentations in other places (runs of one character, mostly); it normalises the longest match where
    `tokenizers` normalises grapheme clusters (combining marks, decomposed kana and Hangul); and a fullwidth
    `<s>` stays text, while the reference turns it into the special token.
    """

    def __init__(self, file: str | Path) -> None:
        import sentencepiece

        try:
            backend = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{file} is not a SentencePiece model ({error}); fetch it again") from error
        found = backend.unk_id(), backend.bos_id(), backend.eos_id()
        if found != (0, 1, 2):
            raise ValueError(
                f"{file} is a SentencePiece model of another family: <unk>, <s> and </s> are {found}, "
                f"XLM-RoBERTa's are (0, 1, 2); use the {SPM_NAME} of jina-embeddings-v3"
            )
        self._backend = backend
        self.vocab_size: int = backend.get_piece_size() + 2  # fairseq adds <pad> and <mask>
        self.pad_id, self.mask_id = PAD, self.vocab_size - 1
        added = {"<s>": BOS, "<pad>": PAD, "</s>": EOS, "<unk>": UNK, "<mask>": self.mask_id}
        self._added = {token: np.array([index], np.int32) for token, index in added.items()}

    def pieces(self) -> list[str]:
        """The string of each id; see `TrainingTokenizer.pieces`."""
        of = {int(index[0]): token for token, index in self._added.items()}
        return [of.get(index) or self._backend.id_to_piece(index - 1) for index in range(self.vocab_size)]

    def fingerprint(self) -> str:
        """A hash; see `TrainingTokenizer.fingerprint`."""
        return hashlib.sha256(self._backend.serialized_model_proto()).hexdigest()

    def encode(self, text: str, max_tokens: int | None = None) -> Tokens:
        """Tokenise one text; see `Tokenizer.encode`."""
        _check_max(max_tokens)
        return self._encode(_clean(text, "text"), max_tokens, offsets=True)

    def encode_batch(
        self, texts: Sequence[str], max_tokens: int | None = None, *, offsets: bool = True
    ) -> list[Tokens]:
        """Tokenise many texts, one after the other; see `Tokenizer.encode_batch`."""
        _check_max(max_tokens)
        return [self._encode(text, max_tokens, offsets) for text in _clean_batch(texts)]

    def _encode(self, text: str, max_tokens: int | None, offsets: bool) -> Tokens:
        """Split at the added tokens, tokenise what lies between, join."""
        text = text.replace("\x85", " ")  # a blank in the reference; sentencepiece's map has no rule for it
        parts, done = [(np.array([BOS], np.int32), _SPECIAL_SPAN)], 0
        for match in _ADDED.finditer(text):
            between, end = text[done : match.start()], match.end()
            if match.group() == "<mask>":  # takes the blanks to its left
                between = between.rstrip(_BLANKS)
            span = np.array([[done + len(between), end]], np.int32)
            parts += [self._segment(between, done, offsets), (self._added[match.group()], span)]
            done = end
        parts += [self._segment(text[done:], done, offsets), (np.array([EOS], np.int32), _SPECIAL_SPAN)]
        ids, spans = map(np.concatenate, zip(*parts, strict=True))
        return _cut(ids, spans if offsets else _NO_SPANS, max_tokens)

    def _segment(self, text: str, start: int, offsets: bool) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 [P] and spans int32 [P, 2], counted from `start`, of text without added tokens."""
        if not offsets:
            return _fairseq(self._backend.encode(text)), _NO_SPANS
        pieces = self._backend.encode(text, out_type=str)
        if not pieces:
            return _fairseq([]), _NO_SPANS
        spans = _piece_spans(pieces, *self._backend.normalize(text, with_offsets=True))
        return _fairseq(self._backend.piece_to_id(pieces)), spans + np.int32(start)


def _piece_spans(pieces: list[str], normalized: str, sources: list[int]) -> np.ndarray:
    """Character spans of SentencePiece pieces in the text, by the convention of `tokenizers`.

    Args:
        pieces: P strings that join to `normalized`.
        normalized: N characters.
        sources: N + 1 integers: for each, where what it came from begins in the text; then where all ends.

    Returns:
        int32 [P, 2]. The word mark at the front of a piece has no span of its own; one that is a piece by
        itself has that of the word's first character. Characters that came from one have its span each.
    """
    source = np.asarray(sources, np.int32)
    ends = np.cumsum(np.fromiter(map(len, pieces), np.int64, len(pieces)))
    starts = np.append(0, ends[:-1])
    marked = np.fromiter((piece[0] == "▁" for piece in pieces), bool, len(pieces))
    first = starts + marked
    last = np.maximum(ends - 1, first)
    after = np.searchsorted(source, source[last], side="right")
    return np.stack([source[first], source[after]], axis=1)


def _fairseq(pieces: list[int]) -> np.ndarray:
    """SentencePiece ids to model ids, int32 [P]."""
    ids = np.array(pieces, np.int32) + 1
    return np.where(ids == 1, np.int32(UNK), ids)


def _from_encoding(encoding: Any, max_tokens: int | None, offsets: bool) -> Tokens:
    """An `Encoding` of `tokenizers` to `Tokens`."""
    spans = np.fromiter(chain.from_iterable(encoding.offsets if offsets else ()), np.int32).reshape(-1, 2)
    return _cut(np.array(encoding.ids, np.int32), spans, max_tokens)


def _cut(ids: np.ndarray, offsets: np.ndarray, max_tokens: int | None) -> Tokens:
    """Truncate to `max_tokens`, the final `</s>` kept."""
    total = len(ids)
    if max_tokens is not None and total > max_tokens:
        ids = np.append(ids[: max_tokens - 1], ids[-1:])
        if len(offsets):
            offsets = np.append(offsets[: max_tokens - 1], offsets[-1:], axis=0)
    return Tokens(ids, offsets, total)


def _check_max(max_tokens: int | None) -> None:
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"{max_tokens=} must be at least 2, the room that <s> and </s> take")


def _clean(text: str, name: str) -> str:
    """Check one text and replace its lone surrogates."""
    if not isinstance(text, str):
        raise TypeError(f"{name} is {type(text).__name__}, must be str; decode or convert it first")
    return _SURROGATE.sub("\ufffd", text)


def _clean_batch(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        raise TypeError("texts is one str, must be a sequence of them; use encode, or [text]")
    return [_clean(text, f"texts[{index}]") for index, text in enumerate(texts)]


def _find(folder: Path) -> Path:
    """The tokenizer file of a checkpoint folder."""
    for name in ("tokenizer.json", SPM_NAME):
        if (folder / name).is_file():
            return folder / name
    models = sorted(folder.glob("*.model"))
    if len(models) > 1:
        names = ", ".join(file.name for file in models)
        raise ValueError(f"several SentencePiece models in {folder} ({names}); pass the path of one of them")
    if not models:
        raise FileNotFoundError(
            f"no tokenizer in {folder}: looked for tokenizer.json, {SPM_NAME}, *.model; "
            "copy the tokenizer.json of the checkpoint there"
        )
    return models[0]
