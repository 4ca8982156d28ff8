"""What trains and what does not, and how adapters come back into their model."""

import jax
import numpy as np
import pytest
from conftest import random_variables
from numerics import EMBEDDING, assert_close

import jina_jax
from jina_jax import checkpoint
from jina_jax.records import InputError
from jina_jax.train import partition, step
from jina_jax.train.recipe import Adapters, Init, Phase, Recipe

TOKENS = np.array([[0, 5, 6, 7, 2], [0, 9, 8, 2, 1]], np.int32)
MASK = TOKENS != 1
PHASE = Phase("one", 1, 8, 16, 1e-2)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model on disk whose every parameter is random, adapters included."""
    config = jina_jax.Config(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=66,
        matryoshka_dimensions=(8, 16),
        lora_rank=2,
    )
    model = jina_jax.Model(config)
    return jina_jax.save(tmp_path_factory.mktemp("base") / "model", model, random_variables(model))


@pytest.fixture(scope="module")
def mesh():
    return jina_jax.make_mesh(devices=jax.devices()[:1])


def recipe(base, **adapters):
    return Recipe("adapter", (PHASE,), init=Init(str(base)), adapters=Adapters(**adapters))


def embeddings(model, variables, task):
    return np.asarray(jax.jit(model.apply, static_argnums=3)(variables, TOKENS, MASK, task).embeddings)


def test_a_fresh_adapter_changes_nothing_yet(base, mesh):
    parts = partition.prepare(recipe(base, trains=("separation",)), mesh)
    variables = partition.assemble(parts.model, parts.trainable, parts.frozen)
    bare, adapted = (embeddings(parts.model, variables, task) for task in (None, "separation"))
    assert_close(adapted, bare, EMBEDDING)
    assert parts.model.config.tasks == ("separation",)
    assert set(parts.trainable) == {"separation"}


def test_fresh_adapters_are_spread_as_the_published_code_spreads_them(base):
    config = jina_jax.Config(tasks=("one",), prompts=("",), lora_rank=4, num_hidden_layers=2, vocab_size=3000)
    adapter = partition.fresh(config, jax.random.key(0))
    for path, inputs in (("attention/qkv", 1024), ("attention/out", 1024), ("mlp/up", 1024), ("mlp/down", 4096)):
        a, b = adapter[f"layers/{path}/lora_a"], adapter[f"layers/{path}/lora_b"]
        assert 0.99 < np.abs(a).max() * inputs**0.5 <= 1
        assert abs(a.std() * (3 * inputs) ** 0.5 - 1) < 0.02
        assert not b.any()
    assert not adapter["embed/words/lora_a"].any()
    assert abs(adapter["embed/words/lora_b"].std() - 1) < 0.05


def test_the_model_s_own_adapter_and_a_copy_of_another_are_where_it_can_start(base, mesh):
    model, variables = jina_jax.load(base)
    for start, task, like in (
        ("model", "separation", "separation"),
        ("classification", "mine", "classification"),
    ):
        parts = partition.prepare(recipe(base, trains=(task,), start=start), mesh)
        ours = partition.assemble(parts.model, parts.trainable, parts.frozen)
        assert_close(embeddings(parts.model, ours, task), embeddings(model, variables, like), EMBEDDING)
    with pytest.raises(InputError, match="has no adapter 'mine'; it has: retrieval"):
        partition.prepare(recipe(base, trains=("mine",), start="model"), mesh)


@pytest.mark.parametrize(
    ("trains", "rank"), [(("mine",), 1), (("retrieval.query", "retrieval.passage"), None), (("separation", "mine"), 3)]
)
def test_trained_adapters_take_their_places_and_nothing_else_moves(base, mesh, trains, rank):
    wanted = recipe(base, trains=trains, rank=rank, alpha=None if rank is None else 1.5)
    parts = partition.prepare(wanted, mesh)
    rng = np.random.default_rng(0)
    trained = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), parts.trainable)
    model, variables = partition.finish(wanted, parts, trained)

    ours = partition.assemble(parts.model, trained, parts.frozen)
    for task in trains:
        assert_close(embeddings(model, variables, task), embeddings(parts.model, ours, task), 2 * EMBEDDING)
    before, old = jina_jax.load(base)
    before, flat_before = before.config, checkpoint.flatten(old)
    flat = checkpoint.flatten(variables)
    kept = [task for task in before.tasks if task not in trains]
    assert model.config.tasks[:5] == before.tasks
    assert model.config.tasks[5:] == tuple(task for task in trains if task not in before.tasks)
    for path, value in flat_before.items():
        if "lora" not in path:
            np.testing.assert_array_equal(flat[path], value)
            continue
        value = np.asarray(value)
        axes = jina_jax.layouts.PARAMETERS[path].split()
        for task in kept:
            index = before.tasks.index(task)
            new = np.take(flat[path], index, axes.index("K"))
            at = [axis for axis in axes if axis != "K"].index("R")
            np.testing.assert_array_equal(
                np.take(new, range(before.lora_rank), at), np.take(value, index, axes.index("K"))
            )
            assert not np.take(new, range(before.lora_rank, new.shape[at]), at).any()


def test_two_tasks_can_share_one_adapter(base, mesh):
    wanted = recipe(base, trains=("retrieval.query", "retrieval.passage"), shared=True, instructions=False)
    parts = partition.prepare(wanted, mesh)
    assert len(parts.trainable) == 1
    trained = jax.tree.map(lambda x: np.ones(x.shape, np.float32), parts.trainable)
    model, variables = partition.finish(wanted, parts, trained)
    both = [embeddings(model, variables, task) for task in ("retrieval.query", "retrieval.passage")]
    np.testing.assert_array_equal(*both)
    assert model.config.prompts == ("",) * 5


def test_the_optimizer_holds_two_moments_of_what_trains_and_nothing_else(base, mesh):
    """T12: optimizer size = 2 x trainable."""
    wanted = recipe(base, trains=("separation",))
    parts = partition.prepare(wanted, mesh)
    state = step.start(step.optimizer(wanted.optim, PHASE), parts.trainable)
    moments = [x for x in jax.tree.leaves(state.optimizer) if x.ndim]
    assert sum(x.size for x in moments) == 2 * partition.count(parts.trainable)
    assert partition.count(parts.trainable) < partition.count(parts.frozen)


def test_a_backbone_trains_without_adapters_and_keeps_its_pooler(base, mesh):
    wanted = Recipe("pairs", (PHASE,), init=Init(str(base), rope_base=123.0, export_rope_base=456.0))
    parts = partition.prepare(wanted, mesh)
    assert parts.model.config.rope_base == 123.0
    assert not parts.frozen
    assert set(parts.aside) == {"pooler/kernel", "pooler/bias"}
    assert not any("lora" in path or "pooler" in path for path in parts.trainable)
    assert "adapters are left out" in parts.notes[0]
    model, variables = partition.finish(wanted, parts, jax.tree.map(partition.host, parts.trainable))
    before, old = jina_jax.load(base)
    assert model.config.rope_base == 456.0
    same = jina_jax.Model(model.config.replace(rope_base=before.config.rope_base))
    assert_close(embeddings(same, variables, None), embeddings(before, old, None), EMBEDDING)


def test_a_model_without_an_mlm_head_gets_one(base, mesh):
    parts = partition.prepare(Recipe("mlm", (PHASE,), init=Init(str(base))), mesh)
    assert "mlm_head/dense/kernel" in parts.trainable
    assert any("got a new one" in note for note in parts.notes)


def test_a_fingerprint_changes_with_a_bit_a_name_and_a_type():
    tree = {"a": np.arange(4, dtype=np.float32), "b": {"c": np.zeros(2, np.float32)}}
    same = {"b": {"c": np.zeros(2, np.float32)}, "a": np.arange(4, dtype=np.float32)}
    first = partition.fingerprint(tree)
    assert partition.fingerprint(same) == first
    for changed in (
        tree | {"a": np.nextafter(tree["a"], np.float32(9))},
        tree | {"a": tree["a"].astype(np.int32)},
        {"d": tree["a"], "b": tree["b"]},
    ):
        assert partition.fingerprint(changed) != first


def test_the_learning_rate_rises_and_falls_and_is_never_lost():
    phase, optim = Phase("one", 100, 8, 16, 2.0), step.Optim(warmup=0.1)
    for schedule in ("linear", "cosine", "constant"):
        rate = step.learning_rate(step.Optim(warmup=10.0, schedule=schedule), phase)
        values = np.array([float(rate(count)) for count in range(100)])
        assert np.argmax(values) == 9
        assert values[9] == pytest.approx(2.0)
        assert values.min() > 0
        np.testing.assert_allclose(np.diff(values[:10]), 0.2, rtol=1e-5)
        assert (np.diff(values[9:]) <= 0).all()
        assert values[-1] == pytest.approx(2.0) if schedule == "constant" else values[-1] < 0.03
    assert float(step.learning_rate(optim, phase)(9)) == pytest.approx(2.0)
