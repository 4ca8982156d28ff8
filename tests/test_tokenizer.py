"""The tokenizer against the goldens of the real file, its laws, and the rebuilt SentencePiece model.

`data/tokenizer/tokenizer.json.xz` is the tokenizer.json of jina-embeddings-v3, byte for byte (the sha256 is
checked). The goldens are what `tokenizers` makes of it, recorded once: ids, and offsets in characters.
"""

import hashlib
import json
import lzma
import random
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import tokenizer as convert_tokenizer
from jina_jax import tokenizer
from jina_jax.tokenizer import JsonTokenizer, SentencePieceTokenizer, load_tokenizer

DATA = Path(__file__).parent / "data" / "tokenizer"
MINI = Path(tokenizer.__file__).parent / "mini"
SHA256 = "f59925fcb90c92b894cb93e51bb9b4a6105c5c249fe54ce1c704420ac39b81af"
GOLDENS = json.loads((DATA / "tokenizer_goldens.json").read_text(encoding="utf-8"))
CASES = GOLDENS["cases"]

# Goldens whose ids the rebuilt SentencePiece model does not reproduce: 17 of 296, no ordinary composed text.
SPM_IDS = {
    "fullwidth specials: the reference makes `<s>` of them, sentencepiece text": [
        "＜ｓ＞",
        "＜/ｓ＞ x",
        "a＜mask＞b",
        "＜pad＞",
        "<ｓ>",
    ],
    "combining marks: sentencepiece composes them, the reference looks at short grapheme clusters only": [
        "\u304b\u3099",
        "\u304c \u30ac \uff76\uff9e",
        "\uac00 \u1100\u1161 \uac01 \u1100\u1161\u11a8",
        "\u24b8\u0345",
        "a\u0300\u0301\u0302b",
        unicodedata.normalize("NFD", "Xin chào thế giới Việt Nam"),
        unicodedata.normalize("NFD", "안녕하세요"),
        unicodedata.normalize("NFD", "がぎぐげご"),
    ],
    "ties: float32 against float64 sums": ["ooooooo", "xxxxxxxx", "wwwwwwww", "。。。。。。。"],
    "U+0085: made a blank by our class, so none": [],
}
# Same ids, other offsets: the reference leaves a mark out of the span of the letter it composes with.
SPM_OFFSETS = ["\xe9 e\u0301", "\xc5 A\u030a \u212b", "ffi 1\u20442 A\u030a"]

TEXTS = st.text(max_size=40) | st.lists(
    st.sampled_from(["Hello", " ", "世界", "<s>", "<mask>", "  ", "\u0085", "e\u0301", "😀", "नमस्ते", "\n"]),
    max_size=12,
).map("".join)


@pytest.fixture(scope="session")
def real_tokenizer_dir(tmp_path_factory):
    """A directory with the real tokenizer.json; its sha256 is that of the published file."""
    content = lzma.decompress((DATA / "tokenizer.json.xz").read_bytes())
    assert hashlib.sha256(content).hexdigest() == SHA256
    folder = tmp_path_factory.mktemp("real_tokenizer")
    (folder / "tokenizer.json").write_bytes(content)
    return folder


@pytest.fixture(scope="session")
def exact(real_tokenizer_dir):
    return load_tokenizer(real_tokenizer_dir)


@pytest.fixture(scope="session")
def spm_file(real_tokenizer_dir, tmp_path_factory):
    file = tmp_path_factory.mktemp("spm") / "sentencepiece.bpe.model"
    convert_tokenizer.rebuild(real_tokenizer_dir / "tokenizer.json", file)
    return file


@pytest.fixture(scope="session")
def spm(spm_file):
    return load_tokenizer(spm_file)


@pytest.fixture(scope="session", params=["exact", "spm"])
def either(request):
    return request.getfixturevalue(request.param)


def same(a, b):
    return np.array_equal(a.ids, b.ids) and np.array_equal(a.offsets, b.offsets) and a.full_length == b.full_length


def test_pieces_are_the_strings_of_ids(exact, spm):
    assert exact.pieces() == spm.pieces()
    assert exact.mask_id == spm.mask_id == exact.pieces().index("<mask>") == 250_001
    assert "".join(exact.pieces()[index] for index in exact.encode("Hello, 世界").ids) == "<s>▁Hello,▁世界</s>"


def test_fingerprints_tell_tokenizers_apart(exact, spm, real_tokenizer_dir):
    assert load_tokenizer(real_tokenizer_dir).fingerprint() == exact.fingerprint() != spm.fingerprint()


class TestGoldens:
    def test_all(self, exact):
        assert len(CASES) == 296
        for case, tokens in zip(CASES, exact.encode_batch([case["text"] for case in CASES]), strict=True):
            assert tokens.ids.tolist() == case["ids"], case["text"]
            assert tokens.offsets.tolist() == case["offsets"], case["text"]
            assert same(tokens, exact.encode(case["text"])), case["text"]
            assert tokens.full_length == len(case["ids"])
            assert not tokens.truncated

    def test_truncation(self, either):
        for case in GOLDENS["truncation"]:
            tokens = either.encode(case["text"], case["max_length"])
            assert tokens.ids.tolist() == case["ids"], case

    def test_shapes_and_types(self, either):
        tokens = either.encode("Hello world", 3)
        assert tokens.ids.dtype == tokens.offsets.dtype == np.int32
        assert tokens.ids.shape == (3,)
        assert tokens.offsets.tolist() == [[0, 0], [0, 5], [0, 0]]
        assert (tokens.full_length, tokens.truncated) == (4, True)
        assert (either.vocab_size, either.pad_id) == (250002, 1)


class TestSentencePiece:
    def test_goldens_but_for_the_listed(self, spm):
        listed = {text for texts in SPM_IDS.values() for text in texts}
        assert len(listed) == 17
        tokens = [spm.encode(case["text"]) for case in CASES]
        other_ids = {c["text"] for c, t in zip(CASES, tokens, strict=True) if t.ids.tolist() != c["ids"]}
        assert other_ids <= listed
        other_offsets = {c["text"] for c, t in zip(CASES, tokens, strict=True) if t.offsets.tolist() != c["offsets"]}
        assert other_offsets <= listed | set(SPM_OFFSETS)

    def test_natural_mixes(self, exact, spm):
        """Words of many languages, added tokens and blanks in any order: ids and offsets always agree."""
        words = [word for case in CASES[108:138] + CASES[142:] for word in case["text"].split(" ") if word]
        words = [word for word in words if not unicodedata.category(word[0]).startswith("M")]
        draw = random.Random(0)
        kinds = [
            words,
            words,
            words,
            [" ", " ", "  ", "\n", "\x85", ""],
            ["<s>", "</s>", "<mask>", "<pad>", "<unk>"],
        ]
        texts = ["".join(draw.choice(draw.choice(kinds)) for _ in range(draw.randint(1, 20))) for _ in range(3000)]
        for text, a, b in zip(texts, exact.encode_batch(texts), spm.encode_batch(texts), strict=True):
            assert same(a, b), text

    def test_every_character(self, exact, spm):
        """Between two letters, each character of Unicode gives the same ids: the map is that of the file."""
        texts = [f"a{chr(code)}b" for code in range(0x110000) if not 0xD800 <= code < 0xE000 and code % 7 == 0]
        texts += [f"a{chr(code)}b" for code in range(0x3400) if code % 7]
        fast, slow = (t.encode_batch(texts, offsets=False) for t in (exact, spm))
        assert [t for t, a, b in zip(texts, fast, slow, strict=True) if not np.array_equal(a.ids, b.ids)] == []

    @pytest.mark.parametrize(
        ("text", "ids", "offsets"),
        [
            ("<mask>", [0, 250001, 2], [[0, 0], [0, 6], [0, 0]]),
            ("x  <mask>y", [0, 1022, 250001, 113, 2], [[0, 0], [0, 1], [1, 9], [9, 10], [0, 0]]),
            ("<s></s><pad><unk>", [0, 0, 2, 1, 3, 2], [[0, 0], [0, 3], [3, 7], [7, 12], [12, 17], [0, 0]]),
        ],
    )
    def test_specials(self, either, text, ids, offsets):
        tokens = either.encode(text)
        assert (tokens.ids.tolist(), tokens.offsets.tolist()) == (ids, offsets)

    def test_many_blanks_before_a_mask_take_linear_time(self, spm):
        tokens = spm.encode(" " * 1_000_000 + "<mask>")
        assert tokens.offsets.tolist() == [[0, 0], [0, 1_000_006], [0, 0]]


class TestLaws:
    @settings(deadline=None)
    @given(texts=st.lists(TEXTS, max_size=5), limit=st.none() | st.integers(2, 12))
    def test_batch_is_single(self, either, texts, limit):
        batch = either.encode_batch(texts, limit)
        assert len(batch) == len(texts)
        assert all(same(a, either.encode(text, limit)) for a, text in zip(batch, texts, strict=True))
        bare = either.encode_batch(texts, limit, offsets=False)
        for a, b in zip(batch, bare, strict=True):
            assert np.array_equal(a.ids, b.ids)
            assert (b.offsets.shape, b.full_length) == ((0, 2), a.full_length)

    @settings(deadline=None)
    @given(text=TEXTS, limit=st.integers(2, 40))
    def test_truncation_cuts_content(self, either, text, limit):
        full, cut = either.encode(text), either.encode(text, limit)
        content = min(limit, len(full.ids)) - 2
        assert cut.ids.tolist() == [0, *full.ids[1 : content + 1].tolist(), 2]
        assert cut.offsets.tolist() == [[0, 0], *full.offsets[1 : content + 1].tolist(), [0, 0]]
        assert cut.full_length == full.full_length == len(full.ids)
        assert cut.truncated == (len(full.ids) > limit)

    @settings(deadline=None)
    @given(text=TEXTS)
    def test_offsets_are_within_the_text(self, either, text):
        tokens = either.encode(text)
        start, end = tokens.offsets[1:-1].T
        assert (start >= 0).all()
        assert (start < end).all()
        assert (end <= len(text)).all()
        assert (np.diff(start) >= 0).all()

    @settings(deadline=None)
    @given(parts=st.lists(st.text(max_size=8) | st.characters(categories=["Cs"]), max_size=8))
    def test_lone_surrogates_are_replacement_characters(self, either, parts):
        text = "".join(parts)
        replaced = "".join("\ufffd" if "\ud800" <= char <= "\udfff" else char for char in text)
        assert same(either.encode(text), either.encode(replaced))

    def test_offsets_count_surrogates(self, either):
        tokens = either.encode("Hello \ud83d world")
        assert ["Hello \ud83d world"[start:end] for start, end in tokens.offsets[1:-1]] == ["Hello", "world"]

    def test_threads_with_different_limits(self, either):
        text = "Follow the white rabbit. " * 20
        full = either.encode(text).ids.tolist()

        def work(limit):
            tokens = [either.encode(text, limit), *either.encode_batch([text] * 3, limit)]
            return [t.ids.tolist() for t in tokens]

        limits = list(range(2, 66)) * 2
        with ThreadPoolExecutor(8) as pool:
            for limit, found in zip(limits, pool.map(work, limits), strict=True):
                assert found == [[*full[: limit - 1], 2]] * 4


class TestBadInputs:
    @pytest.mark.parametrize("limit", [1, 0, -3])
    def test_limit_too_small(self, either, limit):
        for call in (lambda: either.encode("a", limit), lambda: either.encode_batch([], limit)):
            with pytest.raises(ValueError, match=rf"max_tokens={limit} must be at least 2"):
                call()

    @pytest.mark.parametrize("bad", [None, 3, b"bytes", ["a"]])
    def test_not_a_string(self, either, bad):
        said = f"is {type(bad).__name__}, must be str"
        hook = "Type-check error"  # a session that checks annotations comes first
        with pytest.raises(TypeError, match=f"text {said}|{hook}"):
            either.encode(bad)
        with pytest.raises(TypeError, match=rf"texts\[2\] {said}|{hook}"):
            either.encode_batch(["a", "b", bad])

    def test_a_string_is_no_batch(self, either):
        with pytest.raises(TypeError, match="texts is one str"):
            either.encode_batch("abc")

    def test_kinds_of_strings_and_sequences(self, either):
        expected = either.encode("Hello world")
        assert same(either.encode(np.str_("Hello world")), expected)
        assert same(either.encode_batch(("Hello world",))[0], expected)
        assert same(either.encode_batch([np.str_("Hello world")])[0], expected)


class TestLoading:
    def test_mini(self):
        mini = load_tokenizer(MINI)
        assert (mini.vocab_size, mini.pad_id) == (32000, 1)
        assert mini.encode("<mask>").ids.tolist() == [0, 31999, 2]
        assert mini.encode("Hello world").offsets.tolist()[0] == [0, 0]

    def test_preference(self, tmp_path, spm_file, real_tokenizer_dir):
        model = spm_file.read_bytes()
        (tmp_path / "other.model").write_bytes(model)
        assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
        (tmp_path / "another.model").write_bytes(b"")
        with pytest.raises(ValueError, match=r"several SentencePiece models .*another\.model, other\.model"):
            load_tokenizer(tmp_path)
        (tmp_path / "sentencepiece.bpe.model").write_bytes(model)
        assert isinstance(load_tokenizer(str(tmp_path)), SentencePieceTokenizer)
        (tmp_path / "tokenizer.json").write_bytes((MINI / "tokenizer.json").read_bytes())
        assert isinstance(load_tokenizer(tmp_path), JsonTokenizer)
        assert isinstance(load_tokenizer(real_tokenizer_dir / "tokenizer.json"), JsonTokenizer)

    def test_settings_of_the_file_are_ignored(self, tmp_path):
        backend = tokenizers.Tokenizer.from_file(str(MINI / "tokenizer.json"))
        backend.enable_truncation(4)
        backend.enable_padding(length=12)
        backend.save(str(tmp_path / "tokenizer.json"))
        text = "Follow the white rabbit"
        tokens = load_tokenizer(tmp_path).encode(text)
        assert not tokens.truncated
        assert same(tokens, load_tokenizer(MINI).encode(text))

    def test_nothing_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"looked for tokenizer\.json, sentencepiece\.bpe\.model"):
            load_tokenizer(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"missing\.json"):
            load_tokenizer(tmp_path / "missing.json")

    @pytest.mark.parametrize("name", ["tokenizer.json", "sentencepiece.bpe.model"])
    @pytest.mark.parametrize("content", [b"", b"{", b"{}", b'{"model_type": "xlm-roberta"}', b"\xff\x00" * 50])
    def test_broken(self, tmp_path, name, content):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            load_tokenizer(tmp_path)

    def test_of_another_kind(self, tmp_path):
        (tmp_path / "vocab.txt").write_text("a")
        with pytest.raises(ValueError, match=r"vocab\.txt is neither"):
            load_tokenizer(tmp_path / "vocab.txt")

    def test_of_another_family(self, tmp_path):
        words = tokenizers.models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")
        tokenizers.Tokenizer(words).save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(ValueError, match=r"tokenizer\.json is a tokenizer of another family"):
            load_tokenizer(tmp_path)


class TestRebuild:
    def test_command(self, tmp_path, capsys):
        (tmp_path / "tokenizer.json").write_bytes((MINI / "tokenizer.json").read_bytes())
        convert_tokenizer.main([str(tmp_path)])
        model = tmp_path / "sentencepiece.bpe.model"
        assert capsys.readouterr().out == f"{model}\n"
        assert sorted(file.name for file in tmp_path.iterdir()) == [
            "sentencepiece.bpe.model",
            "tokenizer.json",
        ]
        found, expected = load_tokenizer(model), load_tokenizer(tmp_path)
        assert found.vocab_size == expected.vocab_size == 32000
        for text in ("Hello world", "跟着白兔走。", "Sigue al <mask> conejo"):
            assert same(found.encode(text), expected.encode(text))
        convert_tokenizer.main([str(tmp_path / "tokenizer.json"), "--output", str(tmp_path / "again.model")])
        assert (tmp_path / "again.model").read_bytes() == model.read_bytes()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c: c["model"].update(type="BPE"), r"tokenizer\.json: its model is BPE, only Unigram"),
            (lambda c: c.pop("model"), 'has no "model"'),
            (lambda c: c["model"].pop("vocab"), "its vocabulary begins"),
            (lambda c: c["model"]["vocab"].pop(), "its vocabulary begins .* and ends"),
            (lambda c: c["model"].update(byte_fallback=True), "falls back to bytes"),
            (lambda c: c["normalizer"].update(type="NFKC"), "normalizer is NFKC, only Precompiled"),
            (lambda c: c.update(normalizer=None), "normalizer is None, only Precompiled"),
            (lambda c: c["normalizer"].update(precompiled_charsmap="?"), "not base64"),
            (lambda c: c["model"]["vocab"].insert(9, ["", 0.0]), "sentencepiece refuses"),
        ],
    )
    def test_refusals(self, tmp_path, change, message):
        content = json.loads((MINI / "tokenizer.json").read_bytes())
        change(content)
        source, output = tmp_path / "tokenizer.json", tmp_path / "old.model"
        source.write_text(json.dumps(content))
        output.write_bytes(b"kept")
        with pytest.raises(ValueError, match=message):
            convert_tokenizer.rebuild(source, output)
        assert output.read_bytes() == b"kept"
        assert sorted(file.name for file in tmp_path.iterdir()) == ["old.model", "tokenizer.json"]

    def test_command_says_why(self, tmp_path):
        with pytest.raises(SystemExit, match=r"error: .*tokenizer\.json"):
            convert_tokenizer.main([str(tmp_path)])
        (tmp_path / "tokenizer.json").write_text("{")
        with pytest.raises(SystemExit, match=r"error: .*tokenizer\.json is not JSON"):
            convert_tokenizer.main([str(tmp_path)])
