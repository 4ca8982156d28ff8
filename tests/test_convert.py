"""The file-to-file tools, run as a user runs them, on the tiny checkpoints."""

import json
import lzma
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from convert_checks import nothing_left, run, same_model, same_tensors, tensors
from numerics import EMBEDDING, MERGED, assert_close
from safetensors.torch import save_file
from torch_checkpoints import make_config, random_mlm_head, random_state, to_hf, write_original

import jina_jax
from convert.__main__ import FAILED, MISUSED, PIP, main
from convert.hf_reference import load_hf, run_hf
from convert.reference import forward, load_state
from jina_jax.checkpoint import flatten

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"
TINY = DATA / "tiny_checkpoints"
TOKENIZER = DATA / "tokenizer" / "tokenizer.json.xz"


class TestRewrite:
    @pytest.mark.parametrize("name", ["original", "original_bf16", "hf", "hf_bf16"])
    def test_there_and_back_is_exact(self, tmp_path, capsys, name):
        layout = name.split("_")[0]
        assert run("to-jax", TINY / name, tmp_path / "own") == 0
        assert run("to-torch", tmp_path / "own", tmp_path / "back", "--layout", layout) == 0
        same_tensors(tmp_path / "back", TINY / name)
        assert capsys.readouterr().out.count("equal those of the source, bit for bit") == 2
        nothing_left(tmp_path, "own", "back")

    @pytest.mark.parametrize(("source", "layout"), [("original_bf16", "hf"), ("hf", "original")])
    def test_from_one_public_layout_to_the_other(self, tmp_path, source, layout):
        assert run("to-torch", TINY / source, tmp_path / "out", "--layout", layout) == 0
        same_tensors(tmp_path / "out", TINY / source.replace(source.split("_")[0], layout))

    @pytest.mark.parametrize("source", ["native_new", "native_saved"])
    def test_files_of_transformers(self, tmp_path, source):
        assert run("to-torch", TINY / source, tmp_path / "out", "--layout", "original") == 0
        same_tensors(tmp_path / "out", TINY / "original")

    def test_orbax(self, tmp_path):
        assert run("to-jax", TINY / "original_bf16", tmp_path / "orbax", "--layout", "orbax") == 0
        assert (tmp_path / "orbax" / "orbax").is_dir()
        assert run("to-torch", tmp_path / "orbax", tmp_path / "out", "--layout", "original") == 0
        same_tensors(tmp_path / "out", TINY / "original_bf16")

    def test_types(self, tmp_path, capsys):
        assert run("to-jax", TINY / "original", tmp_path / "low", "--dtype", "bfloat16") == 0
        assert "in bfloat16, rounded from float32" in capsys.readouterr().out
        assert run("to-torch", tmp_path / "low", tmp_path / "out", "--layout", "original") == 0
        same_tensors(tmp_path / "out", TINY / "original_bf16")
        assert run("to-torch", TINY / "hf_bf16", tmp_path / "wide", "--layout", "hf", "--dtype", "float32") == 0
        assert {tensor.dtype for tensor in tensors(tmp_path / "wide").values()} == {torch.float32}
        same_model(tmp_path / "wide", TINY / "hf_bf16")

    def test_keep_loses_nothing_of_mixed_types(self, tmp_path):
        """Adapters trained in float32 on a bfloat16 backbone are common."""
        config = make_config(num_hidden_layers=1)
        state = random_state(config, 0)
        mixed = {name: tensor if "lora" in name else tensor.bfloat16() for name, tensor in state.items()}
        write_original(tmp_path / "mixed", mixed, config)
        assert run("to-jax", tmp_path / "mixed", tmp_path / "out") == 0
        same_model(tmp_path / "mixed", tmp_path / "out")

    def test_tokenizer_files_come_along(self, tmp_path, capsys):
        config = make_config(num_hidden_layers=1)
        source = write_original(tmp_path / "source", random_state(config, 0), config)
        (source / "tokenizer.json").write_text("{}")
        (source / "special_tokens_map.json").write_text('{"a": 1}')
        assert run("to-jax", source, tmp_path / "out") == 0
        assert "tokenizer: tokenizer.json, special_tokens_map.json" in capsys.readouterr().out
        assert (tmp_path / "out" / "special_tokens_map.json").read_text() == '{"a": 1}'

    def test_a_write_that_went_wrong_is_noticed(self, tmp_path, capsys, monkeypatch):
        save = jina_jax.save

        def rounding(path, model, variables, **options):
            kernel = variables["params"]["layers"]["mlp"]["up"]["kernel"]
            variables["params"]["layers"]["mlp"]["up"]["kernel"] = kernel.at[0, 0, 0].add(1.0)
            result = save(path, model, variables, **options)
            variables["params"]["layers"]["mlp"]["up"]["kernel"] = kernel
            return result

        monkeypatch.setattr(jina_jax, "save", rounding)
        assert run("to-jax", TINY / "original", tmp_path / "out") == FAILED
        assert "does not read back" in (error := capsys.readouterr().err)
        assert "differ: layers/mlp/up/kernel" in error

    def test_head_is_reported(self, tmp_path, capsys):
        config = make_config(num_hidden_layers=1)
        base, _ = to_hf(random_state(config, 0), config)
        (tmp_path / "source").mkdir()
        save_file(base | random_mlm_head(config, 1), tmp_path / "source" / "model.safetensors")
        config = {key: value for key, value in config.items() if key not in ("lora_adaptations", "task_instructions")}
        (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"model_type": "jina_embeddings_v3"}))
        assert run("to-jax", tmp_path / "source", tmp_path / "out") == 0
        assert "left out: 5 tensors of the masked-language-model head" in capsys.readouterr().out


def draw_batch(config, lengths=(9, 4, 6)):
    rng = np.random.default_rng(0)
    mask = np.arange(max(lengths))[None] < np.array(lengths)[:, None]
    ids = np.where(mask, rng.integers(3, config.vocab_size, mask.shape), config.pad_token_id)
    return ids.astype(np.int32), mask


class TestMerge:
    @pytest.mark.parametrize("layout", ["own", "hf"])
    @pytest.mark.parametrize("source", ["original", "hf_bf16"])
    def test_is_the_factored_model_with_that_task(self, tmp_path, source, layout):
        task = "classification" if layout == "own" else "retrieval.query"
        assert run("merge", TINY / source, tmp_path / "out", "--task", task, "--layout", layout) == 0
        model, variables = jina_jax.load(TINY / source)
        merged, folded = jina_jax.load(tmp_path / "out")
        assert merged.config.tasks == ()
        assert not any("lora" in path for path in flatten(folded))
        ids, mask = draw_batch(model.config)
        factored, found = model.apply(variables, ids, mask, task), merged.apply(folded, ids, mask)
        assert np.abs(factored.hidden - model.apply(variables, ids, mask).hidden)[mask].max() > 0.1
        assert_close(found.hidden, self.exact(source, ids, mask, task), MERGED, where=mask)
        assert_close(found.hidden, factored.hidden, 2 * MERGED, where=mask)  # either may be off by it
        assert_close(found.embeddings, factored.embeddings, EMBEDDING)
        with pytest.raises(ValueError, match="this model has no adapters"):
            merged.apply(folded, ids, mask, task)

    def test_transformers_read_the_result(self, tmp_path, capsys):
        assert run("merge", TINY / "original", tmp_path / "out", "--task", "retrieval.passage", "--layout", "hf") == 0
        assert "every text of this task begins with 'Represent the document for retrieval: '" in capsys.readouterr().out
        ids, mask = draw_batch(jina_jax.load(TINY / "original")[0].config)
        expected = self.exact("original", ids, mask, "retrieval.passage")
        found, _ = run_hf(load_hf(tmp_path / "out"), torch.tensor(ids), torch.tensor(mask))
        assert_close(found.numpy(), expected, MERGED, where=mask)
        assert run("verify", tmp_path / "out", "--tokens", 8) == 0

    @staticmethod
    def exact(source, ids, mask, task):
        """Hidden states of the PyTorch reference in float64."""
        directory = TINY / source.replace("hf", "original")
        state, config = load_state(directory), json.loads((directory / "config.json").read_text())
        out = forward(state, config, torch.tensor(ids), torch.tensor(mask), task, dtype=torch.float64)
        return out.hidden.numpy()

    def test_types(self, tmp_path):
        for dtype in ("bfloat16", "keep"):
            assert run("merge", TINY / "hf_bf16", tmp_path / dtype, "--task", "separation", "--dtype", dtype) == 0
        assert {tensor.dtype for tensor in tensors(tmp_path / "keep").values()} == {torch.bfloat16}
        same_tensors(tmp_path / "keep", tmp_path / "bfloat16")


class TestCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["to-jax", "nowhere", "out"], MISUSED, "no directory 'nowhere'"),
            (["to-jax", "{tmp}", "{tmp}/out"], MISUSED, "no config.json in"),
            (["to-jax", TINY / "hf", "{tmp}"], MISUSED, "exists; delete it or choose another name"),
            (["merge", TINY / "hf", "{tmp}"], MISUSED, None),
            (["merge", TINY / "hf", "{tmp}", "--task", "separation"], MISUSED, "exists; delete it"),
            (["merge", TINY / "hf", "{tmp}/out", "--task", "summary"], MISUSED, "unknown task 'summary'"),
            (["merge", TINY / "hf", "{tmp}/out", "--task", "separation", "--layout", "original"], MISUSED, None),
            (["to-torch", TINY / "hf", "{tmp}/out"], MISUSED, None),
            (["verify", TINY / "hf", "--tokens", "2"], MISUSED, "--tokens 2 must be from 3 to 512"),
            (["verify", TINY / "hf", "--fast", "--dtype", "bfloat16"], MISUSED, "leave --fast out"),
            (["tokenizer", "{tmp}/none.json"], MISUSED, "none.json"),
            (["frobnicate"], MISUSED, None),
            ([], MISUSED, None),
        ],
    )
    def test_mistakes(self, tmp_path, capsys, arguments, code, message):
        arguments = [str(argument).format(tmp=tmp_path) for argument in arguments]
        if message is None:  # argparse's own
            with pytest.raises(SystemExit) as stop:
                main(arguments)
            assert stop.value.code == code
            return
        assert main(arguments) == code
        out, err = capsys.readouterr()
        assert message in err
        assert (out, err.count("\n")) == ("", 1)
        nothing_left(tmp_path)

    def test_the_original_layout_needs_adapters(self, tmp_path, capsys):
        assert run("merge", TINY / "hf", tmp_path / "bare", "--task", "separation") == 0
        assert run("to-torch", tmp_path / "bare", tmp_path / "out", "--layout", "original") == MISUSED
        assert "use --layout hf" in capsys.readouterr().err
        nothing_left(tmp_path, "bare")

    def test_a_layout_without_a_judge(self, tmp_path, capsys):
        assert run("to-jax", TINY / "hf", tmp_path / "own") == 0
        capsys.readouterr()
        assert run("verify", tmp_path / "own") == MISUSED
        assert "python -m convert to-torch" in capsys.readouterr().err

    def test_a_damaged_checkpoint_is_a_failure(self, tmp_path, capsys, monkeypatch):
        source = write_original(tmp_path / "cut", random_state(make_config(), 0), make_config())
        content = (source / "model.safetensors").read_bytes()
        (source / "model.safetensors").write_bytes(content[:-1])
        for command in (["to-jax", source, tmp_path / "out"], ["verify", source]):
            assert run(*command) == FAILED
            assert "not a whole safetensors file" in capsys.readouterr().err
        nothing_left(tmp_path, "cut")
        monkeypatch.setenv("JINA_JAX_DEBUG", "1")
        with pytest.raises(jina_jax.CheckpointError):
            run("verify", source)

    def test_tokenizer(self, tmp_path, capsys):
        (tmp_path / "tokenizer.json").write_bytes(lzma.decompress(TOKENIZER.read_bytes()))
        assert run("tokenizer", tmp_path) == 0
        assert capsys.readouterr().out == f"{tmp_path / 'sentencepiece.bpe.model'}\n"
        assert (tmp_path / "sentencepiece.bpe.model").stat().st_size > 4_000_000
        (tmp_path / "tokenizer.json").write_text("{}")
        assert run("tokenizer", tmp_path) == FAILED

    @pytest.mark.parametrize(("absent", "directory"), [("torch", "original"), ("transformers", "hf"), ("peft", "hf")])
    def test_a_missing_package_is_named(self, absent, directory):
        program = (
            f"import sys, importlib.util as u; find = u.find_spec; sys.modules[{absent!r}] = None\n"
            f"u.find_spec = lambda name, *a: None if name == {absent!r} else find(name, *a)\n"
            f"from convert.__main__ import main; sys.exit(main(['verify', {str(TINY / directory)!r}]))"
        )
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (MISUSED, "")
        assert done.stderr.count("\n") == 1
        assert absent in done.stderr
        assert PIP in done.stderr

    def test_as_a_module(self):
        command = [sys.executable, "-W", "error", "-m", "convert"]
        done = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
        for name in ("to-jax", "to-torch", "merge", "tokenizer", "verify"):
            assert name in done.stdout
        done = subprocess.run(
            [*command, "verify", str(TINY / "hf_bf16"), "--tokens", "8"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines()[0] == f"{TINY / 'hf_bf16'}: jina_jax in float32 against PyTorch in float64"
        assert done.stdout.endswith("15 checks passed, 0 failed\n")
