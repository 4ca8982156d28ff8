"""Checkpoints whose weights are `.bin` files: read whole, and never run."""

import json
import os

import pytest
import torch
from convert_checks import nothing_left, run, same_model, same_tensors
from torch_checkpoints import make_config, random_state, to_hf, write_hf, write_original

from convert.__main__ import FAILED


class TestPickles:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_early_revisions(self, tmp_path, dtype):
        config = make_config()
        state = random_state(config, 0, dtype)
        write_original(tmp_path / "bin", state, config, pickled=True)
        (tmp_path / "bin" / "tokenizer.json").write_text("{}")
        assert run("to-jax", tmp_path / "bin", tmp_path / "own") == 0
        assert (tmp_path / "own" / "tokenizer.json").read_text() == "{}"
        assert run("to-torch", tmp_path / "own", tmp_path / "back", "--layout", "original") == 0
        same_tensors(tmp_path / "back", write_original(tmp_path / "safe", state, config))
        nothing_left(tmp_path, "bin", "own", "back", "safe")
        nothing_left(tmp_path / "bin", "config.json", "pytorch_model.bin", "tokenizer.json")
        assert run("verify", tmp_path / "bin", "--tokens", 8, "--fast") == 0

    def test_shared_and_strided_tensors(self, tmp_path):
        config = make_config(num_hidden_layers=1)
        state = random_state(config, 0)
        safe = write_original(tmp_path / "safe", state, config)
        strided = {name: tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor for name, tensor in state.items()}
        one = torch.cat([state["roberta.emb_ln.weight"], state["roberta.emb_ln.bias"]])  # two views of one memory
        strided |= {"roberta.emb_ln.weight": one[:64], "roberta.emb_ln.bias": one[64:]}
        write_original(tmp_path / "bin", strided, config, pickled=True)
        assert run("to-jax", tmp_path / "bin", tmp_path / "own") == 0
        same_model(safe, tmp_path / "own")

    def test_tied_decoder_in_an_old_file(self, tmp_path):
        config = make_config(num_hidden_layers=1)
        base, adapters = to_hf(random_state(config, 0), config)
        write_hf(tmp_path / "bin", random_state(config, 0), config)
        head = {"lm_head.decoder.weight": base["embeddings.word_embeddings.weight"]}
        (tmp_path / "bin" / "model.safetensors").rename(tmp_path / "kept.safetensors")
        torch.save(base | head, tmp_path / "bin" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        folder = tmp_path / "bin" / "text_matching"
        (folder / "adapter_model.safetensors").unlink()
        torch.save(adapters["text-matching"], folder / "adapter_model.bin")
        assert run("to-torch", tmp_path / "bin", tmp_path / "out", "--layout", "hf") == 0
        same_tensors(tmp_path / "out", write_hf(tmp_path / "safe", random_state(config, 0), config))

    def test_shards(self, tmp_path):
        config = make_config(num_hidden_layers=1)
        state = random_state(config, 0)
        bin = write_original(tmp_path / "bin", state, config, pickled=True)
        (bin / "pytorch_model.bin").unlink()
        names = list(state)
        shards = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
        for file, part in shards.items():
            torch.save({name: state[name] for name in part}, bin / file)
        index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
        (bin / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        assert run("to-jax", bin, tmp_path / "own") == 0
        same_model(tmp_path / "own", write_original(tmp_path / "safe", state, config))

    def test_code_is_refused_and_never_run(self, tmp_path, capsys):
        class Trap:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "trapped"),)

        config = make_config(num_hidden_layers=1)
        write_original(tmp_path / "bin", random_state(config, 0) | {"x": Trap()}, config | {}, pickled=True)
        assert run("to-jax", tmp_path / "bin", tmp_path / "own") == FAILED
        assert "could run code and is refused" in capsys.readouterr().err
        nothing_left(tmp_path, "bin")

    @pytest.mark.parametrize(
        ("content", "message"),
        [(b"", "end of file"), (b"version https://git-lfs", "damaged"), (None, "damaged"), ([1], "found")],
        ids=["empty", "pointer", "cut", "no tensors"],
    )
    def test_damage(self, tmp_path, capsys, content, message):
        config = make_config(num_hidden_layers=1)
        file = write_original(tmp_path / "bin", random_state(config, 0), config, pickled=True) / "pytorch_model.bin"
        if isinstance(content, list):
            torch.save({"epoch": 1}, file)
        else:
            file.write_bytes(file.read_bytes()[:-100] if content is None else content)
        assert run("to-jax", tmp_path / "bin", tmp_path / "own") == FAILED
        assert message in (error := capsys.readouterr().err)
        assert str(file) in error
        nothing_left(tmp_path, "bin")

    def test_errors_name_the_source(self, tmp_path, capsys):
        config = make_config(num_hidden_layers=1)
        state = random_state(config, 0)
        del state["roberta.emb_ln.bias"]
        write_original(tmp_path / "bin", state, config, pickled=True)
        assert run("to-jax", tmp_path / "bin", tmp_path / "own") == FAILED
        assert f"error: {tmp_path / 'bin'} is not a whole checkpoint" in (error := capsys.readouterr().err)
        assert "- emb_ln.bias [64]: in model, not in checkpoint" in error
