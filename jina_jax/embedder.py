"""From texts to embeddings as NumPy arrays."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from jina_jax import batching, checkpoint, chunking, hub, pooling, quantization
from jina_jax.batching import Arrays, Text
from jina_jax.chunking import Chunker, Given
from jina_jax.config import Config
from jina_jax.model import Model
from jina_jax.pipeline import Work, stream
from jina_jax.tokenizer import Tokenizer, Tokens, load_tokenizer

# Tokens computed at once. A CPU is fastest while the activations of a batch stay in its caches.
BATCH_TOKENS = {"cpu": 1024}
BATCH_TOKENS_ACCELERATOR = 32_768
# A window of texts is packed together: so many characters for each token computed at once, or so many texts.
WINDOW_CHARACTERS, WINDOW_TEXTS = 128, 4096
OVERLAP = 256

Truncate = bool | Literal["error"]


@dataclass
class Usage:
    """Counts of a call, filled in as its results come out.

    Attributes:
        texts: Texts, or documents.
        tokens: Tokens of these after truncation, prompts, `<s>` and `</s>` included.
        truncated: Texts that were cut.
        cut_tokens: Tokens that were lost by that.
        computed_tokens: Tokens that the device computed, padding and the overlap of windows included.
        batches: Batches that it computed.
    """

    texts: int = 0
    tokens: int = 0
    truncated: int = 0
    cut_tokens: int = 0
    computed_tokens: int = 0
    batches: int = 0


@dataclass(frozen=True, eq=False)
class Chunks:
    """The chunks of a document.

    Attributes:
        embeddings: One for each chunk, [C, E]; zeros for one without tokens.
        spans: Characters of each in the document, int64 [C, 2].
        tokens: Tokens in the mean of each, int64 [C].
        status: Of each "whole", "cut" (some of it lies beyond the longest text), "truncated" (all of it does) or
            "empty" (it has no tokens).
    """

    embeddings: np.ndarray
    spans: np.ndarray
    tokens: np.ndarray
    status: tuple[str, ...]


@dataclass(frozen=True)
class _Output:
    """How means become embeddings."""

    dimensions: int
    normalize: bool
    precision: str
    ranges: np.ndarray | None

    def __call__(self, means: Float[np.ndarray, "n D"]) -> np.ndarray:
        vectors = means[:, : self.dimensions]
        if self.normalize:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))
        return vectors if self.precision == "float32" else quantization.quantize(vectors, self.precision, self.ranges)


class Embedder:
    """A model with its tokenizer: `Embedder.load(name).encode(texts, task=...)`.

    May be shared by threads.

    Attributes:
        model: The model.
        variables: Its variables.
        tokenizer: Its tokenizer.
    """

    def __init__(self, model: Model, variables: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} ids, the model's table {model.config.vocab_size} rows; "
                "they belong to different models"
            )
        self.model, self.variables, self.tokenizer = model, variables, tokenizer
        self._means = jax.jit(functools.partial(_means, model))

    @classmethod
    def load(
        cls,
        name_or_path: str | Path = "mini",
        *,
        dtype: DTypeLike = jnp.float32,
        revision: str | None = None,
        **overrides: Any,
    ) -> Embedder:
        """Load a model and its tokenizer.

        Args:
            name_or_path: A directory, a name on the Hugging Face hub such as "jinaai/jina-embeddings-v3", or "mini"
                for the small bundled model.
            dtype: Type to compute in and to hold the weights in; float32 is exact.
            revision: Branch, tag or commit on the hub.
            **overrides: Further arguments of `jina_jax.load`, attributes of `Config` included.

        Returns:
            The embedder.

        Raises:
            CheckpointError: If the files are not this model, damaged or incomplete.
            FileNotFoundError: If there is no such directory or no tokenizer in it, or the hub cannot be reached.
        """
        directory = hub.find(name_or_path, revision)
        model, variables = checkpoint.load(directory, dtype=dtype, **overrides)
        return cls(model, variables, load_tokenizer(directory))

    @property
    def config(self) -> Config:
        """The model's configuration."""
        return self.model.config

    @property
    def dimensions(self) -> int:
        """Size E of an embedding when no other is asked for."""
        return self.config.truncate_dim or self.config.hidden_size

    @property
    def programs(self) -> int:
        """Number of programs compiled so far, one for each shape."""
        return self._means._cache_size()  # type: ignore[attr-defined]

    def encode(
        self,
        texts: str | Iterable[str],
        *,
        task: str | Sequence[str | None] | None = None,
        dimensions: int | None = None,
        normalize: bool = True,
        precision: str = "float32",
        ranges: np.ndarray | None = None,
        prompts: bool = True,
        truncate: Truncate = True,
        batch_tokens: int | None = None,
        pack: bool = True,
        usage: Usage | None = None,
        progress: bool = False,
    ) -> np.ndarray:
        """Embed texts.

        In this order: put the task's prompt before the text, tokenise, truncate to `config.max_tokens`, run the model
        with the task's adapter, take the mean over all tokens (those of the prompt, `<s>` and `</s>` included) in
        float32, cut to `dimensions`, normalise, quantise.

        Args:
            texts: One text or any number of them. The empty text is a text.
            task: The task of all texts or one for each; None means the bare backbone, without adapter and prompt.
            dimensions: Numbers to keep of each embedding; None means `Embedder.dimensions`.
            normalize: Whether embeddings have unit length, so that a dot product is a cosine similarity.
            precision: One of `quantization.PRECISIONS`.
            ranges: Of each number for "int8", see `quantization.calibrate`.
            prompts: Whether texts get the prompt of their task.
            truncate: True cuts texts that are too long, "error" refuses them, and False embeds all of them: in
                overlapping windows, whose token vectors go into one mean.
            batch_tokens: Tokens computed at once; a longer text goes alone. None means 1024 on a CPU, 32768 on an
                accelerator. Changes speed and memory, not results.
            pack: Whether several texts share a row; otherwise each has one, and is filled up.
            usage: Counts to add to.
            progress: Whether to show a progress bar on stderr.

        Returns:
            [E] for one text, [n, E] in the order of the texts otherwise, float32 unless `precision` says otherwise.

        Raises:
            TypeError: If something that should be a text is not; names its position.
            ValueError: If a task or precision is unknown, `task` has another length than `texts`, `dimensions` or
                `batch_tokens` is out of range, or a text is too long and `truncate` is "error".
        """
        single, texts = isinstance(texts, str), _as_list(texts)
        if not (task is None or isinstance(task, str)) and len(task) != len(texts):
            raise ValueError(f"task has {len(task)} entries for {len(texts)} texts; give one for each, or one for all")
        output = self._output(dimensions, normalize, precision, ranges)
        results: np.ndarray = output(np.zeros((0, self.config.hidden_size), np.float32))
        results = np.empty((len(texts), *results.shape[1:]), results.dtype)
        done = 0
        works = self._texts(texts, task, prompts, truncate, batch_tokens, pack, usage)
        with tqdm(total=len(texts), unit="text", disable=not progress) as bar:
            for work in works:
                count = len(work.vectors)
                results[done : done + count] = output(work.vectors)
                done += count
                bar.update(count)
        return results[0] if single else results

    def encode_stream(
        self,
        texts: Iterable[str],
        *,
        task: str | Iterable[str | None] | None = None,
        dimensions: int | None = None,
        normalize: bool = True,
        precision: str = "float32",
        ranges: np.ndarray | None = None,
        prompts: bool = True,
        truncate: Truncate = True,
        batch_tokens: int | None = None,
        pack: bool = True,
        usage: Usage | None = None,
    ) -> Iterator[np.ndarray]:
        """Embed texts as they come, in memory that does not grow with their number.

        If the iterator raises, the embeddings of all texts before come out first, then the error.

        Args:
            texts: Texts, any number of them. Some thousand are read ahead.
            task: The task of all texts, or as many as texts.
            dimensions: As in `encode`.
            normalize: As in `encode`.
            precision: As in `encode`.
            ranges: As in `encode`.
            prompts: As in `encode`.
            truncate: As in `encode`.
            batch_tokens: As in `encode`.
            pack: As in `encode`.
            usage: As in `encode`.

        Yields:
            The embedding [E] of each text, in order.

        Raises:
            TypeError: As in `encode`.
            ValueError: As in `encode`.
        """
        output = self._output(dimensions, normalize, precision, ranges)
        for work in self._texts(texts, task, prompts, truncate, batch_tokens, pack, usage):
            yield from output(work.vectors)

    def encode_chunks(
        self,
        document: str | None = None,
        chunks: Given | None = None,
        *,
        chunker: Chunker | None = None,
        task: str | None = "retrieval.passage",
        dimensions: int | None = None,
        normalize: bool = True,
        precision: str = "float32",
        ranges: np.ndarray | None = None,
        prompts: bool = True,
        pool_specials: bool = True,
        truncate: Truncate = False,
        window: int | None = None,
        overlap: int | None = None,
        usage: Usage | None = None,
    ) -> Chunks:
        """Embed the chunks of a document, each in the context of all of it: late chunking (Günther et al., 2024).

        The model runs over the whole document, and each chunk is the mean of its own token vectors.

        Args:
            document: The document; None if `chunks` are all of it: they are joined with one space, as the hosted API
                does.
            chunks: Strings as they stand in the document, in order, or spans of characters, which may overlap.
            chunker: Instead of chunks, "sentences", a number of tokens, or a function from a text to spans.
            task: Its task; None means the bare backbone.
            dimensions: As in `encode`.
            normalize: As in `encode`.
            precision: As in `encode`.
            ranges: As in `encode`.
            prompts: As in `encode`.
            pool_specials: Whether the first chunk takes `<s>` and the prompt into its mean and the last `</s>`, as
                the hosted API does; otherwise no chunk does.
            truncate: False takes documents of any length in overlapping windows; True cuts them at
                `config.max_tokens`, as the hosted API does, and "error" refuses them.
            window: Tokens of a window; None means `config.max_tokens`.
            overlap: Tokens that a window shares with the one before, its context; None means 256, or a quarter of
                a window that is smaller than 1024.
            usage: As in `encode`.

        Returns:
            The chunks. Empty and truncated ones keep their place and are marked.

        Raises:
            ValueError: If a chunk is not in the document, or as in `encode`.
        """
        [found] = self.encode_documents(
            ((document, chunks),),
            chunker=chunker,
            task=task,
            dimensions=dimensions,
            normalize=normalize,
            precision=precision,
            ranges=ranges,
            prompts=prompts,
            pool_specials=pool_specials,
            truncate=truncate,
            window=window,
            overlap=overlap,
            usage=usage,
        )
        return found

    def encode_documents(
        self,
        documents: Iterable[str | tuple[str | None, Given | None]],
        *,
        chunker: Chunker | None = None,
        task: str | None = "retrieval.passage",
        dimensions: int | None = None,
        normalize: bool = True,
        precision: str = "float32",
        ranges: np.ndarray | None = None,
        prompts: bool = True,
        pool_specials: bool = True,
        truncate: Truncate = False,
        window: int | None = None,
        overlap: int | None = None,
        batch_tokens: int | None = None,
        usage: Usage | None = None,
    ) -> Iterator[Chunks]:
        """`encode_chunks` for many documents, which are computed together and streamed like texts.

        Args:
            documents: Documents, which need a chunker, or pairs of a document and its chunks, each as in
                `encode_chunks`.
            chunker: As in `encode_chunks`, for documents without chunks.
            task: As in `encode_chunks`.
            dimensions: As in `encode`.
            normalize: As in `encode`.
            precision: As in `encode`.
            ranges: As in `encode`.
            prompts: As in `encode`.
            pool_specials: As in `encode_chunks`.
            truncate: As in `encode_chunks`.
            window: As in `encode_chunks`.
            overlap: As in `encode_chunks`.
            batch_tokens: As in `encode`.
            usage: As in `encode`.

        Yields:
            The chunks of each document, in order.

        Raises:
            ValueError: As in `encode_chunks`.
        """
        output = self._output(dimensions, normalize, precision, ranges)
        size, overlap = self._window(window, overlap)
        prefix = self._prefix(task) if prompts else ""
        task_id = int(self.config.task_ids([task])[0])

        def prepare(window: tuple[int, list]) -> Work:
            first, found = window
            made = [chunking.read_document(document, chunker, self.tokenizer) for document in found]
            tokens = self._tokenize([prefix + text for text, _ in made], truncate, first=first, offsets=True)
            texts: list[Text] = []
            parts, total = [], 0
            for (_, spans), one in zip(made, tokens, strict=True):
                taken = chunking.token_ranges(one, spans, len(prefix), pool_specials)
                status = chunking.statuses(one, spans, taken, len(prefix))
                texts += _windowed(one.ids, task_id, taken, total, size, overlap)
                parts.append((spans, taken, status, one))
                total += len(spans)
            return self._work(parts, texts, total, batch_tokens, pack=True)

        windows = _windows(documents, self._window_characters(batch_tokens), _document_length)
        for work in stream(self._compute, prepare, windows, self.tokenizer.pad_id):
            if usage is not None:
                _count(usage, [one for *_, one in work.window], work)
            embeddings, start = output(work.vectors), 0
            for spans, taken, status, _ in work.window:
                stop = start + len(spans)
                yield Chunks(embeddings[start:stop], spans, taken[:, 1] - taken[:, 0], status)
                start = stop

    def warmup(self, *, batch_tokens: int | None = None) -> int:
        """Compile every program that texts can need, so that no later call has to wait for one.

        Args:
            batch_tokens: As in the calls to come.

        Returns:
            Number of programs.
        """
        shapes = batching.row_shapes(self.config.max_tokens, self._batch_tokens(batch_tokens))
        for rows, length in shapes:
            nothing = batching.Batch((), rows, length, batching.row_places(length))
            self._compute(batching.fill(nothing, [], self.tokenizer.pad_id))
        return len(shapes)

    def _texts(
        self,
        texts: Iterable[str],
        task: str | Iterable[str | None] | None,
        prompts: bool,
        truncate: Truncate,
        batch_tokens: int | None,
        pack: bool,
        usage: Usage | None,
    ) -> Iterator[Work]:
        """The means of windows of texts, in order."""
        size, overlap = self._window(None, None)
        characters = self._window_characters(batch_tokens)
        pairs: Iterable[tuple[str, str | None]]
        if task is None or isinstance(task, str):
            self.config.task_ids([task])
            pairs = zip(texts, itertools.repeat(task), strict=False)
        else:
            pairs = zip(texts, task, strict=True)

        def prepare(window: tuple[int, list[tuple[str, str | None]]]) -> Work:
            first, found = window
            prefixed = [(self._prefix(name) if prompts else "") + text for text, name in found]
            tokens = self._tokenize(prefixed, truncate, first=first)
            task_ids = self.config.task_ids([name for _, name in found])
            made: list[Text] = []
            for index, (one, task_id) in enumerate(zip(tokens, task_ids, strict=True)):
                made += _windowed(one.ids, int(task_id), np.array([[0, len(one.ids)]]), index, size, overlap)
            return self._work(tokens, made, len(found), batch_tokens, pack)

        windows = _windows(_checked(pairs), characters, lambda pair: len(pair[0]))
        for work in stream(self._compute, prepare, windows, self.tokenizer.pad_id):
            if usage is not None:
                _count(usage, work.window, work)
            yield work

    def _work(self, window: Any, texts: list[Text], count: int, batch_tokens: int | None, pack: bool) -> Work:
        arrange = batching.pack if pack else batching.bucket
        batches = arrange(texts, self.config.max_tokens, self._batch_tokens(batch_tokens))
        return Work(window, texts, batches, np.zeros((count, self.config.hidden_size), np.float32))

    def _compute(self, arrays: Arrays) -> Float[np.ndarray, "B P D"]:
        return np.asarray(self._means(self.variables, *arrays))

    def _tokenize(self, texts: list[str], truncate: Truncate, *, first: int = 0, offsets: bool = False) -> list[Tokens]:
        """Tokens of each text; a number `first` for messages."""
        limit = self.config.max_tokens
        found = self.tokenizer.encode_batch(texts, limit if truncate is True else None, offsets=offsets)
        if truncate == "error":
            for index, tokens in enumerate(found, first):
                if tokens.full_length > limit:
                    raise ValueError(
                        f"text {index} has {tokens.full_length} tokens, the model takes {limit}; shorten or split it, "
                        "or allow truncation or windows (truncate=True or False)"
                    )
        return found

    def _output(self, dimensions: int | None, normalize: bool, precision: str, ranges: np.ndarray | None) -> _Output:
        dimensions = self.dimensions if dimensions is None else dimensions
        pooling.check_dimensions(dimensions, self.config.hidden_size)
        return _Output(dimensions, normalize, precision, ranges)

    def _prefix(self, task: str | None) -> str:
        return "" if task is None else self.config.prompts[self.config.task_id(task)]

    def _window(self, window: int | None, overlap: int | None) -> tuple[int, int]:
        limit = self.config.max_tokens
        window = limit if window is None else window
        if not 1 <= window <= limit:
            raise ValueError(f"{window=} tokens must be at least 1 and at most {limit}, the longest text of this model")
        overlap = min(OVERLAP, window // 4) if overlap is None else overlap
        if not 0 <= overlap < window:
            raise ValueError(f"{overlap=} tokens must be at least 0 and less than the window of {window}")
        return window, overlap

    def _batch_tokens(self, batch_tokens: int | None) -> int:
        if batch_tokens is None:
            return BATCH_TOKENS.get(jax.default_backend(), BATCH_TOKENS_ACCELERATOR)
        if batch_tokens < 1:
            raise ValueError(f"{batch_tokens=} must be at least 1")
        return batch_tokens

    def _window_characters(self, batch_tokens: int | None) -> int:
        return WINDOW_CHARACTERS * self._batch_tokens(batch_tokens)


def _means(
    model: Model,
    variables: Mapping[str, Any],
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    task: Int[Array, "B P"],
    spans: Int[Array, "B P 2"],
) -> Float[Array, "B P D"]:
    """The only output that is needed; the compiler drops the others."""
    output: Any = model.apply(variables, tokens, task=task, segments=segments)
    return pooling.mean_pool_spans(output.hidden, spans)


def _windowed(ids: np.ndarray, task: int, ranges: np.ndarray, first: int, size: int, overlap: int) -> list[Text]:
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
    most = batching.row_places(size)
    texts = []
    for start, stop, taken in chunking.windows(len(ids), size, overlap):
        low, high = np.maximum(ranges[:, 0], taken), np.minimum(ranges[:, 1], stop)
        here = np.flatnonzero(low < high)
        spans = np.stack([low[here], high[here]], axis=1) - start
        shares = ((high - low)[here] / np.maximum(ranges[here, 1] - ranges[here, 0], 1)).astype(np.float32)
        texts += [
            Text(ids[start:stop], task, spans[i : i + most], first + here[i : i + most], shares[i : i + most])
            for i in range(0, len(here), most)
        ]
    return texts


def _windows(items: Iterable[Any], characters: int, length: Any) -> Iterator[tuple[int, list[Any]]]:
    """Items in lists of about so many characters, each with the number of its first item.

    What came before an error comes out before it.
    """
    window: list[Any] = []
    first = total = 0
    try:
        for item in items:
            window.append(item)
            total += length(item)
            if total >= characters or len(window) >= WINDOW_TEXTS:
                yield first, window
                first, window, total = first + len(window), [], 0
    except Exception:
        if window:
            yield first, window
        raise
    if window:
        yield first, window


def _document_length(document: Any) -> int:
    """Characters of a document, roughly."""
    text, chunks = (document, None) if isinstance(document, str) else document
    return len(text) if text is not None else sum(map(len, chunks or ()))


def _count(usage: Usage, tokens: list[Tokens], work: Work) -> None:
    """Add up what a window cost."""
    cut = [one.full_length - len(one.ids) for one in tokens]
    usage.texts += len(tokens)
    usage.tokens += sum(len(one.ids) for one in tokens)
    usage.truncated += sum(count > 0 for count in cut)
    usage.cut_tokens += sum(cut)
    usage.computed_tokens += sum(batch.rows * batch.length for batch in work.batches)
    usage.batches += len(work.batches)


def _checked(pairs: Iterable[tuple[str, str | None]]) -> Iterator[tuple[str, str | None]]:
    """Pairs of a text and its task, the text being one."""
    for index, (text, task) in enumerate(pairs):
        _check_text(text, index)
        yield text, task


def _check_text(text: Any, index: int) -> None:
    if not isinstance(text, str):
        raise TypeError(f"texts[{index}] is {type(text).__name__}, must be str; decode or convert it first")


def _as_list(texts: str | Iterable[str]) -> list[str]:
    """Texts as a list of checked strings."""
    if isinstance(texts, str):
        return [texts]
    # A set has no order to keep, and bytes and mappings would quietly be taken for something else.
    if isinstance(texts, bytes | Mapping | set | frozenset) or not isinstance(texts, Iterable):
        raise TypeError(f"texts is {type(texts).__name__}, must be a str or a sequence of them")
    found = list(texts)
    for index, text in enumerate(found):
        _check_text(text, index)
    return found
