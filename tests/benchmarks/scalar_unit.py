"""Interpret the scalar instructions that steer a TPU kernel, to count how often each of its blocks runs."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tests.benchmarks.bundles import Instruction, Program, signed, terms

Value = int | bool | tuple[str, int] | None  # a tuple is an address (place, offset); None is unknown
MAX_BLOCKS = 20_000_000


class Run(NamedTuple):
    """How often each block ran, and what had to be assumed."""

    counts: list[int]
    assumed: list[str]


def run(
    program: Program,
    scalars: Mapping[int, np.ndarray] | None = None,
    hints: Sequence[float] = (),
    granule: int = 8,
    core: int = 0,
) -> Run:
    """Count how often each block runs.

    Args:
        program: a kernel.
        scalars: contents of operands that reach scalar memory, by operand index; of 32-bit types.
        hints: for the branches that stay undecided, in the order in which they are met: trips of a loop, or the
            share of the time that a conditional block runs. Without a hint a loop runs once, a conditional always.
        granule: words in the unit of transfers.
        core: which core to be, where several share the grid.

    Returns:
        Counts by block, and a line for each branch that the scalars did not decide.
    """
    machine, undecided = Machine(scalars or {}, granule, core), Undecided(hints)
    counts = [0] * len(program.blocks)
    index = tick = 0
    while index < len(program.blocks):
        block = program.blocks[index]
        counts[index] += 1
        tick += 1
        if tick > MAX_BLOCKS:
            raise RuntimeError(f"no end after {MAX_BLOCKS} blocks, at {block.start:#x}")
        for one in block.code:
            machine.step(one, tick)
        index += 1
        if block.branch is not None:
            predicate, negated, target = block.branch
            value = machine.values.get(predicate) if predicate else True
            if undecided.taken(block.start, block.end, target) if value is None else bool(value) != negated:
                index = program.at[target]
    return Run(counts, undecided.assumed + [f"unknown operation {name}" for name in sorted(machine.missing)])


class Undecided:
    """Branches whose predicate is unknown: hints spread evenly over the times that they are met."""

    def __init__(self, hints: Sequence[float]):
        self.hints = iter(hints)
        self.shares: dict[int, float] = {}
        self.turns: dict[int, int] = {}
        self.passes: dict[int, int] = {}
        self.assumed: list[str] = []

    def taken(self, start: int, end: int, target: int) -> bool:
        """Whether to take the branch of block start..end."""
        backward = target <= start
        if start not in self.shares:
            self.shares[start], self.turns[start], self.passes[start] = next(self.hints, 1.0), 0, 0
            what = f"trips of loop {target:#x}..{end:#x}" if backward else f"share of runs of {end:#x}..{target:#x}"
            self.assumed.append(f"{what}: {self.shares[start]:g}")
        share, turn = self.shares[start], self.turns[start]
        due = int((turn + 1) * share) - int(turn * share)
        self.passes[start] += 1
        again = backward and self.passes[start] < due
        if not again:
            self.turns[start], self.passes[start] = turn + 1, 0
        return again if backward else due == 0


class Machine:
    """The scalar unit: values by name, scalar memory by address."""

    def __init__(self, scalars: Mapping[int, np.ndarray], granule: int = 8, core: int = 0):
        self.granule = granule
        self.values: dict[str, Value] = {}
        self.written: dict[str, int] = {}  # when, for phis
        self.memory: dict[str, dict[int, Value]] = {"#allocation0": {0: core}}
        self.missing: set[str] = set()
        for index, array in scalars.items():
            array = np.asarray(array).astype(np.int64)
            array = array.reshape((-1, *array.shape[-2:]) if array.ndim > 1 else (1, 1, -1))
            words = {word(*at, *array.shape[1:]): signed(int(x)) for at, x in np.ndenumerate(array)}
            self.memory[f"#operand{index}"] = words

    def get(self, x: int | str) -> Value:
        """Value of an operand."""
        if isinstance(x, str):
            return (x, 0) if x.startswith("#") else self.values.get(x)
        return x

    def address(self, text: str) -> tuple[str, int] | None:
        """Place and offset of `[#allocation3 + %s5_s1]`."""
        found = [self.get(x) for x in terms(text)]
        place, offset = next((x for x in found if isinstance(x, tuple)), ("", 0))
        return None if None in found else (place, offset + sum(x for x in found if isinstance(x, int)))

    def step(self, one: Instruction, tick: int) -> None:
        """Run one instruction."""
        if one.predicate:
            holds = self.values.get(one.predicate)
            if holds is None:
                one = one._replace(operation="smov", operands=("%unknown",))
            elif bool(holds) == one.negated:
                if one.otherwise is None:
                    return
                one = one._replace(operation="smov", operands=(one.otherwise,))
        if one.operation == "sst":
            if (address := self.address(one.target)) is not None:
                self.memory.setdefault(address[0], {})[address[1]] = self.get(one.operands[0])
            return
        if one.operation == "dma":
            source, size, destination = [self.get(x) for x in one.operands[:3]]
            if isinstance(source, tuple) and isinstance(size, int) and isinstance(destination, tuple):
                self.copy(source, size, destination)
            return
        if one.operation == "sphi":  # of the values that meet here, the one that was written last
            result = self.get(max(one.operands, key=lambda x: self.written.get(x, -1)))
        elif one.operation == "sld":
            place, offset = self.address(one.operands[0]) or ("", 0)
            result = self.memory.get(place, {}).get(offset)
        else:
            result = self.evaluate(one.operation, [self.get(x) for x in one.operands])
        self.values[one.target], self.written[one.target] = result, tick

    def copy(self, source: tuple[str, int], size: int, destination: tuple[str, int]) -> None:
        """A transfer into scalar memory; source and size in granules, destination in words."""
        words, start = self.memory.get(source[0], {}), self.granule * source[1]
        moved = {destination[1] + i: words.get(start + i) for i in range(self.granule * size)}
        self.memory.setdefault(destination[0], {}).update(moved)

    def evaluate(self, name: str, operands: list[Value]) -> Value:
        """Result of an operation on values, some of which may be unknown."""
        if name == "scalar_select" and operands[0] is not None:
            return operands[1] if operands[0] else operands[2]
        if name in DECIDING and DECIDING[name][0] in [None if x is None else bool(x) for x in operands]:
            return DECIDING[name][1]
        if None in operands:
            return None
        if addresses := [x for x in operands if isinstance(x, tuple)]:
            place, offset = addresses[0]
            if len(addresses) == 1 and name in ("sadd", "scalar_lea"):
                return place, offset + sum(x for x in operands if isinstance(x, int))
            if name == "sshll.u32" and isinstance(operands[1], int):
                return place, offset << operands[1]
            return (place, offset) if name in ("smov", "int_to_ptr") else None
        if name not in OPERATIONS:
            self.missing.add(name)
            return None
        result = OPERATIONS[name](*operands)
        return result if isinstance(result, bool) else signed(result)


def word(page: int, i: int, j: int, rows: int, columns: int) -> int:
    """Where an element of an array lies: tiles of 128 columns and 1, 2, 4 or 8 rows follow each other row by row."""
    height = min(8, 1 << (rows - 1).bit_length())
    tile = (page * -(-rows // height) + i // height) * -(-columns // 128) + j // 128
    return tile * height * 128 + i % height * 128 + j % 128


def unsigned(value: int) -> int:
    """The same 32 bits without a sign."""
    return value % 2**32


def comparisons() -> dict[str, Callable]:
    """The scalar comparisons, of signed and of unsigned numbers."""
    compare = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
    with_sign = {f"scmp.{name}": function for name, function in compare.items()}
    without = {
        f"scmp.{name}.u32": lambda a, b, function=function: function(unsigned(a), unsigned(b))
        for name, function in compare.items()
    }
    return with_sign | without


# Where one operand may decide alone: the value that decides, and the result.
DECIDING = {"por": (True, True), "pnor": (True, False), "pand": (False, False), "pnand": (False, True)}
OPERATIONS: dict[str, Callable] = comparisons() | {
    "smov": lambda a: a,
    "pmov": lambda a: a,
    "int_to_ptr": lambda a: a,
    "sadd": lambda a, b: a + b,
    "ssub": lambda a, b: a - b,
    "smul": lambda a, b: a * b,
    "smul.u32": lambda a, b: a * b,
    "smin": min,
    "smax": max,
    "smin.u32": lambda a, b: min(unsigned(a), unsigned(b)),
    "smax.u32": lambda a, b: max(unsigned(a), unsigned(b)),
    "sand.u32": lambda a, b: a & b,
    "sor.u32": lambda a, b: a | b,
    "sxor.u32": lambda a, b: a ^ b,
    "sshll.u32": lambda a, b: a << b,
    "sshrl.u32": lambda a, b: unsigned(a) >> b,
    "sshra": lambda a, b: a >> b,
    "pneg": lambda a: not a,
    "pand": lambda a, b: bool(a and b),
    "por": lambda a, b: bool(a or b),
    "pnand": lambda a, b: not (a and b),
    "pnor": lambda a, b: not (a or b),
    "pxor": lambda a, b: bool(a) != bool(b),
}
