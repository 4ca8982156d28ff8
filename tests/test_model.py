"""The model against the goldens, its interface, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import EMBEDDING, HIDDEN, assert_close

import jina_jax
from jina_jax import TASKS, Config, Model

LAYOUTS = ("original", "original_bf16", "hf", "hf_bf16", "native_new", "native_saved")


@functools.cache
def goldens(data):
    return dict(np.load(data / "tiny_checkpoints" / "goldens.npz"))


def key_of(task):
    return "none" if task is None else task.replace(".", "_").replace("-", "_")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_matches_the_goldens(data, layout):
    model, variables = jina_jax.load(data / "tiny_checkpoints" / layout)
    golden = goldens(data)
    prefix = "bf16_weights/" if layout.endswith("bf16") else ""
    tokens, mask = golden["ids"].astype(np.int32), golden["mask"]
    valid = mask > 0
    run = jax.jit(model.apply)
    for task in (None, *TASKS):
        out = run(variables, tokens, mask, model.config.task_ids([task] * len(tokens)))
        expected = golden[f"{prefix}{key_of(task)}/last_hidden_state_f64"]
        assert_close(out.hidden, expected, HIDDEN, where=valid)
        # In float64 from here: the mean over valid tokens, at unit length.
        mean = (expected * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
        assert_close(out.embeddings, mean / np.linalg.norm(mean, axis=-1, keepdims=True), EMBEDDING)
        if not prefix:
            assert_close(out.embeddings, golden[f"{key_of(task)}/embedding_f64"], EMBEDDING)
            small = jina_jax.truncate(out.embeddings, 16)
            assert_close(small, golden[f"{key_of(task)}/embedding_dim16_f64"], EMBEDDING)
            pooler = model.apply(variables, out.hidden, task, method="pooler_output")
            assert_close(pooler, golden[f"{key_of(task)}/pooler_output"], HIDDEN)


@pytest.mark.parametrize("layout", ["original", "hf"])
def test_the_mixed_batch_the_left_mask_and_every_layer_match_the_goldens(data, layout):
    model, variables = jina_jax.load(data / "tiny_checkpoints" / layout)
    golden = goldens(data)
    valid = golden["mask"] > 0
    tokens, mask = golden["ids"].astype(np.int32), golden["mask"]

    out = model.apply(variables, tokens, mask, golden["mixed/tasks"].astype(np.int32))
    assert_close(out.hidden, golden["mixed/last_hidden_state_f64"], HIDDEN, where=valid)

    for task in (None, *TASKS):
        out = model.apply(variables, golden["ids_l"].astype(np.int32), golden["mask_l"], task)
        expected = golden[f"{key_of(task)}/last_hidden_state_l_f64"]
        assert_close(out.hidden, expected, HIDDEN, where=golden["mask_l"] > 0)

    _, collected = model.apply(variables, tokens, mask, "retrieval.query", mutable=["intermediates"])
    layers = collected["intermediates"]["layers"]["hidden"][0]
    embedded = collected["intermediates"]["embedded"][0]
    for i, actual in enumerate((embedded, *layers)):
        assert_close(actual, golden[f"retrieval_query/hidden_{i}_f64"], HIDDEN, where=valid)


def test_one_compilation_serves_every_mixture_of_tasks_and_masks(tiny):
    model, variables = tiny
    compilations = 0

    @jax.jit
    def run(variables, tokens, mask, task):
        nonlocal compilations
        compilations += 1
        return model.apply(variables, tokens, mask, task).embeddings

    rng = np.random.default_rng(0)
    for _ in range(8):
        tokens = rng.integers(3, 400, (4, 12)).astype(np.int32)
        run(variables, tokens, rng.integers(0, 2, (4, 12)).astype(bool), rng.integers(-1, 5, 4).astype(np.int32))
    assert compilations == 1
    assert run._cache_size() == 1


def test_one_compilation_serves_every_packing(tiny):
    model, variables = tiny
    run = jax.jit(lambda *a, **k: model.apply(*a, **k).embeddings)
    rng = np.random.default_rng(0)
    for _ in range(4):
        segments = np.sort(rng.integers(0, 4, (2, 12)))[:, ::-1].astype(np.int32)
        tokens, task = rng.integers(3, 400, (2, 12)).astype(np.int32), rng.integers(-1, 5, (2, 3)).astype(np.int32)
        assert run(variables, tokens, task=task, segments=segments).shape == (2, 3, 64)
    assert run._cache_size() == 1


def test_adapters_for_a_mixed_batch_add_at_most_five_percent_of_the_work():
    config = Config(vocab_size=1000)  # real width and depth; the table's size is no matter for the work
    model = Model(config)
    tokens = jax.ShapeDtypeStruct((4, 128), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)

    def flops(task):
        # A scan's body is counted once, in both cases.
        run = lambda v, t, *task: model.apply(v, t, None, *task).embeddings  # noqa: E731
        return jax.jit(run).lower(variables, tokens, *task).compile().cost_analysis()["flops"]

    without, mixed = flops(()), flops((jax.ShapeDtypeStruct((4,), jnp.int32),))
    assert 1.0 < mixed / without <= 1.05, mixed / without


def test_dropout_is_on_in_training_alone_and_follows_its_key(tiny):
    model, variables = tiny
    tokens = np.arange(3, 23, dtype=np.int32).reshape(2, 10)

    def run(key=None, **options):
        rngs = None if key is None else {"dropout": jax.random.key(key)}
        return np.asarray(model.apply(variables, tokens, None, "separation", rngs=rngs, **options).embeddings)

    np.testing.assert_array_equal(run(), run())
    np.testing.assert_array_equal(run(0, train=True), run(0, train=True))
    assert np.abs(run(0, train=True) - run(1, train=True)).max() > 1e-2
    assert np.abs(run(0, train=True) - run()).max() > 1e-2
    still = Model(model.config.replace(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    out = still.apply(variables, tokens, None, "separation", train=True, rngs={"dropout": jax.random.key(0)})
    assert_close(out.embeddings, run(), EMBEDDING)


def test_it_is_pure_and_nests_in_transformations(tiny):
    model, variables = tiny
    tokens = np.arange(3, 33, dtype=np.int32).reshape(3, 10)
    plain = model.apply(variables, tokens, None, np.array([0, -1, 4], np.int32))
    jitted = jax.jit(model.apply)(variables, tokens, None, np.array([0, -1, 4], np.int32))
    assert_close(jitted.hidden, plain.hidden, HIDDEN)
    rows = jax.vmap(lambda t, k: model.apply(variables, t[None], None, k[None]).embeddings[0])(
        jnp.asarray(tokens), jnp.asarray([0, -1, 4])
    )
    assert_close(rows, plain.embeddings, EMBEDDING)
    loss = lambda v: model.apply(v, tokens, None, "separation").embeddings[0, 0]  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(variables)
    assert jax.tree.structure(gradient) == jax.tree.structure(variables)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(gradient))
    # Only the adapter in use gets a gradient.
    table = np.asarray(gradient["params"]["layers"]["mlp"]["up"]["lora_b"])
    assert np.abs(table[:, 2]).max() > 0
    assert np.abs(np.delete(table, 2, axis=1)).max() == 0


def test_types_of_computation_and_of_parameters(tiny):
    model, variables = tiny
    tokens = np.arange(3, 23, dtype=np.int32).reshape(2, 10)
    exact = model.apply(variables, tokens)
    narrow = Model(model.config.replace(dtype="bfloat16"))
    out = narrow.apply(variables, tokens)
    assert out.hidden.dtype == jnp.bfloat16
    assert out.embeddings.dtype == out.pooled.dtype == jnp.float32
    assert 0 < np.abs(np.asarray(out.embeddings) - np.asarray(exact.embeddings)).max() < 2e-2
    small = Model(model.config.replace(param_dtype="bfloat16"))
    assert small.init(jax.random.key(0), tokens)["params"]["pooler"]["kernel"].dtype == jnp.bfloat16
    assert small.apply(variables, tokens).hidden.dtype == jnp.float32


def test_a_text_without_tokens_embeds_to_zero_with_a_finite_gradient(tiny):
    model, variables = tiny
    tokens = np.full((2, 6), 7, np.int32)
    mask = np.array([[1, 1, 1, 0, 0, 0], [0] * 6])
    out = model.apply(variables, tokens, mask)
    np.testing.assert_array_equal(out.embeddings[1], 0)
    assert np.isfinite(np.asarray(out.hidden)).all()
    gradient = jax.grad(lambda v: model.apply(v, tokens, mask).embeddings.sum())(variables)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(gradient))


def test_a_token_beyond_the_vocabulary_is_not_another_token(tiny):
    model, variables = tiny
    out = model.apply(variables, np.array([[3, 400, 5]], np.int32))
    assert np.isnan(np.asarray(out.embeddings)).all()


ROW = np.full((2, 6), 7, np.int32)
PACKED = np.array([[1, 1, 2, 2, 0, 0]] * 2, np.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "query"}, r"unknown task 'query'; this model has: retrieval\.query"),
        ({"task": np.array([0, 5], np.int32)}, r"task ids \[5\] are out of range; .* 4 text-matching"),
        ({"task": np.array([0, -2], np.int32)}, r"task ids \[-2\] are out of range"),
        ({"task": np.array([0, 1, 2], np.int32)}, r"task has shape \(3,\); expected \[B\] with B = 2"),
        ({"task": np.array([[0], [1]], np.int32)}, r"task has shape \(2, 1\)"),
        ({"task": np.array([0.0, 1.0], np.float32)}, "None, a name or integers|task"),
        ({"segments": PACKED}, "packed rows need both segments and num_texts"),
        ({"num_texts": 2}, "packed rows need both segments and num_texts"),
        ({"segments": PACKED, "num_texts": 2, "mask": PACKED}, "mask or segments, not both"),
        ({"segments": PACKED, "num_texts": 3, "task": np.zeros((2, 2), np.int32)}, "task has room for 2 texts"),
    ],
)
def test_contradictions_are_named(tiny, arguments, message):
    model, variables = tiny
    with pytest.raises(Exception, match=message) as error:
        model.apply(variables, ROW, **arguments)
    assert isinstance(error.value, ValueError | TypeError)


def test_parts_that_are_not_there_are_named(tiny):
    model, variables = tiny
    bare = Model(model.config.replace(pooler=False, mlm_head=False))
    hidden = jnp.zeros((1, 3, 64))
    with pytest.raises(ValueError, match="no pooler"):
        bare.apply(variables, hidden, method="pooler_output")
    with pytest.raises(ValueError, match="no MLM head"):
        bare.apply(variables, hidden, method="mlm_logits")
    merged = jina_jax.merge(variables, "separation", model.config)
    with pytest.raises(ValueError, match="hold no adapters"):
        model.apply(merged, ROW, None, "separation")
    without = Model(model.config.replace(tasks=(), prompts=()))
    with pytest.raises(ValueError, match="no adapters"):
        without.apply(merged, ROW, None, "separation")
