"""One step of training: a batch to a loss, its gradient, and the update."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from jina_jax import sharding
from jina_jax.model import Model
from jina_jax.train import grad_cache, losses
from jina_jax.train.partition import Tree, assemble
from jina_jax.train.recipe import Optim, Phase, Recipe

Arrays = Mapping[str, Any]


class State(NamedTuple):
    """What changes from step to step.

    Attributes:
        trainable: `Parts.trainable`.
        optimizer: The state of the optimizer.
    """

    trainable: Tree
    optimizer: Any


def learning_rate(optim: Optim, phase: Phase) -> optax.Schedule:
    """Learning rate by number of updates done: it rises to its highest value, then falls to nearly nothing.

    Neither the first nor the last update of a phase is lost on a rate of 0.

    Args:
        optim: The optimizer's settings.
        phase: The phase.

    Returns:
        A schedule for optax.
    """
    warmup = optim.warmup if optim.warmup >= 1 else optim.warmup * phase.steps
    rising = max(int(warmup), 1)
    falling = max(phase.steps - rising, 1)

    def rate(count: Any) -> Any:
        up = (count + 1) / rising
        past = jnp.clip((count + 1 - rising) / (falling + 1), 0.0, 1.0)
        down = {"linear": 1.0 - past, "cosine": 0.5 * (1 + jnp.cos(jnp.pi * past)), "constant": jnp.ones_like(past)}
        return phase.lr * jnp.minimum(up, down[optim.schedule])

    return rate


def optimizer(optim: Optim, phase: Phase) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, 2019); biases and norms have no weight decay.

    Args:
        optim: Its settings.
        phase: The phase.

    Returns:
        The transformation, to be used within `jax.numpy_dtype_promotion("standard")`.
    """

    def decays(tree: Tree) -> Tree:
        return jax.tree_util.tree_map_with_path(lambda path, _: not str(path[-1].key).endswith(("bias", "scale")), tree)

    clip = optax.identity() if optim.clip is None else optax.clip_by_global_norm(optim.clip)
    rate = learning_rate(optim, phase)
    adam = optax.adamw(rate, b1=optim.b1, b2=optim.b2, eps=optim.eps, weight_decay=optim.weight_decay, mask=decays)
    return optax.chain(clip, adam)


def start(optimizer: optax.GradientTransformation, trainable: Tree) -> State:
    """The state before the first step, moments beside the parameters that they belong to.

    Args:
        optimizer: The optimizer.
        trainable: The parameters.

    Returns:
        The state.
    """
    shapes = jax.eval_shape(optimizer.init, trainable)
    mesh = jax.tree.leaves(trainable)[0].sharding.mesh
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = optax.tree_utils.tree_map_params(
        optimizer, lambda _, like: like.sharding, shapes, trainable, transform_non_params=lambda _: whole
    )
    return State(trainable, jax.jit(optimizer.init, out_shardings=placed)(trainable))


def make(model: Model, recipe: Recipe, phase: Phase) -> Any:
    """The step of a phase.

    Args:
        model: `Parts.model`.
        recipe: The recipe.
        phase: The phase.

    Returns:
        A jitted function of a state, the frozen parameters, the arrays of a `batches.Batch` and the number of the
        step, with the keywords `loss`, `roles` and `in_batch` of the batch, to the next state and its metrics. An
        update that is not finite is left out; the metric "finite" says so. The state is donated.
    """
    update = optimizer(recipe.optim, phase)

    def step(
        state: State, frozen: Tree, arrays: Arrays, number: Array, *, loss: str, roles: tuple[int, ...], in_batch: bool
    ) -> tuple[State, dict[str, Array]]:
        # Of two settings of the random numbers' generator, every process and every resumed run has the same.
        key = jax.random.fold_in(jax.random.key(recipe.seed), number)

        def objective(trainable: Tree) -> tuple[Array, dict[str, Array]]:
            variables = assemble(model, trainable, frozen)
            return value(model, variables, arrays, key, recipe, phase, loss=loss, roles=roles, in_batch=in_batch)

        (total, metrics), gradient = jax.value_and_grad(objective, has_aux=True)(state.trainable)
        norm = optax.tree.norm(gradient)
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = update.update(gradient, state.optimizer, state.trainable)
            after = State(optax.apply_updates(state.trainable, updates), moments)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
        return after, {"loss": total, "gradient_norm": norm, "finite": finite, **metrics}

    return jax.jit(step, static_argnames=("loss", "roles", "in_batch"), donate_argnums=0)


def value(
    model: Model,
    variables: Tree,
    arrays: Arrays,
    key: Array,
    recipe: Recipe,
    phase: Phase,
    *,
    loss: str,
    roles: tuple[int, ...],
    in_batch: bool = True,
) -> tuple[Array, dict[str, Array]]:
    """The loss of a batch.

    Args:
        model: The model.
        variables: Its variables.
        arrays: Those of the batch.
        key: For dropout.
        recipe: The recipe.
        phase: The phase.
        loss: Which loss.
        roles: Of each text of a record, 0 for queries and 1 for passages.
        in_batch: Whether other records of the batch are negatives.

    Returns:
        The loss, and metrics by name.
    """
    if loss == "mlm":
        return _masked_language_modelling(model, variables, arrays, key, recipe, phase), {}
    vectors = embed(model, variables, arrays, key, phase.grad_cache, roles)
    settings = recipe.loss

    given: tuple[Array | None, ...] = (vectors[:, 0],)
    metrics: dict[str, Array] = {}
    one: Callable[..., Array]
    if loss == "info_nce":
        names = ("query_ids", "passage_ids", "negative_ids", "groups", "negative_groups")
        options: dict[str, Any] = {name: arrays[name] for name in names if name in arrays}
        options |= {
            "in_batch": in_batch,
            "margin": settings.margin if settings.false_negatives == "margin" else None,
            "chunk": settings.chunk,
        }
        negatives = None
        if vectors.shape[1] > 2:
            negatives, options["negative_mask"] = vectors[:, 2:], arrays["lengths"][:, 2:] > 0
        given = (vectors[:, 0], vectors[:, 1], negatives)
        how: dict[str, Any] = {
            "tau": phase.tau,
            "directions": settings.directions,
            "hardness": settings.hardness,
        }
        one = functools.partial(losses.info_nce, **options, **how)
        metrics = losses.info_nce_statistics(*jax.lax.stop_gradient(given), **options)
    elif loss == "cosent":
        given = (vectors[:, 0], vectors[:, 1])

        def one(a: Array, b: Array) -> Array:
            return losses.cosent(losses.cosine(a, b), arrays["scores"], tau=phase.tau)

    elif loss == "separation":
        one = functools.partial(losses.separation, labels=arrays["labels"], tau=phase.tau)
    else:
        each = "cosine" if settings.distill == "cosine" else "similarity_kl"
        one = functools.partial(losses.distill, teacher=arrays["teacher"], how=each, tau=phase.tau)

    # The teacher's vectors have but one size.
    dims = None if loss == "distill" and settings.distill == "cosine" else settings.dims
    weights = None if dims is None else settings.dim_weights
    total, parts = losses.matryoshka(one, dims, weights, settings.reduce)(*given)
    metrics |= {f"loss_{size}": part for size, part in parts.items()}
    if loss == "distill" and settings.distill == "both":
        apart = losses.distill(vectors[:, 0], arrays["teacher"], how="cosine")
        total, metrics = total + settings.cosine_weight * apart, metrics | {"loss_cosine": apart}
    if settings.gor:
        spread = losses.spread_out(vectors[:, 0])
        total, metrics = total + settings.gor * spread, metrics | {"spread_out": spread}
    return total, metrics


def embed(model: Model, variables: Tree, arrays: Arrays, key: Array, parts: int, roles: tuple[int, ...]) -> Array:
    """Means over the tokens of all texts of a batch, in parts, one after the other.

    Args:
        model: The model; queries have its first task, passages its last, or all of them none where it has none.
        variables: Its variables.
        arrays: Tokens [B, G, T] and lengths [B, G] of G texts for each record; or texts that share rows, as
            `packing.pack` has them.
        key: For dropout.
        parts: Number of parts.
        roles: As in `value`.

    Returns:
        Float32 [B, G, D]; zeros for texts that are not there.
    """
    B, G = arrays["lengths"].shape
    last = len(model.config.tasks) - 1

    def apply(tokens: Array, task: Array, key: Array, **layout: Any) -> Array:
        used = jnp.minimum(task, last) if last >= 0 else None
        num_texts = task.shape[1] if task.ndim == 2 else None
        options: Any = {"num_texts": num_texts, "train": True, "rngs": {"dropout": key}}
        out: Any = model.apply(variables, tokens, task=used, **layout, **options)
        return out.pooled

    if "segments" not in arrays:
        T = arrays["tokens"].shape[2]
        task = jnp.asarray(np.tile(np.array(roles, np.int32), B))

        def padded(rows: tuple[Array, Array, Array], key: Array) -> Array:
            tokens, lengths, task = rows
            return apply(tokens, task, key, mask=jnp.arange(T)[None] < lengths[:, None])

        rows = (arrays["tokens"].reshape(B * G, T), arrays["lengths"].reshape(B * G), task)
        return sharding.constrain(grad_cache.in_chunks(padded, rows, parts, key), "B _").reshape(B, G, -1)

    def packed(rows: tuple[Array, Array, Array], key: Array) -> Array:
        tokens, segments, task = rows
        return apply(tokens, task, key, segments=segments)

    rows = (arrays["tokens"], arrays["segments"], arrays["roles"])
    pooled = sharding.constrain(grad_cache.in_chunks(packed, rows, parts, key), "B _ _")
    # A text is in the rows of its record's group, and so on its device: nothing moves.
    groups = arrays["places"].shape[0]
    places = arrays["places"].reshape(groups, -1)
    pooled = pooled.reshape(groups, -1, pooled.shape[-1])
    vectors = jnp.take_along_axis(pooled, jnp.maximum(places, 0)[..., None], axis=1)
    vectors = jnp.where(places[..., None] < 0, 0.0, vectors)
    return sharding.constrain(vectors.reshape(B, G, -1), "B _ _")


def _masked_language_modelling(
    model: Model, variables: Tree, arrays: Arrays, key: Array, recipe: Recipe, phase: Phase
) -> Array:
    """Mean over all tokens to be told of the batch; each part of it scores its own."""
    table, bias = variables["params"]["embed"]["words"]["embedding"], variables["params"]["mlm_head"]["bias"]

    def encode(rows: Arrays, key: Array) -> Array:
        tokens, weights = rows["tokens"][:, 0], rows["weights"]
        mask = jnp.arange(tokens.shape[1])[None] < rows["lengths"]
        out: Any = model.apply(variables, tokens, mask, train=True, rngs={"dropout": key})
        told = jnp.take_along_axis(out.hidden, rows["positions"][..., None], axis=1)
        features: Any = model.apply(variables, told, method="mlm_features")
        mean = losses.mlm(
            features.reshape(-1, features.shape[-1]),
            table,
            bias,
            rows["targets"].reshape(-1),
            weights.reshape(-1),
            chunk=recipe.loss.vocab_chunk,
            words=model.config.vocab_size,
        )
        # A sum, given back as one number for each row because parts are put together by rows.
        return jnp.full((len(tokens),), mean * weights.sum() / len(tokens))

    names = ("tokens", "lengths", "positions", "targets", "weights")
    sums = grad_cache.in_chunks(encode, {name: arrays[name] for name in names}, phase.grad_cache, key)
    return sums.sum() / jnp.maximum(arrays["weights"].sum(), 1)
