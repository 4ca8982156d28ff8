"""Gradients of whole losses through the model, against PyTorch, and what bfloat16 changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from numerics import EMBEDDING, GRADIENT, assert_close, assert_close_relative
from test_parity import as_original, draw_batch, torch_leaves
from torch_checkpoints import make_config, random_state, write_original

import jina_jax
from convert import reference
from jina_jax.checkpoint import flatten
from jina_jax.train import losses

# For programs that run once: they compile in half the time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
# Adapters alone: float32 against float64, relative to the largest component of all their gradients. Each tensor has its
# own size, but what is rounded on the way are activations, which all of them share.
ADAPTERS = 1e-6


def test_masked_words_equal_transformers(tmp_path):
    """T3: the loss and the gradient of every parameter of the model with its head."""
    from transformers import JinaEmbeddingsV3Config, JinaEmbeddingsV3ForMaskedLM

    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {"vocab_size": 120, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    theirs = JinaEmbeddingsV3ForMaskedLM(
        JinaEmbeddingsV3Config(
            **sizes,
            **rates,
            intermediate_size=128,
            max_position_embeddings=66,
            rope_parameters=rope,
            layer_norm_eps=1e-5,
        )
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            # No bias is zero and no scale is one, and scores are far from equal.
            parameter.copy_(torch.randn(parameter.shape) * 0.1 + ("norm" in name.lower() and name.endswith("weight")))
    theirs.save_pretrained(tmp_path)
    model, variables = jina_jax.load(tmp_path, mlm_head=True)
    assert model.config.rope_base == 10_000.0

    tokens, mask = draw_batch(0, 4, 24, 120)
    positions = np.stack([np.random.default_rng(0).permutation(np.flatnonzero(row))[:5] for row in mask]).astype(
        np.int32
    )
    targets = np.random.default_rng(9).integers(3, 120, (4, 5)).astype(np.int32)
    weights = np.ones((4, 5), np.float32)
    weights[1, 3:] = 0  # fewer words are masked than there is room for

    def loss(variables):
        hidden = model.apply(variables, tokens, mask).hidden
        told = jnp.take_along_axis(hidden, jnp.asarray(positions)[..., None], axis=1)
        features = model.apply(variables, told, method="mlm_features").reshape(20, 64)
        table, bias = variables["params"]["embed"]["words"]["embedding"], variables["params"]["mlm_head"]["bias"]
        return losses.mlm(features, table, bias, *(jnp.asarray(x.reshape(20)) for x in (targets, weights)), chunk=50)

    value, gradient = jit(jax.value_and_grad(loss))(variables)
    labels = np.full((4, 24), -100)
    for row, at in zip(*np.nonzero(weights), strict=True):
        labels[row, positions[row, at]] = targets[row, at]
    theirs = theirs.double().train()
    out = theirs(
        input_ids=torch.tensor(tokens).long(),
        attention_mask=torch.tensor(mask).long(),
        labels=torch.tensor(labels),
    )
    out.loss.backward()
    assert_close_relative(value, out.loss.detach().numpy(), EMBEDDING)

    gradient = jax.tree.map(np.asarray, flatten(gradient))
    compared = set()
    for path, (name, axes) in names(model.config.num_hidden_layers).items():
        leaf, _, layer = path.partition("@")
        ours = gradient[leaf][int(layer)] if layer else gradient[leaf]
        wanted = np.concatenate([theirs.get_parameter(one).grad.numpy() for one in name.split()])
        ours = np.transpose(ours.reshape(np.prod(ours.shape[:axes]), -1)).reshape(wanted.shape) if axes else ours
        assert_close_relative(ours.reshape(wanted.shape), wanted, GRADIENT)
        compared |= {leaf}
    assert compared == set(gradient)
    assert sum(len(name.split()) for name, _ in names(2).values()) == len(list(theirs.named_parameters()))


def names(layers):
    """Each parameter of ours (and @layer), theirs, and how many input axes a kernel has, which theirs has last."""
    table = {
        "embed/words/embedding": ("roberta.embeddings.word_embeddings.weight", 0),
        "embed/types/embedding": ("roberta.embeddings.token_type_embeddings.weight", 0),
        "embed/norm/scale": ("roberta.embeddings.LayerNorm.weight", 0),
        "embed/norm/bias": ("roberta.embeddings.LayerNorm.bias", 0),
        "mlm_head/dense/kernel": ("lm_head.dense.weight", 1),
        "mlm_head/dense/bias": ("lm_head.dense.bias", 0),
        "mlm_head/norm/scale": ("lm_head.layer_norm.weight", 0),
        "mlm_head/norm/bias": ("lm_head.layer_norm.bias", 0),
        "mlm_head/bias": ("lm_head.bias", 0),
    }
    for layer in range(layers):
        stem = f"roberta.layers.{layer}"
        for kind, leaf, axes in (("weight", "kernel", 1), ("bias", "bias", 0)):
            qkv = " ".join(f"{stem}.self_attn.{one}_proj.{kind}" for one in "qkv")
            table[f"layers/attention/qkv/{leaf}@{layer}"] = (qkv, axes)
            table[f"layers/attention/out/{leaf}@{layer}"] = (f"{stem}.self_attn.o_proj.{kind}", 2 * axes)
            table[f"layers/mlp/up/{leaf}@{layer}"] = (f"{stem}.mlp.fc1.{kind}", axes)
            table[f"layers/mlp/down/{leaf}@{layer}"] = (f"{stem}.mlp.fc2.{kind}", axes)
        for leaf, kind in (("scale", "weight"), ("bias", "bias")):
            table[f"layers/attention_norm/{leaf}@{layer}"] = (f"{stem}.post_attention_layernorm.{kind}", 0)
            table[f"layers/mlp_norm/{leaf}@{layer}"] = (f"{stem}.post_mlp_layernorm.{kind}", 0)
    return table


def test_adapters_learn_what_they_would_in_torch_and_merged(tmp_path):
    """T4: InfoNCE through queries' and passages' adapters; and one adapter folded into the weights beforehand."""
    config = make_config(vocab_size=120, num_hidden_layers=2)
    state = random_state(config, 0)
    model, variables = jina_jax.load(write_original(tmp_path / "m", state, config))
    assert model.config.lora_scale == 0.25
    tokens, mask = draw_batch(0, 8, 12, 120)
    tasks = np.array([0, 1] * 4, np.int32)

    @jit
    @jax.value_and_grad
    def factored(variables, tasks):
        vectors = model.apply(variables, tokens, mask, tasks).pooled
        return losses.info_nce(vectors[::2], vectors[1::2], tau=0.1)

    value, gradient = factored(variables, tasks)
    leaves = torch_leaves({name: tensor.double() for name, tensor in state.items()})
    given = (torch.tensor(x).long() for x in (tokens, mask, tasks))
    vectors = reference.embed(reference.forward(leaves, config, *given, dtype=torch.float64).pooled)
    logits, own = vectors[::2] @ vectors[1::2].T / 0.1, torch.arange(4)
    wanted = sum(torch.nn.functional.cross_entropy(one, own) for one in (logits, logits.T))
    wanted.backward()
    assert_close_relative(value, wanted.detach().numpy(), ADAPTERS)
    ours = as_original(gradient, model)
    lora = {name: leaf.grad.numpy() for name, leaf in leaves.items() if ".lora_" in name and "pooler" not in name}
    largest = max(np.abs(one).max() for one in lora.values())
    for name, one in lora.items():
        assert_close(ours[name], one, ADAPTERS * largest)
        assert [bool(factor.any()) for factor in ours[name]] == [True, True, False, False, False]

    @jit
    @jax.value_and_grad
    def merged(variables):
        folded = jina_jax.merge(variables, "separation", model.config)
        vectors = model.apply(folded, tokens, mask).pooled
        return losses.info_nce(vectors[::2], vectors[1::2], tau=0.1)

    task = np.full(8, model.config.task_id("separation"), np.int32)
    (one, ones), (other, others) = merged(variables), factored(variables, task)
    assert_close_relative(one, other, ADAPTERS)
    ones, others = flatten(ones), flatten(others)
    lora = [path for path in others if "/lora_" in path]
    largest = max(float(jnp.abs(others[path]).max()) for path in lora)
    assert largest > 0.1
    for path in lora:
        assert_close(ones[path], others[path], 2 * ADAPTERS * largest)  # both are rounded


def test_bfloat16_hardly_changes_a_loss(tiny):
    """T15: with activations and products in bfloat16, within 1e-2; similarities are not among them."""
    model, variables = tiny
    low = jina_jax.Model(model.config.replace(dtype="bfloat16"))
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 400, (16, 12)).astype(np.int32)
    tokens[8:, 3:] = tokens[:8, 3:]  # pairs are alike

    def loss(model, variables):
        vectors = model.apply(variables, tokens, task="text-matching").pooled
        assert vectors.dtype == jnp.float32
        return losses.info_nce(vectors[:8], vectors[8:], tau=0.05)

    exact, rounded = (float(jit(loss, static_argnums=0)(one, variables)) for one in (model, low))
    assert exact > 0.01
    assert 0 < abs(rounded - exact) <= 1e-2
    jaxpr = str(jax.make_jaxpr(loss, static_argnums=0)(low, variables))
    assert "bf16[8,8]" not in jaxpr
    assert "f32[8,8]" in jaxpr
