"""How fast matrix products of the model's sizes are here, by type: XLA's and, where it is installed, PyTorch's.

    python -m tests.benchmarks.products

Operations per second over those of XLA's float32, medians of interleaved rounds. "weights int8" turns the weights to
bfloat16 within the product.
"""

import functools
import importlib.util
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

TOKENS, ROUNDS = 1024, 25
SIZES = {"width 1024, mlp up": (1024, 4096), "width 384, mlp up": (384, 1536)}


def main() -> None:
    """Print a line for each size."""
    for name, (inner, outer) in SIZES.items():
        runs = ours(inner, outer) | (torchs(inner, outer) if importlib.util.find_spec("torch") else {})
        seconds: dict[str, list[float]] = {kind: [] for kind in runs}
        for _ in range(ROUNDS):
            for kind, run in runs.items():
                start = time.perf_counter()
                run()
                seconds[kind].append(time.perf_counter() - start)
        base = np.median(seconds["float32"])
        print(name, *(f"{kind} {base / np.median(found):.2f}" for kind, found in seconds.items()), sep=", ")


def ours(inner: int, outer: int) -> dict[str, Callable]:
    """Products by XLA."""
    x, w = jnp.ones((TOKENS, inner)), jnp.ones((inner, outer))

    def run(x: jax.Array, w: jax.Array, result: type) -> jax.Array:
        return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=result)

    cases = {
        "float32": (jnp.float32, jnp.float32, jnp.float32),
        "bfloat16": (jnp.bfloat16, jnp.bfloat16, jnp.float32),
        "bfloat16 to bfloat16": (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
        "int8": (jnp.int8, jnp.int8, jnp.int32),
        "weights int8": (jnp.bfloat16, jnp.int8, jnp.float32),
    }
    return {
        name: functools.partial(
            lambda call, *args: jax.block_until_ready(call(*args)),
            jax.jit(functools.partial(run, result=result)),
            x.astype(left),
            w.astype(right),
        )
        for name, (left, right, result) in cases.items()
    }


def torchs(inner: int, outer: int) -> dict[str, Callable]:
    """Products by PyTorch."""
    import torch

    cases = {}
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        x, w = torch.ones(TOKENS, inner, dtype=dtype), torch.ones(inner, outer, dtype=dtype)
        cases[f"torch {name}"] = functools.partial(torch.matmul, x, w)
    return cases


if __name__ == "__main__":
    main()
