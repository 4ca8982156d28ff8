"""From texts to embeddings as NumPy arrays."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int
from tqdm import tqdm

from jina_jax import batching, checkpoint, hub
from jina_jax.config import Config
from jina_jax.model import Model
from jina_jax.pooling import check_dimensions
from jina_jax.tokenizer import Tokenizer, load_tokenizer

# Tokens of a batch, padding included. A CPU is fastest while the activations of a batch stay in its caches.
BATCH_TOKENS = {"cpu": 1024}
BATCH_TOKENS_ACCELERATOR = 32_768
TOKENIZE_AT_ONCE = 4096  # the tokenizer's own results are an order of magnitude larger than the ids kept


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
        self._pooled = jax.jit(functools.partial(_pooled, model))

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

    def encode(
        self,
        texts: str | Iterable[str],
        *,
        task: str | Sequence[str | None] | None = None,
        dimensions: int | None = None,
        normalize: bool = True,
        prompts: bool = True,
        batch_tokens: int | None = None,
        truncate: bool = True,
        progress: bool = False,
    ) -> Float32[np.ndarray, "*n E"]:
        """Embed texts.

        In this order: put the task's prompt before the text, tokenise, truncate to `config.max_tokens`, run the model
        with the task's adapter, take the mean over all tokens (those of the prompt, `<s>` and `</s>` included) in
        float32, cut to `dimensions`, normalise.

        Args:
            texts: One text or any number of them. The empty text is a text.
            task: The task of all texts or one for each; None means the bare backbone, without adapter and prompt.
            dimensions: Numbers to keep of each embedding; None means `Embedder.dimensions`.
            normalize: Whether embeddings have unit length, so that a dot product is a cosine similarity.
            prompts: Whether texts get the prompt of their task.
            batch_tokens: Tokens computed at once, padding included; a longer text goes alone. None means 1024 on a
                CPU, 32768 on an accelerator. Changes speed and memory, not results.
            truncate: Whether texts that are too long are cut; otherwise they are an error.
            progress: Whether to show a progress bar on stderr, if there is more than one batch.

        Returns:
            Float32 [E] for one text, [n, E] in the order of the texts otherwise.

        Raises:
            TypeError: If something that should be a text is not; names its position.
            ValueError: If a task is unknown, `task` has another length than `texts`, `dimensions` or `batch_tokens` is
                out of range, or a text is too long and `truncate` is False.
        """
        single, texts = isinstance(texts, str), _as_list(texts)
        if task is None or isinstance(task, str):
            task_ids = np.full(len(texts), self.config.task_ids([task])[0])
        elif len(task) == len(texts):
            task_ids = self.config.task_ids(task)
        else:
            raise ValueError(f"task has {len(task)} entries for {len(texts)} texts; give one for each, or one for all")
        dimensions = self.dimensions if dimensions is None else dimensions
        check_dimensions(dimensions, self.config.hidden_size)
        if batch_tokens is None:
            batch_tokens = BATCH_TOKENS.get(jax.default_backend(), BATCH_TOKENS_ACCELERATOR)

        prefix = ("", *self.config.prompts) if prompts else ("",) * (1 + len(self.config.tasks))
        ids = self._tokenize([prefix[1 + i] + text for i, text in zip(task_ids, texts, strict=True)], truncate)
        batches = batching.plan([len(row) for row in ids], self.config.max_tokens, batch_tokens)
        embeddings = np.empty((len(texts), dimensions), np.float32)
        with tqdm(total=len(texts), unit="text", disable=not progress or len(batches) < 2) as bar:
            for batch, pooled in self._run(batches, ids, task_ids):
                embeddings[batch.indices] = pooled[: len(batch.indices), :dimensions]
                bar.update(len(batch.indices))
        if normalize:
            embeddings /= np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), np.float32(1e-12))
        return embeddings[0] if single else embeddings

    def _tokenize(self, texts: list[str], truncate: bool) -> list[np.ndarray]:
        """Token ids int32 [T] of each text."""
        ids, limit = [], self.config.max_tokens
        for start in range(0, len(texts), TOKENIZE_AT_ONCE):
            found = self.tokenizer.encode_batch(texts[start : start + TOKENIZE_AT_ONCE], limit, offsets=False)
            for index, tokens in enumerate(found, start):
                if tokens.truncated and not truncate:
                    raise ValueError(
                        f"text {index} has {tokens.full_length} tokens, the model takes {limit}; shorten or split it, "
                        "or allow truncation"
                    )
                ids.append(tokens.ids)
        return ids

    def _run(
        self, batches: list[batching.Batch], ids: list[np.ndarray], task_ids: np.ndarray
    ) -> Iterator[tuple[batching.Batch, np.ndarray]]:
        """Means float32 [B, D] of each batch, fetched one step late: the device works while the host prepares."""
        running: list[tuple[batching.Batch, jax.Array]] = []
        for batch in batches:
            tokens, mask = batching.fill(batch, ids, self.tokenizer.pad_id)
            task = np.full(batch.rows, -1, np.int32)
            task[: len(batch.indices)] = task_ids[batch.indices]
            running.append((batch, self._pooled(self.variables, tokens, mask, task)))
            if len(running) > 1:
                done, pooled = running.pop(0)
                yield done, np.asarray(pooled)
        for done, pooled in running:
            yield done, np.asarray(pooled)


def _pooled(
    model: Model,
    variables: Mapping[str, Any],
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    task: Int[Array, "B"],
) -> Float[Array, "B D"]:
    """The only output that is needed; the compiler drops the others."""
    output: Any = model.apply(variables, tokens, mask, task)
    return output.pooled


def _as_list(texts: str | Iterable[str]) -> list[str]:
    """Texts as a list of checked strings."""
    if isinstance(texts, str):
        return [texts]
    # A set has no order to keep, and bytes and mappings would quietly be taken for something else.
    if isinstance(texts, bytes | Mapping | set | frozenset) or not isinstance(texts, Iterable):
        raise TypeError(f"texts is {type(texts).__name__}, must be a str or a sequence of them")
    found = list(texts)
    for index, text in enumerate(found):
        if not isinstance(text, str):
            raise TypeError(f"texts[{index}] is {type(text).__name__}, must be str; decode or convert it first")
    return found
