"""The published checkpoint layouts as tables: data only, read in both directions.

A rule says which region of which of our parameters a tensor holds, by axis letters on both sides. The letters are
those of the whole project (V vocabulary, Y token types, D and E width, J the three of query, key and value, N
heads, H head size, F mlp width, K adapters, R rank, L layers); parentheses join axes as in einops. An axis of the
parameter that the tensor lacks is fixed: by the `{L}` in the tensor's name, by the rule's `at` (J=0 is the query),
or, for K, by the adapter file that the tensor comes from.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

from jina_jax.config import Config

# Every parameter of the model, with its axes. Also what sharding goes by.
PARAMETERS = {
    "embed/words/embedding": "V D",
    "embed/words/lora_a": "V K R",
    "embed/words/lora_b": "K R D",
    "embed/types/embedding": "Y D",
    "embed/types/lora_a": "Y K R",
    "embed/types/lora_b": "K R D",
    "embed/norm/scale": "D",
    "embed/norm/bias": "D",
    "layers/attention/qkv/kernel": "L D J N H",
    "layers/attention/qkv/bias": "L J N H",
    "layers/attention/qkv/lora_a": "L D K R",
    "layers/attention/qkv/lora_b": "L K R J N H",
    "layers/attention/out/kernel": "L N H D",
    "layers/attention/out/bias": "L D",
    "layers/attention/out/lora_a": "L N H K R",
    "layers/attention/out/lora_b": "L K R D",
    "layers/attention_norm/scale": "L D",
    "layers/attention_norm/bias": "L D",
    "layers/mlp/up/kernel": "L D F",
    "layers/mlp/up/bias": "L F",
    "layers/mlp/up/lora_a": "L D K R",
    "layers/mlp/up/lora_b": "L K R F",
    "layers/mlp/down/kernel": "L F D",
    "layers/mlp/down/bias": "L D",
    "layers/mlp/down/lora_a": "L F K R",
    "layers/mlp/down/lora_b": "L K R D",
    "layers/mlp_norm/scale": "L D",
    "layers/mlp_norm/bias": "L D",
    "pooler/kernel": "D E",
    "pooler/bias": "E",
    "pooler/lora_a": "D K R",
    "pooler/lora_b": "K R E",
    "mlm_head/dense/kernel": "D E",
    "mlm_head/dense/bias": "E",
    "mlm_head/norm/scale": "D",
    "mlm_head/norm/bias": "D",
    "mlm_head/bias": "V",
}


def parameters(config: Config) -> list[str]:
    """Those parameters that a model has, by path."""
    return [
        path
        for path in PARAMETERS
        if (config.tasks or "lora" not in path)
        and (config.pooler or not path.startswith("pooler"))
        and (config.mlm_head or not path.startswith("mlm_head"))
    ]


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter that a model has, by path."""
    size = config.axis_sizes
    return {path: tuple(size[axis] for axis in PARAMETERS[path].split()) for path in parameters(config)}


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} to {"a": {"b": x}}, in the order of the table."""
    tree: dict[str, Any] = {}
    for path in PARAMETERS:
        if path in leaves:
            *parents, name = path.split("/")
            functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[name] = leaves[path]
    return tree


@dataclasses.dataclass(frozen=True)
class Rule:
    """Where one kind of tensor goes.

    Attributes:
        source: The tensor's name, with `{L}` for the layer.
        axes: The tensor's axes, slowest first; parentheses join axes that it holds as one.
        target: The parameter, a key of `PARAMETERS`.
        at: Fixed axes of the parameter, such as {"J": 0}.
    """

    source: str
    axes: str
    target: str
    at: Mapping[str, int] = dataclasses.field(default_factory=dict)


def _rules(table: str) -> tuple[Rule, ...]:
    """Rules from lines of `source | axes | target | fixed axes`."""
    rules = []
    for line in filter(str.strip, table.splitlines()):
        source, axes, target, *at = (cell.strip() for cell in line.split("|"))
        fixed = {axis: int(index) for axis, index in (part.split("=") for part in at)}
        rules.append(Rule(source, axes, target, fixed))
    return tuple(rules)


# jinaai/jina-embeddings-v3: adapters stacked along the first axis of every parametrised weight.
ORIGINAL = _rules("""
embeddings.word_embeddings.parametrizations.weight.original            | V D     | embed/words/embedding
embeddings.word_embeddings.parametrizations.weight.0.lora_A            | K V R   | embed/words/lora_a
embeddings.word_embeddings.parametrizations.weight.0.lora_B            | K R D   | embed/words/lora_b
embeddings.token_type_embeddings.parametrizations.weight.original      | Y D     | embed/types/embedding
embeddings.token_type_embeddings.parametrizations.weight.0.lora_A      | K Y R   | embed/types/lora_a
embeddings.token_type_embeddings.parametrizations.weight.0.lora_B      | K R D   | embed/types/lora_b
emb_ln.weight                                                          | D       | embed/norm/scale
emb_ln.bias                                                            | D       | embed/norm/bias
encoder.layers.{L}.mixer.Wqkv.parametrizations.weight.original         | (J N H) D   | layers/attention/qkv/kernel
encoder.layers.{L}.mixer.Wqkv.bias                                     | (J N H)     | layers/attention/qkv/bias
encoder.layers.{L}.mixer.Wqkv.parametrizations.weight.0.lora_A         | K R D       | layers/attention/qkv/lora_a
encoder.layers.{L}.mixer.Wqkv.parametrizations.weight.0.lora_B         | K (J N H) R | layers/attention/qkv/lora_b
encoder.layers.{L}.mixer.out_proj.parametrizations.weight.original     | D (N H)     | layers/attention/out/kernel
encoder.layers.{L}.mixer.out_proj.bias                                 | D           | layers/attention/out/bias
encoder.layers.{L}.mixer.out_proj.parametrizations.weight.0.lora_A     | K R (N H)   | layers/attention/out/lora_a
encoder.layers.{L}.mixer.out_proj.parametrizations.weight.0.lora_B     | K D R       | layers/attention/out/lora_b
encoder.layers.{L}.norm1.weight                                        | D       | layers/attention_norm/scale
encoder.layers.{L}.norm1.bias                                          | D       | layers/attention_norm/bias
encoder.layers.{L}.mlp.fc1.parametrizations.weight.original            | F D     | layers/mlp/up/kernel
encoder.layers.{L}.mlp.fc1.bias                                        | F       | layers/mlp/up/bias
encoder.layers.{L}.mlp.fc1.parametrizations.weight.0.lora_A            | K R D   | layers/mlp/up/lora_a
encoder.layers.{L}.mlp.fc1.parametrizations.weight.0.lora_B            | K F R   | layers/mlp/up/lora_b
encoder.layers.{L}.mlp.fc2.parametrizations.weight.original            | D F     | layers/mlp/down/kernel
encoder.layers.{L}.mlp.fc2.bias                                        | D       | layers/mlp/down/bias
encoder.layers.{L}.mlp.fc2.parametrizations.weight.0.lora_A            | K R F   | layers/mlp/down/lora_a
encoder.layers.{L}.mlp.fc2.parametrizations.weight.0.lora_B            | K D R   | layers/mlp/down/lora_b
encoder.layers.{L}.norm2.weight                                        | D       | layers/mlp_norm/scale
encoder.layers.{L}.norm2.bias                                          | D       | layers/mlp_norm/bias
pooler.dense.parametrizations.weight.original                          | E D     | pooler/kernel
pooler.dense.bias                                                      | E       | pooler/bias
pooler.dense.parametrizations.weight.0.lora_A                          | K R D   | pooler/lora_a
pooler.dense.parametrizations.weight.0.lora_B                          | K E R   | pooler/lora_b
""")

_MLM_HEAD = """
lm_head.dense.weight       | E D | mlm_head/dense/kernel
lm_head.dense.bias         | E   | mlm_head/dense/bias
lm_head.layer_norm.weight  | D   | mlm_head/norm/scale
lm_head.layer_norm.bias    | D   | mlm_head/norm/bias
lm_head.bias               | V   | mlm_head/bias
"""

# jinaai/jina-embeddings-v3-hf: the backbone, under the names that `save_pretrained` writes.
HF = _rules(
    """
embeddings.word_embeddings.weight          | V D         | embed/words/embedding
embeddings.token_type_embeddings.weight    | Y D         | embed/types/embedding
emb_ln.weight                              | D           | embed/norm/scale
emb_ln.bias                                | D           | embed/norm/bias
encoder.layers.{L}.mixer.Wqkv.weight       | (J N H) D   | layers/attention/qkv/kernel
encoder.layers.{L}.mixer.Wqkv.bias         | (J N H)     | layers/attention/qkv/bias
encoder.layers.{L}.mixer.out_proj.weight   | D (N H)     | layers/attention/out/kernel
encoder.layers.{L}.mixer.out_proj.bias     | D           | layers/attention/out/bias
encoder.layers.{L}.norm1.weight            | D           | layers/attention_norm/scale
encoder.layers.{L}.norm1.bias              | D           | layers/attention_norm/bias
encoder.layers.{L}.mlp.fc1.weight          | F D         | layers/mlp/up/kernel
encoder.layers.{L}.mlp.fc1.bias            | F           | layers/mlp/up/bias
encoder.layers.{L}.mlp.fc2.weight          | D F         | layers/mlp/down/kernel
encoder.layers.{L}.mlp.fc2.bias            | D           | layers/mlp/down/bias
encoder.layers.{L}.norm2.weight            | D           | layers/mlp_norm/scale
encoder.layers.{L}.norm2.bias              | D           | layers/mlp_norm/bias
pooler.dense.weight                        | E D         | pooler/kernel
pooler.dense.bias                          | E           | pooler/bias
"""
    + _MLM_HEAD
)

# The same with query, key and value apart (`save_original_format=False`).
HF_SPLIT = tuple(rule for rule in HF if "Wqkv" not in rule.source) + _rules("""
encoder.layers.{L}.mixer.q_proj.weight     | (N H) D | layers/attention/qkv/kernel | J=0
encoder.layers.{L}.mixer.k_proj.weight     | (N H) D | layers/attention/qkv/kernel | J=1
encoder.layers.{L}.mixer.v_proj.weight     | (N H) D | layers/attention/qkv/kernel | J=2
encoder.layers.{L}.mixer.q_proj.bias       | (N H)   | layers/attention/qkv/bias   | J=0
encoder.layers.{L}.mixer.k_proj.bias       | (N H)   | layers/attention/qkv/bias   | J=1
encoder.layers.{L}.mixer.v_proj.bias       | (N H)   | layers/attention/qkv/bias   | J=2
""")

# One PEFT adapter file per task. The three A of q, k and v are one and the same in the published files; adapters
# trained apart have three, and `peft.py` joins them.
HF_ADAPTER = _rules("""
embeddings.word_embeddings.lora_embedding_A        | R V     | embed/words/lora_a
embeddings.word_embeddings.lora_embedding_B        | D R     | embed/words/lora_b
embeddings.token_type_embeddings.lora_embedding_A  | R Y     | embed/types/lora_a
embeddings.token_type_embeddings.lora_embedding_B  | D R     | embed/types/lora_b
encoder.layers.{L}.self_attn.q_proj.lora_A.weight  | R D     | layers/attention/qkv/lora_a | J=0
encoder.layers.{L}.self_attn.k_proj.lora_A.weight  | R D     | layers/attention/qkv/lora_a | J=1
encoder.layers.{L}.self_attn.v_proj.lora_A.weight  | R D     | layers/attention/qkv/lora_a | J=2
encoder.layers.{L}.self_attn.q_proj.lora_B.weight  | (N H) R | layers/attention/qkv/lora_b | J=0
encoder.layers.{L}.self_attn.k_proj.lora_B.weight  | (N H) R | layers/attention/qkv/lora_b | J=1
encoder.layers.{L}.self_attn.v_proj.lora_B.weight  | (N H) R | layers/attention/qkv/lora_b | J=2
encoder.layers.{L}.mixer.out_proj.lora_A.weight    | R (N H) | layers/attention/out/lora_a
encoder.layers.{L}.mixer.out_proj.lora_B.weight    | D R     | layers/attention/out/lora_b
encoder.layers.{L}.mlp.fc1.lora_A.weight           | R D     | layers/mlp/up/lora_a
encoder.layers.{L}.mlp.fc1.lora_B.weight           | F R     | layers/mlp/up/lora_b
encoder.layers.{L}.mlp.fc2.lora_A.weight           | R F     | layers/mlp/down/lora_a
encoder.layers.{L}.mlp.fc2.lora_B.weight           | D R     | layers/mlp/down/lora_b
pooler.dense.lora_A.weight                         | R D     | pooler/lora_a
pooler.dense.lora_B.weight                         | E R     | pooler/lora_b
""")

# xlm-roberta-base and -large.
XLM_ROBERTA = _rules(
    """
embeddings.word_embeddings.weight                    | V D     | embed/words/embedding
embeddings.token_type_embeddings.weight              | Y D     | embed/types/embedding
embeddings.LayerNorm.weight                          | D       | embed/norm/scale
embeddings.LayerNorm.bias                            | D       | embed/norm/bias
encoder.layer.{L}.attention.self.query.weight        | (N H) D | layers/attention/qkv/kernel | J=0
encoder.layer.{L}.attention.self.key.weight          | (N H) D | layers/attention/qkv/kernel | J=1
encoder.layer.{L}.attention.self.value.weight        | (N H) D | layers/attention/qkv/kernel | J=2
encoder.layer.{L}.attention.self.query.bias          | (N H)   | layers/attention/qkv/bias   | J=0
encoder.layer.{L}.attention.self.key.bias            | (N H)   | layers/attention/qkv/bias   | J=1
encoder.layer.{L}.attention.self.value.bias          | (N H)   | layers/attention/qkv/bias   | J=2
encoder.layer.{L}.attention.output.dense.weight      | D (N H) | layers/attention/out/kernel
encoder.layer.{L}.attention.output.dense.bias        | D       | layers/attention/out/bias
encoder.layer.{L}.attention.output.LayerNorm.weight  | D       | layers/attention_norm/scale
encoder.layer.{L}.attention.output.LayerNorm.bias    | D       | layers/attention_norm/bias
encoder.layer.{L}.intermediate.dense.weight          | F D     | layers/mlp/up/kernel
encoder.layer.{L}.intermediate.dense.bias            | F       | layers/mlp/up/bias
encoder.layer.{L}.output.dense.weight                | D F     | layers/mlp/down/kernel
encoder.layer.{L}.output.dense.bias                  | D       | layers/mlp/down/bias
encoder.layer.{L}.output.LayerNorm.weight            | D       | layers/mlp_norm/scale
encoder.layer.{L}.output.LayerNorm.bias              | D       | layers/mlp_norm/bias
pooler.dense.weight                                  | E D     | pooler/kernel
pooler.dense.bias                                    | E       | pooler/bias
"""
    + _MLM_HEAD
)

# Our own: a tensor per parameter, as it is.
OWN = tuple(Rule(path, axes, path) for path, axes in PARAMETERS.items())

# Spellings of one and the same name that exist in the wild, rewritten in this order to those of the tables.
_PREFIXES = r"^(base_model\.model\.)?((roberta|model)\.)?"
RENAMES = {
    "original": ((_PREFIXES, ""),),
    "hf": (
        (_PREFIXES, ""),
        (r"^layers\.", "encoder.layers."),
        (r"^embeddings\.LayerNorm\.", "emb_ln."),
        (r"\.self_attn\.o_proj\.", ".mixer.out_proj."),
        (r"\.self_attn\.", ".mixer."),
        (r"\.post_attention_layernorm\.", ".norm1."),
        (r"\.post_mlp_layernorm\.", ".norm2."),
    ),
    "hf-adapter": (
        (_PREFIXES, ""),
        (r"^layers\.", "encoder.layers."),
        (r"\.self_attn\.o_proj\.", ".mixer.out_proj."),
    ),
    "xlm-roberta": ((_PREFIXES, ""),),
    "own": (),
}

# Tensors left out on purpose, by layout, and why.
IGNORED = {
    "original": {},
    "hf": {r"lm_head\..*": "loaded when asked for; its decoder is tied to the word embeddings"},
    "hf-adapter": {},
    "xlm-roberta": {
        r"embeddings\.position_embeddings\.weight": "absolute positions give way to rotation",
        r"embeddings\.position_ids": "a buffer",
        r"lm_head\..*": "loaded when asked for; its decoder is tied to the word embeddings",
    },
    "own": {r"mlm_head/.*": "loaded unless it is refused"},
}


def groups(axes: str) -> list[list[str]]:
    """'(J N H) D' to [['J', 'N', 'H'], ['D']]."""
    return [part.strip("()").split() for part in re.findall(r"\([^)]*\)|\S+", axes)]


def region(target: str, fixed: Mapping[str, int]) -> tuple[tuple[int | slice, ...], str]:
    """Part of a parameter.

    Args:
        target: The parameter, a key of `PARAMETERS`, or its axes.
        fixed: Axes that are fixed, and where.

    Returns:
        What to index the parameter with, and the axes that are left, for einops.
    """
    axes = PARAMETERS.get(target, target).split()
    index = tuple(fixed.get(axis, slice(None)) for axis in axes)
    return index, " ".join(axis for axis in axes if axis not in fixed)


def joined_sizes(axes: str, size: Mapping[str, int]) -> dict[str, int]:
    """Sizes of the axes that a tensor holds as one, which einops needs to part them."""
    return {axis: size[axis] for group in groups(axes) if len(group) > 1 for axis in group}


def canonical(layout: str, name: str) -> str:
    """The name that the tables use for a tensor, whatever the spelling."""
    for pattern, replacement in RENAMES[layout]:
        name = re.sub(pattern, replacement, name)
    return name
