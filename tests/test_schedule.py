"""The reader of TPU schedules: blocks, loops, conditionals, spills, bounds from memory; and one real kernel."""

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.benchmarks.bundles import instruction, parse
from tests.benchmarks.hlo import operations, scalar_operands
from tests.benchmarks.scalar_unit import Machine, run
from tests.benchmarks.schedule import GENERATIONS, report, run_all

ROOT = Path(__file__).parent.parent
# Ten steps; bundles 5 and 6 run in the first of them only. A branch here lets one more bundle run.
LISTING = """
= control target key start
LH: loop header
= control target key end

     0   :  { %s1_s0 = smov 0 /* copy for cssa */  ;;  %s9_s1 = inlined_call_operand.hbm [shape: s32[4], index: 0] }
   0x1 LB: > { %s3_s0 = sadd.s32 1, %s2_s0  ;;  %s2_s0 = sphi %s1_s0, %s3_s0 /* phi copy */ }
   0x2   : > { %p4_p0 = scmp.ne.s32.totalorder %s2_s0, 0  ;;  %10 = sst [smem:[#allocation2_spill]] %s3_s0 /* window
iteration_bounds: (10,) */ }
   0x3   : > { %5 = sbr.rel (%p4_p0) target bundleno = 7 (0x7), region = 1 }
   0x4   :  {}
   0x5   : > { %v11_v0 = vmov 0.0 }
   0x6   : > { %12 = vst [vmem:[#allocation3] sm:$0xff] /*vst_source=*/%v11_v0 }
   0x7 PF: > { %s8_s0 = sld [smem:[#allocation2_spill]]  ;;  %13 = vmatmul.bf16.gmra.mxu0 %v11_v0 }
   0x8   : > { %p6_p1 = scmp.ge.s32.totalorder %s8_s0, 10 /* loop exit test */  ;;  %v14_v1 = vpop.f32.mrf.mxu0 }
   0x9   : > { %7 = sbr.rel (!%p6_p1) target bundleno = 1 (0x1), region = 2  ;;  %15 = vst [vmem:[#allocation4_spill]] %v14_v1 }
   0xa   :  {}
   0xb   :  { %16 = vsyncpa [#allocation1], 1 }
"""  # noqa: E501
UNITS = "== CAPACITY:\nMXU, VALU, VLOAD:FILL, VSTORE:SPILL\n    2     4     1     1\n== UTILIZATION:\n"
ROWS = ["0 0 0 0"] * 7 + ["2 1 1 0", "0 0 0 0", "0 0 0 1", "0 0 0 0", "0 0 0 0"]
UTILIZATION = UNITS + "\n".join(ROWS) + "\n"
# Two programs, each with a loop whose trips come from what the window of operand 0 holds.
WINDOWS = """
     0   :  { %s1_s0 = smov 0  ;;  %s2_s1 = inlined_call_operand.hbm [shape: s32[2,1,4], index: 0, kind: input] }
   0x1 LB: > { %s3_s0 = sphi %s1_s0, %s4_s0  ;;  %s4_s0 = sadd.s32 1, %s3_s0  ;;  %s5_s2 = scalar_lea.hbm %s2_s1, %s3_s0 }
   0x2   : > { %s6_s2 = sshll.u32 %s5_s2, 4  ;;  %s7_s2 = int_to_ptr.hbm [resolvable:$true] %s6_s2 }
   0x3   : > { %s8_s3 = scalar_lea.smem [#allocation2], %s3_s0 }
   0x4   : > { %9 = dma.hbm_to_smem /*hbm=*/%s7_s2, /*size_in_granules=*/16, /*smem=*/%s8_s3, /*flag=*/[#allocation5] }
   0x5   : > { %s10_s4 = sld [smem:[%s8_s3 + $0x2]]  ;;  %s11_s5 = smov 0 }
   0x6 LB: >> { %s12_s5 = sphi %s11_s5, %s13_s5  ;;  %s13_s5 = sadd.s32 1, %s12_s5 }
   0x7   : >> { %p14_p0 = scmp.ge.s32.totalorder %s13_s5, %s10_s4 }
   0x8   :  { %15 = sbr.rel (!%p14_p0) target bundleno = 6 (0x6), region = 2 }
   0x9   : > { %p16_p1 = scmp.ge.s32.totalorder %s4_s0, 2 }
   0xa   :  { %17 = sbr.rel (!%p16_p1) target bundleno = 1 (0x1), region = 1 }
   0xb   :  {}
"""  # noqa: E501


def utilization(bundles: int) -> str:
    """A table in which nothing is busy."""
    return UNITS + "0 0 0 0\n" * bundles


def flash():
    """A small kernel for `schedule.main`."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

    return flash_attention, (jax.ShapeDtypeStruct((1, 2, 512, 64), jnp.bfloat16),) * 3


LENGTHS = np.random.default_rng(0).integers(1, 9, (5, 3, 200)).astype(np.int32)


def bounded():
    """A loop whose trips depend on the program, for `schedule.main`."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    def body(lengths, x, out):
        column = pl.program_id(1)
        step = lambda j, total: total + jnp.dot(x[...] + j, x[...])  # noqa: E731
        out[...] = jax.lax.fori_loop(0, lengths[0, 2, column], step, jnp.zeros_like(out))

    x = jax.ShapeDtypeStruct((128, 128), jnp.float32)
    rows = pl.BlockSpec((1, 3, 200), lambda i, j: (i, 0, 0), memory_space=pltpu.SMEM)
    all_of_it = pl.BlockSpec((128, 128), lambda i, j: (0, 0))
    kernel = pl.pallas_call(body, x, grid=(5, 8), in_specs=[rows, all_of_it], out_specs=all_of_it, name="bounded")
    return lambda lengths, x: kernel(lengths + 1, x), (LENGTHS, x)


def measured(function: str, generation: str) -> str:
    """What `schedule.main` says, from a process of its own, in which nobody has loaded libtpu yet."""
    pytest.importorskip("libtpu")
    command = [sys.executable, "-m", "tests.benchmarks.schedule", f"tests.test_schedule:{function}"]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [*command, "--generation", generation], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_blocks_loop_and_conditional():
    program = parse(LISTING, UTILIZATION, delay=1)
    assert [(block.start, block.end) for block in program.blocks] == [(0, 1), (1, 5), (5, 7), (7, 11), (11, 12)]
    assert program.units == ("MXU", "VALU", "VLOAD:FILL", "VSTORE:SPILL")
    assert program.capacity == (2, 4, 1, 1)
    assert program.loops() == [(1, 11, 0)]
    assert run(program) == ([1, 10, 1, 10, 1], [])


def test_report():
    program = parse(LISTING, UTILIZATION, delay=1)
    found = report(program, run(program))
    assert found["cycles"] == 1 + 10 * 4 + 2 + 10 * 4 + 1
    assert found["mxu"] == pytest.approx(10 * 2 / (2 * 84))
    assert found["spills"] == 2
    assert found["hot"] == [(7, 4)]
    assert found["loops"] == [(1, 11, 0, 10)]


def test_only_steering_code_is_kept():
    program = parse(LISTING, UTILIZATION, delay=1)
    kept = {one.target for block in program.blocks for one in block.code}
    assert kept == {"s1", "s2", "s3", "s8", "p4", "p6", "[#allocation2_spill]"}


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_nested_loops(trips):
    """Each loop runs as often as the product of its own trips and those around it says."""
    lines, depth = [], len(trips)
    for i in range(depth):
        lines += [f"%s{i}0_s{i} = smov 0", f"%s{i}1_s{i} = sphi %s{i}0_s{i}, %s{i}2_s{i}"]
    for i in reversed(range(depth)):
        lines += [
            f"%s{i}2_s{i} = sadd.s32 1, %s{i}1_s{i}",
            f"%p{i}3_p0 = scmp.ge.s32.totalorder %s{i}2_s{i}, {trips[i]}",
        ]
        lines += [f"%9 = sbr.rel (!%p{i}3_p0) target bundleno = {2 * i + 1} (0x0), region = 1"]
    listing = "".join(f"  {i:#x}   : {{ {text} }}\n" for i, text in enumerate(lines))
    program = parse(listing, utilization(len(lines)), delay=0)
    counts, assumed = run(program)
    products = [int(np.prod(trips[: i + 1])) for i in range(depth)]
    assert [counts[program.at[2 * i + 1]] for i in range(depth)] == products
    assert [depth for *_, depth in program.loops()] == list(range(depth))
    assert assumed == []


@pytest.mark.parametrize("seed", range(3))
def test_trips_from_memory(seed):
    trips = np.random.default_rng(seed).integers(1, 9, (2, 1, 4)).astype(np.int32)
    program = parse(WINDOWS, utilization(12), delay=0)
    counts, assumed = run(program, {0: trips})
    assert counts[program.at[6]] == trips[:, 0, 2].sum()
    assert assumed == []


def test_cores_share_a_grid():
    """The second core starts one step later."""
    listing = LISTING.replace("%s1_s0 = smov 0 /* copy for cssa */", "%s1_s0 = sld [smem:[#allocation0]] /* core id */")
    program = parse(listing, UTILIZATION, delay=1)
    assert program.cores == 2
    assert [run(program, core=core).counts[1] for core in (0, 1)] == [10, 9]


def test_unknown_branches_are_said_and_take_hints():
    program = parse(WINDOWS, utilization(12), delay=0)
    counts, assumed = run(program)
    assert counts[program.at[6]] == 2
    assert assumed == ["trips of loop 0x6..0x9: 1"]
    counts, assumed = run(program, hints=[3.5])
    assert counts[program.at[6]] == 7
    assert assumed == ["trips of loop 0x6..0x9: 3.5"]


def test_share_of_a_conditional():
    listing = LISTING.replace("%p4_p0 = scmp.ne.s32.totalorder %s2_s0, 0", "%p4_p0 = vector.to.predicate %s2_s0")
    program = parse(listing, UTILIZATION, delay=1)
    assert run(program, hints=[0.3]).counts == [1, 10, 3, 10, 1]
    counts, assumed = run(program)
    assert counts == [1, 10, 10, 10, 1]
    assert assumed == ["share of runs of 0x5..0x7: 1", "unknown operation vector.to.predicate"]


def test_tables_of_another_kernel_are_refused():
    with pytest.raises(ValueError, match="12 bundles, but 11 rows"):
        parse(LISTING, utilization(11), delay=1)


@pytest.mark.parametrize(
    ("text", "inputs", "expected"),
    [
        ("%s1_s0 = sadd.s32 4294967295, %s2_s1", {"s2": 5}, 4),
        ("%s1_s0 = smov (!%p3_p0, %s2_s1), 15", {"s2": 5, "p3": True}, 5),
        ("%s1_s0 = smov (!%p3_p0, %s2_s1), 15", {"s2": 5, "p3": False}, 15),
        (
            "%s1_s0 = scalar_select /*predicate=*/%p3_p0, /*on_true=*/%s2_s1, /*on_false=*/-7",
            {"s2": 5, "p3": False},
            -7,
        ),
        ("%p1_p0 = scmp.lt.u32.totalorder %s2_s1, 4294967295", {"s2": 5}, True),
        ("%p1_p0 = scmp.lt.s32.totalorder %s2_s1, 4294967295", {"s2": 5}, False),
        ("%p1_p0 = pnand %p2_p1, %p3_p2", {"p2": False}, True),
        ("%p1_p0 = por %p2_p1, %p3_p2", {"p2": False}, None),
        ("%s1_s0 = sshra.s32 %s2_s1, 1", {"s2": -5}, -3),
        ("%s1_s0 = sshrl.u32 %s2_s1, 28", {"s2": -1}, 15),
    ],
)
def test_instructions(text, inputs, expected):
    machine = Machine({})
    machine.values.update(inputs)
    one = instruction(text)
    machine.step(one, 0)
    assert machine.values[one.target] == expected


def test_arrays_lie_in_tiles():
    array = np.arange(2 * 11 * 300).reshape(2, 11, 300)
    words = Machine({0: array}).memory["#operand0"]
    tiles = (
        np.pad(array, ((0, 0), (0, 5), (0, 84)), constant_values=-1).reshape(2, 2, 8, 3, 128).transpose(0, 1, 3, 2, 4)
    )
    assert {i: x for i, x in enumerate(tiles.ravel().tolist()) if x >= 0} == words


def test_scalars_are_computed_from_known_arguments():
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl

    def program(lengths, x):
        bounds = jax.jit(lambda n: jnp.cumsum(n) + 1)(lengths)
        body = lambda bounds, x, out: None  # noqa: E731
        return pl.pallas_call(body, jax.ShapeDtypeStruct((8, 128), jnp.float32), name="kernel")(bounds, x * 2)

    lengths = np.array([3, 4, 5], np.int32)
    jaxpr = jax.make_jaxpr(program)(lengths, jnp.zeros((8, 128)))
    [(name, scalars)] = scalar_operands(jaxpr, [lengths, jax.ShapeDtypeStruct((8, 128), jnp.float32)])
    assert name == "kernel"
    assert {i: x.tolist() for i, x in scalars.items()} == {0: [4, 8, 13]}


HLO = """HloModule jit_f

%fused (x.1: f32[8]) -> f32[8] {
  ROOT %kernel.7 = f32[8]{0} custom-call(%x.1), custom_call_target="tpu_custom_call", backend_config={}
}

%body (x: (s32[], f32[8])) -> (s32[], f32[8]) {
  %copy.1 = f32[8]{0:T(256)} copy(%x), backend_config={"estimated_cycles":"10"}
  %kernel.2 = (f32[8]{0:T(256)S(1)}, s32[]) fusion(%copy.1), kind=kCustom, calls=%fused
}

%condition (x: (s32[], f32[8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.1), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %copy = f32[8]{0} copy(%x), backend_config={"estimated_cycles":"12"}
  %odd = f32[8]{0} copy(%x), backend_config={"estimated_cycles":"9223372036854775807"}
  %while.1 = (s32[], f32[8]{0:T(256)}) while(%copy), condition=%condition, body=%body
  %kernel = f32[8]{0} custom-call(%x.1), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"sizes": "{}"
}}, backend_config={}
  ROOT %copy.2 = f32[8]{0} copy(%kernel), frontend_attributes={kernel_metadata={
}}, backend_config={"estimated_cycles":"5"}
}
"""


def test_operations_and_loops_around_kernels():
    assert operations(HLO) == ({"kernel.2": 7, "kernel": 1}, 12 + 7 * 10 + 5, 1)
    with pytest.raises(ValueError, match="3 kernels, of which only"):
        operations(HLO + '%unused (x: f32[8]) -> f32[8] {\n  custom_call_target="tpu_custom_call"\n}\n')


def test_runs_of_a_kernel_add_up():
    program = parse(WINDOWS, utilization(12), delay=0)
    contents = [{0: np.full((2, 1, 4), n, np.int32)} for n in (3, 5, 3)] + [{}]
    counts, assumed = run_all(program, contents, (), 8)
    assert counts[program.at[6]] == 2 * (3 + 5 + 3 + 1)
    assert assumed == ["trips of loop 0x6..0x9: 1"]


def test_scalars_of_every_step_of_a_scan():
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl

    def program(lengths, x):
        kernel = pl.pallas_call(lambda n, x, out: None, jax.ShapeDtypeStruct((8, 128), jnp.float32), name="kernel")
        return jax.lax.scan(lambda x, n: (kernel(n + 1, x), n), x, lengths, reverse=True)

    lengths = np.arange(6, dtype=np.int32).reshape(3, 2)
    jaxpr = jax.make_jaxpr(program)(lengths, jnp.zeros((8, 128)))
    found = scalar_operands(jaxpr, [lengths, jax.ShapeDtypeStruct((8, 128), jnp.float32)])
    assert [scalars[0].tolist() for _, scalars in found] == [[5, 6], [3, 4], [1, 2]]


def test_a_real_kernel():
    output = measured("flash", "v5e")
    # 2 heads, 4 blocks of queries and 4 of keys, and one step more at either end of the pipeline.
    assert re.search(r"loop 0x\w+\.\.0x\w+: \d+ bundles, body runs 34 times", output), output
    cycles, share = re.search(r"flash_attention\S*: ([\d.]+) Mcycles.*\n *busy: MXU (\d+)%", output).groups()
    assert 0 < float(cycles) < 1
    assert int(share) > 0
    assert "assumed" not in output


@pytest.mark.parametrize("generation", GENERATIONS)
def test_real_bounds_from_memory(generation):
    output = measured("bounded", generation)
    assert f"body runs {(LENGTHS[:, 2, :8] + 1).sum()} times" in output, output
    assert "assumed" not in output


def test_blocks_cover_every_bundle():
    for listing, table, delay in ((LISTING, UTILIZATION, 1), (WINDOWS, utilization(12), 0)):
        blocks = parse(listing, table, delay).blocks
        assert blocks[0].start == 0
        assert blocks[-1].end == 12
        assert all(before.end == after.start for before, after in pairwise(blocks))
