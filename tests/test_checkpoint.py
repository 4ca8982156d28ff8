"""Loading every layout in every spelling, writing them back, and what is said of files that are none."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from numerics import EMBEDDING, HIDDEN, assert_close
from safetensors.numpy import load_file, save_file

import jina_jax
from jina_jax import TASKS, CheckpointError, Config, Model
from jina_jax.checkpoint import flatten
from jina_jax.peft import folder_name

LAYOUTS = ("original", "hf", "native_new", "native_saved")


@pytest.fixture
def checkpoint(data, tmp_path):
    """A copy of a tiny checkpoint that a test may break."""

    def copy(layout: str) -> Path:
        return Path(shutil.copytree(data / "tiny_checkpoints" / layout, tmp_path / layout))

    return copy


def rewrite(file: Path, change) -> None:
    """Replace the tensors of a file by `change(tensors)`."""
    tensors = load_file(file)
    save_file(change(dict(tensors)), file, metadata={"format": "pt"})


def assert_same(first: dict, second: dict) -> None:
    """Two trees of parameters are equal bit for bit, types included."""
    first, second = flatten(first), flatten(second)
    assert first.keys() == second.keys()
    for path in first:
        assert first[path].dtype == second[path].dtype, path
        np.testing.assert_array_equal(np.asarray(first[path]), np.asarray(second[path]), err_msg=path)


def assert_same_files(first: Path, second: Path) -> None:
    """Two safetensors files hold the same tensors bit for bit."""
    first, second = load_file(first), load_file(second)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype, name
        np.testing.assert_array_equal(first[name].view(np.uint8), second[name].view(np.uint8), err_msg=name)


# ---- Reading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_hold_the_same_parameters(data, layout):
    model, variables = jina_jax.load(data / "tiny_checkpoints" / layout)
    _, expected = jina_jax.load(data / "tiny_checkpoints" / "original")
    assert model.config.tasks == TASKS
    assert_same(variables, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_types(data, dtype):
    model, variables = jina_jax.load(data / "tiny_checkpoints" / "original_bf16", dtype=dtype)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {dtype}
    assert model.config.dtype == model.config.param_dtype == jnp.dtype(dtype)
    stored = load_file(data / "tiny_checkpoints" / "original_bf16" / "model.safetensors")
    name = "roberta.encoder.layers.2.mlp.fc1.parametrizations.weight.original"
    np.testing.assert_array_equal(
        np.asarray(variables["params"]["layers"]["mlp"]["up"]["kernel"][2], np.float32),
        stored[name].astype(np.float32).T,
    )
    mixed, variables = jina_jax.load(
        data / "tiny_checkpoints" / "hf_bf16", dtype="bfloat16", param_dtype="float32", remat="full"
    )
    assert mixed.config.dtype == jnp.bfloat16
    assert mixed.config.remat == "full"
    assert variables["params"]["pooler"]["kernel"].dtype == jnp.float32


@pytest.mark.parametrize("base_prefix", ["", "roberta."])
@pytest.mark.parametrize("adapter_prefix", ["", "roberta.", "base_model.model.", "base_model.model.roberta."])
@pytest.mark.parametrize("out", ["mixer.out_proj", "self_attn.o_proj"])
@pytest.mark.parametrize("layers", ["encoder.layers", "layers"])
def test_every_legal_spelling_of_hf(data, checkpoint, base_prefix, adapter_prefix, out, layers):
    directory = checkpoint("hf")

    def strip(name):
        return name.removeprefix("roberta.")

    rewrite(directory / "model.safetensors", lambda t: {base_prefix + strip(name): x for name, x in t.items()})
    for task in TASKS:
        rewrite(
            directory / folder_name(task) / "adapter_model.safetensors",
            lambda t: {
                adapter_prefix + strip(name).replace("mixer.out_proj", out).replace("encoder.layers", layers): x
                for name, x in t.items()
            },
        )
    assert_same(jina_jax.load(directory)[1], jina_jax.load(data / "tiny_checkpoints" / "original")[1])


def test_files_in_parts(data, checkpoint):
    directory = checkpoint("original")
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for part, chosen in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{part}-of-00002.safetensors"
        save_file({name: tensors[name] for name in chosen}, directory / file)
        weight_map |= dict.fromkeys(chosen, file)
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(jina_jax.load(directory)[1], jina_jax.load(data / "tiny_checkpoints" / "original")[1])
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="names files that are not there: model-00002-of-00002"):
        jina_jax.load(directory)


@pytest.fixture(scope="module")
def xlm_roberta(tmp_path_factory):
    """A tiny XLM-RoBERTa as transformers saves it, and its tensors."""
    import torch
    from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=34,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )
    directory = tmp_path_factory.mktemp("xlmr")
    model = XLMRobertaForMaskedLM(config)
    model.save_pretrained(directory)
    return directory, {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def test_xlm_roberta_loads_without_its_positions(xlm_roberta):
    directory, tensors = xlm_roberta
    model, variables = jina_jax.load(directory, rope_base=10_000.0)
    assert model.config.tasks == ()
    assert not model.config.pooler
    params = variables["params"]
    assert "mlm_head" not in params
    query = tensors["roberta.encoder.layer.1.attention.self.query.weight"]
    np.testing.assert_array_equal(params["layers"]["attention"]["qkv"]["kernel"][1, :, 0].reshape(32, 32), query.T)
    out = tensors["roberta.encoder.layer.0.attention.output.dense.weight"]
    np.testing.assert_array_equal(params["layers"]["attention"]["out"]["kernel"][0].reshape(32, 32), out.T)
    assert np.isfinite(np.asarray(model.apply(variables, np.arange(6, dtype=np.int32)[None]).embeddings)).all()


def test_xlm_roberta_brings_its_head_when_asked(xlm_roberta):
    import torch
    from transformers import XLMRobertaForMaskedLM

    directory, tensors = xlm_roberta
    model, variables = jina_jax.load(directory, mlm_head=True)
    np.testing.assert_array_equal(variables["params"]["mlm_head"]["bias"], tensors["lm_head.bias"])
    hidden = np.random.default_rng(0).normal(size=(2, 3, 32)).astype(np.float32)
    theirs = XLMRobertaForMaskedLM.from_pretrained(directory)
    with torch.no_grad():
        wanted = theirs.lm_head(torch.tensor(hidden)).numpy()
    assert_close(model.apply(variables, hidden, method="mlm_logits"), wanted, HIDDEN)


def test_a_head_that_is_not_there_is_missed(data):
    with pytest.raises(CheckpointError, match="lm_head"):
        jina_jax.load(data / "tiny_checkpoints" / "hf", mlm_head=True)


def test_parameters_go_where_their_shardings_say(data):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    _, variables = jina_jax.load(data / "tiny_checkpoints" / "hf", shardings=everywhere)
    assert all(leaf.sharding == everywhere for leaf in jax.tree.leaves(variables))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    tree = jax.tree.map(lambda _: everywhere, variables)
    tree["params"]["embed"]["words"]["embedding"] = split
    _, again = jina_jax.load(data / "tiny_checkpoints" / "hf", shardings=tree)
    assert again["params"]["embed"]["words"]["embedding"].sharding == split
    assert_same(again, variables)


# ---- Adapters of users -----------------------------------------------------------------------------------------


def peft_adapter(directory: Path, base: Path, **options) -> Path:
    """An adapter as PEFT saves it after training: random A and B, apart for q, k and v."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import JinaEmbeddingsV3Model

    torch.manual_seed(1)
    adapted = get_peft_model(JinaEmbeddingsV3Model.from_pretrained(base), LoraConfig(**options))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(directory)
    return directory


# 2026-11: peft 0.21 asks transformers 5.23 for a name that it is about to lose.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "fc1"]},
        {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "word_embeddings"]},
        {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": r".*\.(o_proj|fc2)"},
    ],
    ids=["q-v-fc1", "qkv-o-words", "rslora-pattern"],
)
@pytest.mark.parametrize("layout", ["original", "hf"])
def test_a_users_own_adapter_becomes_a_task(data, tmp_path, layout, options):
    import torch
    from transformers import JinaEmbeddingsV3Model

    base = data / "tiny_checkpoints" / "hf"
    adapter = peft_adapter(tmp_path / "mine", base, **options)
    model, variables = jina_jax.load(data / "tiny_checkpoints" / layout, adapters={"my-domain": adapter})
    assert model.config.tasks == (*TASKS, "my-domain")
    assert model.config.prompts[-1] == ""

    theirs = JinaEmbeddingsV3Model.from_pretrained(base, dtype=torch.float32)
    theirs.load_adapter(str(adapter), adapter_name="mine")
    tokens = np.random.default_rng(0).integers(3, 400, (2, 12)).astype(np.int32)
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens).long()).last_hidden_state.numpy()
    assert_close(model.apply(variables, tokens, None, "my-domain").hidden, wanted, HIDDEN)

    # The released tasks are what they were: all of them and none, in one batch.
    released, expected = jina_jax.load(base)
    rows, tasks = np.repeat(tokens[:1], 6, axis=0), np.arange(-1, 5, dtype=np.int32)
    wanted = released.apply(expected, rows, None, tasks).embeddings
    assert_close(model.apply(variables, rows, None, tasks).embeddings, wanted, EMBEDDING)

    # And back out, to both public layouts.
    wanted = model.apply(variables, tokens, None, "my-domain").embeddings
    for target in ("original", "hf"):
        again, reloaded = jina_jax.load(jina_jax.save(tmp_path / target, model, variables, layout=target))
        assert_close(again.apply(reloaded, tokens, None, "my-domain").embeddings, wanted, EMBEDDING)


def test_adapters_that_are_more_than_lora_are_refused(checkpoint):
    directory = checkpoint("native_saved")
    file = directory / "separation" / "adapter_config.json"
    raw = json.loads(file.read_text()) | {"use_dora": True, "bias": "all"}
    file.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError) as error:
        jina_jax.load(directory)
    assert "separation/adapter_config.json: 'use_dora' = True" in str(error.value)
    assert "'bias' = 'all'" in str(error.value)


# ---- Files that are not what they should be --------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["original", "hf", "own"])
def test_all_that_is_wrong_is_listed_in_one_error(data, tmp_path, checkpoint, layout):
    if layout == "own":
        directory = tmp_path / "own"
        jina_jax.save(directory, *jina_jax.load(data / "tiny_checkpoints" / "original"))
        missing, misshapen = "embed/norm/scale", "pooler/bias"
    else:
        directory = checkpoint(layout)
        missing, misshapen = "roberta.encoder.layers.1.norm2.bias", "roberta.pooler.dense.bias"

    def change(tensors):
        del tensors[missing]
        tensors[misshapen] = np.zeros(3, np.float32)
        tensors["surprise.weight"] = np.zeros((2, 2), np.float32)
        return tensors

    rewrite(directory / "model.safetensors", change)
    with pytest.raises(CheckpointError) as error:
        jina_jax.load(directory)
    text = str(error.value)
    assert f"- {missing.removeprefix('roberta.')} [64]: in model, not in checkpoint" in text
    assert f"! {misshapen}: has shape [3], the model needs [64]" in text
    assert "+ surprise.weight [2, 2]: in checkpoint, not in model" in text
    assert str(directory) in text


def test_missing_folders_and_tensors_of_adapters_are_listed_too(checkpoint):
    directory = checkpoint("hf")
    shutil.rmtree(directory / "separation")
    rewrite(
        directory / "retrieval_query" / "adapter_model.safetensors",
        lambda t: {name: x for name, x in t.items() if "layers.1.mlp.fc1.lora_B" not in name},
    )
    with pytest.raises(CheckpointError) as error:
        jina_jax.load(directory)
    assert "separation/: folder of the adapter for 'separation', not in checkpoint" in str(error.value)
    assert "encoder.layers.1.mlp.fc1.lora_B.weight" in str(error.value)
    assert "(retrieval_query/)" in str(error.value)


def test_prompts_of_ones_own_survive_every_layout(data, tmp_path):
    model, variables = jina_jax.load(data / "tiny_checkpoints" / "hf")
    prompts = ("Frage: ", "Text: ", "", "Sorte: ", "")
    model = Model(model.config.replace(prompts=prompts))
    for layout in ("own", "original", "hf"):
        saved = jina_jax.save(tmp_path / layout, model, variables, layout=layout)
        assert jina_jax.load(saved)[0].config.prompts == prompts


def test_our_own_layout_keeps_the_head_and_can_leave_it(tiny, tmp_path):
    model, variables = tiny
    saved = jina_jax.save(tmp_path / "m", model, variables)
    again, loaded = jina_jax.load(saved)
    assert again.config.mlm_head
    assert_same(loaded, variables)
    bare, loaded = jina_jax.load(saved, mlm_head=False)
    assert not bare.config.mlm_head
    assert "mlm_head" not in loaded["params"]


def test_the_backbone_alone_can_be_had(data, checkpoint):
    directory = checkpoint("hf")
    for task in TASKS:
        shutil.rmtree(directory / folder_name(task))
    model, variables = jina_jax.load(directory, tasks=(), prompts=())
    whole, expected = jina_jax.load(data / "tiny_checkpoints" / "hf")
    tokens = np.arange(3, 13, dtype=np.int32)[None]
    assert_close(model.apply(variables, tokens).hidden, whole.apply(expected, tokens).hidden, 0)


@pytest.mark.parametrize("keep", [0, 5, 1000, -100])
def test_truncated_files(checkpoint, keep):
    directory = checkpoint("original")
    file = directory / "model.safetensors"
    content = file.read_bytes()[:keep]
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"not a whole safetensors file \({len(content)} bytes"):
        jina_jax.load(directory)


def test_foreign_directories(tmp_path, checkpoint):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        jina_jax.load(tmp_path)
    directory = checkpoint("original")
    rewrite(directory / "model.safetensors", lambda _: {"bert.pooler.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(CheckpointError, match=r"\+ bert\.pooler\.weight"):
        jina_jax.load(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        jina_jax.load(directory)
    (directory / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="python -m convert to-jax"):
        jina_jax.load(directory)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("jinaai/jina-embeddings-v3", "hf download jinaai/jina-embeddings-v3 --local-dir"),
        ("./nowhere", "no directory './nowhere'"),
        ("nowhere", "'mini'"),
        ("/nowhere/at-all", "no directory"),
    ],
)
def test_names_that_lead_nowhere(name, message):
    with pytest.raises(FileNotFoundError, match=message):
        jina_jax.load(name)


def test_a_file_is_not_a_directory(data):
    with pytest.raises(NotADirectoryError, match="pass the directory"):
        jina_jax.load(data / "tiny_checkpoints" / "original" / "model.safetensors")


def test_the_bundled_model_is_there():
    model, variables = jina_jax.load("mini")
    assert model.config.hidden_size == 384
    assert jax.tree.leaves(variables)[0].dtype == jnp.float32
    out = model.apply(variables, np.array([[0, 5, 6, 2]], np.int32), None, "retrieval.query")
    assert_close(np.linalg.norm(np.asarray(out.embeddings)), 1.0, EMBEDDING)


# ---- Writing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["original", "original_bf16"])
def test_original_to_ours_to_original_is_bit_exact(data, tmp_path, layout):
    source = data / "tiny_checkpoints" / layout
    dtype = "bfloat16" if "bf16" in layout else "float32"
    own = jina_jax.save(tmp_path / "own", *jina_jax.load(source, dtype=dtype))
    back = jina_jax.save(tmp_path / "back", *jina_jax.load(own, dtype=dtype), layout="original")
    assert_same_files(back / "model.safetensors", source / "model.safetensors")
    assert Config.from_json(back / "config.json") == Config.from_json(source / "config.json")


@pytest.mark.parametrize("layout", ["hf", "hf_bf16", "native_new"])
def test_hf_to_ours_to_hf_is_bit_exact(data, tmp_path, layout):
    source = data / "tiny_checkpoints" / layout
    dtype = "bfloat16" if "bf16" in layout else "float32"
    model, variables = jina_jax.load(source, dtype=dtype)
    own = jina_jax.save(tmp_path / "own", model, variables)
    assert_same(jina_jax.load(own, dtype=dtype)[1], variables)
    back = jina_jax.save(tmp_path / "back", *jina_jax.load(own, dtype=dtype), layout="hf")
    assert_same(jina_jax.load(back, dtype=dtype)[1], variables)
    assert Config.from_json(back / "config.json") == Config.from_json(source / "config.json")


def test_what_we_write_as_hf_is_read_by_transformers(data, tmp_path):
    import torch

    from convert.hf_reference import load_hf, run_hf

    model, variables = jina_jax.load(data / "tiny_checkpoints" / "original")
    theirs = load_hf(jina_jax.save(tmp_path / "hf", model, variables, layout="hf"))  # complains of any key amiss
    tokens = np.random.default_rng(0).integers(3, 400, (2, 12)).astype(np.int32)
    for task in (None, *TASKS):
        with torch.no_grad():
            hidden, _ = run_hf(theirs, torch.tensor(tokens).long(), torch.ones(2, 12).long(), task)
        assert_close(model.apply(variables, tokens, None, task).hidden, hidden.numpy(), HIDDEN)


def test_orbax_holds_sharded_trees(data, tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    model, plain = jina_jax.load(data / "tiny_checkpoints" / "original")
    tree = jax.tree.map(lambda leaf: split if leaf.shape[0] % 8 == 0 else whole, plain)
    saved = jina_jax.save(tmp_path / "o", model, jax.device_put(plain, tree), layout="orbax")
    again, variables = jina_jax.load(saved)
    assert again.config == model.config
    assert_same(variables, plain)
    _, sharded = jina_jax.load(saved, shardings=tree)
    assert sharded["params"]["embed"]["words"]["embedding"].sharding == split
    assert_same(sharded, plain)
    shutil.rmtree(saved / "orbax" / "d", ignore_errors=True)
    (saved / "orbax" / "_METADATA").unlink()
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        jina_jax.load(saved)


def test_writing_never_harms_what_is_there(data, tmp_path, monkeypatch):
    model, variables = jina_jax.load(data / "tiny_checkpoints" / "original")
    saved = jina_jax.save(tmp_path / "m", model, variables, tokenizer=data.parent.parent / "jina_jax" / "mini")
    assert (saved / "tokenizer.json").exists()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        jina_jax.save(saved, model, variables)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jina_jax.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        jina_jax.save(saved, model, variables, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]  # no litter
    assert_same(jina_jax.load(saved)[1], variables)
    monkeypatch.undo()
    jina_jax.save(saved, model, jax.tree.map(lambda x: x + 1, variables), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    np.testing.assert_array_equal(
        jina_jax.load(saved)[1]["params"]["pooler"]["bias"], np.asarray(variables["params"]["pooler"]["bias"]) + 1
    )


def test_kill_in_the_middle_of_a_write_leaves_the_old_or_nothing(data, tmp_path):
    script = (
        "import jina_jax, sys, time\n"
        "import jina_jax.checkpoint as c\n"
        "write = c.save_file\n"
        "def slow(tensors, file, metadata=None):\n"
        "    write(tensors, file, metadata)\n"
        "    print('written', flush=True)\n"
        "    time.sleep(60)\n"
        "c.save_file = slow\n"
        f"jina_jax.save(sys.argv[1], *jina_jax.load({str(data / 'tiny_checkpoints' / 'original')!r}))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "m")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "m").exists()
    jina_jax.save(tmp_path / "m", *jina_jax.load(data / "tiny_checkpoints" / "original"))  # and it can be written now


def test_variables_of_another_model_are_refused(tiny, tmp_path):
    model, variables = tiny
    with pytest.raises(ValueError, match="these variables are not this model's") as error:
        jina_jax.save(tmp_path / "m", Model(model.config.replace(hidden_size=32, pooler=False)), variables)
    assert "embed/words/embedding: has shape [400, 64], the model needs [400, 32]" in str(error.value)
    assert "+ pooler/bias" in str(error.value)
    with pytest.raises(ValueError, match="choose from: own, original, hf, orbax"):
        jina_jax.save(tmp_path / "m", model, variables, layout="onnx")


# ---- Size ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_the_real_size_needs_little_more_than_the_parameters(tmp_path_factory, dtype):
    directory = tmp_path_factory.getbasetemp() / "real_size"
    root = Path(__file__).parent.parent
    environment = os.environ | {"XLA_FLAGS": ""}
    for action in ("--write", "--case"):
        what = [action] if action == "--write" else [action, f"original {dtype}"]
        command = [sys.executable, "-m", "tests.benchmarks.load", "--directory", str(directory), *what]
        output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root, env=environment).stdout
    result = json.loads(output.splitlines()[-1])
    assert result["bytes"] == 572_310_396 * np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize
    assert result["peak"] <= 1.3 * result["bytes"], result
