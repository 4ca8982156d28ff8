"""A strict session: no silent promotion, no silent broadcasting, shapes and types checked, 8 simulated devices."""

import os
from pathlib import Path

os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # The suite compiles far more than it computes.
        "--xla_backend_optimization_level=0",
        # XLA:CPU's fused reductions drop NaN silently otherwise.
        "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
    )
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "true"

from jaxtyping import install_import_hook

# Every annotated function of ours checks the types and shapes it is called with, and what it returns.
install_import_hook("jina_jax", "beartype.beartype")

import hypothesis
import jax
import numpy as np
import pytest

import jina_jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# The same examples in every run; HYPOTHESIS_PROFILE=random draws new ones.
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("random", deadline=None, print_blob=True)
# While developing: fail at once instead of searching for the smallest example.
hypothesis.settings.register_profile("quick", deadline=None, derandomize=True, phases=[hypothesis.Phase.generate])
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that no worker begins one when there is nothing left for the others."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def data() -> Path:
    """Folder of the data that tests read."""
    return Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def tiny() -> tuple[jina_jax.Model, dict]:
    """A model of three layers whose every parameter is random and matters, adapters included."""
    config = jina_jax.Config(
        vocab_size=400,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=514,
        matryoshka_dimensions=(8, 16, 32, 64),
        mlm_head=True,
    )
    model = jina_jax.Model(config)
    return model, random_variables(model)


def random_variables(model: jina_jax.Model, seed: int = 0) -> dict:
    """Random parameters: activations stay of order one, and no adapter, bias or scale is trivial."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 4), np.int32))
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        if name == "embedding":
            values = rng.normal(size=leaf.shape)
        elif name == "scale":
            values = 1 + 0.1 * rng.normal(size=leaf.shape)
        elif name == "kernel":
            out = 3 if "qkv" in str(path) else 1
            values = rng.normal(size=leaf.shape) * (model.config.hidden_size**-0.5) / out**0.5
        elif name == "bias":
            values = 0.1 * rng.normal(size=leaf.shape)
        else:  # lora_a, lora_b: an effect about as large as the weight's own
            values = rng.normal(size=leaf.shape) * (0.5 if "embed" in str(path) else 0.3)
        return jax.numpy.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)
