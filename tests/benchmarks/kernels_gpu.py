"""Attention kernels on GPUs that are not here: what the compiler makes of them, ours beside others'.

    pip install 'jina-jax[aot-cuda]'
    python -m tests.benchmarks.kernels_gpu                 # bfloat16, 16 heads of 64, 8192 tokens in all; a few minutes
    python -m tests.benchmarks.kernels_gpu --gpus h100 --head-dims 32 64 128 --dtypes bfloat16 float32 --variants all
    python -m tests.benchmarks.kernels_gpu --json FILE

Everything is compiled to machine code by XLA for a GPU that is only described to it. "triton" is the kernel that comes
with JAX; "xla" is JAX's attention without one. Ours has segments and rotary embeddings, which the others get outside.

    registers   per thread, of 255
    spilled     bytes per thread that did not fit
    shared      memory of a program, KiB
    programs    that one multiprocessor holds at a time, times the warps of each
    issue       cycles in which instructions of the loop without a mask are issued, per 1024 pairs of query and key
    tensor      cycles of the tensor cores for the same at their peak (none for float32)
    masked      like issue, for the loop with a mask
    temp        temporary buffers, MiB

The larger of issue and tensor is a bound that no kernel reaches; they order sizes and kernels, no more.
"""

import argparse
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from tests.benchmarks import sass

TOKENS, WIDTH = 8192, 1024
LENGTHS, KERNELS = (512, 2048, 8192), ("xla", "triton", "ours")
# Name: segments, dropout rate, rotary.
VARIANTS = {"model": (True, 0.0, True), "dense": (False, 0.0, False), "dropout": (True, 0.1, True)}
INSTALL = "this needs the CUDA compiler, not a GPU: pip install 'jina-jax[aot-cuda]'"


def main(options: argparse.Namespace | None = None) -> list[dict]:
    """Measure what is asked for, print a table, return its rows; without the compiler, say what to install."""
    options = parse(None if options is None else vars(options))
    if options.one:
        for row in measure(options):
            print(json.dumps(row), flush=True)
        return []
    if sass.missing():
        print(INSTALL)
        return []
    rows = []
    print(heading())
    for gpu in options.gpus:
        for row in in_process(gpu, options):
            rows.append(row)
            print(line(row), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def parse(given: dict | None) -> argparse.Namespace:
    """The options; those that another program parsed win."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", choices=list(sass.GPUS), default=list(sass.GPUS))
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--head-dims", nargs="+", type=int, choices=(32, 64, 128), default=(64,))
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=("bfloat16",))
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS, "all"], default=("model",), help="of ours")
    parser.add_argument("--json", help="file to write all results to")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(None if given is None else [])
    for name in vars(options).keys() & (given or {}).keys():
        setattr(options, name, given[name])
    options.variants = tuple(VARIANTS) if "all" in options.variants else options.variants
    return options


def in_process(gpu: str, options: argparse.Namespace) -> Iterator[dict]:
    """Rows of one GPU, from a process whose compiler writes down what it does."""
    command = [sys.executable, "-m", "tests.benchmarks.kernels_gpu", "--one", "--gpus", gpu]
    for name in ("lengths", "head_dims", "dtypes", "variants"):
        command += [f"--{name.replace('_', '-')}", *map(str, getattr(options, name))]
    with tempfile.TemporaryDirectory() as folder:
        environment = sass.environment(folder) | {"DUMP": folder}
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as run:
            for text in run.stdout:
                yield json.loads(text)
            errors = run.stderr.read()
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{errors[-2000:]}")


def measure(options: argparse.Namespace) -> Iterator[dict]:
    """Compile and take apart every case; a refusal is a result too."""
    axes = (options.gpus, options.dtypes, options.head_dims, options.lengths, ("forward", "backward"), KERNELS)
    for gpu, dtype, head_dim, length, direction, kernel in itertools.product(*axes):
        for variant in options.variants if kernel == "ours" else ("dense",):
            row = {"gpu": gpu, "dtype": dtype, "head_dim": head_dim, "length": length, "pass": direction}
            row |= {"kernel": kernel, "variant": variant}
            make = (
                functools.partial(ours, variant, sass.GPUS[gpu])
                if kernel == "ours"
                else functools.partial(peer, kernel)
            )
            try:
                for fn, args, steps in make(dtype, head_dim, length, direction == "forward"):
                    row["temporaries"] = sass.compile_for(sass.GPUS[gpu], fn, args, Path(os.environ["DUMP"]))
                    found = sass.kernels(sass.GPUS[gpu], Path(os.environ["DUMP"]), set(steps))
                    yield from [row | judge(one, steps[one["name"]], sass.GPUS[gpu]) for one in found] or [row]
            except (ValueError, RuntimeError) as error:
                yield row | {"error": f"{type(error).__name__}: {error}".splitlines()[0][:160]}


class Step(NamedTuple):
    """What a turn of a kernel's loop does; loops that belong together, warps (None: all), if the next has a mask."""

    products: int  # of matrices
    pairs: int  # of query and key
    loops: int = 1
    warps: int | None = None
    masked: bool = False


Case = tuple[Callable, tuple, dict[str, Step]]  # a function to compile, its arguments, and its kernels


def ours(variant: str, target: sass.Gpu, dtype: str, head_dim: int, length: int, forward: bool) -> Iterator[Case]:
    """Our kernels; if there is one for Hopper alone, then what stands in for it too."""
    import jax
    import jax.numpy as jnp

    from jina_jax.kernels import gpu, hopper
    from jina_jax.kernels.common import Inputs

    (masked, rate, rotary), batch, heads = VARIANTS[variant], TOKENS // length, WIDTH // head_dim
    x = jax.ShapeDtypeStruct((batch, length, WIDTH), dtype)
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32) if masked else None
    tables = (jax.ShapeDtypeStruct((1, length, head_dim // 2), jnp.float32),) * 2 if rotary else None
    logsumexp = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
    arrays, steps = (x, x, x, ids, ids, tables, jax.ShapeDtypeStruct((6,), jnp.uint32)), {}

    def forward_pass(*arrays):
        return gpu.forward(Inputs(*arrays, heads, rate), x.dtype)

    def backward_pass(*arrays):
        return gpu.backward(Inputs(*arrays[:7], heads, rate), *arrays[7:], x.dtype)

    for name, products in (("forward", 2),) if forward else (("queries", 3), ("keys", 4)):
        size = gpu._size(name, x.dtype, head_dim, length, length)
        steps[f"{name}_kernel"] = Step(products, size.held * size.step, masked=masked)
    if not forward:
        yield backward_pass, (*arrays, x, logsumexp, x), steps
        return
    if target.capability == (9, 0) and dtype == "bfloat16" and head_dim > 32 and not rate:
        step = Step(2, hopper.GROUP * hopper.STEP, warps=4, masked=masked)
        with mock.patch.object(gpu, "HOPPER", ("H100",)):
            yield forward_pass, arrays, {"hopper_forward_mosaic_gpu_kernel": step}
    yield forward_pass, arrays, steps


def peer(name: str, dtype: str, head_dim: int, length: int, forward: bool) -> Iterator[Case]:
    """A kernel of JAX's, or JAX's attention without one."""
    import jax
    from jax.experimental.pallas.ops.gpu import attention as triton

    def run(q, k, v):
        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            if name == "xla":
                return jax.nn.dot_product_attention(q, k, v, implementation="xla")
            return triton.mha(q, k, v, None, sm_scale=head_dim**-0.5)

    steps = {}
    if name == "triton":  # one kernel has the loops of both gradients, with blocks of 32
        steps = {"mha_forward": Step(2, 128 * 128)} if forward else {"mha_backward": Step(7, 32 * 32, loops=2)}
    x = jax.ShapeDtypeStruct((TOKENS // length, length, WIDTH // head_dim, head_dim), dtype)
    if forward:
        yield run, (x, x, x), steps
        return
    pull = jax.eval_shape(lambda *operands: jax.vjp(run, *operands)[1], x, x, x)  # what is kept for backward
    yield lambda pull, gradient: pull(gradient), (pull, x), steps


def judge(row: dict, step: Step, gpu: sass.Gpu) -> dict:
    """How many programs fit, and the cycles of a loop per 1024 pairs of query and key."""
    registers = -(-row["registers"] // 8) * 8 * 32 * row["warps"]
    row["programs"] = min(65536 // registers, gpu.shared // (row["shared"] + 1024), 64 // row["warps"])
    warps = step.warps or row["warps"]
    issued = [sum(body.values()) * warps / 4 / (step.pairs / 1024) for body in row["loops"]]
    row["issue"] = sum(issued[: step.loops])
    row["masked"] = sum(issued[step.loops : 2 * step.loops]) if step.masked else None
    return row | {"products": step.products, "flops": gpu.flops}


def heading() -> str:
    """The table's first line."""
    return (
        f"{'GPU':5}{'type':9}{'H':>4}{'length':>7} {'pass':9}{'kernel':24}"
        "registers spilled shared programs  issue tensor masked    temp"
    )


def line(row: dict) -> str:
    """One row of the table."""
    start = f"{row['gpu']:5}{row['dtype']:9}{row['head_dim']:4}{row['length']:7} {row['pass']:9}"
    name = row.get("name", "").removesuffix("_kernel").removesuffix("_mosaic_gpu")
    start += f"{row['kernel'] if row['kernel'] != 'ours' else row['variant']} {name}".ljust(24)
    if "error" in row:
        return f"{start} {row['error']}"
    temporaries = f"{row['temporaries'] / 2**20:8.1f}"
    if "name" not in row:
        return f"{start}{'-':>9}{'-':>8}{'-':>7}{'-':>9}{'-':>7}{'-':>7}{'-':>7}{temporaries}"
    tensor = row["products"] * 2 * 1024 * row["head_dim"] / row["flops"] if row["dtype"] == "bfloat16" else None
    cycles = "".join("-".rjust(7) if x is None else f"{x:7.0f}" for x in (row["issue"], tensor, row["masked"]))
    programs = f"{row['programs']} x {row['warps']}"
    return f"{start}{row['registers']:9}{row['spilled']:8}{row['shared'] / 1024:7.0f}{programs:>9}{cycles}{temporaries}"


if __name__ == "__main__":
    main()
