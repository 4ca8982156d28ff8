"""The judges are judged first: both PyTorch references against stored goldens, and against each other."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch_checkpoints import make_config, random_mlm_head, random_state, to_hf, write_hf, write_original

from convert.hf_reference import load_hf, run_hf
from convert.reference import embed, forward, load_state, mlm_logits

TINY = Path(__file__).parent / "data" / "tiny_checkpoints"
CONFIG = json.loads((TINY / "original" / "config.json").read_text())
TASKS = [None, *CONFIG["lora_adaptations"]]

HIDDEN, POOLED, EMBEDDING = 1e-5, 5e-6, 1e-6  # float32 against float32 or float64
EXACT = 1e-12  # float64 against float64
BF16 = 5e-3  # a unit vector computed in bfloat16 against float64


def folder_name(task):
    return "none" if task is None else task.replace(".", "_").replace("-", "_")


def near(actual, expected, atol):
    """Assert equality within `atol`, in shape, and without NaN or infinity on either side."""
    actual, expected = (x.detach() if isinstance(x, torch.Tensor) else x for x in (actual, expected))
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(actual.astype(np.float64), expected.astype(np.float64), rtol=0, atol=atol)


def draw_batch(config, seed=0, lengths=(9, 4, 1, 6)):
    """Draw right-padded ids without special ids, and their mask."""
    rng = np.random.default_rng(seed)
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    ids = np.where(mask, rng.integers(3, config["vocab_size"], mask.shape), config["pad_token_id"])
    return torch.tensor(ids), torch.tensor(mask)


@pytest.fixture(scope="module")
def goldens():
    with np.load(TINY / "goldens.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def batch(goldens):
    return torch.tensor(goldens["ids"]), torch.tensor(goldens["mask"])


@pytest.fixture(scope="module")
def left_masked(goldens):
    return torch.tensor(goldens["ids_l"]), torch.tensor(goldens["mask_l"])


@pytest.fixture(scope="module")
def original():
    return load_state(TINY / "original")


class TestOriginalAgainstGoldens:
    @pytest.mark.parametrize("task", TASKS)
    def test_float32(self, goldens, batch, left_masked, original, task):
        name = folder_name(task)
        out = forward(original, CONFIG, *batch, task)
        assert {x.dtype for x in (out.hidden, out.pooler, out.pooled)} == {torch.float32}
        near(out.hidden, goldens[f"{name}/orig_last_hidden_state"], HIDDEN)
        near(out.hidden, goldens[f"{name}/last_hidden_state"], HIDDEN)
        near(out.pooler, goldens[f"{name}/pooler_output"], POOLED)
        near(out.pooled, goldens[f"{name}/mean_pooled_f64"], POOLED)
        near(embed(out.pooled), goldens[f"{name}/embedding_f64"], EMBEDDING)
        near(embed(out.pooled, 16), goldens[f"{name}/embedding_dim16_f64"], EMBEDDING)
        left = forward(original, CONFIG, *left_masked, task)
        near(left.hidden, goldens[f"{name}/last_hidden_state_l"], HIDDEN)

    @pytest.mark.parametrize("task", TASKS)
    def test_float64(self, goldens, batch, left_masked, original, task):
        name = folder_name(task)
        out = forward(original, CONFIG, *batch, task, dtype=torch.float64)
        assert {x.dtype for x in (out.hidden, out.pooler, out.pooled)} == {torch.float64}
        near(out.hidden, goldens[f"{name}/last_hidden_state_f64"], EXACT)
        near(out.pooled, goldens[f"{name}/mean_pooled_f64"], EXACT)
        near(embed(out.pooled), goldens[f"{name}/embedding_f64"], EXACT)
        near(embed(out.pooled, 16), goldens[f"{name}/embedding_dim16_f64"], EXACT)
        left = forward(original, CONFIG, *left_masked, task, dtype=torch.float64)
        near(left.hidden, goldens[f"{name}/last_hidden_state_l_f64"], EXACT)

    def test_hidden_states(self, goldens, batch, original):
        out = forward(original, CONFIG, *batch, "retrieval.query", dtype=torch.float64)
        assert len(out.hidden_states) == CONFIG["num_hidden_layers"] + 1
        for i, hidden in enumerate(out.hidden_states):
            near(hidden, goldens[f"retrieval_query/hidden_{i}_f64"], EXACT)
        assert torch.equal(out.hidden_states[-1], out.hidden)

    @pytest.mark.parametrize(("dtype", "key", "atol"), [
        (torch.float32, "mixed/last_hidden_state", HIDDEN),
        (torch.float64, "mixed/last_hidden_state_f64", EXACT),
    ])  # fmt: skip
    def test_mixed_tasks(self, goldens, batch, original, dtype, key, atol):
        tasks = torch.tensor(goldens["mixed/tasks"])
        near(forward(original, CONFIG, *batch, tasks, dtype=dtype).hidden, goldens[key], atol)

    @pytest.mark.parametrize("task", TASKS)
    def test_bfloat16_weights(self, goldens, batch, task):
        state = load_state(TINY / "original_bf16")
        assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
        expected = goldens[f"bf16_weights/{folder_name(task)}/last_hidden_state_f64"]
        exact = forward(state, CONFIG, *batch, task, dtype=torch.float64)
        near(exact.hidden, expected, EXACT)
        near(forward(state, CONFIG, *batch, task).hidden, expected, HIDDEN)
        low = forward(state, CONFIG, *batch, task, dtype=torch.bfloat16)
        assert low.hidden.dtype == torch.bfloat16
        assert low.pooled.dtype == torch.float32
        near(embed(low.pooled), embed(exact.pooled), BF16)

    def test_goldens_tell_tasks_apart(self, goldens):
        for i, one in enumerate(TASKS):
            for other in TASKS[i + 1 :]:
                one_, other_ = (goldens[f"{folder_name(t)}/embedding_f64"] for t in (one, other))
                assert np.abs(one_ - other_).max() > 0.05


class TestNativeAgainstGoldens:
    @pytest.mark.parametrize("directory", ["hf", "native_saved", "native_new", "hf_bf16"])
    def test_every_task(self, goldens, batch, left_masked, directory):
        model = load_hf(TINY / directory)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        for task in [*TASKS, None]:  # the last one: adapters can be left again
            name = folder_name(task)
            hidden, pooler = run_hf(model, *batch, task)
            if directory == "hf_bf16":
                near(hidden, goldens[f"bf16_weights/{name}/last_hidden_state_f64"], HIDDEN)
                continue
            near(hidden, goldens[f"{name}/last_hidden_state"], HIDDEN)
            near(hidden, goldens[f"{name}/last_hidden_state_f64"], HIDDEN)
            near(pooler, goldens[f"{name}/pooler_output"], POOLED)
            left, _ = run_hf(model, *left_masked, task)
            near(left, goldens[f"{name}/last_hidden_state_l"], HIDDEN)

    def test_unknown_task_is_refused(self, batch):
        with pytest.raises(ValueError, match="summarisation"):
            run_hf(load_hf(TINY / "hf"), *batch, "summarisation")

    def test_original_layout_is_refused(self):
        with pytest.raises(ValueError, match=r"missing: embeddings\.word_embeddings\.weight"):
            load_hf(TINY / "original")

    @pytest.mark.parametrize("task", ["classification", "text-matching"])  # the first and the last loaded
    def test_incomplete_adapter_is_refused(self, tmp_path, task):
        config = make_config(num_hidden_layers=1)
        write_hf(tmp_path, random_state(config, 0), config)
        file = tmp_path / folder_name(task) / "adapter_model.safetensors"
        tensors = load_file(file)
        del tensors["encoder.layers.0.mlp.fc1.lora_B.weight"]
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"missing: layers\.0\.mlp\.fc1\.lora_B\.{folder_name(task)}"):
            load_hf(tmp_path)

    def test_loading_is_quiet_and_leaves_the_settings_alone(self, capfd):
        from transformers.utils import logging

        before = logging.get_verbosity()
        logging.set_verbosity_info()
        try:
            load_hf(TINY / "hf")
            assert tuple(capfd.readouterr()) == ("", "")
            assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.INFO, True)
        finally:
            logging.set_verbosity(before)


ODD = {"hidden_size": 36, "intermediate_size": 50, "num_attention_heads": 3, "vocab_size": 61}
RANDOM_CONFIGS = {
    "tiny": {},
    "odd sizes": ODD,
    "rank and alpha": {"lora_rank": 3, "lora_alpha": 5, "num_hidden_layers": 2},
    "one adapter": {"lora_adaptations": ["my.own-task"], "num_hidden_layers": 1},
    "rotary base and eps": {"rotary_emb_base": 500.0, "layer_norm_eps": 1e-3},
}


def in_memory(name, task):
    """Turn a name that `to_hf` gives into that of the loaded `transformers` model."""
    for old, new in {
        "encoder.": "", "mixer.": "self_attn.", "out_proj": "o_proj", "emb_ln": "embeddings.LayerNorm",
        "norm1": "post_attention_layernorm", "norm2": "post_mlp_layernorm",
    }.items():  # fmt: skip
        name = name.replace(old, new)
    if "lora_embedding" in name:
        return f"{name}.{folder_name(task)}"
    module, leaf = name.rsplit(".", 1)
    if "lora" in module:
        return f"{module}.{folder_name(task)}.{leaf}"
    return name if "norm" in module.lower() else f"{module}.base_layer.{leaf}"


class TestJudgesAgree:
    @pytest.mark.parametrize("prefix", ["", "roberta."])
    @pytest.mark.parametrize("overrides", RANDOM_CONFIGS.values(), ids=RANDOM_CONFIGS.keys())
    def test_on_random_checkpoints(self, tmp_path, overrides, prefix):
        config = make_config(**overrides)
        state = random_state(config, seed=len(overrides))
        model = load_hf(write_hf(tmp_path, state, config, prefix=prefix))
        ids, mask = draw_batch(config)
        seen = []
        for task in [None, *config["lora_adaptations"]]:
            hidden, pooler = run_hf(model, ids, mask, task)
            out = forward(state, config, ids, mask, task)
            near(out.hidden, hidden, HIDDEN)
            near(out.pooler, pooler, HIDDEN)
            assert all((hidden - other).abs().max() > 0.1 for other in seen), "this adapter does nothing"
            seen.append(hidden)

    def test_on_gradients(self, tmp_path):
        """Autograd through merged weights equals autograd through PEFT's factored ones, in float64."""
        config = make_config(num_hidden_layers=2)
        task = "text-matching"
        state = {k: v.double().requires_grad_() for k, v in random_state(config, 1).items()}
        ids, mask = draw_batch(config)
        weights = torch.randn(*ids.shape, config["hidden_size"], generator=torch.Generator().manual_seed(0))
        weights = (weights * mask[:, :, None]).double()

        def loss(hidden, pooler):
            return (hidden * weights).sum() + (pooler * weights[:, 0]).sum()

        out = forward(state, config, ids, mask, task, dtype=torch.float64)
        loss(out.hidden, out.pooler).backward()
        used = [name == task for name in config["lora_adaptations"]]
        for name, tensor in state.items():
            if ".lora_" in name:  # of the stacked factors, only the task's is reached
                assert [bool(factor.any()) for factor in tensor.grad] == used, name
            else:
                assert tensor.grad.any(), name

        model = load_hf(write_hf(tmp_path, {k: v.detach() for k, v in state.items()}, config)).double()
        run_hf(model, ids, mask, task)  # activates the adapter
        model.requires_grad_(True)
        native = model(input_ids=ids, attention_mask=mask)
        loss(native.last_hidden_state, native.pooler_output).backward()
        unseen = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

        base, adapters = to_hf({name: tensor.grad for name, tensor in state.items()}, config)
        for name, grad in {**base, **adapters[task]}.items():
            if "Wqkv" in name:
                for projection, part in zip("qkv", grad.chunk(3), strict=True):
                    near(unseen.pop(in_memory(name, task).replace("Wqkv", f"{projection}_proj")), part, 1e-10)
            elif "q_proj.lora_A" in name:  # the original has one A for q, k and v: the sum is its gradient
                names = [in_memory(name.replace("q_proj", f"{p}_proj"), task) for p in "qkv"]
                near(sum(unseen.pop(name) for name in names), grad, 1e-10)
            elif not any(part in name for part in ("k_proj.lora_A", "v_proj.lora_A")):
                near(unseen.pop(in_memory(name, task)), grad, 1e-10)
        assert not unseen

    def test_on_the_masked_language_model_head(self):
        from transformers import JinaEmbeddingsV3Config
        from transformers.models.jina_embeddings_v3.modeling_jina_embeddings_v3 import JinaEmbeddingsV3LMHead

        config = make_config(layer_norm_eps=1e-3, **ODD)
        state, head = random_state(config, 3), random_mlm_head(config, 4)
        table = state["roberta.embeddings.word_embeddings.parametrizations.weight.original"]
        fields = ("vocab_size", "hidden_size", "layer_norm_eps", "num_attention_heads")
        native = JinaEmbeddingsV3LMHead(JinaEmbeddingsV3Config(**{name: config[name] for name in fields}))
        tensors = {name.removeprefix("lm_head."): tensor for name, tensor in head.items()}
        native.load_state_dict(tensors | {"decoder.weight": table, "decoder.bias": tensors["bias"]})
        hidden = forward(state, config, *draw_batch(config)).hidden
        with torch.no_grad():
            near(mlm_logits(head, table, hidden, eps=1e-3), native(hidden), HIDDEN)
            exact = mlm_logits(head, table, hidden.double(), eps=1e-3)
            assert exact.dtype == torch.float64
            near(exact, native.double()(hidden.double()), EXACT)


class TestForward:
    def test_spellings_of_a_task(self, batch, original):
        by_name = forward(original, CONFIG, *batch, "separation")
        for task in (2, torch.full((5,), 2)):
            other = forward(original, CONFIG, *batch, task)
            assert torch.equal(by_name.hidden, other.hidden)
            assert torch.equal(by_name.pooler, other.pooler)

    def test_mixed_rows_are_the_rows_of_single_tasks(self, batch, original):
        tasks = torch.tensor([4, -1, 0, -1, 2])
        mixed = forward(original, CONFIG, *batch, tasks, dtype=torch.float64)
        for row, task in enumerate(tasks.tolist()):
            alone = forward(original, CONFIG, *batch, None if task == -1 else task, dtype=torch.float64)
            near(mixed.pooler[row], alone.pooler[row], EXACT)
            near(mixed.pooled[row], alone.pooled[row], EXACT)
            for one, other in zip(mixed.hidden_states, alone.hidden_states, strict=True):
                near(one[row], other[row], EXACT)

    @pytest.mark.parametrize("task", ["summarisation", 5, -2, torch.zeros(3, dtype=torch.int64)])
    def test_wrong_task_is_refused(self, batch, original, task):
        with pytest.raises(ValueError, match=r"task|summarisation"):
            forward(original, CONFIG, *batch, task)

    def test_row_without_tokens(self, batch, original):
        ids, mask = batch
        empty = forward(original, CONFIG, ids, torch.zeros_like(mask), "classification")
        near(embed(empty.pooled), np.zeros((5, 64)), 0)
        assert torch.isfinite(empty.hidden).all()

    def test_base_without_adapters(self, batch, original):
        base, _ = to_hf(original, CONFIG, "roberta.")
        del base["roberta.pooler.dense.bias"]
        out = forward(base, CONFIG, *batch)
        assert out.pooler is None
        assert torch.equal(out.hidden, forward(original, CONFIG, *batch).hidden)
        with pytest.raises(KeyError):
            forward(base, CONFIG, *batch, "classification")

    def test_gradient_agrees_with_differences(self):
        config = make_config(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=12)
        state = {k: v.double().requires_grad_() for k, v in random_state(config, 5).items()}
        ids, mask = draw_batch(config, lengths=(4, 2, 3))
        tasks = torch.tensor([1, -1, 4])

        def loss(tensors):
            out = forward(tensors, config, ids, mask, tasks, dtype=torch.float64)
            return embed(out.pooled)[:, :4].sum() + out.pooler.pow(2).sum()

        generator = torch.Generator().manual_seed(6)
        step = {k: torch.randn(v.shape, generator=generator, dtype=torch.float64) for k, v in state.items()}
        loss(state).backward()
        slope = sum((state[k].grad * step[k]).sum() for k in state)
        with torch.no_grad():
            ahead, behind = (loss({k: v + h * step[k] for k, v in state.items()}) for h in (1e-6, -1e-6))
        assert abs(slope) > 0.1
        near((ahead - behind) / 2e-6, slope, 1e-6)

    def test_embed_cuts_then_normalises(self):
        pooled = torch.tensor([[3.0, 4.0, 12.0], [0.0, 0.0, 1.0]])
        near(embed(pooled, 2), [[0.6, 0.8], [0.0, 0.0]], 1e-7)
        near(embed(pooled), [[3 / 13, 4 / 13, 12 / 13], [0.0, 0.0, 1.0]], 1e-7)
        assert embed(pooled.bfloat16()).dtype == torch.float32


class TestCheckpoints:
    def test_make_config_is_the_published_kind(self):
        assert make_config() == CONFIG
        with pytest.raises(TypeError, match="hiden_size"):
            make_config(hiden_size=32)

    def test_random_state_has_every_tensor(self, original):
        state = random_state(make_config(), 0)
        assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in original.items()}
        assert all(tensor.std() > 0.01 for tensor in state.values() if tensor.numel() > 1)

    def test_random_state_is_a_function_of_its_seed(self):
        config = make_config()
        one, again, other = (random_state(config, seed) for seed in (1, 1, 2))
        low = random_state(config, 1, torch.bfloat16)
        for name, tensor in one.items():
            assert torch.equal(tensor, again[name])
            assert not torch.equal(tensor, other[name])
            assert torch.equal(tensor.bfloat16(), low[name])

    @pytest.mark.parametrize("width", [16, 64, 512])
    def test_activations_stay_of_order_one(self, width):
        config = make_config(hidden_size=width, num_hidden_layers=4)
        ids, mask = draw_batch(config)
        state = random_state(config, 7)
        for task in (None, "classification"):
            out = forward(state, config, ids, mask, task)
            assert all(0.7 < hidden.std() < 1.4 for hidden in out.hidden_states)
            assert 0.3 < out.pooler.std() < 0.9

    @pytest.mark.parametrize(("source", "target"), [("original", "hf"), ("original_bf16", "hf_bf16")])
    def test_to_hf_gives_the_published_tensors(self, source, target):
        base, adapters = to_hf(load_state(TINY / source), CONFIG, "roberta.")
        pairs = [(base, TINY / target / "model.safetensors")]
        for task, tensors in adapters.items():
            pairs.append((tensors, TINY / target / folder_name(task) / "adapter_model.safetensors"))
        for tensors, file in pairs:
            stored = load_file(file)
            assert tensors.keys() == stored.keys()
            for name, tensor in stored.items():
                assert tensors[name].dtype == tensor.dtype
                assert torch.equal(tensors[name], tensor)

    @pytest.mark.parametrize("pickled", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_written_original_is_read_back(self, tmp_path, pickled, dtype):
        config = make_config(num_hidden_layers=1)
        state = random_state(config, 8, dtype)
        loaded = load_state(write_original(tmp_path, state, config, pickled=pickled))
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
        assert {tensor.dtype for tensor in loaded.values()} == {dtype}
        assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == str(dtype)[6:]

    def test_configs_on_disk(self, tmp_path):
        state = load_state(TINY / "original")
        write_original(tmp_path / "original", state, CONFIG)
        write_hf(tmp_path / "hf", state, CONFIG, prefix="roberta.")
        for file in ("original/config.json", "hf/config.json", "hf/text_matching/adapter_config.json"):
            assert json.loads((tmp_path / file).read_text()) == json.loads((TINY / file).read_text())

    def test_missing_weights(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin"):
            load_state(tmp_path)
