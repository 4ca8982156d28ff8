"""Attention's implementations on this device: memory at 8192 tokens, and time by length.

    python -m tests.benchmarks.attention memory     # 2 layers of the real width, 8192 tokens: peak of a forward pass
    python -m tests.benchmarks.attention gradient   # the same for a training step, as the compiler plans it
    python -m tests.benchmarks.attention time       # forward by length, 16 heads of 64, 8192 tokens in all
    python -m tests.benchmarks.attention blocks     # the plans of blockwise by length of text, rows of 1024 tokens

Memory is the peak of a process of its own over what it held before the call (so without the weights), beside the
compiler's own count of temporary buffers. `time` interleaves the implementations and prints medians as ratios.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jina_jax import Config, Model
from jina_jax.kernels import IMPLEMENTATIONS, attention, blockwise
from jina_jax.kernels.common import Inputs
from tests.benchmarks.load import peak, resident

LENGTH = 8192


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "gradient", "time", "blocks"))
    parser.add_argument("--implementation", choices=sorted(IMPLEMENTATIONS), help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.what == "time":
        by_length(options.rounds)
    elif options.what == "blocks":
        plans(options.rounds)
    elif options.what == "gradient":
        planned = {name: plan_gradient(name) for name in ("reference", "blockwise")}
        print_memory({name: {"temporaries": size} for name, size in planned.items()})
    elif options.implementation:
        print(json.dumps(run_memory(options.implementation)))
    else:
        results = {}
        for name in ("reference", "blockwise"):
            command = [sys.executable, "-m", "tests.benchmarks.attention", "memory", "--implementation", name]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[name] = json.loads(output.splitlines()[-1])
        first, second = (np.array(results[name].pop("sample")) for name in results)
        print_memory(results)
        print(f"largest difference between the two embeddings: {np.abs(first - second).max():.2g}")


def plans(rounds: int) -> None:
    """Time of each plan over that of 128 x 128, for texts of one length packed into a row of 1024; and the choice."""
    names = {"64": blockwise.SMALL, "128": blockwise.MEDIUM, "by head": blockwise.LARGE}
    print("| heads | texts of | " + " | ".join(names) + " | chosen |\n|" + "---|" * (3 + len(names)))
    rng = np.random.default_rng(0)
    for heads, width in ((12, 32), (16, 64)):
        for length in (16, 32, 64, 128, 256, 512, 1024):
            segments = np.repeat(np.arange(1, 1 + 1024 // length), length).astype(np.int32)[None]
            q, k, v = rng.normal(size=(3, 1, 1024, heads * width)).astype(np.float32)
            inputs = Inputs(q, k, v, segments, segments, None, np.zeros(6, np.uint32), heads, 0.0)
            runs = {name: functools.partial(blockwise._forward, plan=plan) for name, plan in names.items()}
            runs["chosen"] = blockwise.forward
            compiled = {name: timed(run, inputs) for name, run in runs.items()}
            times: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(rounds):
                for name, run in compiled.items():
                    start = time.perf_counter()
                    run()
                    times[name].append(time.perf_counter() - start)
            medians = {name: statistics.median(found) for name, found in times.items()}
            ratios = " | ".join(f"{found / medians['128']:.2f}" for found in medians.values())
            print(f"| {heads} x {width} | {length} | {ratios} |", flush=True)


def timed(run: Callable, inputs: Inputs) -> Callable[[], None]:
    """Eight calls one after the other, compiled."""

    def calls(q, k, v, segments, words):
        given = dataclasses.replace(inputs, q=q, k=k, v=v, q_segments=segments, k_segments=segments, words=words)
        step = lambda q, _: (run(dataclasses.replace(given, q=q), jnp.float32)[0], None)  # noqa: E731
        return jax.lax.scan(step, q, None, length=8)[0]

    arguments = (inputs.q, inputs.k, inputs.v, inputs.q_segments, inputs.words)
    program = jax.jit(calls).lower(*arguments).compile()
    program(*arguments)
    return lambda: jax.block_until_ready(program(*arguments))


def model_and_inputs(name: str) -> tuple[Model, dict, np.ndarray]:
    """Two layers of the real width with random weights, and one text of 8192 tokens."""
    model = Model(Config(num_hidden_layers=2, vocab_size=1000, attention=name, remat="full"))
    tokens = np.random.default_rng(0).integers(3, 1000, (1, LENGTH)).astype(np.int32)
    return model, jax.jit(model.init)(jax.random.key(0), tokens[:, :8]), tokens


def run_memory(name: str) -> dict:
    """Peak of one forward pass over what was there before, and a sample of its result."""
    model, variables, tokens = model_and_inputs(name)
    jax.block_until_ready(variables)
    run = jax.jit(lambda v, t: model.apply(v, t).embeddings).lower(variables, tokens).compile()
    before = resident()
    embeddings = np.asarray(run(variables, tokens))
    assert np.isfinite(embeddings).all()
    temporaries = run.memory_analysis().temp_size_in_bytes
    return {"peak": peak() - before, "temporaries": temporaries, "sample": embeddings[0, :64].tolist()}


def plan_gradient(name: str) -> int:
    """Bytes of temporary buffers that the compiler plans for a gradient."""
    model, variables, tokens = model_and_inputs(name)
    loss = jax.grad(lambda v, t: model.apply(v, t).embeddings.sum())
    return jax.jit(loss).lower(variables, tokens).compile().memory_analysis().temp_size_in_bytes


def print_memory(results: dict[str, dict]) -> None:
    """Bytes of both implementations and their ratio."""
    for key in next(iter(results.values())):
        first, second = results["reference"][key], results["blockwise"][key]
        print(
            f"{key:12} reference {first / 2**20:8.0f} MiB   blockwise {second / 2**20:8.0f} MiB   "
            f"ratio 1/{first / second:.1f}"
        )


def by_length(rounds: int) -> None:
    """Time of blockwise over that of reference, by length, at a constant number of tokens."""
    for dtype in (jnp.float32, jnp.bfloat16):
        for length in (64, 128, 256, 512, 1024, 2048):
            rng = np.random.default_rng(0)
            shape = (max(1, 2048 // length), length, 16, 64)
            q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(3))
            segments = jnp.ones(shape[:2], jnp.int32)
            runs = {
                name: jax.jit(lambda q, k, v, s, name=name: attention(q, k, v, segments=s, implementation=name))
                for name in ("reference", "blockwise")
            }
            seconds: dict[str, list[float]] = {name: [] for name in runs}
            for turn in range(rounds + 1):
                for name, run in runs.items():
                    start = time.perf_counter()
                    run(q, k, v, segments).block_until_ready()
                    if turn:
                        seconds[name].append(time.perf_counter() - start)
            ratios = [b / a for a, b in zip(seconds["reference"], seconds["blockwise"], strict=True)]
            print(f"{jnp.dtype(dtype).name:8} T={length:5}  blockwise / reference = {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
