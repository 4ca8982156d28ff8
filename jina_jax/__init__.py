"""jina-embeddings-v3 in JAX."""

from jina_jax._version import __version__
from jina_jax.checkpoint import load, save
from jina_jax.config import TASKS, Config
from jina_jax.embedder import Chunks, Embedder, Usage
from jina_jax.lora import merge
from jina_jax.model import Model, Output
from jina_jax.pooling import normalize, truncate
from jina_jax.quantization import calibrate, quantize
from jina_jax.sharding import make_mesh, shardings, use
from jina_jax.tensors import CheckpointError

__all__ = [
    "TASKS",
    "CheckpointError",
    "Chunks",
    "Config",
    "Embedder",
    "Model",
    "Output",
    "Usage",
    "__version__",
    "calibrate",
    "load",
    "make_mesh",
    "merge",
    "normalize",
    "quantize",
    "save",
    "shardings",
    "truncate",
    "use",
]
