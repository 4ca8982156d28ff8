"""Rank tile sizes of the TPU kernels by the cycles of their static schedules, without a TPU.

    pip install 'jina-jax[aot]'
    python -m tests.benchmarks.search --generation v5e --pass forward              # prints the candidates, best first
    python -m tests.benchmarks.search --generation v6e --pass backward --write     # and puts the best in blocks.json

8192 tokens, 16 heads of 64, bfloat16, no mask. A candidate that does not fit in the chip's memory is left out.
"""

import argparse
import itertools
import json
from pathlib import Path

import jax

from jina_jax.kernels import tiles
from tests.benchmarks.kernels import TOKENS, ours
from tests.benchmarks.schedule import measure

KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}
BLOCKS = Path(tiles.__file__).with_name("blocks.json")


def main() -> None:
    """Measure all candidates and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generation", choices=KINDS, required=True)
    parser.add_argument("--pass", dest="name", choices=("forward", "backward"), default="forward")
    parser.add_argument("--tiles", nargs="+", type=int, default=[512])
    parser.add_argument("--chunks", nargs="+", type=int, default=[128, 256])
    parser.add_argument("--parts", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--turns", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--write", action="store_true", help="put the best into blocks.json")
    options = parser.parse_args()

    blocks = json.loads(BLOCKS.read_text())
    now = tiles.Sizes(**blocks.get(KINDS[options.generation], blocks["default"])[options.name])
    found = []
    for query, key, chunk, part, turn in itertools.product(
        options.tiles, options.tiles, options.chunks, options.parts, options.turns
    ):
        sizes = now._replace(query=query, key=key, chunk=chunk, part=part, turn=turn)
        try:
            result = cycles(options.generation, options.name, sizes)
        except jax.errors.JaxRuntimeError as error:
            print(f"{sizes}: {str(error).splitlines()[0][:100]}", flush=True)
            continue
        found.append((*result, sizes))
        print(f"{result[0] / 1e6:8.3f} Mcycles, {result[1]:5d} spill slots: {sizes}", flush=True)
    found.sort()
    print("best first:")
    for count, spills, sizes in found:
        print(f"{count / 1e6:8.3f} Mcycles, {spills:5d} spill slots: {sizes}")
    if options.write and found:
        blocks.setdefault(KINDS[options.generation], dict(blocks["default"]))[options.name] = found[0][2]._asdict()
        BLOCKS.write_text(json.dumps(blocks, indent=1) + "\n")


def cycles(generation: str, name: str, sizes: tiles.Sizes) -> tuple[int, int]:
    """Cycles of one launch, and spill slots in its hot blocks."""
    result = measure(*ours(1, TOKENS, name, None, sizes), generation)
    return int(result["cycles"]), sum(kernel["spills"] for kernel in result["kernels"].values())


if __name__ == "__main__":
    main()
