"""What must hold whatever the weights are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_variables
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import EMBEDDING, GRADIENT, HIDDEN, MERGED, assert_close, assert_close_relative

import jina_jax
from jina_jax import TASKS, Model
from jina_jax.model import Block

# Rows and lengths are drawn; the arrays have one shape, so that each law compiles once.
ROWS, LENGTH = 4, 24


@pytest.fixture(scope="module")
def run(tiny):
    model, _ = tiny
    return jax.jit(model.apply, static_argnames=("num_texts",))


def draw(seed, rows=ROWS, length=LENGTH):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, 400, (rows, length)).astype(np.int32)
    lengths = rng.integers(1, length + 1, rows)
    mask = np.arange(length)[None] < lengths[:, None]
    task = rng.integers(-1, len(TASKS), rows).astype(np.int32)
    return rng, tokens, mask, task, lengths


@given(seed=st.integers(0, 10_000))
def test_what_stands_in_padding_changes_nothing(tiny, run, seed):
    rng, tokens, mask, task, _ = draw(seed)
    mask = rng.permuted(mask, axis=1)  # any pattern, holes included
    other = np.where(mask, tokens, rng.integers(3, 400, tokens.shape)).astype(np.int32)
    first, second = (run(tiny[1], t, mask, task) for t in (tokens, other))
    np.testing.assert_array_equal(np.asarray(first.hidden)[mask], np.asarray(second.hidden)[mask])
    np.testing.assert_array_equal(first.embeddings, second.embeddings)


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000))
def test_the_bucket_changes_nothing(tiny, run, seed):
    rng, tokens, mask, task, _ = draw(seed)
    extra = 8 * int(rng.integers(1, 3))
    wide = np.pad(tokens, ((0, 0), (0, extra)), constant_values=1)
    first = run(tiny[1], tokens, mask, task)
    second = run(tiny[1], wide, np.pad(mask, ((0, 0), (0, extra))), task)
    assert_close(np.asarray(second.hidden)[:, :LENGTH], first.hidden, HIDDEN, where=mask)
    assert_close(second.embeddings, first.embeddings, EMBEDDING)


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000))
def test_left_padding_equals_right_padding(tiny, run, seed):
    _, tokens, mask, task, lengths = draw(seed)
    right = run(tiny[1], tokens, mask, task)
    left_tokens, left_mask = tokens.copy(), mask.copy()
    for row, length in enumerate(lengths):
        left_tokens[row] = np.roll(tokens[row], LENGTH - length)
        left_mask[row] = np.roll(mask[row], LENGTH - length)
    assert_close(run(tiny[1], left_tokens, left_mask, task).embeddings, right.embeddings, EMBEDDING)


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000))
def test_a_batch_equals_its_rows(tiny, run, seed):
    _, tokens, mask, task, _ = draw(seed)
    batch = run(tiny[1], tokens, mask, task)
    for row in range(ROWS):
        single = run(tiny[1], tokens[row : row + 1], mask[row : row + 1], task[row : row + 1])
        assert_close(single.hidden[0], batch.hidden[row], HIDDEN, where=mask[row])
        assert_close(single.embeddings[0], batch.embeddings[row], EMBEDDING)


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000))
def test_packed_equals_separate(tiny, run, seed):
    rng, tokens, mask, task, lengths = draw(seed)
    separate = run(tiny[1], tokens, mask, task)
    # All texts one after the other in two rows, in any order, with padding between and after them.
    row_length, places = 2 * LENGTH + 8, 3
    packed = np.full((2, row_length), 1, np.int32)
    segments, packed_task = np.zeros((2, row_length), np.int32), np.full((2, places), -1, np.int32)
    where = {}
    for row, texts in enumerate(np.split(rng.permutation(ROWS), 2)):
        start = 0
        for place, text in enumerate(texts):
            start += int(rng.integers(0, 4))
            span = slice(start, start + int(lengths[text]))
            packed[row, span], segments[row, span] = tokens[text, : lengths[text]], place + 1
            packed_task[row, place], where[text] = task[text], (row, place, span)
            start = span.stop
    out = run(tiny[1], packed, task=packed_task, segments=segments)
    for text, (row, place, span) in where.items():
        assert_close(out.embeddings[row, place], separate.embeddings[text], EMBEDDING)
        assert_close(out.hidden[row, span], separate.hidden[text, : lengths[text]], HIDDEN)
    np.testing.assert_array_equal(out.embeddings[:, 2], 0)  # nobody lives there


def test_one_packed_text_equals_a_mask(tiny):
    _, tokens, mask, _, _ = draw(0)
    masked = tiny[0].apply(tiny[1], tokens, mask, "separation")
    packed = tiny[0].apply(tiny[1], tokens, task="separation", segments=mask.astype(np.int32), num_texts=1)
    assert_close(packed.embeddings[:, 0], masked.embeddings, EMBEDDING)


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000))
def test_mixed_tasks_equal_each_alone(tiny, run, seed):
    _, tokens, mask, task, _ = draw(seed)
    mixed = run(tiny[1], tokens, mask, task)
    for row, index in enumerate(task):
        alone = run(tiny[1], tokens, mask, np.full(ROWS, index, np.int32))
        np.testing.assert_array_equal(mixed.hidden[row], alone.hidden[row])


@pytest.mark.parametrize("task", TASKS)
def test_a_name_is_its_index(tiny, run, task):
    _, tokens, mask, _, _ = draw(0)
    index = np.full(ROWS, TASKS.index(task), np.int32)
    named = tiny[0].apply(tiny[1], tokens, mask, task)
    assert_close(named.hidden, run(tiny[1], tokens, mask, index).hidden, HIDDEN)
    bare = run(tiny[1], tokens, mask)
    assert np.abs(np.asarray(named.embeddings) - np.asarray(bare.embeddings)).max() > 1e-2  # adapters matter


def test_minus_one_equals_none_equals_adapters_of_zero(tiny, run):
    _, tokens, mask, task, _ = draw(0)
    _, variables = tiny
    bare = run(variables, tokens, mask)
    assert_close(run(variables, tokens, mask, np.full(ROWS, -1, np.int32)).hidden, bare.hidden, 2e-6)
    zero = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if path[-1].key == "lora_b" else leaf, variables
    )
    assert_close(run(zero, tokens, mask, task).hidden, bare.hidden, 2e-6)


@pytest.mark.parametrize("task", [*TASKS, 3])
def test_merged_equals_factored(tiny, run, task):
    model, variables = tiny
    _, tokens, mask, _, _ = draw(1)
    merged = jina_jax.merge(variables, task, model.config)
    assert not any("lora" in str(path) for path, _ in jax.tree_util.tree_flatten_with_path(merged)[0])
    index = np.full(ROWS, task if isinstance(task, int) else TASKS.index(task), np.int32)
    factored = run(variables, tokens, mask, index)
    # Hidden values reach 4, embeddings stay below 1: the bound is for the latter.
    assert_close(model.apply(merged, tokens, mask).embeddings, factored.embeddings, MERGED)
    assert_close(model.apply(merged, tokens, mask).hidden, factored.hidden, HIDDEN, where=mask)


def test_merge_refuses_what_the_configuration_does_not_say(tiny):
    _, variables = tiny
    with pytest.raises(ValueError, match="unknown task"):
        jina_jax.merge(variables, "query")
    with pytest.raises(ValueError, match="pass config="):
        jina_jax.merge(variables, 0, jina_jax.Config(lora_rank=8))


def test_the_scan_equals_a_loop(tiny, run):
    model, variables = tiny
    _, tokens, mask, task, _ = draw(2)
    whole, collected = model.apply(variables, tokens, mask, task, mutable=["intermediates"])
    x = collected["intermediates"]["embedded"][0]
    adapters = jax.nn.one_hot(task[:, None], len(TASKS))
    rope = model._rope(LENGTH, None)
    segments = jnp.asarray(mask, jnp.int32)
    for layer in range(model.config.num_hidden_layers):
        params = jax.tree.map(lambda leaf: leaf[layer], variables["params"]["layers"])  # noqa: B023
        x, _ = Block(model.config).apply({"params": params}, x, segments, rope, adapters, False)
    assert_close(x, whole.hidden, HIDDEN, where=mask)
    unrolled = Model(model.config.replace(unroll=3)).apply(variables, tokens, mask, task)
    assert_close(unrolled.hidden, whole.hidden, HIDDEN, where=mask)


@pytest.mark.parametrize("remat", ["full", "dots", "names"])
def test_rematerialised_equals_plain(tiny, remat):
    model, variables = tiny
    _, tokens, mask, task, _ = draw(3)

    def gradients(model):
        def loss(variables):
            out = model.apply(variables, tokens, mask, task, train=True, rngs={"dropout": jax.random.key(0)})
            return jnp.square(out.embeddings[:, :7]).sum()

        return jax.jit(jax.value_and_grad(loss))(variables)

    loss, plain = gradients(model)
    other, actual = gradients(Model(model.config.replace(remat=remat)))
    assert_close(other, loss, EMBEDDING)
    jax.tree.map(lambda x, y: assert_close_relative(x, y, GRADIENT), actual, plain)


@pytest.mark.parametrize("attention", ["reference", "blockwise"])
def test_implementations_of_attention_agree_within_the_model(tiny, run, attention):
    model, variables = tiny
    _, tokens, mask, task, _ = draw(4)
    out = Model(model.config.replace(attention=attention)).apply(variables, tokens, mask, task)
    assert_close(out.hidden, run(variables, tokens, mask, task).hidden, HIDDEN, where=mask)


def test_token_types_are_looked_up(tiny):
    model, _ = tiny
    wide = Model(model.config.replace(type_vocab_size=2))
    variables = random_variables(wide)
    _, tokens, mask, _, _ = draw(5)
    zeros = wide.apply(variables, tokens, mask, token_types=np.zeros_like(tokens))
    assert_close(zeros.hidden, wide.apply(variables, tokens, mask).hidden, HIDDEN)
    ones = wide.apply(variables, tokens, mask, token_types=np.ones_like(tokens))
    assert np.abs(np.asarray(ones.embeddings) - np.asarray(zeros.embeddings)).max() > 1e-3
