"""The model's configuration, and how it is read from and written to the published `config.json` files."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

TASKS = ("retrieval.query", "retrieval.passage", "separation", "classification", "text-matching")
PROMPTS = (
    "Represent the query for retrieving evidence documents: ",
    "Represent the document for retrieval: ",
    "",
    "",
    "",
)
OWN_MODEL_TYPE = "jina_jax"
REMAT_POLICIES = ("none", "full", "dots", "names")


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that defines the model; the defaults are the released jina-embeddings-v3.

    The first group describes the weights and has the names of the published `config.json`. The second group
    says how to compute and can be changed at will for the same weights.

    Attributes:
        vocab_size: Rows of the word embedding table.
        type_vocab_size: Rows of the token type table.
        hidden_size: Model width D.
        num_hidden_layers: Encoder layers L.
        num_attention_heads: Heads N; the head size H is `hidden_size / num_attention_heads`.
        intermediate_size: Width F of the feed-forward part.
        max_position_embeddings: Longest input plus two, a convention inherited from XLM-R.
        layer_norm_eps: Added to the variance in every LayerNorm.
        rope_base: Base of the rotary frequencies.
        pad_token_id: Id that fills rows up. `bos_token_id` and `eos_token_id` frame every text.
        hidden_dropout_prob: Dropout on the embedding sum and on both residual branches, in training.
        attention_probs_dropout_prob: Dropout on the attention probabilities, in training.
        initializer_range: Standard deviation of freshly initialised weights.
        tasks: Names of the adapters, in the order of the stacked weights; empty for a bare backbone.
        prompts: Text put before every input of the task; parallel to `tasks`.
        lora_rank: Rank R of every adapter.
        lora_alpha: Adapters are scaled by `lora_alpha / lora_rank`.
        lora_dropout: Dropout on the input of the adapters, in training.
        matryoshka_dimensions: Output sizes the model was trained for (any size may be asked for).
        truncate_dim: Output size when none is asked for; None keeps all.
        pooler: Whether the checkpoint has the (unused) pooler.
        mlm_head: Whether the masked-language-model head is there.
        dtype: Type of activations and matrix products' inputs. Products accumulate in float32 either way.
        param_dtype: Type in which parameters are held.
        attention: Implementation for `kernels.attention`; None picks the best one, "reference" is the one for
            forward-mode and second derivatives.
        remat: What the backward pass keeps of each layer: "none" (everything), "dots" (matrix products),
            "names" (the outputs of attention and mlp), "full" (the layer's input alone).
        unroll: Layers per step of the scan; `num_hidden_layers` unrolls it altogether.
        vocab_multiple: The vocabulary's tables have rows nobody reads at their end, so that their number is a multiple
            of this: a mesh of devices splits them evenly. `sharding.padded` sets it.
    """

    vocab_size: int = 250_002
    type_vocab_size: int = 1
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    max_position_embeddings: int = 8194
    layer_norm_eps: float = 1e-5
    rope_base: float = 20_000.0
    pad_token_id: int = 1
    bos_token_id: int = 0
    eos_token_id: int = 2
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    tasks: tuple[str, ...] = TASKS
    prompts: tuple[str, ...] = PROMPTS
    lora_rank: int = 4
    lora_alpha: float = 1.0
    lora_dropout: float = 0.0
    matryoshka_dimensions: tuple[int, ...] = (32, 64, 128, 256, 512, 768, 1024)
    truncate_dim: int | None = None
    pooler: bool = True
    mlm_head: bool = False

    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    attention: str | None = None
    remat: str = "none"
    unroll: int = 1
    vocab_multiple: int = 1

    def __post_init__(self) -> None:
        """Check what would otherwise fail far from its cause."""
        # Normalised so that equal configurations compare and hash as equal: jnp.float32 is a class, not a dtype.
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        object.__setattr__(self, "param_dtype", jnp.dtype(self.param_dtype))
        if self.hidden_size % self.num_attention_heads or self.head_dim % 2:
            raise ValueError(
                f"{self.hidden_size=} must be {self.num_attention_heads=} times an even head size (rotary pairs)"
            )
        if len(self.prompts) != len(self.tasks) or len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"tasks must be distinct and have one prompt each: {self.tasks=}, {self.prompts=}")
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"{self.remat=} must be one of {', '.join(REMAT_POLICIES)}")

    @property
    def head_dim(self) -> int:
        """Size H of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def max_tokens(self) -> int:
        """Longest input in tokens, `<s>` and `</s>` included (8192 for the released model)."""
        return self.max_position_embeddings - 2

    @property
    def lora_scale(self) -> float:
        """Factor of every adapter's product."""
        return self.lora_alpha / self.lora_rank

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Size of every axis that parameters have, by its letter."""
        return {
            "V": -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple,
            "Y": self.type_vocab_size,
            "D": self.hidden_size,
            "E": self.hidden_size,
            "F": self.intermediate_size,
            "J": 3,
            "N": self.num_attention_heads,
            "H": self.head_dim,
            "K": len(self.tasks),
            "R": self.lora_rank,
            "L": self.num_hidden_layers,
        }

    def task_id(self, task: str) -> int:
        """Position of a task's adapter.

        Args:
            task: A name in `tasks`.

        Returns:
            Its index.

        Raises:
            ValueError: If there is no such task; names those that exist.
        """
        if task not in self.tasks:
            known = ", ".join(self.tasks) or "none: this model has no adapters"
            raise ValueError(f"unknown task {task!r}; this model has: {known} (or None for the bare backbone)")
        return self.tasks.index(task)

    def task_ids(self, tasks: Sequence[str | None]) -> np.ndarray:
        """Adapter indices for one batch.

        Args:
            tasks: One name, or None for the bare backbone, for each text.

        Returns:
            Int32 [B]; -1 stands for None.

        Raises:
            ValueError: If a name is unknown.
        """
        return np.array([-1 if task is None else self.task_id(task) for task in tasks], np.int32)

    def replace(self, **changes: Any) -> "Config":
        """Copy with some attributes changed."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_json(cls, source: str | Path | Mapping[str, Any], **overrides: Any) -> "Config":
        """Read a published `config.json`.

        Understands `jinaai/jina-embeddings-v3`, `jinaai/jina-embeddings-v3-hf`, `xlm-roberta-*` and our own.

        Args:
            source: Path of the file, or its parsed content.
            **overrides: Attributes of `Config` that replace what the file says.

        Returns:
            The configuration.

        Raises:
            ValueError: If an attribute is unknown, missing, or has a value that this model cannot honour. All
                problems are listed in one error.
        """
        name, raw = "config", source
        if not isinstance(source, Mapping):
            name, raw = str(source), read_json(source)
        assert isinstance(raw, Mapping)
        return cls(**{**_translate(name, raw), **overrides})

    def to_json(self, layout: str = "original") -> dict[str, Any]:
        """Content of a `config.json` that describes these weights.

        Args:
            layout: "original", "hf" or "own".

        Returns:
            A dictionary that `json.dumps` takes.
        """
        if layout == "own":
            return {"model_type": OWN_MODEL_TYPE} | {name: getattr(self, name) for name in _OWN_KEYS}
        content = {key: getattr(self, attribute) for key, attribute in _KEYS.items()}
        content |= {
            "hidden_act": "gelu",
            "position_embedding_type": "rotary",
            "emb_pooler": None,
            "lora_adaptations": list(self.tasks),
            "task_instructions": dict(zip(self.tasks, self.prompts, strict=True)),
            "matryoshka_dimensions": list(self.matryoshka_dimensions),
            "load_trained_adapters": bool(self.tasks),
            "lora_main_params_trainable": False,
            "use_flash_attn": True,
            "torch_dtype": jnp.dtype(self.param_dtype).name,
        }
        if layout == "original":
            return {"architectures": ["XLMRobertaModel"], "auto_map": _AUTO_MAP} | content
        rope = {"rope_type": "default", "rope_theta": self.rope_base}  # transformers ignores rotary_emb_base
        return {
            "architectures": ["JinaEmbeddingsV3Model"],
            "model_type": "jina_embeddings_v3",
            "rope_parameters": rope,
        } | content


def read_json(path: str | Path) -> dict[str, Any]:
    """Parse a JSON file that must hold an object.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        ValueError: If it is not JSON, or not an object; says where.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


# ---- The published files, as data ------------------------------------------------------------------------------

# Key in config.json -> attribute of Config, where the value is taken as it is.
_KEYS = {
    "vocab_size": "vocab_size",
    "type_vocab_size": "type_vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "layer_norm_eps": "layer_norm_eps",
    "rotary_emb_base": "rope_base",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "hidden_dropout_prob": "hidden_dropout_prob",
    "attention_probs_dropout_prob": "attention_probs_dropout_prob",
    "initializer_range": "initializer_range",
    "lora_rank": "lora_rank",
    "lora_alpha": "lora_alpha",
    "lora_dropout_p": "lora_dropout",
    "truncate_dim": "truncate_dim",
}
_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")

# Keys whose value changes what the model computes; only these values are the model written here.
_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": (None, "jina_embeddings_v3", "xlm-roberta"),
    "hidden_act": ("gelu",),
    "position_embedding_type": ("rotary", "absolute"),
    "emb_pooler": (None, "mean"),
    "tie_word_embeddings": (True,),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "use_reg_tokens": (None, False, 0),
}

# Keys that say nothing about the weights or the function.
_IGNORED = frozenset(
    (
        *("_name_or_path", "architectures", "auto_map", "transformers_version", "problem_type", "id2label", "label2id"),
        *("use_cache", "output_past", "use_flash_attn", "use_reentrant", "gradient_checkpointing", "return_dict"),
        *("torch_dtype", "dtype", "output_hidden_states", "output_attentions", "chunk_size_feed_forward"),
        *("classifier_dropout", "load_trained_adapters", "lora_main_params_trainable"),
    )
)
_READ_APART = frozenset(
    ("lora_adaptations", "task_instructions", "matryoshka_dimensions", "rope_parameters", "rope_theta")
)

# Our own files hold the first group of attributes under their own names.
_COMPUTE = ("dtype", "param_dtype", "attention", "remat", "unroll")
_OWN_KEYS = tuple(field.name for field in dataclasses.fields(Config) if field.name not in _COMPUTE)

_REMOTE = "jinaai/xlm-roberta-flash-implementation--"
_AUTO_MAP = {
    "AutoConfig": f"{_REMOTE}configuration_xlm_roberta.XLMRobertaFlashConfig",
    "AutoModel": f"{_REMOTE}modeling_lora.XLMRobertaLoRA",
}


def _translate(name: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of Config from the content of a config.json; every problem in one error."""
    if raw.get("model_type") == OWN_MODEL_TYPE:
        unknown = sorted(raw.keys() - {"model_type", *_OWN_KEYS})
        if unknown:
            raise ValueError(f"{name}: unknown attributes {unknown} (written by a newer jina_jax?)")
        return {key: tuple(raw[key]) if isinstance(raw[key], list) else raw[key] for key in _OWN_KEYS if key in raw}

    known = _KEYS.keys() | _ONLY.keys() | _IGNORED | _READ_APART
    problems = [f"unknown attribute {key!r} = {raw[key]!r}" for key in sorted(raw.keys() - known)]
    problems += [f"missing attribute {key!r}" for key in _REQUIRED if key not in raw]
    problems += [
        f"{key!r} = {raw[key]!r}, but this model needs {' or '.join(map(repr, values))}"
        for key, values in _ONLY.items()
        if key in raw and raw[key] not in values
    ]
    is_xlm_roberta = raw.get("model_type") == "xlm-roberta"
    if raw.get("position_embedding_type") == "absolute" and not is_xlm_roberta:
        problems.append("'position_embedding_type' = 'absolute', but this model is rotary")
    rope = raw.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        problems.append(f"'rope_parameters' = {rope!r}, but this model needs rope_type 'default'")

    tasks = () if is_xlm_roberta else tuple(raw.get("lora_adaptations") or ())
    instructions = raw.get("task_instructions") or {}
    problems += [f"'task_instructions' for {key!r}, no such task" for key in instructions if key not in tasks]
    if problems:
        raise ValueError(f"{name}: not a configuration of this model:\n  " + "\n  ".join(problems))

    fields = {attribute: raw[key] for key, attribute in _KEYS.items() if key in raw}
    fields |= {name: float(value) for name, value in fields.items() if isinstance(getattr(Config, name), float)}
    fields["tasks"] = tasks
    fields["prompts"] = tuple(instructions.get(task, "") for task in tasks)
    # transformers ignores rotary_emb_base in the files it reads, so the first of these that is there wins.
    bases = (rope.get("rope_theta"), raw.get("rope_theta"), raw.get("rotary_emb_base"))
    fields["rope_base"] = next((float(base) for base in bases if base is not None), Config.rope_base)
    dimensions = raw.get("matryoshka_dimensions")
    fields["matryoshka_dimensions"] = tuple(dimensions or (raw["hidden_size"],))
    return fields
