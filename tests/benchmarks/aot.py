"""The whole model on TPUs that are not here: does it compile, and what does a chip need to hold?

    pip install 'jina-jax[aot]'
    python -m tests.benchmarks.aot                         # every row; ten minutes
    python -m tests.benchmarks.aot forward

forward    one text of 8192 tokens on one v5e chip, bfloat16 weights, without and with the adapters' mixture
train      a step of AdamW on 8 texts of 8192 tokens on eight v5e chips: float32 weights and moments split over the
           axis "fsdp", bfloat16 activations, each layer recomputed in the backward pass; all parameters train
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from typing import Any

TOKENS = 8192
GIB = 2**30
MEMORY = ("bytes", "arguments", "temporary", "results")


def main() -> None:
    """Compile what is asked for and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="*", help=f"of: {', '.join(PROGRAMS)}; all by default")
    parser.add_argument("--json", help="file to write all results to")
    options = parser.parse_args()
    if importlib.util.find_spec("libtpu") is None:
        sys.exit("compiling for TPUs needs libtpu: pip install 'jina-jax[aot]'")
    rows = []
    for program in options.programs or PROGRAMS:
        for what, compiled in PROGRAMS[program]():
            rows.append({"program": program, "case": what, **held(compiled)})
            row = {name: f"{x / GIB:.3f} GiB" if name in MEMORY else x for name, x in rows[-1].items()}
            print("  ".join(f"{name}={x}" for name, x in row.items()), flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


def held(compiled: Any) -> dict[str, int]:
    """What a chip holds, in bytes: arguments, temporary buffers, results that take no argument's place, and all."""
    memory = compiled.memory_analysis()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }
    kernels = compiled.as_text().count("tpu_custom_call")
    return {"bytes": sum(parts.values()), **parts, "kernels": kernels}


def forward() -> Any:
    """One text of 8192 tokens on one chip."""
    import jax
    import jax.numpy as jnp

    from jina_jax import Config, Model
    from tests.benchmarks.schedule import compile_for

    model = Model(Config(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, pooler=False))
    variables, tokens, _ = shapes(model, 1)
    yield "no task", compile_for(lambda v, x: model.apply(v, x).embeddings, (variables, tokens), "v5e")[0]
    task = jax.ShapeDtypeStruct((1,), jnp.int32)
    run = lambda v, x, task: model.apply(v, x, task=task).embeddings  # noqa: E731
    yield "task per text", compile_for(run, (variables, tokens, task), "v5e")[0]


def train() -> Any:
    """A training step of 8 texts of 8192 tokens on eight chips."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from jina_jax import Config, Model
    from tests.benchmarks.schedule import dump_directory

    dump_directory()
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = Mesh(np.array(devices), ("fsdp",))
    model = Model(Config(dtype=jnp.bfloat16, pooler=False, remat="full"))
    optimizer = optax.adamw(1e-4)
    variables, tokens, mask = shapes(model, 8)
    state = (variables, jax.eval_shape(optimizer.init, variables))

    def spec(x: jax.ShapeDtypeStruct) -> PartitionSpec:
        """The longest axis that can be split, but never that of the layers, which are gathered one at a time."""
        axes = [axis for axis in range(x.ndim) if x.shape[axis] % 8 == 0 and x.shape[axis] != 24]
        best = max(axes, key=lambda axis: x.shape[axis], default=None)
        return PartitionSpec(*("fsdp" if axis == best else None for axis in range(x.ndim)))

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec(x)))

    def loss(variables: Any, tokens: Any, mask: Any, key: Any) -> Any:
        out = model.apply(variables, tokens, mask, "text-matching", train=True, rngs={"dropout": key})
        scores = 20.0 * out.embeddings @ out.embeddings.T
        pairs = jnp.arange(8) ^ 1  # texts 0 and 1 belong together, 2 and 3, and so on
        own = jnp.eye(8, dtype=bool)
        return optax.softmax_cross_entropy_with_integer_labels(jnp.where(own, -jnp.inf, scores), pairs).mean()

    def step(state: Any, tokens: Any, mask: Any, key: Any) -> Any:
        variables, moments = state
        value, gradients = jax.value_and_grad(loss)(variables, tokens, mask, key)
        updates, moments = optimizer.update(gradients, moments, variables)
        return (optax.apply_updates(variables, updates), moments), value

    state, tokens, mask = jax.tree.map(place, (state, tokens, mask))
    key = jax.eval_shape(jax.random.key, 0)
    placed = jax.tree.map(lambda x: x.sharding, state)
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(placed, None))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield "fsdp=8, 8 x 8192", compiled.trace(state, tokens, mask, key).lower(lowering_platforms=("tpu",)).compile()


def shapes(model: Any, rows: int) -> tuple[Any, Any, Any]:
    """Shapes of the variables, of token ids and of a mask."""
    import jax
    import jax.numpy as jnp

    tokens = jax.ShapeDtypeStruct((rows, TOKENS), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8), jnp.int32))
    return variables, tokens, jax.ShapeDtypeStruct(tokens.shape, jnp.bool_)


PROGRAMS: dict[str, Callable[[], Any]] = {"forward": forward, "train": train}

if __name__ == "__main__":
    main()
