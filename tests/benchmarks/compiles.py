"""Whether the TPU kernels compile, for every generation, length and type, without a TPU.

    pip install 'jina-jax[aot]'
    python -m tests.benchmarks.compiles                    # an hour
    python -m tests.benchmarks.compiles --generations v5e --lengths 8192 --types bfloat16

One row of 16 heads of 64 with segments and rotation, forward and backward: the gradients of `attention`.
"""

import argparse
import importlib.util
import itertools
import json
import sys
import time
from collections.abc import Sequence

GENERATIONS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
LENGTHS = (128, 512, 2048, 8192, 32768)
TYPES = ("bfloat16", "float32")
HEADS, WIDTH = 16, 64


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile what is asked for, print a line for each and say how many did not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", nargs="+", choices=GENERATIONS, default=GENERATIONS)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--types", nargs="+", choices=TYPES, default=TYPES)
    parser.add_argument("--dense", action="store_true", help="no segments")
    parser.add_argument("--json", help="file to write all results to")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("libtpu") is None:
        sys.exit("compiling for TPUs needs libtpu: pip install 'jina-jax[aot]'")
    rows = []
    for case in itertools.product(options.generations, options.lengths, options.types):
        rows.append(compiled(*case, masked=not options.dense))
        print("  ".join(f"{value}" for value in rows[-1].values()), flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)
    return sum("error" in row for row in rows)


def compiled(generation: str, length: int, dtype: str, masked: bool = True) -> dict:
    """Compile one case; a refusal is a result too.

    Args:
        generation: One of GENERATIONS.
        length: Tokens T.
        dtype: Type of queries, keys and values.
        masked: Whether there are segments.

    Returns:
        The case, the number of kernels, temporary memory in MiB and seconds; or the error.
    """
    import jax
    import jax.numpy as jnp

    from jina_jax.kernels.attention import attention
    from tests.benchmarks.schedule import compile_for

    def loss(vectors, segments, rope):
        out = attention(*vectors, heads=HEADS, segments=segments, rope=rope, implementation="flash")
        return out.astype(jnp.float32).sum()

    vectors = (jax.ShapeDtypeStruct((1, length, HEADS * WIDTH), dtype),) * 3
    segments = jax.ShapeDtypeStruct((1, length), jnp.int32) if masked else None
    rope = (jax.ShapeDtypeStruct((1, length, WIDTH // 2), jnp.float32),) * 2
    row: dict = {"generation": generation, "length": length, "type": dtype}
    start = time.monotonic()
    try:
        program, _ = compile_for(jax.value_and_grad(loss), (vectors, segments, rope), generation)
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error}".replace("\n", " ")[:300]}
    return row | {
        "kernels": program.as_text().count("tpu_custom_call"),
        "temporaries": round(program.memory_analysis().temp_size_in_bytes / 2**20, 1),
        "seconds": round(time.monotonic() - start),
    }


if __name__ == "__main__":
    sys.exit(main())
