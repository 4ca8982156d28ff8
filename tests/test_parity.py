"""Live parity with PyTorch: transformers' own model with PEFT adapters, and a restatement of the original one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import EMBEDDING, GRADIENT, HIDDEN, assert_close, assert_close_relative
from torch_checkpoints import make_config, random_mlm_head, random_state, write_hf, write_original

import jina_jax
from convert import hf_reference, reference
from jina_jax import TASKS
from jina_jax.checkpoint import as_stored, flatten
from jina_jax.layouts import ORIGINAL

configs = st.builds(
    lambda layers, heads, head_dim, rank, alpha, base: make_config(
        vocab_size=120,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_size=heads * head_dim,
        lora_rank=rank,
        lora_alpha=alpha,
        rotary_emb_base=base,
    ),
    layers=st.integers(1, 4),
    heads=st.integers(1, 4),
    head_dim=st.sampled_from([8, 16, 32, 64]),
    rank=st.sampled_from([1, 4, 8]),
    alpha=st.sampled_from([1, 4]),
    base=st.sampled_from([10_000.0, 20_000.0]),
)


def draw_batch(seed: int, rows: int, length: int, vocabulary: int):
    """Token ids, and a mask of any pattern with at least one valid token per row."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, vocabulary, (rows, length)).astype(np.int32)
    mask = rng.integers(0, 4, (rows, length)) > 0
    mask[np.arange(rows), rng.integers(0, length, rows)] = True
    return tokens, mask


@settings(max_examples=25)
@given(config=configs, seed=st.integers(0, 10_000), rows=st.integers(1, 4), length=st.integers(1, 40))
def test_equals_the_original(tmp_path_factory, config, seed, rows, length):
    state = random_state(config, seed)
    directory = write_original(tmp_path_factory.mktemp("original"), state, config)
    model, variables = jina_jax.load(directory)
    tokens, mask = draw_batch(seed, rows, length, config["vocab_size"])
    run = jax.jit(model.apply)
    tasks = np.random.default_rng(seed).integers(-1, len(TASKS), rows).astype(np.int32)
    for task in (tasks, *(np.full(rows, index, np.int32) for index in range(-1, len(TASKS)))):
        out = run(variables, tokens, mask, task)
        wanted = reference.forward(
            state, config, torch.tensor(tokens).long(), torch.tensor(mask).long(), torch.tensor(task).long()
        )
        assert_close(out.hidden, wanted.hidden.numpy(), HIDDEN, where=mask)
        assert_close(out.embeddings, reference.embed(wanted.pooled).numpy(), EMBEDDING)


@settings(max_examples=20)
@given(config=configs, seed=st.integers(0, 10_000), rows=st.integers(1, 4), length=st.integers(1, 40))
def test_equals_transformers_with_peft(tmp_path_factory, config, seed, rows, length):
    directory = write_hf(tmp_path_factory.mktemp("hf"), random_state(config, seed), config)
    theirs = hf_reference.load_hf(directory)
    model, variables = jina_jax.load(directory)
    tokens, mask = draw_batch(seed, rows, length, config["vocab_size"])
    run = jax.jit(model.apply)
    for task in (None, *TASKS):
        with torch.no_grad():
            hidden, pooler = hf_reference.run_hf(theirs, torch.tensor(tokens).long(), torch.tensor(mask).long(), task)
        out = run(variables, tokens, mask, model.config.task_ids([task] * rows))
        assert_close(out.hidden, hidden.numpy(), HIDDEN, where=mask)
        actual = model.apply(variables, hidden.numpy(), task, method="pooler_output")
        assert_close(actual, pooler.numpy(), HIDDEN)


def as_original(tree: dict, model: jina_jax.Model) -> dict[str, np.ndarray]:
    """Parameters, or their gradients, under the names and axes of the original layout."""
    return {f"roberta.{name}": tensor for name, tensor in as_stored(flatten(tree), model.config, ORIGINAL)}


def torch_leaves(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone().requires_grad_() for name, tensor in state.items()}


def test_gradients_of_the_adapters_equal_torchs(tmp_path):
    config = make_config(vocab_size=120, num_hidden_layers=2)
    state = random_state(config, 0)
    model, variables = jina_jax.load(write_original(tmp_path / "m", state, config))
    tokens, mask = draw_batch(0, 5, 20, 120)
    tasks = np.array([0, 4, -1, 2, 2], np.int32)
    probe = np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32)

    loss = lambda v: (model.apply(v, tokens, mask, tasks).embeddings * probe).sum()  # noqa: E731
    ours = as_original(jax.jit(jax.grad(loss))(variables), model)

    # In float64, so that the judge's own rounding does not count.
    leaves = torch_leaves({name: tensor.double() for name, tensor in state.items()})
    result = reference.forward(
        leaves,
        config,
        torch.tensor(tokens).long(),
        torch.tensor(mask).long(),
        torch.tensor(tasks).long(),
        dtype=torch.float64,
    )
    (reference.embed(result.pooled) * torch.tensor(probe).double()).sum().backward()
    for name, leaf in leaves.items():
        if "pooler" not in name:
            assert_close_relative(ours[name], leaf.grad.numpy(), GRADIENT)
    used = np.abs(ours["roberta.encoder.layers.0.mixer.Wqkv.parametrizations.weight.0.lora_B"]).max(axis=(1, 2))
    np.testing.assert_array_equal(used > 0, [True, False, True, False, True])


def test_gradients_of_the_mlm_loss_equal_torchs(tmp_path):
    config = make_config(vocab_size=120, num_hidden_layers=2)
    state, head = random_state(config, 0), random_mlm_head(config, 1)
    model, variables = jina_jax.load(write_original(tmp_path / "m", state, config))
    model = jina_jax.Model(model.config.replace(mlm_head=True))
    params = {name: tensor.numpy() for name, tensor in head.items()}
    variables["params"]["mlm_head"] = {
        "dense": {"kernel": params["lm_head.dense.weight"].T, "bias": params["lm_head.dense.bias"]},
        "norm": {"scale": params["lm_head.layer_norm.weight"], "bias": params["lm_head.layer_norm.bias"]},
        "bias": params["lm_head.bias"],
    }
    variables = jax.tree.map(jnp.asarray, variables)
    tokens, mask = draw_batch(0, 4, 20, 120)
    rng = np.random.default_rng(2)
    positions, labels = rng.integers(0, 20, (4, 3)), rng.integers(3, 120, (4, 3))

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradient(variables):
        hidden = model.apply(variables, tokens, mask).hidden
        gathered = jnp.take_along_axis(hidden, jnp.asarray(positions, jnp.int32)[:, :, None], axis=1)
        logits = jax.nn.log_softmax(model.apply(variables, gathered, method="mlm_logits"))
        return -jnp.take_along_axis(logits, jnp.asarray(labels, jnp.int32)[:, :, None], axis=2).mean()

    loss, gradient = loss_and_gradient(variables)
    leaves = torch_leaves({name: tensor.double() for name, tensor in (state | head).items()})
    hidden = reference.forward(
        leaves, config, torch.tensor(tokens).long(), torch.tensor(mask).long(), dtype=torch.float64
    ).hidden
    gathered = torch.gather(hidden, 1, torch.tensor(positions)[:, :, None].expand(-1, -1, hidden.shape[-1]))
    table = leaves["roberta.embeddings.word_embeddings.parametrizations.weight.original"]
    head_leaves = {name: leaf for name, leaf in leaves.items() if name.startswith("lm_head")}
    logits = reference.mlm_logits(head_leaves, table, gathered, eps=config["layer_norm_eps"])
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(labels).flatten())
    wanted.backward()

    assert_close_relative(loss, wanted.detach().numpy(), EMBEDDING)
    heads = gradient["params"].pop("mlm_head")
    ours = as_original(gradient, model) | {
        "lm_head.dense.weight": heads["dense"]["kernel"].T,
        "lm_head.dense.bias": heads["dense"]["bias"],
        "lm_head.layer_norm.weight": heads["norm"]["scale"],
        "lm_head.layer_norm.bias": heads["norm"]["bias"],
        "lm_head.bias": heads["bias"],
    }
    compared = 0
    for name, leaf in leaves.items():
        if leaf.grad is not None and "pooler" not in name and "lora" not in name:
            assert_close_relative(ours[name], leaf.grad.numpy(), GRADIENT)
            compared += 1
    assert compared == 4 + 12 * 2 + 5


REAL_WIDTH = {
    "vocab_size": 1000,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "max_position_embeddings": 8194,
}


@pytest.fixture(scope="module")
def real_width(tmp_path_factory):
    """A random checkpoint of the real width and depth with a small vocabulary, stored in bfloat16 as the real one."""
    config = make_config(**REAL_WIDTH)
    state = random_state(config, 0, torch.bfloat16)
    return config, state, write_original(tmp_path_factory.mktemp("real_width"), state, config)


@pytest.mark.slow
def test_real_width_equals_the_original(real_width):
    config, state, directory = real_width
    tokens, mask = draw_batch(0, 3, 48, 1000)
    tasks = np.array([0, -1, 4], np.int32)
    model, variables = jina_jax.load(directory)
    out = jax.jit(model.apply)(variables, tokens, mask, tasks)
    with torch.no_grad():
        wanted = reference.forward(
            state,
            config,
            torch.tensor(tokens).long(),
            torch.tensor(mask).long(),
            torch.tensor(tasks).long(),
            dtype=torch.float64,
        )
    assert_close(out.hidden, wanted.hidden.numpy(), HIDDEN, where=mask)
    assert_close(out.embeddings, reference.embed(wanted.pooled).numpy(), EMBEDDING)


@pytest.mark.slow
@pytest.mark.parametrize("task", [None, "retrieval.passage"])
def test_bfloat16_at_real_width_is_as_close_to_the_truth_as_torchs(real_width, task):
    from numerics import BFLOAT16_FACTOR

    config, state, directory = real_width
    tokens, mask = draw_batch(1, 4, 64, 1000)
    ids, valid = torch.tensor(tokens).long(), torch.tensor(mask).long()

    def run(dtype):
        with torch.no_grad():
            result = reference.forward(state, config, ids, valid, task, dtype=dtype)
        return result.hidden.double().numpy(), reference.embed(result.pooled).double().numpy()

    hidden, embeddings = run(torch.float64)
    theirs = run(torch.bfloat16)
    model, variables = jina_jax.load(directory, dtype="bfloat16")
    out = jax.jit(model.apply)(variables, tokens, mask, model.config.task_ids([task] * 4))

    def error(actual, exact, where=...):
        difference = (np.asarray(actual, np.float64) - exact)[where]
        assert np.isfinite(difference).all()
        return np.sqrt(np.square(difference).mean())

    assert error(out.hidden, hidden, mask) <= BFLOAT16_FACTOR * error(theirs[0], hidden, mask)
    assert error(out.embeddings, embeddings) <= BFLOAT16_FACTOR * error(theirs[1], embeddings)
