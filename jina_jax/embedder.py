"""From texts to embeddings as NumPy arrays."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from jina_jax import batching, checkpoint, chunking, hub, lora, pipeline, pooling, quantization, sharding
from jina_jax.batching import Arrays, Text
from jina_jax.chunking import Chunker, Given
from jina_jax.config import Config
from jina_jax.model import Model
from jina_jax.pipeline import Window, Work
from jina_jax.tokenizer import Tokenizer, Tokens, load_tokenizer

# Tokens computed at once. A CPU is fastest while the activations of a batch stay in its caches.
BATCH_TOKENS = {"cpu": 1024}
BATCH_TOKENS_ACCELERATOR = 32_768
# Characters of a window of texts, which are packed together, for each token computed at once.
WINDOW_CHARACTERS = 128
OVERLAP = 256

Truncate = bool | Literal["error"]
Document = str | tuple[str | None, Given | None]


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
        mesh: Devices over which `variables` are split and batches are computed, see `make_mesh`; None for one device.
            Where it has devices of other processes, all of them must make the same calls, and all get the results.
    """

    def __init__(
        self,
        model: Model,
        variables: Mapping[str, Any],
        tokenizer: Tokenizer,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} ids, the model's table {model.config.vocab_size} rows; "
                "they belong to different models"
            )
        self.model, self.variables, self.tokenizer, self.mesh = model, variables, tokenizer, mesh
        means = functools.partial(_means, model)
        if mesh is None:
            self._split, self._means = batching.Split(), jax.jit(means)
        else:
            self._split = batching.Split(*sharding.parts(mesh))
            # Every process takes all results.
            self._means = jax.jit(means, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._held = self._hold(variables)

    def _hold(self, variables: Mapping[str, Any]) -> Mapping[str, Any]:
        """Variables as the programs take them."""
        return lora.as_bits(variables) if self.mesh is None and jax.default_backend() == "cpu" else variables

    @classmethod
    def load(
        cls,
        name_or_path: str | Path = "mini",
        *,
        dtype: DTypeLike = jnp.float32,
        mesh: jax.sharding.Mesh | None = None,
        revision: str | None = None,
        **overrides: Any,
    ) -> Embedder:
        """Load a model and its tokenizer.

        Args:
            name_or_path: A directory, a name on the Hugging Face hub such as "jinaai/jina-embeddings-v3", or "mini"
                for the small bundled model.
            dtype: Type to compute in and to hold the weights in; float32 is exact.
            mesh: Devices to split the model and batches over, see `make_mesh`; None means the default device.
            revision: Branch, tag or commit on the hub.
            **overrides: Further arguments of `jina_jax.load`, attributes of `Config` included.

        Returns:
            The embedder.

        Raises:
            CheckpointError: If the files are not this model, damaged or incomplete.
            FileNotFoundError: If there is no such directory or no tokenizer in it, or the hub cannot be reached.
        """
        directory = hub.find(name_or_path, revision)
        model, variables = checkpoint.load(directory, dtype=dtype, mesh=mesh, **overrides)
        return cls(model, variables, load_tokenizer(directory), mesh)

    def with_variables(self, variables: Mapping[str, Any]) -> Embedder:
        """This embedder with other weights, such as those of a later step of training.

        Args:
            variables: Variables of the same model, of the same types and on the same devices.

        Returns:
            An embedder that shares all compiled programs with this one.
        """
        other = copy.copy(self)
        other.variables, other._held = variables, self._hold(variables)
        return other

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
                accelerator, times the devices that rows and tokens are split over. Changes speed and memory, not
                results.
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
        works = self._texts(
            [self._with_tasks(texts, task)],
            adapters=task is not None,
            prompts=prompts,
            truncate=truncate,
            batch_tokens=batch_tokens,
            pack=pack,
            usage=usage,
        )
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
        works = self._texts(
            [self._with_tasks(texts, task)],
            adapters=task is not None,
            prompts=prompts,
            truncate=truncate,
            batch_tokens=batch_tokens,
            pack=pack,
            usage=usage,
        )
        for work in works:
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
        documents: Iterable[Document],
        *,
        chunker: Chunker | None = None,
        task: str | Iterable[str | None] | None = "retrieval.passage",
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
            task: The task of all documents, or as many as documents.
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
        works = self._documents(
            [((*_with_chunks(item), name) for item, name in self._with_tasks(documents, task))],
            adapters=task is not None,
            chunker=chunker,
            prompts=prompts,
            pool_specials=pool_specials,
            truncate=truncate,
            window=window,
            overlap=overlap,
            batch_tokens=batch_tokens,
            usage=usage,
        )
        for work in works:
            yield from _chunks(work, output)

    def encode_groups(
        self,
        groups: Iterable[Iterable[str | tuple[str, str | None]]],
        *,
        task: str | None = None,
        dimensions: int | None = None,
        normalize: bool = True,
        precision: str = "float32",
        ranges: np.ndarray | None = None,
        **options: Any,
    ) -> Iterator[np.ndarray]:
        """Embed groups of texts, such as the shards of a corpus, each as if there were no other.

        No text shares a batch with one of another group, so the last bits of a group's embeddings depend on the group
        alone. The next group is read and tokenised while one is computed.

        Args:
            groups: Groups of texts, or of pairs of a text and its task.
            task: The task of texts that come without one.
            dimensions: As in `encode`.
            normalize: As in `encode`.
            precision: As in `encode`.
            ranges: As in `encode`.
            **options: `prompts`, `truncate`, `batch_tokens`, `pack` and `usage` of `encode_stream`.

        Yields:
            The embeddings [n, E] of each group, in order.

        Raises:
            TypeError: As in `encode`; positions count within the group.
            ValueError: As in `encode`.
        """
        output = self._output(dimensions, normalize, precision, ranges)
        self.config.task_ids([task])
        pairs = (((item, task) if isinstance(item, str) else item for item in group) for group in groups)
        found: list[np.ndarray] = []
        for work in self._texts(pairs, **options):
            found.append(output(work.vectors))
            if work.ends:
                yield np.concatenate(found)
                found = []

    def encode_document_groups(
        self,
        groups: Iterable[Iterable[Document | tuple[str | None, Given | None, str | None]]],
        *,
        task: str | None = "retrieval.passage",
        dimensions: int | None = None,
        normalize: bool = True,
        precision: str = "float32",
        ranges: np.ndarray | None = None,
        **options: Any,
    ) -> Iterator[list[Chunks]]:
        """`encode_groups` for documents.

        Args:
            groups: Groups of documents as in `encode_documents`, or with a task as third part.
            task: The task of documents that come without one.
            dimensions: As in `encode`.
            normalize: As in `encode`.
            precision: As in `encode`.
            ranges: As in `encode`.
            **options: `chunker`, `prompts`, `pool_specials`, `truncate`, `window`, `overlap`, `batch_tokens` and
                `usage` of `encode_documents`.

        Yields:
            The chunks of the documents of each group, in order.

        Raises:
            ValueError: As in `encode_documents`.
        """
        output = self._output(dimensions, normalize, precision, ranges)
        self.config.task_ids([task])

        def triple(item: Any) -> tuple[str | None, Given | None, str | None]:
            return item if len(item) == 3 and not isinstance(item, str) else (*_with_chunks(item), task)

        found: list[Chunks] = []
        for work in self._documents((map(triple, group) for group in groups), **options):
            found += _chunks(work, output)
            if work.ends:
                yield found
                found = []

    def means(
        self,
        texts: Sequence[Text],
        count: int,
        *,
        batch_tokens: int | None = None,
        usage: Usage | None = None,
    ) -> Float[np.ndarray, "n D"]:
        """Means of texts that are token ids already: what `encode` does between tokenising and cutting.

        Args:
            texts: Token ids of at most `config.max_tokens`, the adapter of each, and the means wanted of it.
            count: Means in all, n.
            batch_tokens: As in `encode`.
            usage: Counts to add the batches and the tokens computed to.

        Returns:
            Float32 [n, D].

        Raises:
            ValueError: If a text is too long.
        """
        work = self._work([], list(texts), count, batch_tokens, True, True)
        for batch in work.batches:
            arrays = batching.fill(batch, work.texts, self.tokenizer.pad_id, work.adapters)
            batching.collect(batch, work.texts, np.asarray(self._compute(arrays)), work.vectors)
        if usage is not None:
            _count(usage, [], work)
        return work.vectors

    def warmup(self, *, adapters: bool = True, batch_tokens: int | None = None) -> int:
        """Compile every program that texts can need, so that no later call has to wait for one.

        Args:
            adapters: Whether texts will have tasks. Calls with `task=None` have programs of their own, which know no
                adapters; `task=[None, ...]` uses the others.
            batch_tokens: As in the calls to come.

        Returns:
            Number of programs.
        """
        shapes = batching.row_shapes(self.config.max_tokens, self._batch_tokens(batch_tokens), self._split)
        for rows, length in shapes:
            nothing = batching.Batch((), rows, length, batching.row_places(length))
            jax.block_until_ready(self._compute(batching.fill(nothing, [], self.tokenizer.pad_id, adapters)))
        return len(shapes)

    def _texts(
        self,
        groups: Iterable[Iterable[tuple[str, str | None]]],
        *,
        adapters: bool = True,
        prompts: bool = True,
        truncate: Truncate = True,
        batch_tokens: int | None = None,
        pack: bool = True,
        usage: Usage | None = None,
    ) -> Iterator[Work]:
        """The means of windows of texts, in order. Groups hold pairs of a text and its task."""
        size, overlap = self._window(None, None)

        def prepare(window: Window[tuple[str, str | None]]) -> Work:
            prefixed = [(self._prefix(name) if prompts else "") + text for text, name in window.items]
            tokens = self._tokenize(prefixed, truncate, first=window.first)
            task_ids = self.config.task_ids([name for _, name in window.items])
            made: list[Text] = []
            for index, (one, task_id) in enumerate(zip(tokens, task_ids, strict=True)):
                made += chunking.cut(one.ids, int(task_id), np.array([[0, len(one.ids)]]), index, size, overlap)
            return self._work(tokens, made, len(tokens), batch_tokens, pack, adapters)

        windows = pipeline.windows(
            map(_checked, groups), self._window_characters(batch_tokens), lambda pair: len(pair[0])
        )
        for work in self._stream(prepare, windows):
            if usage is not None:
                _count(usage, work.made, work)
            yield work

    def _documents(
        self,
        groups: Iterable[Iterable[tuple[str | None, Given | None, str | None]]],
        *,
        adapters: bool = True,
        chunker: Chunker | None = None,
        prompts: bool = True,
        pool_specials: bool = True,
        truncate: Truncate = False,
        window: int | None = None,
        overlap: int | None = None,
        batch_tokens: int | None = None,
        usage: Usage | None = None,
    ) -> Iterator[Work]:
        """The means of the chunks of windows of documents, in order. Groups hold documents, chunks and tasks."""
        size, overlap = self._window(window, overlap)

        def prepare(window: Window[tuple[str | None, Given | None, str | None]]) -> Work:
            made = [chunking.read_document((text, given), chunker, self.tokenizer) for text, given, _ in window.items]
            prefixes = [self._prefix(name) if prompts else "" for *_, name in window.items]
            prefixed = [prefix + text for prefix, (text, _) in zip(prefixes, made, strict=True)]
            tokens = self._tokenize(prefixed, truncate, first=window.first, offsets=True)
            task_ids = self.config.task_ids([name for *_, name in window.items])
            texts: list[Text] = []
            parts, total = [], 0
            for (_, spans), prefix, one, task_id in zip(made, prefixes, tokens, task_ids, strict=True):
                taken = chunking.token_ranges(one, spans, len(prefix), pool_specials)
                status = chunking.statuses(one, spans, taken, len(prefix))
                texts += chunking.cut(one.ids, int(task_id), taken, total, size, overlap)
                parts.append((spans, taken, status, one))
                total += len(spans)
            return self._work(parts, texts, total, batch_tokens, True, adapters)

        windows = pipeline.windows(groups, self._window_characters(batch_tokens), _document_length)
        for work in self._stream(prepare, windows):
            if usage is not None:
                _count(usage, [one for *_, one in work.made], work)
            yield work

    def _with_tasks(self, items: Iterable[Any], task: str | Iterable[str | None] | None) -> Iterator[tuple]:
        """Each item with the task that it has alone, or all have."""
        if task is None or isinstance(task, str):
            self.config.task_ids([task])
            pairs = zip(items, itertools.repeat(task), strict=False)
        else:
            pairs = zip(items, task, strict=True)
        return pairs

    def _work(
        self, made: list, texts: list[Text], count: int, batch_tokens: int | None, pack: bool, adapters: bool
    ) -> Work:
        arrange = batching.pack if pack else batching.bucket
        batches = arrange(texts, self.config.max_tokens, self._batch_tokens(batch_tokens), self._split)
        return Work(made, texts, batches, np.zeros((count, self.config.hidden_size), np.float32), adapters)

    def _stream(self, prepare: Callable[[Window], Work], windows: Iterator[Window]) -> Iterator[Work]:
        return pipeline.stream(self._compute, prepare, windows, self.tokenizer.pad_id, in_order=self.mesh is not None)

    def _compute(self, arrays: Arrays) -> Float[Array | np.ndarray, "B P D"]:
        arrays = arrays if self.config.tasks else arrays._replace(task=None)
        if self.mesh is None:
            return np.asarray(self._means(self._held, *arrays))
        pairs = zip(arrays, _AXES, strict=True)
        placed = [None if array is None else sharding.put(self.mesh, array, axes) for array, axes in pairs]
        with sharding.use(self.mesh):  # contexts belong to threads
            return self._means(self._held, *placed)

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
            one = BATCH_TOKENS.get(jax.default_backend(), BATCH_TOKENS_ACCELERATOR)
            return one * self._split.rows * self._split.tokens
        if batch_tokens < 1:
            raise ValueError(f"{batch_tokens=} must be at least 1")
        return batch_tokens

    def _window_characters(self, batch_tokens: int | None) -> int:
        return WINDOW_CHARACTERS * self._batch_tokens(batch_tokens)


_AXES = ("B T", "B T", "B _", "B _ _")  # of `Arrays`


def _means(
    model: Model,
    variables: Mapping[str, Any],
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    task: Int[Array, "B P"] | None,
    spans: Int[Array, "B P 2"],
) -> Float[Array, "B P D"]:
    """The only output that is needed; the compiler drops the others."""
    output: Any = model.apply(variables, tokens, task=task, segments=segments, num_texts=spans.shape[1])
    return pooling.mean_pool_spans(output.hidden, spans)


def _chunks(work: Work, output: _Output) -> Iterator[Chunks]:
    """The chunks of each document of a window."""
    embeddings, start = output(work.vectors), 0
    for spans, taken, status, _ in work.made:
        stop = start + len(spans)
        yield Chunks(embeddings[start:stop], spans, taken[:, 1] - taken[:, 0], status)
        start = stop


def _with_chunks(document: Document) -> tuple[str | None, Given | None]:
    """A document and its chunks, where it has any."""
    return (document, None) if isinstance(document, str) else document


def _document_length(document: tuple) -> int:
    """Characters of a document, roughly."""
    text, chunks, _ = document
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
