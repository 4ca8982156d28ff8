"""`python -m convert verify`: green on right checkpoints, and not on wrong ones."""

import hashlib
import json
import lzma
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from convert_checks import run
from safetensors.torch import load_file, save_file
from torch_checkpoints import make_config, random_state, write_hf

import jina_jax
from convert import anchors as published
from convert import bits, report, verify
from convert.__main__ import FAILED
from convert.reference import forward, load_state

DATA = Path(__file__).parent / "data"
TINY = DATA / "tiny_checkpoints"
TOKENIZER = DATA / "tokenizer" / "tokenizer.json.xz"
DIRECTORIES = ("original", "original_bf16", "hf", "hf_bf16", "native_new", "native_saved")
TASKS = jina_jax.TASKS


class TestVerify:
    @pytest.mark.parametrize("name", DIRECTORIES)
    def test_is_green(self, capsys, name):
        assert run("verify", TINY / name, "--tokens", 16) == 0
        out = capsys.readouterr().out
        assert out.endswith("15 checks passed, 0 failed\n")
        assert "do not apply: these are not the released weights" in out
        for task in ("no task", *TASKS, "mixed tasks"):
            assert re.search(rf"^hidden, {re.escape(task)} +\S+e-0[67] +1\.0e-05  ok$", out, re.MULTILINE)
            assert re.search(rf"^embeddings, {re.escape(task)} +\S+e-0[78] +1\.0e-06  ok$", out, re.MULTILINE)

    @pytest.mark.parametrize("options", [("--fast",), ("--dtype", "bfloat16")])
    def test_options(self, capsys, options):
        assert run("verify", TINY / "original_bf16", "--tokens", 8, *options) == 0
        assert "15 checks passed" in capsys.readouterr().out

    def test_batch_has_what_it_should(self):
        config = jina_jax.load(TINY / "hf")[0].config
        batch = verify.draw_batch(config, 16)
        assert batch.mask.sum(1).tolist() == [16, 12, 8, 5, 2, 15]
        assert batch.mask[:, 0].tolist() == [True] * 5 + [False]
        assert batch.mixed.tolist() == [-1, 0, 1, 2, 3, 4]
        assert (batch.ids[~batch.mask][:-1] == config.pad_token_id).all()

    @pytest.mark.parametrize(
        ("fault", "missed"),
        [
            ({"rope_base": 10_000.0}, "hidden, no task"),
            ({"layer_norm_eps": 1e-4}, "hidden, no task"),
            ({"lora_alpha": 1.001}, "embeddings, separation"),
            ({"tasks": TASKS[::-1]}, "hidden, retrieval.query"),
        ],
        ids=["rotary base", "eps", "adapter scale", "task order"],
    )
    def test_a_planted_fault_is_a_miss(self, capsys, monkeypatch, fault, missed):
        load = jina_jax.load

        def faulty(*arguments, **options):
            model, variables = load(*arguments, **options)
            return jina_jax.Model(model.config.replace(**fault)), variables

        monkeypatch.setattr(jina_jax, "load", faulty)
        directory = "hf_bf16" if "tasks" in fault else "original"
        assert run("verify", TINY / directory, "--tokens", 8) == FAILED
        out = capsys.readouterr().out
        assert re.search(rf"^{re.escape(missed)} .* MISS$", out, re.MULTILINE)
        assert re.search(r"^\d+ checks passed, [1-9]\d* failed$", out, re.MULTILINE)
        if "lora_alpha" in fault:
            assert re.search(r"^hidden, no task .* ok$", out, re.MULTILINE)

    @pytest.mark.parametrize("directory", ["original_bf16", "hf"])
    def test_one_bit_is_a_miss(self, capsys, monkeypatch, directory):
        """The smallest change of one weight is far below what the outputs show."""
        load = jina_jax.load

        def faulty(*arguments, **options):
            model, variables = load(*arguments, **options)
            b = variables["params"]["layers"]["mlp"]["down"]["lora_b"]
            changed = b.at[1, 2, 3, 4].set(jnp.nextafter(b[1, 2, 3, 4], jnp.float32(9.0)))
            variables["params"]["layers"]["mlp"]["down"]["lora_b"] = changed
            return model, variables

        monkeypatch.setattr(jina_jax, "load", faulty)
        assert run("verify", TINY / directory, "--tokens", 8) == FAILED
        out = capsys.readouterr().out
        assert re.search(r"^stored tensors held, bit for bit .* MISS$", out, re.MULTILINE)
        assert "encoder.layers.1.mlp.fc2." in out
        assert "14 checks passed, 1 failed" in out

    def test_nan_is_a_miss(self):
        assert not report.within("x", float("nan"), 1.0).passed
        assert report.show("", [report.within("x", 1.0, 1.0), report.within("x", np.float64(2.0), 1.0)]) == 1

    def test_adapters_of_several_ranks(self, tmp_path, capsys):
        """Held padded to one rank, so their bits cannot be compared; their outputs can."""
        config = make_config(num_hidden_layers=1)
        hf = write_hf(tmp_path / "hf", random_state(config, 0), config)
        folder = hf / "separation"
        file, settings = folder / "adapter_model.safetensors", json.loads((folder / "adapter_config.json").read_text())
        cut = {
            name: (tensor[:2] if "_A" in name else tensor[:, :2]).contiguous()
            for name, tensor in load_file(file).items()
        }
        save_file(cut, file, metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(settings | {"r": 2}))
        assert run("verify", hf, "--tokens", 8) == 0
        out = capsys.readouterr().out
        assert re.search(r"^adapter tensors of another rank or scale +18, held padded", out, re.MULTILINE)
        assert "15 checks passed, 0 failed" in out


def make_anchors(directory):
    """What others could have published about a tiny checkpoint: from its files and the float64 reference."""
    state = load_state(TINY / "original_bf16")
    config = json.loads((TINY / "original_bf16" / "config.json").read_text())
    stems = {"embeddings.word_embeddings": None, "layers.0.mlp.fc1": None, "pooler.dense": None} | {
        f"layers.0.self_attn.{name}_proj": index for index, name in enumerate("qkv")
    }
    sha256 = {}
    for stem, part in stems.items():
        name = stem if part is None else "encoder.layers.0.mixer.Wqkv"
        name = f"roberta.{name.replace('layers.0.mlp', 'encoder.layers.0.mlp')}.parametrizations.weight.original"
        tensor = state[name].float() if part is None else state[name].float().chunk(3)[part]
        sha256[f"{stem}.weight"] = hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
    files = [file for file in directory.rglob("*") if file.is_file()]
    cases = []
    for mask in (None, [0, 1, 1, 1, 1, 1, 1]):
        ids = torch.tensor([[0, 5, 399, 17, 23, 8, 2]])
        mask_ids = torch.ones_like(ids) if mask is None else torch.tensor([mask])
        hidden = {
            task or "none": forward(state, config, ids, mask_ids, task, dtype=torch.float64).hidden[0, 1:4, 1:5]
            for task in (None, *TASKS)
        }
        rounded = {task: np.round(values.numpy(), 4).tolist() for task, values in hidden.items()}
        case = {"input_ids": ids[0].tolist(), "rows": [1, 4], "columns": [1, 5], "tolerance": 1e-4, "hidden": rounded}
        cases.append(case if mask is None else case | {"attention_mask": mask})
    names = {str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return {"files": {"sha256": names}, "tensors": {"sha256": sha256}, "values": cases}


def check(directory, anchors):
    return list(published.check(directory, *jina_jax.load(directory), anchors))


def missed(checks):
    return [one.name for one in checks if one.passed is False]


class TestAnchors:
    @pytest.fixture(scope="class")
    @staticmethod
    def anchors():
        return make_anchors(TINY / "hf_bf16")

    def test_the_released_files(self, anchors):
        checks = check(TINY / "hf_bf16", anchors)
        assert [one.passed for one in checks] == [True] * (12 + 6 + 12)
        assert {one.name for one in checks} >= {
            "sha256 of text_matching/adapter_model.safetensors",
            "sha256 of layers.0.self_attn.k_proj.weight",
            "published values 1, no task",
            "published values 2, text-matching",
        }

    def test_the_same_weights_in_the_other_layout(self, anchors):
        checks = check(TINY / "original_bf16", anchors)
        assert [one.passed for one in checks] == [None] + [True] * (6 + 12)
        assert checks[0].name == "published sha256 of files"

    def test_other_weights(self, anchors):
        (only,) = check(TINY / "hf", anchors)
        assert only.passed is None

    def test_a_model_with_an_adapter_folded_in_is_another(self, anchors, tmp_path):
        assert run("merge", TINY / "hf_bf16", tmp_path / "out", "--task", "separation") == 0
        (only,) = check(tmp_path / "out", anchors)
        assert only.passed is None

    @pytest.mark.parametrize("file", ["config.json", "model.safetensors", "separation/adapter_model.safetensors"])
    def test_a_damaged_file_is_a_miss(self, anchors, tmp_path, file):
        damaged = shutil.copytree(TINY / "hf_bf16", tmp_path / "damaged") / file
        content = bytearray(damaged.read_bytes())
        if file == "config.json":
            content += b"\n"
        else:
            content[-1] ^= 1  # in the last weight
        damaged.write_bytes(content)
        expected = [f"sha256 of {file}"]
        if file == "model.safetensors":
            expected.append("sha256 of pooler.dense.weight")  # which is where the last number is
        assert missed(check(tmp_path / "damaged", anchors)) == expected

    def test_wrong_values_are_misses(self, anchors, monkeypatch):
        wrong = json.loads(json.dumps(anchors))
        wrong["values"][0]["hidden"]["none"][2][3] += 1e-3
        wrong["values"][1]["hidden"]["separation"][0][0] -= 1e-3
        wrong["values"][1]["hidden"]["classification"][0][0] = float("nan")
        assert missed(check(TINY / "original_bf16", wrong)) == [
            "published values 1, no task",
            "published values 2, separation",
            "published values 2, classification",
        ]
        monkeypatch.setattr(published, "read", lambda: wrong)
        assert run("verify", TINY / "original_bf16", "--tokens", 8, "--fast") == FAILED

    def test_the_masked_first_token_matters(self, anchors):
        wrong = json.loads(json.dumps(anchors))
        del wrong["values"][1]["attention_mask"]
        assert len(missed(check(TINY / "original_bf16", wrong))) == 6

    def test_a_missing_file_or_adapter_does_not_apply(self, anchors):
        more = json.loads(json.dumps(anchors))
        more["files"]["sha256"]["modules.json"] = "0" * 64
        more["values"][0]["hidden"]["summarisation"] = [[0.0]]
        more["values"][0]["text"] = "Hello"
        skipped = [one.name for one in check(TINY / "hf_bf16", more) if one.passed is None]
        assert skipped == [
            "sha256 of modules.json",
            "published token ids of text 1",
            "published values 1, summarisation",
        ]

    def test_token_ids(self, tmp_path):
        (tmp_path / "tokenizer.json").write_bytes(lzma.decompress(TOKENIZER.read_bytes()))
        case = published.read()["values"][0]
        (right,) = published._check_ids("ids", tmp_path, case)
        (wrong,) = published._check_ids("ids", tmp_path, case | {"text": case["text"].lower()})
        assert (right.passed, wrong.passed) == (True, False)
        assert len(case["input_ids"]) == 17
        sha256 = hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
        assert published.read()["files"]["sha256"]["tokenizer.json"] == sha256

    def test_the_published_ones_fit_the_model(self):
        """Names are those of tensors and tasks, slices are those of the values; the data itself needs the weights."""
        anchors = published.read()
        model, variables = jina_jax.load(TINY / "hf")
        names = list(anchors["tensors"]["sha256"])
        assert len(names) == 9
        assert list(bits.fingerprints(variables, model.config, names)) != []
        assert bits.fingerprints(variables, model.config, names).keys() == set(names)
        for name in (*anchors["tensors"]["sha256"].values(), *anchors["files"]["sha256"].values()):
            assert re.fullmatch("[0-9a-f]{64}", name)
        for case in anchors["values"]:
            assert list(case["hidden"]) == ["none", *TASKS]
            shape = tuple(end - start for start, end in (case["rows"], case["columns"]))
            assert {np.shape(values) for values in case["hidden"].values()} == {shape}
            assert len(case.get("attention_mask", case["input_ids"])) == len(case["input_ids"])
