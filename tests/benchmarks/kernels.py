"""Attention kernels on accelerators that are not here: what the compilers say, ours beside others'.

    pip install 'jina-jax[aot]'
    python -m tests.benchmarks.kernels                     # TPU: cycles, see schedule.py; an hour or two
    python -m tests.benchmarks.kernels --generations v5e --lengths 8192 --passes forward --masks dense
    python -m tests.benchmarks.kernels --gpu               # GPU: registers, spills, shared memory

8192 tokens in all, 16 heads of 64, bfloat16. Masks: padded (the first 3/4 of each row are text), packed (texts of 512).
Every kernel is judged by the same method. The others get operands in the layout that they want, [B, N, T, H], and the
best of several block sizes (chosen without a mask). They skip nothing, so what a mask holds makes no difference.

    cycles     of the kernels, in millions
    MXU        share of its slots that are busy
    spills     slots that save or restore registers in the blocks that do most of the work
    temp       temporary buffers, MiB
    around     XLA's own estimate of what it does before, between and after the kernels, millions of cycles
    flat       cycles and `around` together if operands and results are [B, T, N*H], as in a model, with the best blocks
               for that (all else is of those with the fewest cycles)
    ratio      cycles over those of ours, and then flat over that of ours
"""

import argparse
import functools
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence

TOKENS, HEADS, WIDTH, TEXT = 8192, 16, 64, 512
LENGTHS, PASSES, MASKS = (512, 2048, 8192), ("forward", "backward"), ("dense", "padded", "packed")


def main() -> None:
    """Measure what is asked for and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", nargs="+", default=["v5e", "v5p", "v6e"])
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=MASKS)
    parser.add_argument("--kernels", nargs="+", choices=list(KERNELS), default=list(KERNELS))
    parser.add_argument("--json", help="file to write all results to")
    parser.add_argument("--gpu", action="store_true", help="the GPU kernels instead")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.gpu:
        from tests.benchmarks import kernels_gpu

        kernels_gpu.main(options)
        return
    if importlib.util.find_spec("libtpu") is None:
        sys.exit("compiling for TPUs needs libtpu: pip install 'jina-jax[aot]'")
    cases = itertools.product(options.generations, options.lengths, options.passes, options.kernels)
    if options.one:
        print(json.dumps([row for case in cases for row in measure_case(*case, options.masks)]))
        return
    rows: list[dict] = []
    print(heading())
    for (generation, length, direction), group in itertools.groupby(cases, key=lambda case: case[:3]):
        found = [row for case in group for row in in_process(*case, options.masks)]
        ours = {row["mask"]: row for row in found if row["kernel"] == "ours" and "cycles" in row}
        for row in sorted(found, key=lambda row: options.masks.index(row["mask"])):
            row |= {"generation": generation, "length": length, "pass": direction}
            if "cycles" in row and row["mask"] in ours:
                own = ours[row["mask"]]
                row["ratio"] = row["cycles"] / own["cycles"]
                row["flat ratio"] = row["flat"] / own["flat"] if row["flat"] and own["flat"] else None
            print(line(row), flush=True)
        rows += found
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


def in_process(generation: str, length: int, direction: str, kernel: str, masks: Sequence[str]) -> list[dict]:
    """`measure_case` in a process of its own, so that a compiler that gives up takes nothing else with it."""
    command = [sys.executable, "-m", "tests.benchmarks.kernels", "--one", "--kernels", kernel, "--masks", *masks]
    command += ["--generations", generation, "--lengths", str(length), "--passes", direction]
    with tempfile.TemporaryDirectory() as folder:  # for the dumps, whatever becomes of the process
        environment = os.environ | {"TMPDIR": folder}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    error = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
    return [{"kernel": kernel, "mask": mask, "error": error} for mask in masks]


def measure_case(generation: str, length: int, direction: str, kernel: str, masks: Sequence[str]) -> list[dict]:
    """One kernel at one length: its blocks tuned without a mask, then a row for each mask."""
    configurations = KERNELS[kernel][1](length, direction)
    tried = [attempt(kernel, generation, length, direction, "dense", one) for one in configurations]
    tried.sort(key=lambda row: row.get("cycles", float("inf")))
    in_all = sorted(tried, key=lambda row: row["cycles"] + row["around"] if "cycles" in row else float("inf"))
    rows: list[dict] = []
    for mask in masks:
        if mask == "packed" and length == TEXT:
            continue
        found = tried
        if mask != "dense":
            found = [row | {"mask": mask} for row in rows if row["mask"] != "dense" and kernel != "ours"]
        if not found:  # the best of the blocks that still fit beside a mask
            again = (attempt(kernel, generation, length, direction, mask, row["blocks"]) for row in tried)
            refused = {"kernel": kernel, "mask": mask, "error": "no blocks fit"}
            found = [next((row for row in again if "cycles" in row), refused)]
        row = found[0]
        if "cycles" in row and "flat" not in row:
            again = (attempt(kernel, generation, length, direction, mask, row["blocks"], flat=True) for row in in_all)
            row["flat"] = next((flat["cycles"] + flat["around"] for flat in again if "cycles" in flat), None)
        rows.append(row)
    return rows


def attempt(kernel: str, generation: str, length: int, direction: str, mask: str, blocks, flat: bool = False) -> dict:
    """Compile one configuration and read its schedule; a refusal is a result too."""
    from tests.benchmarks import schedule

    row = {"kernel": kernel, "mask": mask, "blocks": blocks}
    try:
        fn, args = program(kernel, length, direction, mask, blocks, flat)
        found = schedule.measure(fn, args, generation)
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    total = sum(one["cycles"] for one in found["kernels"].values())
    return row | {
        "cycles": found["cycles"] if found["kernels"] else found["xla_cycles"],
        "mxu": sum(one["mxu"] * one["cycles"] for one in found["kernels"].values()) / total if total else None,
        "spills": sum(one["spills"] for one in found["kernels"].values()) if total else None,
        "temporaries": found["temporaries"],
        "around": found["xla_cycles"] if found["kernels"] else 0,
        "unknown": found["xla_unknown"],
        "kernels": {name: one["cycles"] for name, one in found["kernels"].items()},
        "assumed": [line for one in found["kernels"].values() for line in one["assumed"]],
    }


def program(kernel: str, length: int, direction: str, mask: str, blocks, flat: bool) -> tuple[Callable, tuple]:
    """The function to compile and its arguments: shapes, and the segments themselves."""
    import jax
    import jax.numpy as jnp

    batch = TOKENS // length
    segments = segment_ids(batch, length, mask)
    if kernel == "ours":
        return ours(batch, length, direction, segments)
    attend = functools.partial(KERNELS[kernel][0], blocks, length)
    shape, order = (batch, HEADS, length, WIDTH), (0, 2, 1, 3)
    if kernel == "xla":
        shape, order = (batch, length, HEADS, WIDTH), (0, 1, 2, 3)

    def forward(q, k, v):
        if flat:
            q, k, v = (x.reshape(batch, length, HEADS, WIDTH).transpose(order) for x in (q, k, v))
        out = attend(q, k, v, segments)
        return out.transpose(order).reshape(batch, length, -1) if flat else out

    x = jax.ShapeDtypeStruct((batch, length, HEADS * WIDTH) if flat else shape, jnp.bfloat16)
    if direction == "forward":
        return forward, (x, x, x)
    pull = jax.eval_shape(lambda *operands: jax.vjp(forward, *operands)[1], x, x, x)  # what is kept for backward
    return lambda pull, gradient: pull(gradient), (pull, x)


def segment_ids(batch: int, length: int, mask: str):
    """Segments int32[B, T] of a mask, or None: 0 is padding."""
    import numpy as np

    places = np.arange(length, dtype=np.int32)
    row = {"dense": None, "padded": (places < length * 3 // 4).astype(np.int32), "packed": places // TEXT + 1}[mask]
    return None if row is None else np.tile(row, (batch, 1))


def flash(blocks: Sequence[int], length: int, q, k, v, segments):
    """JAX's flash attention."""
    from jax.experimental.pallas.ops.tpu import flash_attention as module

    names = ("q", "k_major", "k", "b", "q_major_dkv", "q_dkv", "k_major_dkv", "k_dkv", "q_dq", "k_major_dq", "k_dq")
    sizes = module.BlockSizes(**{f"block_{name}": block for name, block in zip(names, blocks, strict=False)})
    ids = None if segments is None else module.SegmentIds(segments, segments)
    return module.flash_attention(q, k, v, segment_ids=ids, sm_scale=WIDTH**-0.5, block_sizes=sizes)


def splash(blocks: Sequence, length: int, q, k, v, segments):
    """JAX's splash attention, whose users scale q themselves."""
    import jax
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as module
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    layouts, *blocks = blocks
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    options = {f"block_{name}": block for name, block in zip(names, blocks, strict=False)}
    for name, layout in zip("qkv", layouts, strict=True):
        minor = "SEQ_MINOR" if layout == "s" else "HEAD_DIM_MINOR"
        options[f"{name}_layout"] = module.QKVLayout[minor]
    sizes = module.BlockSizes(**options, use_fused_bwd_kernel=len(blocks) == 6)
    mask = masks.MultiHeadMask([masks.FullMask((length, length))] * HEADS)
    kernel = module.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    ids = None if segments is None else module.SegmentIds(segments, segments)
    return jax.vmap(kernel, in_axes=(0, 0, 0, None if ids is None else 0))(q, k, v, ids)


def xla(blocks: None, length: int, q, k, v, segments):
    """JAX's attention without a kernel."""
    import jax

    mask = None if segments is None else (segments[:, None, :, None] == segments[:, None, None, :])
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")


def ours(batch: int, length: int, direction: str, segments, sizes=None) -> tuple[Callable, tuple]:
    """Our kernels, which take [B, T, N*H], and segments to skip blocks by; None for sizes takes the device's."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jina_jax.kernels import tpu
    from jina_jax.kernels.common import Inputs

    x = jax.ShapeDtypeStruct((batch, length, HEADS * WIDTH), jnp.bfloat16)
    logsumexp = jax.ShapeDtypeStruct((batch, HEADS, length), jnp.float32)
    given = (x, x, x, segments, np.zeros(6, np.uint32))

    def inputs(q, k, v, segments, words):
        return Inputs(q, k, v, segments, segments, None, words, HEADS, 0.0)

    if direction == "forward":
        return lambda *given: tpu.forward(inputs(*given), jnp.bfloat16, sizes=sizes), given

    def backward(*given):
        return tpu.backward(inputs(*given[:5]), *given[5:], jnp.bfloat16, sizes=sizes)

    return backward, (*given, x, logsumexp, x)


def flash_blocks(length: int, direction: str) -> list[tuple]:
    """Blocks to try: q, k (loaded, computed) and batch; then q and k (both twice) of dkv, q and k (twice) of dq."""
    if direction == "forward":
        sizes = [(512, 512, 512), (1024, 1024, 512), (2048, 1024, 512), (1024, 2048, 1024), (2048, 2048, 1024)]
        return fitting([(*one, 1) for one in sizes] + [(512, 512, 512, 4)] * (length == 512), length)
    pairs = [((512, 512), (512, 512)), ((512, 2048), (1024, 512)), ((512, 2048), (2048, 512))]
    pairs += [((1024, 1024), (2048, 512)), ((256, 4096), (4096, 256))]
    return fitting([(512, 512, 512, 1, q, q, k, k, *dq, dq[1]) for (q, k), dq in pairs], length)


def splash_blocks(length: int, direction: str) -> list[tuple]:
    """Blocks to try: layouts of q, k, v (minor: head or sequence), q, kv (loaded, computed); dkv; dq if not fused."""
    if direction == "forward":
        sizes = [(1024, 2048, 512), (2048, 2048, 256), (2048, 2048, 1024)]
        found = [(layouts, *one) for layouts in ("hss", "hsh") for one in sizes]
        return fitting([*found, ("hss", 1024, 8192, 1024)], length)
    sizes = [(1024, 2048, 512), (512, 4096, 512), (512, 8192, 512), (1024, 2048, 512, 1024, 2048)]
    return fitting([("hss", 512, 512, 512, *one) for one in sizes], length)


def fitting(configurations: list[tuple], length: int) -> list[tuple]:
    """Configurations with no block longer than the row, each once."""
    return list(dict.fromkeys(tuple(x if isinstance(x, str) else min(x, length) for x in c) for c in configurations))


KERNELS: dict[str, tuple] = {
    "flash": (flash, flash_blocks),
    "splash": (splash, splash_blocks),
    "xla": (xla, lambda length, direction: [None]),
    "ours": (ours, lambda length, direction: [None]),
}


# Heading, key, divisor and format of the table's columns.
COLUMNS = (
    ("cycles", "cycles", 1e6, "9.3f"),
    ("MXU", "mxu", 1, "5.0%"),
    ("spills", "spills", 1, "7.0f"),
    ("temp", "temporaries", 2**20, "8.1f"),
    ("around", "around", 1e6, "8.3f"),
    ("flat", "flat", 1e6, "8.3f"),
    ("ratio", "ratio", 1, "6.2f"),
    ("flat", "flat ratio", 1, "6.2f"),
)


def heading() -> str:
    """The table's first line."""
    columns = "".join(name.rjust(int(form.split(".")[0]) + 1) for name, *_, form in COLUMNS)
    return f"{'TPU':5} {'length':>6} {'pass':8} {'mask':6} {'kernel':6}{columns}  blocks"


def line(row: dict) -> str:
    """One row of the table."""
    start = f"{row['generation']:5} {row['length']:6} {row['pass']:8} {row['mask']:6} {row['kernel']:6}"
    if "cycles" not in row:
        return f"{start}  {row.get('error')}"
    cells = (
        "-".rjust(int(form.split(".")[0])) if row.get(key) is None else format(row[key] / scale, form)
        for _, key, scale, form in COLUMNS
    )
    notes = [str(tuple(row["blocks"]))] if row["blocks"] else []
    notes += [f"{row['unknown']} XLA operations unknown"] if row["unknown"] else []
    return f"{start} {' '.join(cells)}  {', '.join(notes)}"


if __name__ == "__main__":
    main()
