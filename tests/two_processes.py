"""One of two processes with four simulated devices each; `test_two_processes.py` starts both.

python two_processes.py PORT PROCESS CHECKPOINT OUTPUT
"""

import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"

import contextlib
import json
from pathlib import Path

import jax
import numpy as np

import jina_jax
from jina_jax import distributed, tensors

MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (2, 4, 1, 1), (1, 2, 4, 1), (2, 1, 1, 4), (1, 2, 2, 2)]
TEXTS = [f"{'of the ' * (5 * i % 17)}people {i}" for i in range(23)]
TASKS = [[None, "text-matching", "retrieval.query"][i % 3] for i in range(23)]


class Counted:
    """A tensor of a file that counts the bytes which are asked of it."""

    read = 0

    def __init__(self, tensor):
        self.tensor = tensor

    def get_shape(self):
        return self.tensor.get_shape()

    def __getitem__(self, index):
        found = self.tensor[index]
        Counted.read += found.nbytes
        return found


@contextlib.contextmanager
def counting(self, names, opened=tensors.TensorFiles.open):
    with opened(self, names) as found:
        yield {name: Counted(tensor) for name, tensor in found.items()}


def main() -> None:
    port, process, checkpoint, output = sys.argv[1:]
    assert distributed.start(f"127.0.0.1:{port}", 2, int(process)) == (int(process), 2)
    tensors.TensorFiles.open = counting
    results, facts = {}, {}
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 400, (8, 24)).astype(np.int32)
    task = np.array([-1, 0, 1, 2, 3, 4, -1, 2], np.int32)
    for sizes in MESHES:
        name = "-".join(map(str, sizes))
        mesh = jina_jax.make_mesh(*sizes)
        Counted.read = 0
        embedder = jina_jax.Embedder.load(checkpoint, mesh=mesh)
        held = {  # what this process holds of all parameters, each part once
            (path, str(shard.index)): shard.data.nbytes
            for path, leaf in jina_jax.checkpoint.flatten(embedder.variables).items()
            for shard in leaf.addressable_shards
        }
        facts[name] = {"read": Counted.read, "share": sum(held.values())}
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        with jina_jax.use(mesh):
            rows = [jina_jax.sharding.put(mesh, x, axes) for x, axes in ((tokens, "B T"), (task, "B"))]
            apply = jax.jit(embedder.model.apply, out_shardings=whole)
            results[f"{name} hidden"] = np.asarray(apply(embedder.variables, rows[0], task=rows[1]).hidden)
        results[f"{name} texts"] = embedder.encode(TEXTS, task=TASKS)
    np.savez(Path(output) / f"{process}.npz", **results)
    (Path(output) / f"{process}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
