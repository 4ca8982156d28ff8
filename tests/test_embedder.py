import functools
import itertools
from pathlib import Path

import jax
import jaxtyping
import numpy as np
import pytest
from conftest import random_variables
from numerics import EMBEDDING, assert_close

import jina_jax
from jina_jax import batching
from jina_jax.tokenizer import load_tokenizer

MINI = Path(jina_jax.__file__).parent / "mini"
PROMPTS = ("Find what answers: ", "A document: ", "", "", "")
TASKS = (None, *jina_jax.TASKS)
WORDS = ["river", "Haus", "図書館", "مكتبة", "music", "Übung", "of", "the", "12", "café,", "библиотека", "sleeps."]


def make_config(**changes):
    """A small model with the vocabulary of the bundled one, prompts, and a limit that tests reach."""
    small = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 130,
        "matryoshka_dimensions": (16, 32, 64),
        "prompts": PROMPTS,
    }
    return jina_jax.Config.from_json(MINI / "config.json", **(small | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint whose adapters differ."""
    model = jina_jax.Model(make_config())
    path = tmp_path_factory.mktemp("models") / "small"
    return jina_jax.save(path, model, random_variables(model), layout="original", tokenizer=MINI)


@pytest.fixture(scope="module")
def embedder(folder):
    return jina_jax.Embedder.load(folder)


def draw_texts(count, seed=0, longest=40):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(0, longest))) for _ in range(count)]


@functools.partial(jax.jit, static_argnums=0)
def hidden_states(model, variables, tokens, mask, task):
    return model.apply(variables, tokens, mask, task).hidden


def reference(embedder, text, task, dimensions=None, normalize=True, prompts=True):
    """The documented order of operations, one text at a time in one shape, pooled and cut in float64."""
    config = embedder.config
    prompt = "" if task is None or not prompts else config.prompts[config.tasks.index(task)]
    ids = load_tokenizer(MINI).encode(prompt + text).ids
    if len(ids) > config.max_tokens:
        ids = np.append(ids[: config.max_tokens - 1], ids[-1])
    tokens = np.pad(ids, (0, config.max_tokens - len(ids)))[None]
    mask = np.arange(config.max_tokens)[None] < len(ids)
    hidden = hidden_states(embedder.model, embedder.variables, tokens, mask, config.task_ids([task]))
    vector = np.asarray(hidden, np.float64)[0, : len(ids)].mean(axis=0)[:dimensions]
    return vector / np.linalg.norm(vector) if normalize else vector


# ---- Laws ------------------------------------------------------------------------------------------------------


def test_the_documented_order_of_operations(embedder):
    texts = ["", *draw_texts(8), " ".join(WORDS * 30)]
    for task in TASKS:
        found = embedder.encode(texts, task=task)
        assert found.dtype == np.float32
        assert_close(found, np.stack([reference(embedder, text, task) for text in texts]), EMBEDDING)


def test_a_batch_equals_its_texts_alone_whatever_its_shape(embedder):
    texts = draw_texts(24, longest=25)
    alone = np.stack([embedder.encode(text, task="separation") for text in texts])
    for batch_tokens, pack in itertools.product((1, 300, None), (True, False)):
        found = embedder.encode(texts, task="separation", batch_tokens=batch_tokens, pack=pack)
        assert_close(found, alone, EMBEDDING)
    order = np.random.default_rng(0).permutation(len(texts))
    assert_close(embedder.encode([texts[i] for i in order], task="separation"), alone[order], EMBEDDING)


def test_mixed_tasks_equal_each_alone(embedder):
    texts, rng = draw_texts(30), np.random.default_rng(1)
    tasks = [TASKS[i] for i in rng.integers(0, len(TASKS), len(texts))]
    assert set(tasks) == set(TASKS)
    mixed = embedder.encode(texts, task=tasks)
    for task in TASKS:
        rows = [i for i, other in enumerate(tasks) if other == task]
        assert_close(mixed[rows], embedder.encode([texts[i] for i in rows], task=task), EMBEDDING)


def test_tasks_differ_by_adapter_and_by_prompt(embedder):
    found = {task: embedder.encode("a text", task=task) for task in TASKS}
    bare = {task: embedder.encode("a text", task=task, prompts=False) for task in TASKS}
    for index, task in enumerate(TASKS):
        for other in TASKS[:index]:
            assert np.abs(bare[task] - bare[other]).max() > 0.01
        assert_close(bare[task], reference(embedder, "a text", task, prompts=False), EMBEDDING)
        has_prompt = task in ("retrieval.query", "retrieval.passage")
        assert (np.abs(bare[task] - found[task]).max() > 0.01) == has_prompt
    by_hand = embedder.encode(PROMPTS[0] + "a text", task="retrieval.query", prompts=False)
    assert_close(found["retrieval.query"], by_hand, 0)


def test_cut_first_then_normalise(embedder):
    texts = draw_texts(6)
    for dimensions in (1, 7, 32, 64):
        found = embedder.encode(texts, task="classification", dimensions=dimensions)
        assert found.shape == (6, dimensions)
        expected = np.stack([reference(embedder, text, "classification", dimensions) for text in texts])
        assert_close(found, expected, EMBEDDING)
        assert_close(np.linalg.norm(found.astype(np.float64), axis=1), np.ones(6), 1e-6)


def test_without_normalisation(embedder):
    text = draw_texts(3)[2]
    found = embedder.encode(text, normalize=False, dimensions=20)
    assert_close(found, reference(embedder, text, None, 20, normalize=False), 1e-5)
    assert abs(np.linalg.norm(found) - 1) > 0.01


def test_compiled_shapes_are_bounded_over_any_lengths_and_mixtures_of_tasks(folder):
    embedder, rng = jina_jax.Embedder.load(folder, max_position_embeddings=66), np.random.default_rng(0)
    for seed in range(40):
        texts = draw_texts(rng.integers(1, 20), seed, longest=rng.integers(1, 40))
        tasks = [TASKS[i] for i in rng.integers(0, len(TASKS), len(texts))]
        task = tasks if seed % 3 else TASKS[1 + seed % 5]
        embedder.encode(texts, task=task, dimensions=int(rng.integers(1, 65)), batch_tokens=64)
    assert len(batching.row_shapes(embedder.config.max_tokens, 64)) == embedder._means._cache_size() == 1


def test_the_same_call_gives_the_same_bits(embedder):
    texts = draw_texts(20)
    np.testing.assert_array_equal(embedder.encode(texts), embedder.encode(texts))


# ---- Arguments -------------------------------------------------------------------------------------------------


def test_shapes_and_kinds_of_input(embedder):
    texts = ["one", "two words"]
    expected = embedder.encode(texts)
    assert expected.shape == (2, 64)
    assert embedder.encode("one").shape == (64,)
    assert embedder.encode(["one"]).shape == (1, 64)
    assert embedder.dimensions == 64
    for same in (tuple(texts), np.array(texts), iter(texts), (text for text in texts), dict.fromkeys(texts).keys()):
        np.testing.assert_array_equal(embedder.encode(same), expected)


def test_nothing_to_encode(embedder):
    for task in (None, [], "separation"):
        found = embedder.encode([], task=task, dimensions=5)
        assert found.shape == (0, 5)
        assert found.dtype == np.float32


def test_unusual_texts(embedder):
    texts = ["", " ", "\n\t", "\x00", "\ud800", "🧑‍🚀", "\u202eabc", "<s></s><pad>", "a" * 10_000]
    found = embedder.encode(texts)
    assert_close(np.linalg.norm(found.astype(np.float64), axis=1), np.ones(len(texts)), 1e-6)
    assert_close(found[1], found[0], EMBEDDING)


def test_default_dimensions_come_from_the_configuration(embedder):
    config = embedder.config.replace(truncate_dim=24)
    cut = jina_jax.Embedder(jina_jax.Model(config), embedder.variables, embedder.tokenizer)
    assert cut.dimensions == 24
    assert_close(cut.encode("a text"), embedder.encode("a text", dimensions=24), 0)
    assert cut.encode("a text", dimensions=64).shape == (64,)


def test_truncation_can_be_refused(embedder):
    limit = embedder.config.max_tokens
    assert limit == 128
    fits, long = " ".join(["of"] * (limit - 2)), " ".join(["of"] * (limit - 1))
    np.testing.assert_array_equal(embedder.encode([fits], truncate="error"), embedder.encode([fits]))
    np.testing.assert_array_equal(embedder.encode([fits]), embedder.encode([long]))
    with pytest.raises(ValueError, match="text 1 has 129 tokens, the model takes 128"):
        embedder.encode([fits, long, long], truncate="error")
    # The prompt counts.
    with pytest.raises(ValueError, match="text 0 has"):
        embedder.encode(fits, task="retrieval.query", truncate="error")


def test_positions_of_texts_in_errors_count_on(embedder, monkeypatch):
    monkeypatch.setattr("jina_jax.pipeline.WINDOW_TEXTS", 10)
    texts = ["of"] * 25 + [" ".join(["of"] * 200)]
    with pytest.raises(ValueError, match="text 25 has 202 tokens"):
        embedder.encode(texts, truncate="error")


def test_long_texts_in_windows(embedder):
    """Without truncation, the mean over all tokens, each from the first window in which it has enough before it."""
    text = " ".join(np.random.default_rng(0).choice(WORDS, 150))
    ids = embedder.tokenizer.encode(text).ids
    assert len(ids) > 2 * embedder.config.max_tokens
    limit, overlap, vectors = 128, 32, []
    for start in range(0, len(ids) - overlap, limit - overlap):
        part = ids[start : start + limit]
        tokens, mask = np.pad(part, (0, limit - len(part)))[None], np.arange(limit)[None] < len(part)
        hidden = hidden_states(embedder.model, embedder.variables, tokens, mask, embedder.config.task_ids([None]))
        vectors.append(np.asarray(hidden, np.float64)[0, overlap if start else 0 : len(part)])
    vector = np.concatenate(vectors)
    assert len(vector) == len(ids)
    usage = jina_jax.Usage()
    found = embedder.encode([text, "short"], truncate=False, usage=usage)
    assert_close(found[0], vector.mean(axis=0) / np.linalg.norm(vector.mean(axis=0)), EMBEDDING)
    assert_close(found[1], embedder.encode("short"), EMBEDDING)
    assert (usage.truncated, usage.cut_tokens) == (0, 0)


def test_usage(embedder):
    limit, usage = embedder.config.max_tokens, jina_jax.Usage()
    embedder.encode(["of", " ".join(["of"] * 200)], usage=usage)
    embedder.encode("of", usage=usage, task="retrieval.query")
    prompt = len(embedder.tokenizer.encode(PROMPTS[0] + "of").ids)
    assert usage.texts == 3
    assert usage.tokens == 3 + limit + prompt
    assert (usage.truncated, usage.cut_tokens) == (1, 202 - limit)
    assert usage.computed_tokens == 128 + 128 + 128
    assert usage.batches == 3


def test_a_text_may_be_longer_than_the_budget_of_a_batch(embedder):
    texts = [" ".join(["of"] * 100), "short"]
    assert_close(embedder.encode(texts, batch_tokens=20), embedder.encode(texts), EMBEDDING)


@pytest.mark.parametrize("task", ["retrieval", ["separation", "nope"], ["", None]])
def test_unknown_tasks_list_the_known_ones(embedder, task):
    with pytest.raises(ValueError, match=r"unknown task .*retrieval\.query, retrieval\.passage, separation"):
        embedder.encode(["a", "b"], task=task)
    if isinstance(task, str):
        with pytest.raises(ValueError, match="unknown task"):
            embedder.encode([], task=task)


def test_one_task_for_each_text(embedder):
    with pytest.raises(ValueError, match="task has 1 entries for 2 texts"):
        embedder.encode(["a", "b"], task=["separation"])


@pytest.mark.parametrize("dimensions", [0, -1, 65, True])
def test_dimensions_out_of_range(embedder, dimensions):
    with pytest.raises(ValueError, match="must be a whole number from 1 to 64"):
        embedder.encode("a", dimensions=dimensions)


def test_batch_tokens_out_of_range(embedder):
    with pytest.raises(ValueError, match="batch_tokens=0 must be at least 1"):
        embedder.encode("a", batch_tokens=0)


@pytest.fixture
def unchecked(monkeypatch):
    """Users have no type checker in front of these functions."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("texts", [b"bytes", {"a": 1}, {"a", "b"}, 7, None])
def test_what_is_no_sequence_of_texts(embedder, texts):
    with pytest.raises(TypeError, match="must be a str or a sequence of them"):
        embedder.encode(texts)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("texts", [["a", b"b"], ["a", None], ("a", 3), np.array([["a"], ["b"]])])
def test_what_is_no_text_is_named_by_position(embedder, texts):
    with pytest.raises(TypeError, match=r"texts\[[01]\] is \w+, must be str"):
        embedder.encode(texts)


# ---- Loading ---------------------------------------------------------------------------------------------------


def test_bfloat16_weights_are_held_once_and_cut_as_they_are():
    model = jina_jax.Model(make_config(dtype="bfloat16", param_dtype="bfloat16"))
    variables = random_variables(model)
    embedder = jina_jax.Embedder(model, variables, load_tokenizer(MINI))
    kernel = variables["params"]["layers"]["mlp"]["up"]["kernel"]
    held = embedder._held["params"]["layers"]["mlp"]["up"]["kernel"]
    assert held.dtype == np.uint16
    assert held.unsafe_buffer_pointer() == kernel.unsafe_buffer_pointer()
    [batch] = batching.pack([batching.Text(*ONE)], 64, 64)
    arrays = batching.fill(batch, [batching.Text(*ONE)], 1)
    lowered = [embedder._means.lower(given, *arrays) for given in (embedder._held, variables)]
    as_bits, as_numbers = (one.compile() for one in lowered)
    assert "f32[2,64,128]" not in as_bits.as_text()
    assert "f32[2,64,128]" in as_numbers.as_text(), "XLA no longer copies bfloat16 weights: as_bits can go"
    np.testing.assert_array_equal(as_bits(embedder._held, *arrays), as_numbers(variables, *arrays))


ONE = (np.arange(5, 37, dtype=np.int32), 2, np.array([[0, 32]]), np.array([0]), np.ones(1, np.float32))


def test_loading_with_another_type(folder, embedder):
    rounded = jina_jax.Embedder.load(folder, dtype=jax.numpy.bfloat16)
    assert rounded.config.dtype == jax.numpy.bfloat16
    texts = draw_texts(5)
    found = rounded.encode(texts, task="text-matching")
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert 0 < np.abs(found - embedder.encode(texts, task="text-matching")).max() < 0.05


def test_overrides_reach_the_configuration(folder):
    assert jina_jax.Embedder.load(folder, max_position_embeddings=22).config.max_tokens == 20


def test_a_model_without_adapters():
    model = jina_jax.Model(make_config(tasks=(), prompts=()))
    embedder = jina_jax.Embedder(model, random_variables(model), load_tokenizer(MINI))
    assert_close(embedder.encode("a text"), reference(embedder, "a text", None), EMBEDDING)
    with pytest.raises(ValueError, match="this model has no adapters"):
        embedder.encode("a text", task="separation")


def test_a_tokenizer_of_another_model():
    model = jina_jax.Model(make_config(vocab_size=100))
    with pytest.raises(ValueError, match="32000 ids, the model's table 100 rows"):
        jina_jax.Embedder(model, {}, load_tokenizer(MINI))


def test_no_such_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="no directory"):
        jina_jax.Embedder.load(tmp_path / "nothing")


def test_progress(embedder, capsys):
    embedder.encode(["a", "b"])
    assert capsys.readouterr().err == ""
    embedder.encode(draw_texts(30), progress=True)
    assert "30/30" in capsys.readouterr().err


def test_the_bundled_model_is_the_default():
    embedder = jina_jax.Embedder.load()
    english, german, other = embedder.encode(["The dog sleeps.", "Der Hund schläft.", "Taxes rose again last year."])
    assert english @ german > english @ other + 0.05
