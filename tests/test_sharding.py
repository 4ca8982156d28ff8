"""A model on 8 simulated devices is the model on one."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_variables
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from numerics import EMBEDDING, HIDDEN, assert_close
from test_checkpoint import assert_same
from test_embedder import MINI, draw_texts

import jina_jax
from jina_jax import layouts, sharding
from jina_jax.checkpoint import flatten

AXES = sharding.AXES
# Every mesh of 8 devices: how often each axis is doubled.
MESHES = [tuple(2**power for power in powers) for powers in itertools.product(range(4), repeat=4) if sum(powers) == 3]


def make(sizes):
    return jina_jax.make_mesh(*sizes)


def name(sizes):
    return "-".join(f"{axis}{size}" for axis, size in zip(AXES, sizes, strict=True) if size > 1)


@pytest.fixture(scope="module")
def fitting(tiny):
    """The tiny model; with 8 heads where a mesh splits 8 of them."""
    model = jina_jax.Model(tiny[0].config.replace(num_attention_heads=8))
    more = model, random_variables(model)
    return lambda sizes: more if sizes[2] == 8 else tiny


def place(model, variables, mesh):
    return jax.device_put(variables, jina_jax.shardings(model, mesh))


def masked():
    """Rows of different lengths, with mixed tasks."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 400, (8, 37)).astype(np.int32)
    mask = np.arange(37)[None] < rng.integers(1, 38, 8)[:, None]
    return tokens, {"mask": mask, "task": np.array([-1, 0, 1, 2, 3, 4, -1, 2], np.int32)}


def packed():
    """Three texts in each row, of odd lengths and different tasks, in rows that no axis splits evenly."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 400, (8, 61)).astype(np.int32)
    segments = np.zeros((8, 61), np.int32)
    for row in segments:
        cuts = np.sort(rng.choice(np.arange(1, 60), 3, replace=False))
        for text, (start, stop) in enumerate(itertools.pairwise([0, *cuts]), 1):
            row[start:stop] = text
    return tokens, {"segments": segments, "task": rng.integers(-1, 5, (8, 3)).astype(np.int32)}


@pytest.mark.parametrize("sizes", MESHES, ids=name)
def test_every_mesh_gives_what_one_device_gives(fitting, sizes):
    model, variables = fitting(sizes)
    mesh = make(sizes)
    with jina_jax.use(mesh):
        placed = place(model, variables, mesh)
        tokens, options = packed()
        check(model, variables, placed, tokens, options)


def check(model, variables, placed, tokens, options):
    """Compare one call with the same on one device."""
    with jax.set_mesh(jina_jax.make_mesh(devices=jax.devices()[:1])):
        whole = APPLY(model, variables, tokens, **options)
    split = jax.jit(model.apply)(placed, tokens, **options)
    seen = options["mask"] if "mask" in options else options["segments"] > 0
    assert_close(np.asarray(split.hidden)[seen], np.asarray(whole.hidden)[seen], HIDDEN)
    assert_close(split.embeddings, whole.embeddings, HIDDEN)


APPLY = jax.jit(lambda model, variables, *args, **options: model.apply(variables, *args, **options), static_argnums=0)


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (2, 2, 2, 1), (1, 2, 1, 4)], ids=name)
def test_fewer_rows_than_devices_and_a_length_that_nothing_divides(tiny, sizes):
    model, variables = tiny
    tokens = np.random.default_rng(1).integers(3, 400, (3, 19)).astype(np.int32)
    options = {"mask": np.arange(19)[None] < np.array([[19], [4], [11]]), "task": np.array([0, -1, 3], np.int32)}
    mesh = make(sizes)
    with jina_jax.use(mesh):
        check(model, variables, place(model, variables, mesh), tokens, options)


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (1, 1, 4, 2), (1, 2, 1, 4)], ids=name)
def test_gradients_too(tiny, sizes):
    model, variables = tiny
    tokens, options = masked()
    target = jnp.asarray(np.random.default_rng(3).normal(size=(8, 64)), jnp.float32)

    def loss(variables):
        return jnp.sum(model.apply(variables, tokens, **options).embeddings * target)

    if "whole" not in _GRADIENTS:
        _GRADIENTS["whole"] = jax.jit(jax.grad(loss))(variables)
    mesh = make(sizes)
    with jina_jax.use(mesh):
        split = jax.jit(jax.grad(loss), out_shardings=jina_jax.shardings(model, mesh))(place(model, variables, mesh))
    for path, wanted in flatten(_GRADIENTS["whole"]).items():
        scale = max(1.0, float(np.abs(wanted).max()))
        assert_close(np.asarray(flatten(split)[path]) / scale, np.asarray(wanted) / scale, HIDDEN)


_GRADIENTS: dict = {}


# ---- Where things are ------------------------------------------------------------------------------------------


def share(model, mesh):
    """The part of all numbers that the fullest device holds."""
    targets = flatten(jina_jax.shardings(model, mesh))
    shapes = layouts.parameter_shapes(model.config)
    held = sum(np.prod(targets[path].shard_shape(shape)) for path, shape in shapes.items())
    return held / sum(np.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize("sizes", [sizes for sizes in MESHES if sizes[1] * sizes[2] > 1], ids=name)
def test_a_device_holds_its_share_of_the_released_model(sizes):
    mesh = make(sizes)
    model = jina_jax.Model(sharding.padded(jina_jax.Config(), mesh))
    wanted = 1 / (sizes[1] * sizes[2])
    assert wanted <= share(model, mesh) <= 1.02 * wanted


def test_a_matrix_is_split_over_both_axes_and_a_vector_over_heads_alone():
    mesh = make((1, 4, 2, 1))
    model = jina_jax.Model(sharding.padded(jina_jax.Config(mlm_head=True), mesh))
    found = {path: target.spec for path, target in flatten(jina_jax.shardings(model, mesh)).items()}
    assert found["embed/words/embedding"] == PartitionSpec("tensor", "fsdp")
    assert found["embed/words/lora_a"] == PartitionSpec(("tensor", "fsdp"), None, None)
    assert found["layers/attention/qkv/kernel"] == PartitionSpec(None, "fsdp", None, "tensor", None)
    assert found["layers/attention/qkv/lora_a"] == PartitionSpec(None, ("fsdp", "tensor"), None, None)
    assert found["layers/mlp/down/bias"] == PartitionSpec(None, None)
    assert found["layers/mlp/up/bias"] == PartitionSpec(None, "tensor")
    split = {name for spec in found.values() for entry in spec for name in names(entry)}
    assert split == {"fsdp", "tensor"}


def test_every_process_chooses_alike():
    """Hashes of strings differ from process to process; where heads and their parts could both be split, heads are."""
    found = flatten(jina_jax.shardings(jina_jax.Model(jina_jax.Config(vocab_size=64)), make((2, 4, 1, 1))))
    assert found["layers/attention/qkv/lora_b"].spec == PartitionSpec(None, None, None, None, "fsdp", None)
    assert found["layers/attention/out/lora_a"].spec == PartitionSpec(None, "fsdp", None, None, None)


def test_what_a_mesh_cannot_split_is_all_listed():
    with pytest.raises(ValueError, match="does not fit this model") as error:
        jina_jax.shardings(jina_jax.Model(jina_jax.Config(intermediate_size=4100)), make((1, 1, 8, 1)))
    text = str(error.value)
    assert "mlp width: 4100 cannot be split over tensor" in text
    assert "rows of the vocabulary: 250002 cannot be split over tensor; see Config.vocab_multiple" in text
    assert text.count("\n") == 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": -1, "fsdp": -1}, "-1 for one of them"),
        ({"data": 0}, "at least 1"),
        ({"data": -1, "fsdp": 3}, "does not make a mesh of 8 devices"),
        ({"data": 2, "fsdp": 2}, "does not make a mesh of 8 devices"),
        ({"data": -2}, "at least 1"),
    ],
)
def test_meshes_that_cannot_be(sizes, message):
    with pytest.raises(ValueError, match=message):
        jina_jax.make_mesh(**sizes)


def test_meshes():
    assert dict(jina_jax.make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1, "sequence": 1}
    two = jina_jax.make_mesh(tensor=2, devices=jax.devices()[:2])
    assert dict(two.shape) == {"data": 1, "fsdp": 1, "tensor": 2, "sequence": 1}
    explicit = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with pytest.raises(ValueError, match="axis 'data' of the mesh is of type Explicit, must be Auto"):
        jina_jax.use(explicit)


def test_a_mesh_with_other_axes_is_left_alone(tiny):
    model, variables = tiny
    mesh = jax.make_mesh((8,), ("mine",), axis_types=(AxisType.Auto,))
    tokens, options = masked()
    text = jax.jit(model.apply).lower(variables, tokens, **options).as_text()
    with jax.set_mesh(mesh):
        assert "sharding_constraint" not in jax.jit(model.apply).lower(variables, tokens, **options).as_text()
    assert "sharding_constraint" not in text


def test_rows_of_the_vocabulary_that_nobody_reads(tiny):
    model, variables = tiny
    padded = jina_jax.Model(model.config.replace(vocab_multiple=7))
    extra = padded.config.axis_sizes["V"] - 400
    assert extra == 6
    longer = {"embed/words/embedding", "embed/words/lora_a", "mlm_head/bias"}
    tree = {
        path: jnp.pad(leaf, [(0, extra), *((0, 0),) * (leaf.ndim - 1)]) if path in longer else leaf
        for path, leaf in flatten(variables).items()
    }
    tree = {"params": layouts.nest(tree)}
    tokens, options = masked()
    whole, again = (m.apply(v, tokens, **options) for m, v in ((model, variables), (padded, tree)))
    np.testing.assert_array_equal(whole.hidden, again.hidden)
    one, two = (m.apply(v, whole.hidden, method="mlm_logits") for m, v in ((model, variables), (padded, tree)))
    assert one.shape == two.shape
    assert_close(two, one, HIDDEN)
    beyond = np.full((1, 4), 400, np.int32)  # there is a row, but not one of the vocabulary
    assert np.isnan(padded.apply(tree, beyond).hidden).all()


# ---- The embedder ----------------------------------------------------------------------------------------------


def test_an_embedder_on_a_mesh(tmp_path, tiny):
    sizes = (1, 2, 2, 2)
    config = tiny[0].config.replace(vocab_size=32_003, max_position_embeddings=66, mlm_head=False)
    model = jina_jax.Model(config)
    folder = jina_jax.save(tmp_path / "m", model, random_variables(model), tokenizer=MINI)
    alone = jina_jax.Embedder.load(folder)
    spread = jina_jax.Embedder.load(folder, mesh=make(sizes))
    assert spread.config.axis_sizes["V"] % 4 == 0
    texts = draw_texts(60, longest=90)
    tasks = [[None, *config.tasks][i % 6] for i in range(60)]
    programs = spread.warmup()
    assert_close(spread.encode(texts, task=tasks), alone.encode(texts, task=tasks), EMBEDDING)
    assert_close(spread.encode(texts[0], task="separation"), alone.encode(texts[0], task="separation"), EMBEDDING)
    one, two = (it.encode_chunks(" ".join(texts[:9]), chunker="sentences") for it in (alone, spread))
    assert_close(two.embeddings, one.embeddings, EMBEDDING)
    assert spread.programs == programs <= 8


def test_what_is_saved_has_the_rows_that_are_read(tmp_path, data):
    source = data / "tiny_checkpoints" / "original"
    model, variables = jina_jax.load(source, mesh=make((1, 4, 2, 1)))
    _, plain = jina_jax.load(source)
    for layout in ("own", "original", "hf"):
        saved = jina_jax.save(tmp_path / layout, model, variables, layout=layout)
        again, found = jina_jax.load(saved)
        assert again.config.vocab_multiple == 1
        assert_same(found, plain)
    saved = jina_jax.save(tmp_path / "orbax", model, variables, layout="orbax")  # as it is
    again, found = jina_jax.load(saved, mesh=make((1, 2, 2, 2)))
    assert again.config.vocab_multiple == 8
    assert_same(found, variables)
    with pytest.raises(ValueError, match="mesh or shardings"):
        jina_jax.load(source, mesh=make((8, 1, 1, 1)), shardings=jax.devices()[0])


@pytest.mark.parametrize("layout", ["original", "hf", "native_new", "own"])
def test_every_layout_is_read_into_shards(tmp_path, data, layout):
    source = data / "tiny_checkpoints" / layout
    if layout == "own":
        source = jina_jax.save(tmp_path / "m", *jina_jax.load(data / "tiny_checkpoints" / "original"))
    _, plain = jina_jax.load(source)
    for sizes in ((1, 2, 2, 2), (1, 8, 1, 1), (2, 2, 2, 1)):
        model, variables = jina_jax.load(source, mesh=make(sizes))
        targets = flatten(jina_jax.shardings(model, make(sizes)))
        for path, leaf in flatten(variables).items():
            assert leaf.sharding == targets[path]
            wanted = flatten(plain)[path]
            np.testing.assert_array_equal(np.asarray(leaf)[tuple(map(slice, wanted.shape))], wanted, err_msg=path)
            assert not np.asarray(leaf)[wanted.shape[0] :].any()


# ---- What travels ----------------------------------------------------------------------------------------------

LENGTH = 176  # tokens of a row; no axis of a parameter is like it, nor like a part of it
COLLECTIVES = r"= (\(.*?\)|\S+) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("


def collectives(model, variables, mesh, rows=8, length=LENGTH):
    """Every collective operation of a forward pass: its kind, and the shape of what comes out."""
    inputs = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "sequence"))
    tokens = jax.device_put(np.full((rows, length), 5, np.int32), inputs)
    task = jax.device_put(np.zeros(rows, np.int32), NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    with jina_jax.use(mesh):
        run = jax.jit(lambda v, x, task: model.apply(v, x, task=task).embeddings)
        text = run.lower(place(model, variables, mesh), tokens, task).compile().as_text()
    return [(kind, shape) for shape, kind in re.findall(COLLECTIVES, text)]


def names(entry):
    """Axes of the mesh in an entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


def gathered_parameters(model, mesh):
    """How many axes of the mesh each of a layer's parameters is gathered over before it is used.

    That is "fsdp", and "tensor" for adapters that have neither heads nor mlp and are spread over it all the same.
    """
    counts = []
    for path, target in flatten(jina_jax.shardings(model, mesh)).items():
        axes = layouts.PARAMETERS[path].split()
        spare = {name for axis, entry in zip(axes, target.spec, strict=True) for name in names(entry)}
        spare -= {"tensor"} if {"N", "F"} & set(axes) else set()
        if axes[0] == "L" and spare:
            counts.append(len(spare))
    return counts


@pytest.mark.parametrize("sizes", MESHES, ids=name)
def test_no_collective_that_theory_does_not_ask_for(fitting, sizes):
    """The layers stand once in the program, in a loop: what is in it counts for one layer."""
    model, variables = fitting(sizes)
    _, fsdp, tensor, sequence = sizes
    found = collectives(model, variables, make(sizes))
    kinds = [kind for kind, _ in found]
    if sizes == (8, 1, 1, 1):
        assert found == []
    # Keys and values travel round the ring.
    assert kinds.count("collective-permute") == (2 if sequence > 1 else 0)
    # Attention and mlp each end in a sum over "tensor", and so does the lookup; the mean is one over "sequence". What
    # the word adapter looks up comes from the devices that share its table.
    sums = (2 if tensor > 1 else 0) + (1 if sequence > 1 else 0)
    merged = tensor > 1 and fsdp == 1  # both lookups in one operation
    sums += merged or (tensor > 1) + (fsdp > 1)
    assert kinds.count("all-reduce") == sums, found
    # Each row's owner gets its whole width from those who share the table.
    assert kinds.count("all-to-all") == (1 if fsdp > 1 else 0), found
    # A layer's weights are gathered, a layer at a time; besides, token ids and which of them are words, where rows
    # share a table. Activations never are.
    gathered = [shape for kind, shape in found if kind == "all-gather"]
    weights = [shape for shape in gathered if shape.startswith("f32")]
    wanted = gathered_parameters(model, make(sizes))
    assert len(wanted) <= len(weights) <= sum(wanted), weights
    assert all(shape.startswith("f32[1,") for shape in weights), weights
    assert len(gathered) - len(weights) == (2 if fsdp > 1 else 0), gathered
    assert not any(f"{LENGTH // part}," in shape for shape in weights for part in (1, sequence)), weights


def test_backward_scatters_gradients(tiny):
    """Gradients of split weights come out split: nobody holds, nor sums, all of a gradient."""
    model, variables = tiny
    mesh = make((1, 8, 1, 1))
    tokens = jax.device_put(np.full((8, 64), 5, np.int32), NamedSharding(mesh, PartitionSpec("fsdp")))
    targets = jina_jax.shardings(model, mesh)

    def loss(v, x):
        return jnp.sum(model.apply(v, x).embeddings[:, :3])

    with jina_jax.use(mesh):
        step = jax.jit(jax.grad(loss), out_shardings=targets)
        out = step(place(model, variables, mesh), tokens)
    for path, leaf in flatten(out).items():
        assert leaf.sharding.is_equivalent_to(flatten(targets)[path], leaf.ndim), path


def test_the_program_holds_the_constraints(tiny):
    model, variables = tiny
    tokens, options = masked()
    with jina_jax.use(make((2, 2, 2, 1))):
        text = jax.jit(model.apply).lower(variables, tokens, **options).as_text()
    # Two tables with an adapter each: ids, and before and after what is shared goes to its owners. A layer, which
    # stands once: four dense parts with a kernel, an output and both parts of an adapter.
    assert text.count("sharding_constraint") == 2 * (1 + 2 + 2) + 4 * 4
