"""Where a document is cut, and which of its tokens each chunk takes: the bookkeeping of late chunking.

Late chunking (Günther et al., 2024) runs the model over the whole document and takes the mean of each chunk's token
vectors, so that every chunk has seen its context. Here are the numbers only; `Embedder.encode_chunks` runs the model.
"""

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from jina_jax.batching import Text, row_places
from jina_jax.tokenizer import Tokenizer, Tokens

# Characters of a text, from the first to the one after the last.
Span = tuple[int, int]
Chunker = Callable[[str], Sequence[Span]] | str | int
# Chunks as they may be given.
Given = Sequence[str] | Sequence[Span] | np.ndarray

# Ends of sentences: full stops of many scripts, with closing quotes and brackets, before a blank or the end. Those of
# Chinese and Japanese need no blank after them.
_SENTENCE_END = re.compile(r"""(?:[.!?…؟۔।॥։።။]+["'”’»)\]]*(?=\s|$)|[。！？｡]+["'”’」』）》]*|\n\s*\n)\s*""")


def sentences(text: str, count: int = 1) -> list[Span]:
    """Cut after every `count` sentences. Nothing is left out: blanks between sentences belong to the one before.

    Args:
        text: Any text. Abbreviations are not known: "Dr. Who" is cut after "Dr.".
        count: Sentences in a chunk.

    Returns:
        Spans that cover the text; none for a blank text.

    Raises:
        ValueError: If `count` is not positive.
    """
    if count < 1:
        raise ValueError(f"{count=} sentences in a chunk must be at least 1")
    ends = [match.end() for match in _SENTENCE_END.finditer(text) if text[: match.end()].strip()]
    if not ends or text[ends[-1] :].strip():
        ends.append(len(text))
    ends[-1] = len(text)
    cuts = [0, *ends[count - 1 : -1 : count], len(text)]
    return [(start, end) for start, end in pairwise(cuts) if text[start:end].strip()]


def fixed_tokens(text: str, tokenizer: Tokenizer, size: int) -> list[Span]:
    """Cut after every `size` tokens.

    Args:
        text: Any text.
        tokenizer: What tokens are.
        size: Tokens in a chunk.

    Returns:
        Spans that cover the text; none for a text without tokens.

    Raises:
        ValueError: If `size` is not positive.
    """
    if size < 1:
        raise ValueError(f"{size=} tokens in a chunk must be at least 1")
    starts = np.maximum.accumulate(tokenizer.encode(text).offsets[1:-1, 0])[::size]
    cuts = [0, *starts[1:].tolist(), len(text)]
    return [(start, end) for start, end in pairwise(cuts) if start < end] if len(starts) else []


def join(chunks: Sequence[str], separator: str = " ") -> tuple[str, list[Span]]:
    """Chunks put together to one document, as the hosted API does with its list of inputs.

    Args:
        chunks: Strings in their order.
        separator: What stands between them; it belongs to neither.

    Returns:
        The document and the chunks' spans in it.
    """
    spans, position = [], 0
    for chunk in chunks:
        spans.append((position, position + len(chunk)))
        position += len(chunk) + len(separator)
    return separator.join(chunks), spans


def locate(document: str, chunks: Sequence[str]) -> list[Span]:
    """Where chunks stand in their document.

    Args:
        document: The whole text.
        chunks: Parts of it in the order of their beginnings; they may overlap and leave gaps.

    Returns:
        Their spans: of each the first place that is not before that of the chunk before.

    Raises:
        ValueError: If one is not there; says which.
    """
    spans: list[Span] = []
    for index, chunk in enumerate(chunks):
        start = document.find(chunk, spans[-1][0] + (spans[-1][1] > spans[-1][0]) if spans else 0)
        if start < 0:
            raise ValueError(
                f"chunk {index} does not stand in the document after chunk {index - 1}: {chunk[:60]!r}; give chunks "
                "as they stand there, in order, or no document to have them joined"
            )
        spans.append((start, start + len(chunk)))
    return spans


def check_spans(spans: Sequence[Span] | np.ndarray, length: int) -> np.ndarray:
    """Spans as an array, each within its document.

    Args:
        spans: Pairs of characters, in any order; they may overlap, leave gaps and be empty.
        length: Characters of the document.

    Returns:
        Int64 [C, 2].

    Raises:
        ValueError: If one is not within the document, or not a pair of whole numbers; says which.
    """
    found = np.asarray(spans)
    found = found.reshape(0, 2) if found.size == 0 else found
    if found.ndim != 2 or found.shape[1] != 2 or not (found.size == 0 or np.issubdtype(found.dtype, np.integer)):
        raise ValueError(f"spans must be pairs of character positions, not {str(spans)[:80]}")
    wrong = (found[:, 0] < 0) | (found[:, 1] > length) | (found[:, 0] > found[:, 1])
    if wrong.any():
        index = int(wrong.argmax())
        raise ValueError(f"span {index} is {tuple(found[index].tolist())}, but the document has {length} characters")
    return found.astype(np.int64)


def read_document(
    document: str | tuple[str | None, Given | None],
    chunker: Chunker | None,
    tokenizer: Tokenizer,
) -> tuple[str, np.ndarray]:
    """A document and its chunks, in whatever form they were given.

    Args:
        document: A text, or a text and its chunks: strings that stand in it, or spans. Without a text the strings are
            joined.
        chunker: What cuts a text without chunks: a function, "sentences", or a number of tokens.
        tokenizer: What tokens are.

    Returns:
        The text and the chunks' spans, int64 [C, 2].

    Raises:
        TypeError: If the text is not a string.
        ValueError: If there is nothing to say where chunks are, or too much, or they are not in the text.
    """
    text, chunks = (document, None) if isinstance(document, str) else document
    if chunks is None:
        if text is None or chunker is None:
            raise ValueError("a document needs chunks (strings or spans) or a chunker; chunks alone are joined")
        if chunker == "sentences":
            chunks = sentences(text)
        elif isinstance(chunker, int):
            chunks = fixed_tokens(text, tokenizer, chunker)
        elif callable(chunker):
            chunks = chunker(text)
        else:
            raise ValueError(f"{chunker=} must be 'sentences', a number of tokens or a function from text to spans")
    elif chunker is not None:
        raise ValueError("give chunks or a chunker, not both")
    if isinstance(chunks, str):
        raise TypeError("chunks is one str, must be a sequence of them")
    if text is not None and not isinstance(text, str):
        raise TypeError(f"document is {type(text).__name__}, must be str; decode or convert it first")
    spans: Any = chunks if isinstance(chunks, np.ndarray) else list(chunks)
    if text is None:
        text, spans = join(spans)
    elif len(spans) and isinstance(spans[0], str):
        spans = locate(text, spans)
    return text, check_spans(spans, len(text))


def token_ranges(tokens: Tokens, spans: np.ndarray, prompt: int, pool_specials: bool) -> np.ndarray:
    """The tokens of each chunk.

    A token belongs to the chunk in which its last character lies. By the convention of the hosted API the first chunk
    takes `<s>` and the prompt too, and the last takes `</s>`, unless the text was truncated before.

    Args:
        tokens: Those of prompt and document.
        spans: Characters of each chunk in the document, int [C, 2].
        prompt: Characters of the prompt.
        pool_specials: Whether to follow that convention; otherwise nobody takes them.

    Returns:
        First token and the one after the last, int64 [C, 2]; equal for a chunk without tokens.
    """
    content = tokens.offsets[1:-1].astype(np.int64) - prompt
    last = np.maximum.accumulate(np.maximum(content[:, 1] - 1, content[:, 0]))
    ranges = 1 + np.searchsorted(last, spans)
    if pool_specials and len(ranges):
        if ranges[0, 1] > ranges[0, 0]:
            ranges[0, 0] = 0
        if ranges[-1, 1] > ranges[-1, 0] and not tokens.truncated:
            ranges[-1, 1] = len(tokens.ids)
    return ranges


def statuses(tokens: Tokens, spans: np.ndarray, ranges: np.ndarray, prompt: int) -> tuple[str, ...]:
    """What became of each chunk.

    Args:
        tokens: As in `token_ranges`.
        spans: As in `token_ranges`.
        ranges: What it gave.
        prompt: As in `token_ranges`.

    Returns:
        Of each "whole"; "cut" or "truncated" if the text was truncated before its end, or before its beginning; or
        "empty" if it has no tokens.
    """
    reach = tokens.offsets[-2, 1] - prompt if tokens.truncated else np.inf
    beyond, some = spans[:, 1] > reach, ranges[:, 1] > ranges[:, 0]
    names = np.where(beyond, np.where(some, "cut", "truncated"), np.where(some, "whole", "empty"))
    return tuple(names.tolist())


class Window(NamedTuple):
    """A part of a long document that is computed at once.

    Attributes:
        start: Its first token.
        stop: The one after its last.
        first: The first token whose vector is taken from this window; those before it are context.
    """

    start: int
    stop: int
    first: int


def windows(length: int, size: int, overlap: int) -> list[Window]:
    """Overlapping windows over a long document, after the reference code of late chunking.

    Every token is taken from the first window in which it has `overlap` tokens before it.

    Args:
        length: Tokens of the document, `<s>`, prompt and `</s>` included.
        size: Tokens of a window; the last may have fewer.
        overlap: Tokens that a window shares with the one before.

    Returns:
        Windows in order; one if the document fits.

    Raises:
        ValueError: If the overlap is negative or not smaller than a window.
    """
    if not 0 <= overlap < size:
        raise ValueError(f"{overlap=} must be at least 0 and less than the window of {size} tokens")
    found = [Window(0, min(size, length), 0)]
    while found[-1].stop < length:
        start = found[-1].start + size - overlap
        found.append(Window(start, min(start + size, length), start + overlap))
    return found


def cut(ids: np.ndarray, task: int, ranges: np.ndarray, first: int, size: int, overlap: int) -> list[Text]:
    """A document in windows, and the parts of its means that lie in each.

    Args:
        ids: Its token ids.
        task: Its adapter.
        ranges: First token and the one after the last of each mean, int [C, 2].
        first: Number of the vector of the first mean.
        size: Tokens of a window.
        overlap: Tokens that windows share.

    Returns:
        A text for each window; two or more for one with more means than a row has places.
    """
    most = row_places(size)
    texts = []
    for start, stop, taken in windows(len(ids), size, overlap):
        low, high = np.maximum(ranges[:, 0], taken), np.minimum(ranges[:, 1], stop)
        here = np.flatnonzero(low < high)
        spans = np.stack([low[here], high[here]], axis=1) - start
        shares = ((high - low)[here] / np.maximum(ranges[here, 1] - ranges[here, 0], 1)).astype(np.float32)
        texts += [
            Text(ids[start:stop], task, spans[i : i + most], first + here[i : i + most], shares[i : i + most])
            for i in range(0, len(here), most)
        ]
    return texts
