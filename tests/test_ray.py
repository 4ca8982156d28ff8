import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jina_jax
from jina_jax.ray import EmbedBatch

ROOT = Path(__file__).parent.parent

# Ray warns about itself and starts processes, so it has one of its own.
PROGRAM = """
import sys
import ray
from jina_jax.ray import EmbedBatch

ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
ray.data.from_items([{"n": n, "text": f"text {n}"} for n in range(40)], override_num_blocks=4).map_batches(
    EmbedBatch,
    fn_constructor_kwargs={"task": "separation", "dimensions": 16},
    batch_size=8,
    compute=ray.data.ActorPoolStrategy(size=1),
).write_parquet(sys.argv[1])
"""


def test_a_batch():
    batch = {"id": np.array([3, 4]), "body": np.array(["a", "b"], object)}
    embed = EmbedBatch("mini", "body", "vector", dimensions=8, dtype="float32", precision="float16")
    found = embed(batch)
    assert list(found) == ["id", "body", "vector"]
    assert list(batch) == ["id", "body"]
    expected = embed.embedder.encode(["a", "b"], dimensions=8, precision="float16")
    np.testing.assert_array_equal(found["vector"], expected)


@pytest.mark.slow
def test_a_pipeline(tmp_path):
    import pyarrow.parquet as pq

    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    rows = sorted(pq.read_table(tmp_path / "out").to_pylist(), key=lambda row: row["n"])
    assert [row["n"] for row in rows] == list(range(40))
    expected = jina_jax.Embedder.load("mini").encode([row["text"] for row in rows], task="separation", dimensions=16)
    assert np.abs(np.array([row["embedding"] for row in rows], np.float32) - expected).max() <= 1e-6
