"""Embeddings in a Ray Data pipeline, on a cluster: `dataset.map_batches(EmbedBatch, ...)`."""

from typing import Any

import numpy as np

from jina_jax.embedder import Embedder

LOADING = ("dtype", "revision")


class EmbedBatch:
    """Adds a column of embeddings to batches of rows; each actor loads the model once.

        dataset.map_batches(
            EmbedBatch,
            fn_constructor_kwargs={"model": "jinaai/jina-embeddings-v3", "task": "retrieval.passage"},
            batch_size=4096,
            compute=ray.data.ActorPoolStrategy(size=8),
            num_gpus=1,
        )

    Args:
        model: As in `Embedder.load`.
        text_column: Column of the texts.
        output_column: Column to add.
        **options: `dtype` and `revision` of `Embedder.load`, and all options of `Embedder.encode`.
    """

    def __init__(
        self, model: str = "mini", text_column: str = "text", output_column: str = "embedding", **options: Any
    ) -> None:
        loading = {name: options.pop(name) for name in LOADING if name in options}
        self.embedder = Embedder.load(model, **loading)
        self.text_column, self.output_column, self.options = text_column, output_column, options

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Embed one batch.

        Args:
            batch: Columns of equal length, as `batch_format="numpy"` (the default) gives them.

        Returns:
            The same columns and that of the embeddings, [n, E].
        """
        return batch | {self.output_column: self.embedder.encode(batch[self.text_column].tolist(), **self.options)}
