"""Evaluation during training: the model as it is, by the tasks of a recipe."""

from typing import Any

import jax
import numpy as np

from jina_jax.embedder import Embedder
from jina_jax.eval.tasks import evaluate
from jina_jax.model import Model
from jina_jax.tokenizer import TrainingTokenizer
from jina_jax.train import plan, step
from jina_jax.train.partition import Parts, Tree, host, whole_set
from jina_jax.train.recipe import Data, Dataset, Phase, Recipe

# Texts of a batch in which perplexity is measured, at most.
PERPLEXITY_BATCH = 8


class Evaluator:
    """Measures a model by a recipe's tasks: a function of what trains.

    It takes nothing from the run: neither records nor random numbers. Programs are compiled once.
    """

    def __init__(self, recipe: Recipe, parts: Parts, tokenizer: TrainingTokenizer, mesh: jax.sharding.Mesh) -> None:
        self._recipe, self._parts, self._tokenizer, self._mesh = recipe, parts, tokenizer, mesh
        self._embedder: Embedder | None = None
        self._score = jax.jit(step.value, static_argnums=(0, 4, 5), static_argnames=("loss", "roles"))

    def __call__(self, trainable: Tree) -> dict[str, Any]:
        """Measure.

        Args:
            trainable: As `Parts.trainable`.

        Returns:
            "tasks": results by task, as `eval.tasks.evaluate` gives them; "score": the main one, the higher the
            better.
        """
        wanted = self._recipe.eval
        if not wanted.tasks:
            return {"tasks": {}, "score": None}
        model, variables = whole_set(self._recipe, self._parts, trainable)
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "remat": "none"}
        model = Model(model.config.replace(**quiet))
        if self._embedder is None:
            mesh = self._mesh if self._mesh.size > 1 else None
            self._embedder = Embedder(model, variables, self._tokenizer, mesh)
        else:
            self._embedder = self._embedder.with_variables(variables)
        dims = wanted.dims or model.config.matryoshka_dimensions
        dims = tuple(size for size in dims if size <= model.config.hidden_size)

        def perplexity(path: str) -> float:
            return self._perplexity(model, variables, path)

        tasks = evaluate(wanted.tasks, self._embedder, dims, perplexity)
        scores = {name: score(result) for name, result in tasks.items()}
        best = float(np.mean(list(scores.values()))) if wanted.best is None else scores[wanted.best]
        return {"tasks": tasks, "score": best}

    def _perplexity(self, model: Model, variables: Tree, path: str) -> float:
        """Perplexity of tokens of which the model sees only the others, masked alike in every evaluation."""
        longest = max(phase.max_length for phase in self._recipe.phases)
        data = Data((Dataset("perplexity", path, kind="text"),), by_language=False, index=self._recipe.data.index)

        def planned(batch: int) -> tuple[Recipe, Phase, plan.Plan]:
            phase = Phase("perplexity", 1, batch, longest, 0.0)
            recipe = self._recipe.replace(data=data, phases=(phase,), seed=0, stage="mlm")
            return recipe, phase, plan.make(recipe, phase, self._tokenizer, ("", ""), model.config.max_tokens)

        # As many at once as leave none over.
        count = planned(1)[2].records
        recipe, phase, one = planned(next(n for n in range(PERPLEXITY_BATCH, 0, -1) if count % n == 0))
        total = weights = 0.0
        for number in range(one.epoch):
            arrays = one.batch(number).arrays
            key, weight = jax.random.key(0), float(arrays["weights"].sum())
            loss, _ = self._score(model, variables, arrays, key, recipe, phase, loss="mlm", roles=(0,))
            total, weights = total + weight * float(host(loss)), weights + weight
        return float(np.exp(total / weights))


def score(result: dict[str, Any]) -> float:
    """The main number of a result at full size, the higher the better."""
    sizes = result["metrics"][result["main"]]
    best = sizes[max(sizes)]
    return -best if result["main"] == "perplexity" else best
