"""What a run leaves behind: a public checkpoint with all that made it, and a card that tells how to use it."""

import functools
import json
import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_variables
from safetensors.numpy import load_file

import jina_jax
from jina_jax import checkpoint, layouts
from jina_jax.train.export import card, export
from jina_jax.train.recipe import Adapters, Data, Dataset, Eval, EvalTask, Init, Loss, Phase, Recipe, to_json

TOKENIZER = Path(__file__).parent / "data" / "tokenizer"
MINI = Path(jina_jax.__file__).parent / "mini"
PROMPT = "A question of the crew: "
RECIPE = Recipe(
    stage="adapter",
    phases=(Phase("pairs", 60, 32, 64, 5e-3), Phase("long", 10, 16, 128, 1e-3, tau=0.02)),
    data=Data(
        (Dataset("crew", "/home/somebody/crew.jsonl", kind="pair", lang="en", license="CC0"), Dataset("b", "b.jsonl"))
    ),
    loss=Loss(dims=(16, 32, 64)),
    adapters=Adapters(trains=("my-domain",), prompts=(PROMPT,)),
    eval=Eval(tasks=(EvalTask("held-out", "ir", "held_out.jsonl", task="my-domain"),)),
)
FACTS = {
    "command": "jina-jax train configs/new_adapter.py --data crew.jsonl --task my-domain",
    "seconds": 71.3,
    "steps": 70,
    "data": ["crew   pair  500 records  100%  15 batches per epoch"],
    "versions": {"jina_jax": "0.3", "jax": "0.10.2"},
    "plans": ["7f3a91c2" * 8],
    "frozen": "ab" * 32,
}


def result(low: float, high: float) -> dict:
    return {"held-out": {"main": "ndcg@10", "metrics": {"ndcg@10": {16: low, 64: high}, "mrr@10": {16: 0.1, 64: 0.2}}}}


RESULTS = {"before": result(0.2, 0.25), "after": result(0.8, 0.9375)}


@pytest.fixture(scope="module")
def six(tiny) -> tuple[jina_jax.Model, dict]:
    """The tiny model with a sixth adapter."""
    model, variables = tiny
    old = model.config
    config = old.replace(tasks=(*old.tasks, "my-domain"), prompts=(*old.prompts, PROMPT), mlm_head=False)
    flat, rng = checkpoint.flatten(variables), np.random.default_rng(1)
    for path in [path for path in flat if "lora" in path]:
        at = layouts.PARAMETERS[path].split().index("K")
        new = 0.3 * rng.normal(size=[1 if i == at else size for i, size in enumerate(flat[path].shape)])
        flat[path] = jnp.concatenate([flat[path], jnp.asarray(new, jnp.float32)], axis=at)
    flat = {path: x for path, x in flat.items() if not path.startswith("mlm_head")}
    return jina_jax.Model(config), {"params": layouts.nest(flat)}


@pytest.fixture(scope="module")
def exported(six, tmp_path_factory) -> Path:
    return export(tmp_path_factory.mktemp("run") / "export", RECIPE, *six, TOKENIZER, RESULTS, FACTS)


@functools.partial(jax.jit, static_argnums=0)
def apply(model: jina_jax.Model, variables: dict, tokens: np.ndarray, task: np.ndarray) -> jax.Array:
    return model.apply(variables, tokens, tokens != 1, task).embeddings


def outputs(model: jina_jax.Model, variables: dict) -> np.ndarray:
    """Embeddings of two texts by every task, and by none."""
    texts = np.array([[0, 17, 34, 51, 2, 1], [0, 68, 85, 102, 119, 2]], np.int32)
    tasks = np.arange(-1, len(model.config.tasks), dtype=np.int32)
    return np.asarray(apply(model, variables, np.repeat(texts, len(tasks), 0), np.tile(tasks, 2)))


def test_the_export_gives_the_same_outputs_to_the_bit(six, exported):
    model, variables = jina_jax.load(exported)
    assert model.config.tasks == six[0].config.tasks
    assert model.config.prompts == six[0].config.prompts
    assert outputs(model, variables).tobytes() == outputs(*six).tobytes()


def test_the_new_adapter_comes_sixth_and_the_others_are_what_they_were(tiny, exported, tmp_path):
    model, variables = tiny
    before = jina_jax.save(tmp_path / "before", model, variables, layout="hf")
    folders = sorted(file.parent.name for file in exported.glob("*/adapter_model.safetensors"))
    assert folders == sorted([task.replace(".", "_").replace("-", "_") for task in model.config.tasks] + ["my_domain"])
    for file in before.glob("*/adapter_model.safetensors"):
        old, new = load_file(file), load_file(exported / file.relative_to(before))
        assert old.keys() == new.keys()
        assert all(old[name].tobytes() == new[name].tobytes() for name in old)
    backbone = load_file(exported / "model.safetensors")
    assert all((load_file(before / "model.safetensors")[name] == x).all() for name, x in backbone.items())


def test_the_other_public_layout_holds_it_too(six, exported, tmp_path):
    model, variables = jina_jax.load(exported)
    original = jina_jax.save(tmp_path / "original", model, variables, layout="original")
    again = jina_jax.load(original)
    assert outputs(*again).tobytes() == outputs(*six).tobytes()


def test_files_beside_the_weights(exported):
    def read(name):
        return json.loads((exported / name).read_text())

    assert [module["type"].split(".")[-1] for module in read("modules.json")] == ["Transformer", "Pooling", "Normalize"]
    assert read("1_Pooling/config.json") == {
        "word_embedding_dimension": 64,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    prompts = read("config_sentence_transformers.json")["prompts"]
    assert prompts["my-domain"] == PROMPT
    assert len(prompts) == 6
    assert read("recipe.json") == to_json(RECIPE)
    assert read("training.json") == json.loads(json.dumps({"facts": FACTS, "results": RESULTS}))
    for name in checkpoint.TOKENIZER_FILES:
        if (TOKENIZER / name).exists():
            assert (exported / name).read_bytes() == (TOKENIZER / name).read_bytes()


def test_an_export_appears_whole_or_not_at_all(six, tmp_path, monkeypatch):
    monkeypatch.setattr("jina_jax.train.export.card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(tmp_path / "export", RECIPE, *six, TOKENIZER, RESULTS, FACTS)
    assert list(tmp_path.iterdir()) == []


def test_an_export_replaces_an_older_one(six, exported, tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "old.txt").touch()
    path = export(tmp_path / "export", RECIPE, *six, TOKENIZER, {}, FACTS)
    assert {file.name for file in path.iterdir()} == {file.name for file in exported.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


# ---- The card --------------------------------------------------------------------------------------------------


def test_the_card_says_what_was_done(exported):
    text = (exported / "MODEL_CARD.md").read_text()
    assert FACTS["command"] in text
    for said in ("my-domain", "jina-jax-mini", "CC0", "info_nce", "500 records", "7f3a91c2", "0.10.2", "1 min 11 s"):
        assert said in text, said
    assert "| pairs | 60 | 32 | 64 | 0.005 | 0.05 |" in text
    assert "/home/somebody" not in text  # nobody's business
    assert max(map(len, text.splitlines())) < 300
    assert "\n\n\n" not in text


def test_the_card_shows_every_size_before_and_after(exported):
    rows = [line for line in (exported / "MODEL_CARD.md").read_text().splitlines() if line.startswith("| held-out")]
    assert rows == [
        "| held-out | ndcg@10 | before | 0.2000 | 0.2500 |",
        "| held-out | ndcg@10 | after | 0.8000 | 0.9375 |",
        "| held-out | ndcg@10 | change | +0.6000 | +0.6875 |",
    ]


def test_a_card_without_one_of_the_evaluations_shows_the_other(six):
    config = six[0].config
    after = card(RECIPE, config, {"after": json.loads(json.dumps(RESULTS["after"]))}, FACTS)  # sizes as JSON has them
    assert "| held-out | ndcg@10 | after | 0.8000 | 0.9375 |" in after
    assert "before" not in after.split("## Evaluation")[1].split("##")[0]
    assert "Nothing was measured" in card(RECIPE, config, {}, FACTS)


def test_the_card_of_a_backbone_has_no_adapters(six):
    recipe = Recipe(
        "mlm", (Phase("short", 10, 8, 64, 1e-4),), Data((Dataset("t", "t.jsonl", "text"),)), Init(config=six[0].config)
    )
    text = card(recipe, six[0].config.replace(tasks=(), prompts=()), {}, FACTS)
    assert "task=" not in text
    assert "random weights" in text
    assert "masked language modelling" in text


def test_the_code_of_the_card_runs(tmp_path):
    config = jina_jax.Config(
        **{"vocab_size": 32_000, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"intermediate_size": 64, "tasks": ("my-domain",), "prompts": ("",), "matryoshka_dimensions": (16, 64)},
    )
    model = jina_jax.Model(config)
    path = export(tmp_path / "export", RECIPE, model, random_variables(model), MINI, RESULTS, FACTS)
    text = (path / "MODEL_CARD.md").read_text().replace("DIRECTORY", str(path))
    blocks = re.findall(r"```(\w+)\n(.*?)```", text, flags=re.DOTALL)
    names: dict = {}
    exec(next(code for language, code in blocks if language == "python"), names)
    assert names["vectors"].shape == (2, 16)
    assert names["model"].config.tasks == ("my-domain",)
    from convert.__main__ import _parser

    commands = [line for language, code in blocks if language == "bash" for line in code.splitlines()]
    converting = [line for line in commands if line.startswith("python -m convert ")]
    for line in converting:
        _parser().parse_args(shlex.split(line, comments=True)[3:])
    assert len(converting) == 3
