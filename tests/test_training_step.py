"""What a step of adapter training costs, beside the form that folds the adapter into the weights first."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jina_jax
from jina_jax.train import partition, step
from jina_jax.train.recipe import Adapters, Init, Loss, Phase, Recipe

# So few tokens that weights, and not activations, are what a merged form pays for.
B, T = 8, 16
CONFIG = jina_jax.Config(
    vocab_size=4096,
    hidden_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=1024,
    max_position_embeddings=130,
    matryoshka_dimensions=(64, 256),
)
PHASE = Phase("one", 1, B, T, 1e-3)


def compiled(merged, **changes):
    """The program of a loss and its gradient."""
    config = CONFIG.replace(**changes)
    recipe = Recipe("adapter", (PHASE,), init=Init("mini", config), adapters=Adapters(("separation",)), dropout=0.0)
    parts = partition.prepare(recipe, jina_jax.make_mesh(devices=jax.devices()[:1]))
    ids = jnp.arange(B, dtype=jnp.int32)
    arrays = {
        "tokens": jnp.asarray(np.random.default_rng(0).integers(3, 4096, (B, 2, T)), jnp.int32),
        "lengths": jnp.full((B, 2), T, jnp.int32),
        "query_ids": ids,
        "passage_ids": ids,
        "groups": jnp.full(B, -1, jnp.int32),
    }
    value = functools.partial(step.value, loss="info_nce", roles=(0, 1))

    def loss(trainable, frozen):
        model, variables = parts.model, partition.assemble(parts.model, trainable, frozen)
        if merged:
            variables = jina_jax.merge(variables, "separation", model.config)
            model = jina_jax.Model(model.config.replace(tasks=(), prompts=()))
        return value(model, variables, arrays, jax.random.key(0), recipe, PHASE)[0]

    return jax.jit(jax.value_and_grad(loss)).lower(parts.trainable, parts.frozen).compile()


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        # The body of a loop is counted once: so that all layers are, there is none.
        (lambda program: program.cost_analysis()["flops"], {"unroll": 2}),
        (lambda program: program.memory_analysis().temp_size_in_bytes, {}),
    ],
    ids=["operations", "memory"],
)
def test_factored_adapters_cost_three_quarters_of_merged_ones_or_less(what, changes):
    factored, merged = (what(compiled(form, **changes)) for form in (False, True))
    assert factored <= 0.75 * merged, f"{factored / merged:.3f}"


def test_distillation_by_both_is_their_weighted_sum():
    config = CONFIG.replace(tasks=(), prompts=(), hidden_size=64, intermediate_size=128, num_hidden_layers=1)
    config = config.replace(matryoshka_dimensions=(16, 64))
    generator = np.random.default_rng(1)
    arrays = {
        "tokens": jnp.asarray(generator.integers(3, 4096, (B, 1, T)), jnp.int32),
        "lengths": jnp.full((B, 1), T, jnp.int32),
        "teacher": jnp.asarray(generator.standard_normal((B, 64)), jnp.float32),
    }

    def total(**loss):
        recipe = Recipe("distill", (PHASE,), init=Init("mini", config), loss=Loss(dims=(16, 64), **loss), dropout=0.0)
        parts = partition.prepare(recipe, jina_jax.make_mesh(devices=jax.devices()[:1]))
        variables = partition.assemble(parts.model, parts.trainable, parts.frozen)
        found, metrics = step.value(
            parts.model, variables, arrays, jax.random.key(0), recipe, PHASE, loss="distill", roles=(0,)
        )
        return float(found), metrics

    cosine, _ = total(distill="cosine")
    similarities, _ = total(distill="similarity_kl")
    both, metrics = total(distill="both", cosine_weight=3.0)
    assert min(cosine, similarities) > 0.1
    np.testing.assert_allclose(both, similarities + 3 * cosine, rtol=1e-5)
    np.testing.assert_allclose(float(metrics["loss_cosine"]), cosine, rtol=1e-5)
