import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jina_jax import Config, Model
from jina_jax.layouts import parameter_shapes
from jina_jax.model import count_parameters

XLM_ROBERTA_LARGE = {
    "architectures": ["XLMRobertaForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 514,
    "model_type": "xlm-roberta",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "output_past": True,
    "pad_token_id": 1,
    "position_embedding_type": "absolute",
    "transformers_version": "4.17.0.dev0",
    "type_vocab_size": 1,
    "use_cache": True,
    "vocab_size": 250002,
}


def released(data) -> dict:
    return json.loads((data / "real_hf_config.json").read_text())


def test_the_default_is_the_released_model(data):
    assert Config.from_json(data / "real_hf_config.json") == Config()
    assert Config.from_json(released(data)) == Config()


def test_the_default_has_the_released_size():
    shapes = jax.eval_shape(Model().init, jax.random.key(0), np.zeros((1, 8), np.int32))
    assert count_parameters(shapes) == 572_310_396
    bare = jax.eval_shape(Model(Config(tasks=(), prompts=())).init, jax.random.key(0), np.zeros((1, 8), np.int32))
    assert count_parameters(bare) == 559_364_096


def test_derived_values():
    config = Config()
    assert (config.head_dim, config.max_tokens, config.lora_scale) == (64, 8192, 0.25)


def test_xlm_roberta_has_no_adapters_and_takes_a_base():
    config = Config.from_json(XLM_ROBERTA_LARGE, rope_base=10_000.0)
    assert config.tasks == ()
    assert config.max_tokens == 512
    assert config.rope_base == 10_000.0
    assert config.hidden_size == 1024


@pytest.mark.parametrize(
    ("changes", "base"),
    [
        ({}, 20_000.0),
        ({"rotary_emb_base": 10_000.0}, 10_000.0),
        ({"rope_theta": 30_000.0}, 30_000.0),
        ({"rope_theta": 30_000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}, 5e4),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": None}, 20_000.0),
    ],
)
def test_rope_base_is_read_in_the_order_that_transformers_follows(data, changes, base):
    assert Config.from_json(released(data) | changes).rope_base == base


def test_every_problem_is_named_at_once(data):
    raw = released(data) | {"surprise": 1, "hidden_act": "relu", "rope_parameters": {"rope_type": "yarn"}}
    del raw["hidden_size"]
    with pytest.raises(ValueError, match="not a configuration of this model") as error:
        Config.from_json(raw)
    for part in ("'surprise' = 1", "'hidden_act' = 'relu'", "'gelu'", "'hidden_size'", "yarn"):
        assert part in str(error.value)


def test_absolute_positions_are_refused_outside_xlm_roberta(data):
    with pytest.raises(ValueError, match="'absolute', but this model is rotary"):
        Config.from_json(released(data) | {"position_embedding_type": "absolute"})


def test_foreign_and_broken_files(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "bert", "vocab_size": 30522}')
    with pytest.raises(ValueError, match="'bert'"):
        Config.from_json(file)
    file.write_text("{not json")
    with pytest.raises(ValueError, match=r"config\.json: not a JSON file"):
        Config.from_json(file)
    file.write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        Config.from_json(file)


@pytest.mark.parametrize("layout", ["original", "hf", "own"])
def test_written_files_read_back_the_same(layout):
    config = Config(hidden_size=96, num_attention_heads=6, rope_base=12_345.0, lora_rank=8, truncate_dim=32)
    content = json.loads(json.dumps(config.to_json(layout)))
    assert Config.from_json(content) == config


def test_our_own_file_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="surprise"):
        Config.from_json(Config().to_json("own") | {"surprise": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 15}, "num_attention_heads"),
        ({"hidden_size": 15, "num_attention_heads": 5}, "even head size"),
        ({"tasks": ("a", "a"), "prompts": ("", "")}, "distinct"),
        ({"prompts": ()}, "one prompt each"),
        ({"remat": "some"}, "remat='some' must be one of"),
    ],
)
def test_impossible_values(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)


def test_tasks():
    config = Config()
    np.testing.assert_array_equal(config.task_ids(["text-matching", None, "retrieval.query"]), [4, -1, 0])
    with pytest.raises(ValueError, match=r"unknown task 'query'; this model has: retrieval\.query, "):
        config.task_id("query")
    with pytest.raises(ValueError, match="no adapters"):
        Config(tasks=(), prompts=()).task_id("separation")


def test_equal_configurations_are_equal_whatever_spells_their_types():
    assert Config(dtype="bfloat16") == Config(dtype=jnp.bfloat16)
    assert hash(Config(dtype="bfloat16")) == hash(Config(dtype=jnp.dtype(jnp.bfloat16)))


def test_the_table_of_parameters_is_the_model():
    config = Config(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlm_head=True)
    shapes = jax.eval_shape(Model(config).init, jax.random.key(0), np.zeros((1, 8), np.int32))
    flat = {
        "/".join(key.key for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_flatten_with_path(shapes["params"])[0]
    }
    assert flat == parameter_shapes(config)
