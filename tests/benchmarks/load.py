"""Time and memory of loading a checkpoint of the real size, next to transformers.

    python -m tests.benchmarks.load [--directory DIR] [--rounds 3] [--json FILE]

Writes random bfloat16 checkpoints of 572M parameters (1.14 GB) in both public layouts to a temporary directory, then
loads them in fresh processes, ours and theirs in turn, with the files in the page cache. The backbone alone is what
`from_pretrained` reads of the -hf layout; ours always includes the five adapters, theirs is shown without and with.
Memory is the peak over the resident set before the call, divided by the bytes of the parameters in memory.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

OURS = ("original float32", "original bfloat16", "hf float32", "hf bfloat16")
THEIRS = ("transformers float32", "transformers bfloat16", "transformers+peft float32", "transformers+peft bfloat16")


def main() -> None:
    """Write the checkpoints, run every case in a process of its own, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="where the checkpoints are, or go (kept)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="only write the original layout to --directory")
    options = parser.parse_args()
    if options.write:
        write_checkpoints(options.directory, ("original",))
        return
    if options.case:
        print(json.dumps(run_case(options.case, options.directory)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.directory or Path(temporary)
        write_checkpoints(directory, ("original", "hf"))
        results: dict[str, list[dict]] = {}
        for turn in range(options.rounds):
            # Shuffled: what a process leaves behind (free memory, warm caches) helps or hinders the next one.
            for case in np.random.default_rng(turn).permutation(OURS + THEIRS).tolist():
                command = [sys.executable, "-m", "tests.benchmarks.load", "--case", case, "--directory", str(directory)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                results.setdefault(case, []).append(json.loads(output.splitlines()[-1]))
    table = {
        case: {
            "seconds": statistics.median(run["seconds"] for run in runs),
            "peak / parameters": max(run["peak"] / run["bytes"] for run in runs),
        }
        for case, runs in results.items()
    }
    print(f"{'':28}  seconds (median of {options.rounds})  against transformers  peak / parameters")
    for case in OURS + THEIRS:
        row = table[case]
        base = table[f"transformers {case.split()[1]}"]["seconds"]
        print(f"{case:28}  {row['seconds']:21.2f}  {row['seconds'] / base:20.2f}  {row['peak / parameters']:17.2f}")
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n")


def write_checkpoints(directory: Path, layouts: tuple[str, ...]) -> None:
    """Random checkpoints of the real size, unless they are there."""
    import jax

    from jina_jax import Config, Model, save
    from jina_jax.layouts import nest, parameter_shapes

    config = Config(param_dtype=ml_dtypes.bfloat16)
    rng = np.random.default_rng(0)
    with jax.default_device(jax.devices("cpu")[0]):
        for layout in layouts:
            if not (directory / layout).exists():
                leaves = {path: random_bfloat16(rng, shape) for path, shape in parameter_shapes(config).items()}
                save(directory / layout, Model(config), {"params": nest(leaves)}, layout=layout)


def random_bfloat16(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of either sign between 2**-9 and 2**-5, made from random bits, so quickly."""
    bits = rng.integers(0, 2**16, shape, np.uint16)
    return ((bits & 0x81FF) | 0x3B00).view(ml_dtypes.bfloat16)


def run_case(case: str, directory: Path) -> dict[str, float]:
    """Load once; seconds, peak bytes above the start, bytes of the parameters."""
    what, dtype = case.split()
    for file in (directory / ("hf" if what.startswith("transformers") else what)).rglob("*.safetensors"):
        with file.open("rb") as handle:  # into the page cache, should the system have dropped it
            while handle.read(1 << 24):
                pass
    if what.startswith("transformers"):
        import torch
        import transformers

        transformers.logging.disable_progress_bar()
        transformers.logging.set_verbosity_error()
        before, start = resident(), time.perf_counter()
        model = transformers.JinaEmbeddingsV3Model.from_pretrained(directory / "hf", dtype=getattr(torch, dtype))
        if what.endswith("peft"):
            for folder in sorted(file.parent for file in (directory / "hf").glob("*/adapter_config.json")):
                model.load_adapter(str(folder), adapter_name=folder.name)
        arrays = [parameter.detach().flatten().view(torch.uint8).numpy() for parameter in model.parameters()]
        touch(arrays)
        seconds = time.perf_counter() - start
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    else:
        import jax

        import jina_jax

        jax.devices()
        before, start = resident(), time.perf_counter()
        _, variables = jina_jax.load(directory / what, dtype=dtype)
        leaves = jax.tree.leaves(variables)
        touch([np.asarray(leaf).reshape(-1).view(np.uint8) for leaf in leaves])
        seconds = time.perf_counter() - start
        size = sum(leaf.nbytes for leaf in leaves)
    return {"seconds": seconds, "peak": peak() - before, "bytes": size}


def touch(arrays: list[np.ndarray]) -> None:
    """Read a byte of every page, so that a file that is only mapped counts as loaded once it is."""
    for array in arrays:
        array[::4096].sum()


def resident() -> int:
    """Bytes resident now."""
    return _status("VmRSS")


def peak() -> int:
    """Most bytes that were resident at once."""
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


if __name__ == "__main__":
    main()
