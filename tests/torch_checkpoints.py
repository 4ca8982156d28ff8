"""Random checkpoints of jina-embeddings-v3, in memory and on disk, in the original and the native layout.

Tests draw a tiny config, fill it with weights whose every tensor matters (no zero LoRA B, no unit LayerNorm),
and write complete folders as they are published. Torch only: nothing here comes from `jina_jax`.
Letters: V vocabulary, D width, F mlp width, L layers, K adapters, R rank.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

PROMPTS = {
    "retrieval.query": "Represent the query for retrieving evidence documents: ",
    "retrieval.passage": "Represent the document for retrieval: ",
    "separation": "",
    "classification": "",
    "text-matching": "",
}

_REMOTE = "jinaai/xlm-roberta-flash-implementation"
_LORA_TARGETS = [
    "word_embeddings", "token_type_embeddings", "q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "dense",
]  # fmt: skip


def make_config(**overrides: Any) -> dict[str, Any]:
    """Draw up a config.json of the original kind, tiny unless told otherwise.

    Args:
        **overrides: fields to change. `task_instructions` and `matryoshka_dimensions` follow
            `lora_adaptations` and `hidden_size` if not given.

    Returns:
        The parsed config.json.
    """
    width = overrides.get("hidden_size", 64)
    tasks = overrides.get("lora_adaptations", list(PROMPTS))
    config = {
        "_name_or_path": "jinaai/jina-embeddings-v3",
        "architectures": ["XLMRobertaModel"],
        "attention_probs_dropout_prob": 0.1,
        "auto_map": {
            "AutoConfig": f"{_REMOTE}--configuration_xlm_roberta.XLMRobertaFlashConfig",
            "AutoModel": f"{_REMOTE}--modeling_lora.XLMRobertaLoRA",
        },
        "bos_token_id": 0,
        "classifier_dropout": None,
        "emb_pooler": None,
        "eos_token_id": 2,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": 2 * width,
        "layer_norm_eps": 1e-5,
        "load_trained_adapters": True,
        "lora_adaptations": tasks,
        "lora_alpha": 1,
        "lora_dropout_p": 0.0,
        "lora_main_params_trainable": False,
        "lora_rank": 4,
        "matryoshka_dimensions": [2**i for i in range(3, width.bit_length()) if 2**i <= width],
        "max_position_embeddings": 514,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "output_past": True,
        "pad_token_id": 1,
        "position_embedding_type": "rotary",
        "rotary_emb_base": 20000.0,
        "torch_dtype": "float32",
        "transformers_version": "4.30.2",
        "truncate_dim": None,
        "type_vocab_size": 1,
        "use_cache": True,
        "use_flash_attn": True,
        "vocab_size": 400,
        "task_instructions": {task: PROMPTS.get(task, "") for task in tasks},
    }
    if unknown := overrides.keys() - config.keys():
        raise TypeError(f"no such fields in config.json: {sorted(unknown)}")
    return config | overrides


def random_state(
    config: dict[str, Any],
    seed: int,
    dtype: torch.dtype = torch.float32,
    *,
    adapter_scale: float = 0.5,
    pooler: bool = True,
) -> dict[str, Tensor]:
    """Draw a checkpoint in the original layout whose activations stay of order one at any width.

    Args:
        config: a config.json.
        seed: of the draw; every dtype rounds the same float32 numbers.
        dtype: of all tensors.
        adapter_scale: size of an adapter's change next to its weight.
        pooler: whether the pooler is part of it.

    Returns:
        Tensors by original name.
    """
    draw = _Draw(seed, dtype)
    d, f = config["hidden_size"], config["intermediate_size"]
    k, r = len(config["lora_adaptations"]), config["lora_rank"]
    b_scale = adapter_scale * r**0.5 / config["lora_alpha"]
    state: dict[str, Tensor] = {}

    def embedding(module: str, rows: int, scale: float) -> None:
        stem = f"roberta.embeddings.{module}.parametrizations.weight"
        state[f"{stem}.original"] = draw(rows, d, scale=scale)
        state[f"{stem}.0.lora_A"] = draw(k, rows, r, scale=scale)
        state[f"{stem}.0.lora_B"] = draw(k, r, d, scale=b_scale)

    def linear(module: str, into: int, out: int) -> None:
        stem = f"roberta.{module}.parametrizations.weight"
        state[f"{stem}.original"] = draw(out, into, scale=into**-0.5)
        state[f"{stem}.0.lora_A"] = draw(k, r, into, scale=into**-0.5)
        state[f"{stem}.0.lora_B"] = draw(k, out, r, scale=b_scale)
        state[f"roberta.{module}.bias"] = draw(out, scale=0.1)

    def norm(module: str) -> None:
        state[f"roberta.{module}.weight"] = draw(d, scale=0.1, mean=1.0)
        state[f"roberta.{module}.bias"] = draw(d, scale=0.1)

    embedding("word_embeddings", config["vocab_size"], 1.0)
    embedding("token_type_embeddings", config["type_vocab_size"], 0.3)
    norm("emb_ln")
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layers.{i}"
        linear(f"{layer}.mixer.Wqkv", d, 3 * d)
        linear(f"{layer}.mixer.out_proj", d, d)
        norm(f"{layer}.norm1")
        linear(f"{layer}.mlp.fc1", d, f)
        linear(f"{layer}.mlp.fc2", f, d)
        norm(f"{layer}.norm2")
    if pooler:
        linear("pooler.dense", d, d)
    return state


def random_mlm_head(config: dict[str, Any], seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Draw the head of a masked language model; its decoder is the word table.

    Args:
        config: a config.json.
        seed: of the draw.
        dtype: of all tensors.

    Returns:
        `lm_head.dense.*`, `lm_head.layer_norm.*` and `lm_head.bias`.
    """
    draw = _Draw(seed, dtype)
    d = config["hidden_size"]
    return {
        "lm_head.dense.weight": draw(d, d, scale=d**-0.5),
        "lm_head.dense.bias": draw(d, scale=0.1),
        "lm_head.layer_norm.weight": draw(d, scale=0.1, mean=1.0),
        "lm_head.layer_norm.bias": draw(d, scale=0.1),
        "lm_head.bias": draw(config["vocab_size"], scale=0.1),
    }


def to_hf(
    state: dict[str, Tensor], config: dict[str, Any], prefix: str = ""
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Respell a checkpoint as `jinaai/jina-embeddings-v3-hf` does.

    The base keeps the fused names of the original; an adapter splits Wqkv into q, k and v, which share one A,
    names them `self_attn.*` next to `mixer.out_proj`, and turns the factors of embeddings round.

    Args:
        state: tensors by original name.
        config: its config.json.
        prefix: put before every name, `roberta.` or nothing: both exist.

    Returns:
        The base's tensors, and each adapter's by task.
    """
    base: dict[str, Tensor] = {}
    tasks = config["lora_adaptations"]
    adapters: dict[str, dict[str, Tensor]] = {task: {} for task in tasks}
    for name, tensor in state.items():
        module, _, leaf = name.removeprefix("roberta.").partition(".parametrizations.weight.")
        name = prefix + module
        if not leaf:
            base[name] = tensor
            continue
        if leaf == "original":
            base[f"{name}.weight"] = tensor
            continue
        letter = leaf[-1]  # of "0.lora_A" or "0.lora_B"
        for task, factor in zip(tasks, tensor, strict=True):
            if "embeddings" in module:
                adapters[task][f"{name}.lora_embedding_{letter}"] = factor.T.contiguous()
            elif module.endswith("Wqkv"):
                parts = [factor] * 3 if letter == "A" else factor.chunk(3)
                for part, projection in zip(parts, ("q_proj", "k_proj", "v_proj"), strict=True):
                    attention = name.replace("mixer.Wqkv", f"self_attn.{projection}")
                    adapters[task][f"{attention}.lora_{letter}.weight"] = part.clone()
            else:
                adapters[task][f"{name}.lora_{letter}.weight"] = factor.clone()
    return base, adapters


def write_original(directory: Path, state: dict[str, Tensor], config: dict[str, Any], *, pickled: bool = False) -> Path:
    """Write a folder as `jinaai/jina-embeddings-v3` publishes it.

    Args:
        directory: made if absent.
        state: tensors by original name.
        config: its config.json.
        pickled: write the `pytorch_model.bin` of early revisions instead of `model.safetensors`.

    Returns:
        The directory.
    """
    _write_config(directory, config, state)
    if pickled:
        torch.save(state, directory / "pytorch_model.bin")
    else:
        _write_tensors(directory / "model.safetensors", state)
    return directory


def write_hf(directory: Path, state: dict[str, Tensor], config: dict[str, Any], *, prefix: str = "") -> Path:
    """Write a folder as `jinaai/jina-embeddings-v3-hf` publishes it.

    Args:
        directory: made if absent.
        state: tensors by original name.
        config: its config.json, of the original kind. A rotary base other than 20000 is also written as
            `rope_theta`, since `transformers` does not read `rotary_emb_base`.
        prefix: as in `to_hf`.

    Returns:
        The directory.
    """
    base, adapters = to_hf(state, config, prefix)
    native = {key: value for key, value in config.items() if key != "auto_map"}
    native |= {"architectures": ["JinaEmbeddingsV3Model"], "model_type": "jina_embeddings_v3"}
    if config["rotary_emb_base"] != 20000.0:
        native["rope_theta"] = config["rotary_emb_base"]
    _write_config(directory, native, base)
    _write_tensors(directory / "model.safetensors", base)
    for task, tensors in adapters.items():
        folder = directory / task.replace(".", "_").replace("-", "_")
        folder.mkdir(exist_ok=True)
        adapter_config = {
            "peft_type": "LORA",
            "base_model_name_or_path": None,
            "r": config["lora_rank"],
            "lora_alpha": config["lora_alpha"],
            "lora_dropout": config["lora_dropout_p"],
            "target_modules": _LORA_TARGETS,
        }
        (folder / "adapter_config.json").write_text(json.dumps(adapter_config, indent=3))
        _write_tensors(folder / "adapter_model.safetensors", tensors)
    return directory


class _Draw:
    """A source of normal tensors: one stream of float32 numbers, rounded to a dtype."""

    def __init__(self, seed: int, dtype: torch.dtype):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def __call__(self, *shape: int, scale: float, mean: float = 0.0) -> Tensor:
        return (mean + scale * torch.randn(shape, generator=self.generator)).to(self.dtype)


def _write_config(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config | {"torch_dtype": dtype}, indent=2))


def _write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    save_file({k: v.contiguous() for k, v in tensors.items()}, file, metadata={"format": "pt"})
