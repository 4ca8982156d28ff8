"""The whole model of 570M parameters, compiled for TPUs ahead of time: what a chip holds, does, sends and needs.

    pip install 'jina-jax[aot]'
    python -m tests.benchmarks.aot                               # everything; half an hour
    python -m tests.benchmarks.aot --machines v5e-8 --programs embed pairs
    python -m tests.benchmarks.aot --markdown aot.md --json aot.json

Machines: v5e-8, v5e-256, v5p-8, v6e-8. Programs:

embed   rows of 512 tokens, 64 for each chip that rows are split over, with a task per row; bfloat16 weights
long    rows of 8192 tokens, one for each such chip, with a task per row; bfloat16 weights
pairs   a step of the paper's pair training (Table A1, short): 16,384 pairs of texts of 192 tokens, InfoNCE over all of
        them in both directions at seven Matryoshka sizes, AdamW. Gradients are cached: all texts are embedded, 64 for
        each chip at a time, then the loss is computed, and then they are embedded again with their share of its
        gradient; four programs, of which the first and the third run many times
adapt   a step of its adapter training (retrieval): 128 queries with 8 passages of 512 tokens each; the backbone frozen
full    a step on rows of 8192 tokens, one for each such chip; AdamW

Training has float32 weights and moments, bfloat16 activations, and computes each layer again in the backward pass.

For each chip: what it holds in memory (arguments, which stay between steps, and temporary); multiplications and
additions, two each; bytes that collective operations deliver; and time. Time is XLA's own estimate (`estimated_cycles`
of every operation in the compiled program, loops included) and, for the attention kernels, of which XLA knows nothing,
the cycles of their final schedule (`schedule.py`). It is a lower bound: waiting for the network is free. The share of
peak is what these operations would take at the peak of the chip, over that time.
"""

import argparse
import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

GIB, TERA = 2**30, 1e12
DIMENSIONS = (32, 64, 128, 256, 512, 768, 1024)


class Machine(NamedTuple):
    """Some TPUs.

    Attributes:
        topology: their name for libtpu.
        generation: a key of `schedule.GENERATIONS`.
        chips: their number.
        hertz: cycles a second.
        peak: operations on bfloat16 a second.
        memory: bytes of a chip.
    """

    topology: str
    generation: str
    chips: int
    hertz: float
    peak: float
    memory: int


MACHINES = {
    "v5e-8": Machine("v5e:2x4", "v5e", 8, 1.5e9, 197e12, 16 * GIB),
    "v5e-256": Machine("v5e:16x16", "v5e", 256, 1.5e9, 197e12, 16 * GIB),
    "v5p-8": Machine("v5p:2x2x2", "v5p", 8, 1.75e9, 459e12, 95 * GIB),
    "v6e-8": Machine("v6e:2x4", "v6e", 8, 1.75e9, 918e12, 32 * GIB),
}
# Sizes of the axes data, fsdp, tensor and sequence; data takes what is left.
EMBED = [(-1, 1, 1, 1), (-1, 8, 1, 1), (-1, 1, 4, 1)]
LONG = [(-1, 1, 1, 1), (-1, 1, 1, 8)]
TRAIN = [(-1, 8, 1, 1)]
CASES: dict[tuple[str, str], list[tuple[int, int, int, int]]] = {
    ("v5e-8", "embed"): EMBED,
    ("v5e-8", "long"): LONG,
    ("v5e-8", "pairs"): [(-1, 1, 1, 1), (-1, 8, 1, 1)],
    ("v5e-8", "adapt"): EMBED[:1],
    ("v5e-8", "full"): TRAIN,
    ("v5e-256", "embed"): EMBED[:2],
    ("v5e-256", "pairs"): TRAIN,
    ("v5p-8", "embed"): EMBED[:1],
    ("v5p-8", "pairs"): TRAIN,
    ("v6e-8", "embed"): EMBED[:1],
    ("v6e-8", "pairs"): TRAIN,
}
PROGRAMS = ("embed", "long", "pairs", "adapt", "full")


def main() -> None:
    """Compile what is asked for and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", nargs="*", choices=MACHINES, default=list(MACHINES))
    parser.add_argument("--programs", nargs="*", choices=PROGRAMS, default=PROGRAMS)
    parser.add_argument("--json", type=Path, help="file to write all results to")
    parser.add_argument("--markdown", type=Path, help="file to write the table to")
    parser.add_argument("--cycles", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cycles:
        generation, rows, tokens, heads, direction = options.cycles
        print(cycles(generation, int(rows), int(tokens), int(heads), direction))
        return
    if importlib.util.find_spec("libtpu") is None:
        sys.exit("compiling for TPUs needs libtpu: pip install 'jina-jax[aot]'")
    rows = []
    for (machine, program), layouts in CASES.items():
        for sizes in layouts if machine in options.machines and program in options.programs else ():
            rows.append(measure(machine, program, sizes))
            print(json.dumps(rows[-1]), flush=True)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1))
            if options.markdown:
                options.markdown.write_text(table(rows))
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """The results in Markdown."""
    lines = [
        "| chips | program | mesh | rows × tokens | held + temporary, GiB | TFLOP | collectives, GiB | ms | of peak |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        fits = "" if row["fits"] else " **does not fit**"
        lines.append(
            f"| {row['machine']} | {row['program']} | {row['mesh']} | {row['rows']} × {row['tokens']} "
            f"| {row['arguments'] / GIB:.2f} + {row['temporary'] / GIB:.2f}{fits} | {row['flops'] / TERA:.2f} "
            f"| {row['collectives'] / GIB:.2f} | {1000 * row['seconds']:.0f} | {100 * row['share']:.0f}% |"
        )
    return "\n".join(lines) + "\n"


class Part(NamedTuple):
    """A program of a step.

    Attributes:
        times: how often it runs in a step.
        fn: the jitted function.
        args: shapes of its arguments.
        rows: rows of its batch on each chip.
    """

    times: int
    fn: Any
    args: tuple
    rows: int


def measure(name: str, program: str, sizes: tuple[int, int, int, int]) -> dict[str, Any]:
    """Compile a program for a machine and read what there is to know."""
    import jax
    from jax.experimental import topologies

    import jina_jax
    from jina_jax import sharding
    from tests.benchmarks import hlo
    from tests.benchmarks.schedule import QUIET

    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")
    machine = MACHINES[name]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=machine.topology).devices
    mesh = jina_jax.make_mesh(*sizes, devices=devices)
    rows, tokens, parts = PREPARE[program](mesh)
    heads, local_tokens = 16 // mesh.shape["tensor"], tokens // sharding.parts(mesh)[1]
    seconds = flops = collectives = 0.0
    held, temporary, kernels = [], [], {}
    for number, part in enumerate(parts):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            traced = part.fn.trace(*part.args)
            compiled = traced.lower(lowering_platforms=("tpu",)).compile()
        text, memory = compiled.as_text(), compiled.memory_analysis()
        operations = hlo.operations(text)
        cycles, work = operations.cycles, hlo.flops(traced.jaxpr) / machine.chips
        for kernel, times in operations.kernels.items():
            backward = "backward" in kernel
            cycles += times * kernel_cycles(machine.generation, part.rows, local_tokens, heads, backward)
            work += times * (10 if backward else 4) * part.rows * local_tokens**2 * heads * 64
            kernels[f"{number} {kernel}"] = times
        seconds += part.times * cycles / machine.hertz
        flops += part.times * work
        collectives += part.times * hlo.collective_bytes(text)
        held.append(memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes)
        temporary.append(memory.temp_size_in_bytes)
    return {
        "machine": name,
        "program": program,
        "mesh": " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1),
        "rows": rows,
        "tokens": tokens,
        "arguments": max(held),
        "temporary": max(temporary),
        "fits": max(map(sum, zip(held, temporary, strict=True))) < machine.memory,
        "flops": flops,
        "collectives": collectives,
        "seconds": seconds,
        "share": flops / machine.peak / seconds,
        "kernels": kernels,
    }


@functools.cache
def kernel_cycles(generation: str, rows: int, tokens: int, heads: int, backward: bool) -> int:
    """Cycles of one run of the attention kernel on one chip.

    Asked of another process: writing schedules down, which libtpu decides on when it is loaded, makes it slow.
    """
    shape = [generation, str(rows), str(tokens), str(heads), "backward" if backward else "forward"]
    command = [sys.executable, "-m", "tests.benchmarks.aot", "--cycles", *shape]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def cycles(generation: str, rows: int, tokens: int, heads: int, direction: str) -> int:
    """What `kernel_cycles` asks for."""
    import jax
    import jax.numpy as jnp

    from jina_jax.kernels import attention
    from tests.benchmarks import schedule

    attend = functools.partial(attention, heads=heads, implementation="flash")

    def both(q: Any, k: Any, v: Any) -> Any:
        out, pull = jax.vjp(attend, q, k, v)
        return pull(out)

    x = jax.ShapeDtypeStruct((rows, tokens, heads * 64), jnp.bfloat16)
    backward = direction == "backward"
    kernels = schedule.measure(both if backward else attend, (x, x, x), generation)["kernels"]
    return sum(kernel["cycles"] for name, kernel in kernels.items() if ("backward" in name) == backward)


# ---- Programs --------------------------------------------------------------------------------------------------

CHUNK = 64  # texts of a chip that are encoded at once in `pairs`
Prepared = tuple[int, int, list[Part]]


def embed(mesh: Any, tokens: int = 512, rows: int = 64) -> Prepared:
    """A forward pass as the embedder does it."""
    import jax
    import jax.numpy as jnp

    from jina_jax import sharding

    model, variables = shapes(mesh, param_dtype=jnp.bfloat16)
    whole = rows * sharding.parts(mesh)[0]
    inputs = place(mesh, (whole, tokens), jnp.int32, "B T"), place(mesh, (whole,), jnp.int32, "B")
    run = jax.jit(lambda v, x, task: model.apply(v, x, task=task).embeddings)
    return whole, tokens, [Part(1, run, (variables, *inputs), rows)]


def pairs(mesh: Any, count: int = 16_384, tokens: int = 192) -> Prepared:
    """Pair training with cached gradients. All parts hold the whole state."""
    import jax
    import jax.numpy as jnp

    from jina_jax import pooling, sharding
    from jina_jax.sharding import constrain

    model, variables = shapes(mesh, remat="full")
    parts = sharding.parts(mesh)[0]
    chunks = 2 * count // parts // CHUNK
    update, state = training(mesh, variables)
    total = variables  # of the gradients
    texts = place(mesh, (parts * CHUNK, tokens), jnp.int32, "B T")
    key = jax.eval_shape(jax.random.key, 0)
    pooled = place(mesh, (2 * count, 1024), jnp.float32, "B _")
    share = place(mesh, (parts * CHUNK, 1024), jnp.float32, "B _")

    def encode(variables: Any, texts: Any, key: Any) -> Any:
        return model.apply(variables, texts, task="retrieval.query", train=True, rngs={"dropout": key}).pooled

    def forward(state: Any, total: Any, pooled: Any, texts: Any, key: Any) -> Any:
        return constrain(encode(state[0], texts, key), "B _")

    def loss(pooled: Any) -> Any:
        both = pooled.reshape(count, 2, -1)
        kept = jnp.arange(both.shape[2])[None] < jnp.array(DIMENSIONS)[:, None]

        def one(value: Any, kept: Any) -> Any:
            cut = pooling.normalize(jnp.where(kept[None, None], both, 0.0))
            queries, passages = constrain(cut[:, 0], "B _"), constrain(cut[:, 1], "_ _")
            scores = constrain(queries @ passages.T / 0.05, "B _")
            own = jnp.sum(queries * constrain(cut[:, 1], "B _"), axis=1) / 0.05
            lines, columns = (jax.nn.logsumexp(scores, axis=axis) for axis in (1, 0))
            return value + jnp.mean(lines + columns - 2 * own), None

        return jax.lax.scan(jax.checkpoint(one), 0.0, kept)[0]

    def gradient(state: Any, total: Any, pooled: Any) -> Any:
        value, shares = jax.value_and_grad(loss)(pooled)
        return value, constrain(shares, "B _")

    def backward(state: Any, total: Any, pooled: Any, texts: Any, key: Any, share: Any) -> Any:
        _, pull = jax.vjp(lambda variables: encode(variables, texts, key), state[0])
        return jax.tree.map(jnp.add, total, pull(share)[0])

    jit = functools.partial(jax.jit, keep_unused=True)
    placed = jax.tree.map(lambda x: x.sharding, total)
    held = (state, total, pooled)
    programs = [
        Part(chunks, jit(forward), (*held, texts, key), CHUNK),
        Part(1, jit(gradient), held, 0),
        Part(chunks, jit(backward, donate_argnums=1, out_shardings=placed), (*held, texts, key, share), CHUNK),
        Part(1, update, (state, total), 0),
    ]
    return 2 * count, tokens, programs


def full(mesh: Any, tokens: int = 8192) -> Prepared:
    """A step on long rows, all of whose parameters train."""
    import jax.numpy as jnp

    from jina_jax import sharding

    model, variables = shapes(mesh, remat="full")
    rows = sharding.parts(mesh)[0]

    def loss(variables: Any, tokens: Any, key: Any) -> Any:
        out = model.apply(variables, tokens, task="text-matching", train=True, rngs={"dropout": key})
        return contrast(out.embeddings)

    return rows, tokens, [step(mesh, loss, variables, place(mesh, (rows, tokens), jnp.int32, "B T"), 1)]


def adapt(mesh: Any, queries: int = 128, negatives: int = 7, tokens: int = 512) -> Prepared:
    """Adapter training: the backbone is an argument that has no gradient."""
    import jax
    import jax.numpy as jnp
    from flax.traverse_util import flatten_dict, unflatten_dict

    from jina_jax import sharding

    model, variables = shapes(mesh, remat="full", param_dtype=jnp.bfloat16)
    flat = flatten_dict(variables)
    trained = {path: x.update(dtype=jnp.float32) for path, x in flat.items() if path[-1].startswith("lora")}
    frozen = {path: x for path, x in flat.items() if path not in trained}
    rows = queries * (2 + negatives)

    def loss(trained: Any, rest: Any, key: Any) -> Any:
        frozen, tokens = rest
        rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), trained)
        variables = unflatten_dict(frozen | rounded)
        task = (jnp.arange(rows) % (2 + negatives) > 0).astype(jnp.int32)  # a query, then its passages
        out = model.apply(variables, tokens, task=task, train=True, rngs={"dropout": key})
        return contrast(out.embeddings)

    inputs = frozen, place(mesh, (rows, tokens), jnp.int32, "B T")
    return rows, tokens, [step(mesh, loss, trained, inputs, rows // sharding.parts(mesh)[0])]


def contrast(embeddings: Any) -> Any:
    """InfoNCE of neighbours: rows 0 and 1 belong together, 2 and 3, and so on."""
    import jax.numpy as jnp
    import optax

    count = embeddings.shape[0]
    scores = jnp.where(jnp.eye(count, dtype=bool), -jnp.inf, 20.0 * embeddings @ embeddings.T)
    return optax.softmax_cross_entropy_with_integer_labels(scores, jnp.arange(count) ^ 1).mean()


def step(mesh: Any, loss: Callable, parameters: Any, inputs: Any, rows: int) -> Part:
    """A step in one program."""
    import jax

    update, state = training(mesh, parameters)

    def run(state: Any, inputs: Any, key: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(state[0], inputs, key)
        return update(state, gradients), value

    placed = jax.tree.map(lambda x: x.sharding, state)
    fn = jax.jit(run, donate_argnums=0, out_shardings=(placed, None))
    return Part(1, fn, (state, inputs, jax.eval_shape(jax.random.key, 0)), rows)


def training(mesh: Any, parameters: Any) -> tuple[Any, Any]:
    """The update of AdamW, whose state stays where it is, and that state."""
    import jax
    import optax
    from jax.sharding import NamedSharding, PartitionSpec

    optimizer = optax.adamw(1e-4)

    def update(state: Any, gradients: Any) -> Any:
        parameters, moments = state
        updates, moments = optimizer.update(gradients, moments, parameters)
        return optax.apply_updates(parameters, updates), moments

    whole = NamedSharding(mesh, PartitionSpec())
    moments = optax.tree_utils.tree_map_params(
        optimizer,
        lambda x, like: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=like.sharding),
        jax.eval_shape(optimizer.init, parameters),
        parameters,
        transform_non_params=lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
    )
    state = (parameters, moments)
    placed = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(update, donate_argnums=0, out_shardings=placed), state


def shapes(mesh: Any, **changes: Any) -> tuple[Any, Any]:
    """The model, and the shapes and places of its variables."""
    import jax
    import jax.numpy as jnp

    import jina_jax
    from jina_jax import sharding

    config = jina_jax.Config(dtype=jnp.bfloat16, pooler=False, **changes)
    model = jina_jax.Model(sharding.padded(config, mesh))
    variables = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8), jnp.int32))
    targets = jina_jax.shardings(model, mesh)
    return model, jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), variables, targets)


def place(mesh: Any, shape: tuple[int, ...], dtype: Any, axes: str) -> Any:
    """The shape of an input, split as `sharding.RULES` say."""
    import jax

    from jina_jax.sharding import placed

    return jax.ShapeDtypeStruct(shape, dtype, sharding=placed(mesh, axes))


PREPARE: dict[str, Callable[[Any], Prepared]] = {
    "embed": embed,
    "long": functools.partial(embed, tokens=8192, rows=1),
    "pairs": pairs,
    "adapt": adapt,
    "full": full,
}

if __name__ == "__main__":
    main()
