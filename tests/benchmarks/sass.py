"""Machine code for GPUs that are not here: described to XLA, compiled by it, taken apart again."""

import importlib.util
import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# What the process that compiles needs to have had from its start; files go to the folder.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
DUMPS = {"XLA_FLAGS": "--xla_dump_to={}", "MOSAIC_GPU_DUMP_TO": "{}"}


class Gpu(NamedTuple):
    """What XLA and this report want to know of a GPU, from NVIDIA's data sheets."""

    name: str
    capability: tuple[int, int]
    arch: str
    processors: int
    gigahertz: float
    flops: int  # of the tensor cores of a multiprocessor per cycle, bfloat16
    shared: int  # bytes per multiprocessor
    most: int  # bytes per program
    l2: int
    memory: int
    bandwidth: int


GPUS = {
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), "sm_80", 108, 1.41, 2048, 167936, 166912, 40 << 20, 80 << 30, 2039 * 10**9
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), "sm_90a", 132, 1.83, 4096, 233472, 232448, 50 << 20, 80 << 30, 3352 * 10**9
    ),
}


def missing() -> bool:
    """Whether the compiler is not installed."""
    return importlib.util.find_spec("jax_cuda12_plugin") is None or None in (tool("ptxas"), tool("cuobjdump"))


def environment(folder: str) -> dict[str, str]:
    """Variables of a process that compiles and leaves its files in the folder."""
    found = {name: f"{os.environ.get(name, '')} {value.format(folder)}".strip() for name, value in DUMPS.items()}
    # Mosaic writes what the assembler in the path understands.
    path = os.pathsep.join([*(str(Path(tool(name)).parent) for name in ("ptxas", "cuobjdump")), os.environ["PATH"]])
    return os.environ | ENVIRONMENT | found | {"PATH": path}


def compile_for(gpu: Gpu, fn: Callable, args: tuple, folder: Path) -> int:
    """Compile, with all files in the folder afterwards; bytes of temporary buffers."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    for file in folder.iterdir():
        file.unlink()
    topology = topologies.get_topology_desc(platform="cuda", target_config=target(gpu), topology="1x1x1")
    mesh = jax.sharding.Mesh(np.array(topology.devices), ("x",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), args)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def kernels(gpu: Gpu, folder: Path, names: set[str]) -> list[dict]:
    """Of every kernel among the names: warps, shared memory, registers, bytes spilled, loops."""
    found = []
    for file in sorted(folder.glob("*.ptx")):
        for name in names & set(re.findall(r"\.entry (\w+)\(", file.read_text())):
            threads, shared = launch(name, file)
            found.append({"name": name, "warps": threads // 32, "shared": shared, **assemble(file, gpu)})
    return found


def launch(name: str, file: Path) -> tuple[int, int]:
    """Threads and bytes of shared memory of a kernel, from what its compiler says of the launch."""
    if name.endswith("mosaic_gpu_kernel"):
        text = file.with_suffix(".mlir-passes.log").read_text()
        form = r"gpu\.launch .*? threads\(.*?\) in \(\S+ = %c(\d+).*?dynamic_shared_memory_size %c(\d+)_i32"
    else:
        text = "".join(log.read_text() for log in file.parent.glob("*thunk_sequence.txt"))
        form = rf" {name} grid: .*?threads: \[(\d+),.*?shared_memory: (\d+)"
    threads, shared = re.search(form, text).groups()
    return int(threads), int(shared)


def assemble(file: Path, gpu: Gpu) -> dict:
    """Assembled once more, with statistics: registers, bytes spilled, instructions of the innermost loops."""
    code = file.with_suffix(".cubin")
    command = [tool("ptxas"), "-v", f"-arch={gpu.arch}", str(file), "-o", str(code)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    listing = subprocess.run([tool("cuobjdump"), "-sass", str(code)], check=True, capture_output=True, text=True).stdout
    registers, spilled = (
        int(re.search(what, said).group(1)) for what in (r"Used (\d+) registers", r"(\d+) bytes spill stores")
    )
    return {"registers": registers, "spilled": spilled, "loops": loops(listing)}


def loops(listing: str) -> list[dict[str, int]]:
    """Instructions of every innermost loop that multiplies matrices, by name."""
    form = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]*)\S*\s*(.*?);")
    lines = [(int(at, 16), name, rest) for at, name, rest in form.findall(listing)]
    jumps = [(int(rest.split("0x")[1], 16), at) for at, name, rest in lines if name == "BRA" and "0x" in rest]
    bodies = {
        (first, last): Counter(name for at, name, _ in lines if first <= at <= last)
        for first, last in sorted(jumps)
        if first < last
    }
    # Loops that only wait stand within others.
    work = {at: body for at, body in bodies.items() if body["HGMMA"] + body["HMMA"] + body["FFMA"] / 64 >= 4}
    outer = {x for x in work for y in work if x != y and x[0] <= y[0] and y[1] <= x[1]}
    return [dict(body.most_common()) for at, body in work.items() if at not in outer]


def tool(name: str) -> str | None:
    """A program of the CUDA wheels."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in spec.submodule_search_locations] if spec else []
    return next((str(path) for folder in folders for path in sorted(folder.glob(f"*/bin/{name}"))), None)


def target(gpu: Gpu) -> str:
    """A GPU in the words of XLA's GpuTargetConfigProto."""
    major, minor = gpu.capability
    feature = "ACCELERATED_FEATURES" if gpu.arch.endswith("a") else "NONE"
    rates = {  # XLA's number of a type: units per core, operations per clock
        "scalar_unit_description": {11: (128, 1), 16: (128, 2), 10: (128, 2), 12: (64, 1), 4: (64, 1)},
        "matrix_unit_description": {16: (4, gpu.flops // 8), 10: (4, gpu.flops // 8), 11: (4, gpu.flops // 16)},
    }
    units = " ".join(
        f"{unit} {{ "
        + " ".join(
            f"rate_infos {{ key: {key} value {{ clock_rate_ghz: {gpu.gigahertz} units_per_core: {count} "
            f"ops_per_clock: {operations} }} }}"
            for key, (count, operations) in rates[unit].items()
        )
        + " }"
        for unit in rates
    )
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 core_count: {gpu.processors} fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared} shared_memory_per_block_optin: {gpu.most}
  memory_bandwidth: {gpu.bandwidth} l2_cache_size: {gpu.l2} clock_rate_ghz: {gpu.gigahertz}
  device_memory_size: {gpu.memory} device_address_bits: 64 ecc_enabled: true pcie_bandwidth: 34359738368
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}
  {units}
  name: "{gpu.name}" device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability {major}.{minor}"
  driver_version: "13.0.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0" dnn_version: "9.10.0"
  device_interconnect_info {{ active_links: 12 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{gpu.name}"
"""
