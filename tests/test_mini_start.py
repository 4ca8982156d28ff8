"""The bundled model's teacher, and the student that is made of it, with a tiny teacher in its place."""

import json
import lzma
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import jina_jax
from configs.mini.start import e5, fit, kept, order, surgery, teacher, vocabulary
from configs.mini.start import student as start
from jina_jax import Config, Embedder, Model, layouts
from jina_jax.records import InputError

SIZES = {"D": 32, "L": 3, "N": 2, "F": 64, "V": 700, "T": 512, "Y": 2}
TEXTS = {
    "en": ["Press the button to open the file.", "The elves left the forest at dawn.", "Save, then close the window."],
    "de": ["Drücken Sie die Taste, um die Datei zu öffnen.", "Die Elfen verließen den Wald im Morgengrauen."],
    "ja": ["ファイルを開くにはボタンを押します。", "エルフたちは夜明けに森を去った。"],
}
WHOLE = json.loads(Path(jina_jax.__file__).with_name("mini").joinpath("tokenizer.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def _shapes_may_differ():
    with jax.numpy_rank_promotion("allow"):
        yield


def quantised(weights: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Weights in blocks of 4 bits, and what they are then."""
    rows = weights.reshape(-1, 32)
    scale = (np.abs(rows).max(axis=1, keepdims=True) / 7).astype(np.float16)
    codes = np.clip(np.rint(rows / scale.astype(np.float32)) + 8, 0, 15).astype(np.uint8)
    blocks = np.zeros(len(rows), e5.BLOCK)
    blocks["scale"], blocks["nibbles"] = scale[:, 0], codes[:, :16] | codes[:, 16:] << 4
    return blocks.tobytes(), ((codes.astype(np.float32) - 8) * scale.astype(np.float32)).reshape(weights.shape)


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors of a teacher, under its names for them."""
    rng, size = np.random.default_rng(seed), SIZES | {"(N H)": SIZES["D"]}
    found = {}
    for name, _, theirs, _ in e5.TENSORS:
        shape = [size[axis] for axis in theirs.replace("J ", "").replace("L ", "").replace("(N H)", "D").split()]
        for kind in "qkv" if "J" in theirs else ("",):
            for layer in range(SIZES["L"]) if "L" in theirs else ("",):
                key = name.replace("{q,k,v}", kind)
                noise = rng.normal(size=shape).astype(np.float32) * (0.3 if len(shape) > 1 else 0.1)
                found[f"l{layer}.{key}" if "L" in theirs else key] = noise + ("ln.w" in name)
    return found


def image(given: dict[str, np.ndarray]) -> tuple[bytes, dict[str, np.ndarray]]:
    """The file that holds tensors, and what they are in it."""
    head = e5.MAGIC + struct.pack("<i", 1) + struct.pack("<7ifi", *(SIZES[one] for one in "DLNFVTY"), 1e-12, 32)
    head += struct.pack("<5iQ", 2, 0, 2, 1, 3, 5) + bytes(4 * 3 + 4 * 2 + 5)  # a vocabulary of two pieces
    head += struct.pack("<iI", 1, 5) + bytes(5)  # a map of one character
    body, directory, stored = b"", b"", {}
    at = len(head) + 4 + sum(2 + len(name) + struct.calcsize("<BIQQ") for name in given)
    for name, x in given.items():
        kind = int(x.ndim == 2 and not name.startswith(("emb.pos", "emb.type")))
        data, stored[name] = quantised(x) if kind else (x.tobytes(), x)
        directory += struct.pack("<H", len(name)) + name.encode()
        directory += struct.pack("<BIQQ", kind, x.size, at + len(body), len(data))
        body += data
    return head + struct.pack("<i", len(given)) + directory + body, stored


@pytest.fixture(scope="module")
def found() -> dict[str, np.ndarray]:
    """Parameters of a tiny teacher."""
    return e5.parameters(*e5.read(image(tensors())[0]))


@pytest.fixture
def tiny(found, tmp_path, monkeypatch) -> teacher.Teacher:
    """A tiny teacher, which takes the place of the real one."""
    smaller = vocabulary.choose(WHOLE, TEXTS, SIZES["V"])
    with lzma.open(tmp_path / "tokenizer.json.xz", "wt", encoding="utf-8") as file:
        json.dump(smaller, file)
    monkeypatch.setattr(teacher, "TOKENIZER", tmp_path / "tokenizer.json.xz")
    monkeypatch.setattr(teacher, "LENGTHS", (64, 512))
    monkeypatch.setattr(teacher, "BATCH", 512)
    monkeypatch.setattr(teacher, "parameters", lambda work: (found, SIZES | {"eps": 1e-12}))
    return teacher.load(tmp_path)


def student_of(parameters: dict[str, np.ndarray], layers: int, **changes: object) -> tuple[Model, dict]:
    """A model of parameters."""
    model = Model(start.config(SIZES["V"], SIZES | {"eps": 1e-12}).replace(num_hidden_layers=layers, **changes))
    flat = start.with_adapters(model, parameters)
    return model, flat


def apply(model: Model, flat: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    with jax.numpy_rank_promotion("raise"):
        variables = {"params": layouts.nest({path: jnp.asarray(x) for path, x in flat.items()})}
        return np.asarray(jax.jit(model.apply)(variables, tokens).embeddings)


def test_the_teachers_file_gives_back_what_it_was_made_of():
    given, stored = image(tensors())
    read, sizes = e5.read(given)
    assert sizes == SIZES | {"eps": pytest.approx(1e-12)}
    for name, x in stored.items():
        np.testing.assert_array_equal(read[name].reshape(x.shape), x)
    flat = e5.parameters(read, sizes)
    key = stored["l1.k.w"].reshape(2, 16, 32)  # N H D
    np.testing.assert_array_equal(flat["layers/attention/qkv/kernel"][1, :, 1], key.transpose(2, 0, 1))
    np.testing.assert_array_equal(flat["layers/mlp/down/kernel"][2], stored["l2.fo.w"].T)
    with pytest.raises(InputError, match="ends before its tensor"):
        e5.read(given[:-1])
    with pytest.raises(InputError, match="begins with"):
        e5.read(b"GGUF" + given)


def test_the_teacher_reads_each_text_by_itself(tiny):
    texts = [text for part in TEXTS.values() for text in part] + ["long " * 600]
    vectors = teacher.encode(texts, teacher=tiny)
    assert vectors.shape == (8, 32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors[5], teacher.encode(texts[5:6], teacher=tiny)[0], atol=1e-5)
    assert abs(vectors[0] - teacher.encode(texts[:1], "passage: ", teacher=tiny)[0]).max() > 1e-3


def test_texts_are_encoded_once(tmp_path):
    asked: list[str] = []

    def encode(texts: list[str]) -> np.ndarray:
        asked.extend(texts)
        return np.array([[len(text), 1] for text in texts], np.float32)

    first = kept.vectors(["a", "bb", "a"], tmp_path, encode)
    second = kept.vectors(["ccc", "bb"], tmp_path, encode)
    assert asked == ["a", "bb", "ccc"]
    np.testing.assert_array_equal(first, [[1, 1], [2, 1], [1, 1]])
    np.testing.assert_array_equal(second, [[3, 1], [2, 1]])


def test_another_basis_keeps_what_heads_see(found):
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(3, 200, 32)).astype(np.float32) * rng.uniform(0.1, 2, size=32).astype(np.float32)
    changed = surgery.rebase(found, inputs)

    def scores(parameters: dict[str, np.ndarray]) -> np.ndarray:
        weights, bias = parameters[surgery.QKV + "kernel"], parameters[surgery.QKV + "bias"]
        qkv = np.einsum("LTD,LDJNH->LJTNH", inputs, weights) + bias[:, :, None]
        return np.einsum("LTNH,LSNH->LNTS", qkv[:, 0], qkv[:, 1])

    np.testing.assert_allclose(scores(changed), scores(found), rtol=1e-3, atol=2e-3)
    # The slowest pair has the strongest components, the fastest the weakest.
    read = np.concatenate([inputs[0], np.ones((200, 1))], axis=1)
    weights = np.concatenate([changed[surgery.QKV + "kernel"], changed[surgery.QKV + "bias"][:, None]], axis=1)[0]
    strength = np.square(np.einsum("TD,DNH->TNH", read, weights[:, 0])).mean(axis=(0, 1))
    assert (np.diff(strength[surgery.pair_places(16)][::2]) <= 1e-3).all()
    assert sorted(surgery.pair_places(16)) == list(range(16))
    assert surgery.pair_places(16)[:2].tolist() == [7, 15]


def test_an_order_of_dimensions_is_a_symmetry(found):
    parameters = surgery.take(found, range(3), np.ones(4))
    model, flat = student_of(parameters, 3, max_position_embeddings=66)
    permutation = np.random.default_rng(1).permutation(32)
    tokens = np.arange(4, 20, dtype=np.int32).reshape(2, 8)
    moved = surgery.permute(flat, permutation)
    np.testing.assert_allclose(apply(model, moved, tokens), apply(model, flat, tokens)[:, permutation], atol=2e-5)
    assert abs(apply(model, flat, tokens) - apply(model, flat, tokens)[:, permutation]).max() > 0.01


def test_dimensions_that_tell_most_come_first():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, 16)) * np.where(np.arange(16) % 4 == 1, 3.0, 0.3)
    permutation = order.greedy(vectors, count=8)
    assert sorted(permutation) == list(range(16))
    assert set(permutation[:4]) == {1, 5, 9, 13}


def test_languages_are_told_apart_no_more():
    rng = np.random.default_rng(0)
    differences = rng.normal(size=(40, 8)).astype(np.float32)
    languages = np.array(["de", "ja"] * 20)
    offsets = teacher.language_offsets(differences, languages)
    assert sorted(offsets) == ["de", "en", "ja"]
    assert not offsets["en"].any()
    np.testing.assert_allclose(offsets["ja"], differences[1::2].mean(axis=0), rtol=1e-6)


def test_a_smaller_vocabulary_reads_the_same_texts():
    smaller = vocabulary.choose(WHOLE, TEXTS, 600)
    pieces = [piece for piece, _ in smaller["model"]["vocab"]]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(smaller))
    assert len(pieces) == tokenizer.get_vocab_size() == 600
    assert pieces[:4] == ["<s>", "<pad>", "</s>", "<unk>"]
    assert pieces[-1] == "<mask>"
    assert [token["id"] for token in smaller["added_tokens"]] == [0, 1, 2, 3, 599]
    for text in ("Press the button.", "Die Elfen öffnen die Datei", "エルフは森を去った"):
        encoded = tokenizer.encode(text)
        assert encoded.ids[0] == 0
        assert encoded.ids[-1] == 2
        assert 3 not in encoded.ids
        assert tokenizer.decode(encoded.ids) == text
    places = vocabulary.rows(smaller, WHOLE)
    assert (np.diff(places) > 0).all()
    assert [WHOLE["model"]["vocab"][place][0] for place in places] == pieces


def test_layers_that_were_left_out_are_made_up_for(tiny, found):
    texts = [f"{text} {number}" for part in TEXTS.values() for text in part for number in range(20)]
    batches = fit.hidden(tiny, texts)
    layers = (0, 2)
    student = surgery.take(found, layers, np.ones(30))
    fitted = fit.downs(student, layers, tiny, batches, 1e4, ridge=1e-3)

    def distance(parameters: dict[str, np.ndarray]) -> float:
        model, flat = student_of(parameters, 2)
        tokens, mask, vectors = batches[0]
        rows = mask.all(axis=1) | mask.any(axis=1)
        width = int(mask[rows].sum(axis=1).min())
        wanted = vectors[-1][rows, :width].mean(axis=1)
        given = apply(model, flat, tokens[rows, :width])
        return float(1 - (given * teacher.unit_rows(wanted)).sum(axis=1).mean())

    assert distance(fitted) < 0.7 * distance(student)


def test_the_start_is_a_model_in_the_original_layout(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(start, "LAYERS", (0, 2))
    monkeypatch.setattr(start, "SIZES", (8, 32))
    records = [{"text": text, "lang": lang} for lang, part in TEXTS.items() for text in part]
    others = [{"text": TEXTS["en"][i % 2]} if one["lang"] == "ja" else one for i, one in enumerate(records)]
    (tmp_path / "train").mkdir()
    for name, rows in (("distill", records), ("distill.targets", others)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / "train" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    with pytest.raises(InputError, match="permutation"):
        start.make(tmp_path, 500)
    targets = teacher.targets(tmp_path)
    assert targets.shape == (7, 32)
    assert targets.dtype == np.float16
    np.testing.assert_array_equal(targets, np.load(tmp_path / "train" / "distill.npy"))

    folder = start.make(tmp_path, 500)
    config = Config.from_json(folder / "config.json")
    assert (config.vocab_size, config.num_hidden_layers, config.rope_base) == (500, 2, 1e4)
    assert config.matryoshka_dimensions == (8, 32)
    embedder = Embedder.load(folder)
    texts = [one["text"] for one in records]
    bare = embedder.encode(texts)
    np.testing.assert_allclose(bare, embedder.encode(texts, task="classification"), atol=1e-6)
    assert np.linalg.norm(embedder.encode(texts, normalize=False).mean(axis=0)) < 0.02
    assert set(start.measure(tmp_path)) == {"cosine"}
