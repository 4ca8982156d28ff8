"""Texts that share rows in training: nothing is lost, nothing moves between devices, and the loss is the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_close_relative

import jina_jax
from jina_jax.tokenizer import load_tokenizer
from jina_jax.train import packing, partition, plan, step
from jina_jax.train.packing import Split


@given(st.data())
def test_every_text_has_a_place_of_its_own_and_rows_have_room(data):
    devices, parts = data.draw(st.sampled_from([(1, 1), (2, 1), (4, 2), (8, 3)]))
    size = devices * data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    lengths = np.array(data.draw(st.lists(st.integers(0, 60), min_size=size[0] * size[1], max_size=size[0] * size[1])))
    lengths = lengths.reshape(size)
    lengths[:, 0] = np.maximum(lengths[:, 0], 1)
    split = Split(devices, parts, data.draw(st.booleans()))
    other = np.maximum(lengths[::-1] - 7, 1) if data.draw(st.booleans()) else lengths
    rows, where = packing.lay(lengths, packing.choose([other], split), split)
    assert rows.number % parts == 0
    assert ((where >= 0) == (lengths > 0)).all()
    groups = split.groups(len(lengths))
    assert groups % devices == 0
    for group, at in zip(np.split(lengths, groups), np.split(where, groups), strict=True):
        used = at[at >= 0]
        assert len(set(used.tolist())) == used.size
        assert used.max(initial=0) < rows.number * rows.places
        tokens = np.zeros(rows.number, int)
        np.add.at(tokens, used // rows.places, group[at >= 0])
        assert tokens.max() <= rows.length
        for row in range(rows.number):  # places are taken from the first on
            there = np.sort(used[used // rows.places == row] % rows.places)
            np.testing.assert_array_equal(there, np.arange(there.size))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A plan of triplets, with texts that are missing and prompts."""
    folder = training.data(tmp_path_factory.mktemp("packing"))
    base = training.model(folder / "base")
    recipe = training.recipe(base, folder, data=training.Data(training.recipe(base, folder).data.datasets, negatives=2))
    return recipe, plan.make(recipe, recipe.phases[0], load_tokenizer(training.MINI), ("ask: ", "the answer: "))


def test_rows_hold_the_same_texts_whoever_makes_them(made):
    _, plan_ = made
    for number in range(4):
        plain = plan_.batch(number)
        for split in (Split(1), Split(8), Split(4, 2), Split(2, 1, fixed=True)):
            whole = plan_.batch(number, None, split)
            groups = len(whole.arrays["places"])
            assert groups == (8 if split.fixed else split.devices)
            rows, size = len(whole.arrays["tokens"]) // groups, 16 // groups
            for record in range(16):
                for text in range(plain.arrays["lengths"].shape[1]):
                    length = plain.arrays["lengths"][record, text]
                    at = whole.arrays["places"][record // size, record % size, text]
                    assert (at < 0) == (length == 0)
                    if not length:
                        continue
                    row, place = divmod(at, whole.arrays["roles"].shape[1])
                    row += rows * (record // size)
                    found = whole.arrays["tokens"][row][whole.arrays["segments"][row] == place + 1]
                    np.testing.assert_array_equal(found, plain.arrays["tokens"][record, text, :length])
                    assert whole.arrays["roles"][row, place] == plain.roles[text]
            # The second of two processes, which holds the second half.
            half = plan_.batch(number, np.arange(8, 16), split) if split.devices > 1 else whole
            for name, array in half.arrays.items():
                np.testing.assert_array_equal(array, whole.arrays[name][-len(array) :])
            assert (half.padded, half.tokens) == (whole.padded, whole.tokens)


def test_where_dropout_goes_by_rows_they_are_the_same_on_any_mesh(made):
    _, plan_ = made
    one, *others = (plan_.batch(3, None, Split(devices, 2, fixed=True)).arrays for devices in (1, 2, 4, 8))
    for other in others:
        for name, array in one.items():
            np.testing.assert_array_equal(array, other[name])
    assert Split(3, fixed=True).groups(48) == 3  # where that cannot be, devices decide
    assert Split(16, fixed=True).groups(16) == 16


def test_few_shapes_and_little_padding(made):
    _, plan_ = made
    batches = [plan_.batch(number, None, Split(1)) for number in range(30)]
    assert len({batch.arrays["tokens"].shape for batch in batches}) <= 3
    padding = [1 - sum(b.tokens for b in some) / sum(b.padded for b in some) for some in
               (batches, [plan_.batch(number) for number in range(30)])]  # fmt: skip
    assert padding[0] < 0.25 < padding[1]


def test_the_loss_and_its_gradient_are_those_of_a_row_for_each_text(made):
    recipe, plan_ = made
    phase = recipe.phases[0]
    results = []
    for devices, split in ((1, None), (1, Split(1, 2)), (8, Split(8, 1))):
        mesh = jina_jax.make_mesh(devices=jax.devices()[:devices])
        with jina_jax.use(mesh):
            quiet = recipe.replace(dropout=0.0)
            parts = partition.prepare(quiet, mesh)
            trainable = jax.tree.map(lambda x: x + 0.02, parts.trainable)  # adapters that matter
            batch = plan_.batch(0, None, split)

            def loss(trainable, arrays, parts=parts, phase=phase, batch=batch, quiet=quiet):
                variables = partition.assemble(parts.model, trainable, parts.frozen)
                value = functools.partial(step.value, loss=batch.loss, roles=batch.roles)
                return value(parts.model, variables, arrays, jax.random.key(0), quiet, phase)[0]

            arrays = jax.tree.map(jnp.asarray, batch.arrays)
            results.append(jax.jit(jax.value_and_grad(loss))(trainable, arrays))
    for value, gradient in results[1:]:
        assert_close_relative(value, results[0][0], 1e-6)
        for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(results[0][1]), strict=True):
            assert_close_relative(one, other, 2e-5, floor=1e-3)
