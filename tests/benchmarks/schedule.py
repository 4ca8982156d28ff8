"""A TPU kernel's cycles without a TPU: compile it ahead of time, read the final schedule, run its control flow.

    pip install 'jina-jax[aot]'
    python -m tests.benchmarks.schedule package.module:function --generation v5e

`function()` returns `(fn, args)` or `(fn, args, options)`, options being keywords of `measure`.

libtpu is a compiler that needs no TPU, and it can write down the bundles (instruction words, one a cycle) of every
kernel. The scalar unit's share of them decides which bundles run how often: grid counters, loop bounds, skipped blocks.
So we interpret these few scalar instructions and count. The estimate is the number of bundles executed: exact for the
core itself, a lower bound in all because waits for memory, semaphores and instructions are free here. Where
a device has two cores (v5p) the one with more to do is counted.
"""

import argparse
import atexit
import importlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.benchmarks.bundles import Program, parse
from tests.benchmarks.hlo import operations, scalar_operands
from tests.benchmarks.scalar_unit import Run, run


class Generation(NamedTuple):
    """A kind of TPU.

    Attributes:
        topology: name of a small machine of this kind.
        delay: bundles after a branch that run whether it is taken or not.
        granule: words in the unit of transfers.
    """

    topology: str
    delay: int = 4
    granule: int = 8


GENERATIONS = {
    "v4": Generation("v4:2x2x1", delay=1, granule=128),
    "v5e": Generation("v5e:2x2"),
    "v5p": Generation("v5p:2x2x1"),
    "v6e": Generation("v6e:2x2"),
    "tpu7x": Generation("tpu7x:2x2x1", delay=6),
}
# No questions to a host that is not there, no log files, no lock against other processes.
QUIET = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_LOG_DIR": "disabled",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
_dumps: list[Path] = []


def dump_directory() -> Path:
    """The folder of this process's dumps. libtpu reads the name when it is loaded, so this must come before."""
    if not _dumps:
        folder = Path(tempfile.mkdtemp(prefix="schedule-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        flags = (
            f"--xla_jf_dump_to={folder}",
            "--xla_jf_dump_llo_text=true",
            "--xla_jf_dump_llo_pass_label_regex=packed-bundles-post-ra|pre-delay.*utilization",
        )
        os.environ["LIBTPU_INIT_ARGS"] = " ".join((os.environ.get("LIBTPU_INIT_ARGS", ""), *flags)).strip()
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        jax.config.update("jax_platforms", "cpu")  # a compiler is all that libtpu is here
        _dumps.append(folder)
    return _dumps[0]


def compile_for(fn: Callable, args: Sequence, generation: str) -> tuple[jax.stages.Compiled, jax.stages.Traced]:
    """Compile for one device of a TPU generation.

    Args:
        fn: a function of arrays.
        args: its arguments: arrays or `jax.ShapeDtypeStruct`s, in any tree.
        generation: a key of GENERATIONS.

    Returns:
        The executable, which cannot run here, and the trace that it was made from.
    """
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise ImportError("ahead-of-time compilation for TPU needs libtpu: pip install 'jina-jax[aot]'") from None
    dump_directory()
    devices = topologies.get_topology_desc(platform="tpu", topology_name=GENERATIONS[generation].topology).devices
    mesh = Mesh(np.array(devices[:1]), ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tuple(args))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # kernels ask it for the generation
        traced = jax.jit(fn).trace(*args)
        return traced.lower(lowering_platforms=("tpu",)).compile(), traced


def measure(fn: Callable, args: Sequence, generation: str, hints: dict[str, Sequence[float]] | None = None) -> dict:
    """Compile, then count the cycles of every Pallas kernel in it.

    Args:
        fn: a function of arrays.
        args: its arguments: shapes, and arrays where contents decide about loop bounds or skipped blocks (segments,
            lengths): whatever a kernel is given in scalar memory is computed from them.
        generation: a key of GENERATIONS.
        hints: for kernels whose name contains the key, what to do at branches that the scalars do not decide, in the
            order in which they are met: trips of a loop, or the share of the time that a conditional block runs.

    Returns:
        cycles: of all Pallas kernels together; kernels: a report for each; temporaries: bytes; xla_cycles: the
        compiler's own estimate for every other operation; xla_unknown: number of operations that it has none for.
    """
    kind, folder = GENERATIONS[generation], dump_directory()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    compiled, traced = compile_for(fn, args, generation)
    program, scalars = operations(compiled.as_text()), scalar_operands(traced.jaxpr, jax.tree.leaves(tuple(args)))
    kernels = {}
    for name, times in program.kernels.items():
        own = [i for i, (key, _) in enumerate(scalars) if name.startswith(key)][:times]
        contents = [scalars[i][1] for i in own] + [{}] * (times - len(own))
        scalars = [x for i, x in enumerate(scalars) if i not in own]
        shares = next((v for k, v in (hints or {}).items() if k in name), ())
        bundles = read(folder, name, kind.delay)
        kernels[name] = report(bundles, run_all(bundles, contents, shares, kind.granule))
    return {
        "cycles": sum(kernel["cycles"] for kernel in kernels.values()),
        "kernels": kernels,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "xla_cycles": program.cycles,
        "xla_unknown": program.unknown,
    }


def read(folder: Path, name: str, delay: int) -> Program:
    """Parse the dump of one kernel, or say what is missing."""
    texts = []
    for part in ("packed-bundles-post-ra", "pre-delay_hlo-static-per-bundle-utilization"):
        pattern = re.compile(rf"\d+-{re.escape(name)}-\d+-{part}\.txt")
        files = [path for path in folder.iterdir() if pattern.fullmatch(path.name)]
        if len(files) != 1:
            raise FileNotFoundError(f"{len(files)} dumps {part} of kernel {name}: is this a libtpu that writes them?")
        texts.append(files[0].read_text())
    return parse(*texts, delay)


def run_all(program: Program, contents: Sequence[dict], hints: Sequence[float], granule: int) -> Run:
    """All runs of a kernel together, each with its scalars, and each on the core that has most to do."""
    counts, assumed, done = [0] * len(program.blocks), [], {}
    for scalars in contents:
        key = tuple((i, x.shape, x.tobytes()) for i, x in sorted(scalars.items()))
        if key not in done:
            runs = [run(program, scalars, hints, granule, core) for core in range(program.cores)]
            done[key] = max(runs, key=lambda one: program.cycles(one.counts))
        counts = [a + b for a, b in zip(counts, done[key].counts, strict=True)]
        assumed += [line for line in done[key].assumed if line not in assumed]
    return Run(counts, assumed)


def report(program: Program, result: Run) -> dict:
    """What one kernel does: cycles, MXU share, spills of its hot blocks, loops, and what was assumed."""
    blocks, counts = program.blocks, result.counts
    cycles = program.cycles(counts)
    slots = {
        unit: sum(block.slots[i] * count for block, count in zip(blocks, counts, strict=True))
        for i, unit in enumerate(program.units)
    }
    mxu, hot = program.units.index("MXU"), []
    if slots["MXU"]:
        hot = [b for b, n in zip(blocks, counts, strict=True) if b.slots[mxu] * n >= 0.1 * slots["MXU"]]
    spills = [i for i, unit in enumerate(program.units) if unit.endswith(("FILL", "SPILL"))]
    return {
        "cycles": cycles,
        "mxu": slots["MXU"] / (cycles * program.capacity[mxu]) if cycles else 0.0,
        "busy": {u: slots[u] / (cycles * c) for u, c in zip(program.units, program.capacity, strict=True) if cycles},
        "spills": sum(block.slots[i] for block in hot for i in spills),
        "hot": [(block.start, block.length) for block in hot],
        "bundles": sum(block.length for block in blocks),
        "loops": [(start, end, depth, counts[program.at[start]]) for start, end, depth in program.loops()],
        "assumed": result.assumed,
    }


def show(result: dict) -> None:
    """Print a report of `measure`."""
    for name, kernel in result["kernels"].items():
        busy = "  ".join(f"{unit} {100 * share:.0f}%" for unit, share in kernel["busy"].items() if share >= 0.005)
        print(
            f"{name}: {kernel['cycles'] / 1e6:.3f} Mcycles, {kernel['bundles']} bundles, {kernel['spills']} spill slots"
        )
        print(f"    busy: {busy}")
        print("    hot blocks: " + ", ".join(f"{start:#x} ({length} bundles)" for start, length in kernel["hot"]))
        for start, end, depth, count in kernel["loops"]:
            print(f"    {'  ' * depth}loop {start:#x}..{end:#x}: {end - start} bundles, body runs {count} times")
        for line in kernel["assumed"]:
            print(f"    assumed: {line}")
    print(
        f"temporaries {result['temporaries'] / 2**20:.1f} MiB, XLA around it {result['xla_cycles'] / 1e6:.3f} Mcycles"
        f" ({result['xla_unknown']} operations unknown)"
    )


def main() -> None:
    """Measure one function."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("function", help="module:function")
    parser.add_argument("--generation", choices=sorted(GENERATIONS), default="v5e")
    options = parser.parse_args()
    module, function = options.function.split(":")
    fn, args, *rest = getattr(importlib.import_module(module), function)()
    try:
        result = measure(fn, args, options.generation, **(rest[0] if rest else {}))
    except (ImportError, FileNotFoundError) as error:
        sys.exit(str(error))
    show(result)


if __name__ == "__main__":
    main()
