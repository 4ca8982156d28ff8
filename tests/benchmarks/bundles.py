"""Read the listing of a TPU kernel's bundles (instruction words): its blocks, their busy units, and its loops.

A bundle is one cycle. Before the compiler's last pass, which packs stalls into the bundle before them, every planned
stall is an empty bundle of its own, so that bundles are cycles until something waits for memory.
Values carry two names, as in `%s8581_s21`: the first is assigned in one place only, the second is a register.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s*(?:[A-Z]{2})?\s*:[ >]*\{", re.MULTILINE)
BRANCH = re.compile(r"sbr\.\w+ (?:\((!?)%(\w+)\) )?target bundleno = (\d+)")
DEFINITION = re.compile(r"%([sp]\d+)(?:_[sp]\d+)? = (\S+)\s*(.*)", re.DOTALL)
STORE = re.compile(r"sst \[smem:(\[.*?\])\]\s*(.*)", re.DOTALL)
COPY = re.compile(r"dma\.\w+_to_smem\s*(.*)", re.DOTALL)
PREDICATE = re.compile(r"\((!?)%(p\d+)(?:_p\d+)?(?:, (%\w+))?\),?\s*")
NAME = re.compile(r"%([sp]\d+)(?:_[sp]\d+)?")


class Instruction(NamedTuple):
    """`target = operation operands` of the scalar unit, if `predicate` holds, else `target = otherwise`."""

    target: str
    operation: str
    operands: tuple[int | str, ...]
    predicate: str | None = None
    negated: bool = False
    otherwise: int | str | None = None


class Branch(NamedTuple):
    """Goes to bundle `target` if the predicate (negated or not) holds, or always."""

    predicate: str | None
    negated: bool
    target: int


class Block(NamedTuple):
    """Bundles start..end (exclusive), at most the last of which branches: busy slots by unit, and steering code."""

    start: int
    end: int
    slots: tuple[int, ...]
    code: tuple[Instruction, ...]
    branch: Branch | None

    @property
    def length(self) -> int:
        """Number of bundles."""
        return self.end - self.start


class Program(NamedTuple):
    """A kernel's blocks in order, and the slots that a bundle has for each unit."""

    blocks: tuple[Block, ...]
    units: tuple[str, ...]
    capacity: tuple[int, ...]
    at: dict[int, int]  # index of the block that starts at a bundle
    cores: int  # that share the grid

    def cycles(self, counts: Sequence[int]) -> int:
        """Bundles in all, if blocks run that often."""
        return sum(block.length * count for block, count in zip(self.blocks, counts, strict=True))

    def loops(self) -> list[tuple[int, int, int]]:
        """Start, end and depth of every loop (the span of a branch backwards), outer before inner."""
        found = {(b.branch.target, b.end) for b in self.blocks if b.branch and b.branch.target <= b.start}
        ordered = sorted(found, key=lambda span: (span[0], -span[1]))
        return [(s, e, sum(a <= s and e <= z for a, z in found) - 1) for s, e in ordered]


def parse(listing: str, utilization: str, delay: int) -> Program:
    """Split a kernel into blocks.

    Args:
        listing: the dump packed-bundles-post-ra.
        utilization: the dump pre-delay_hlo-static-per-bundle-utilization: busy slots by bundle, after the capacities.
        delay: bundles after a branch that run whether it is taken or not.

    Returns:
        The kernel; of its instructions only those that decide about branches.
    """
    capacity, *rows = [tuple(map(int, x.split())) for x in utilization.splitlines() if re.fullmatch(r"[\d ]+", x)]
    units = tuple(x.strip() for x in next(x for x in utilization.splitlines() if "MXU" in x).split(","))
    heads = list(BUNDLE.finditer(listing))
    if [int(head.group(1), 0) for head in heads] != list(range(len(rows))):
        raise ValueError(f"{len(heads)} bundles, but {len(rows)} rows of utilization: not of the same kernel?")
    ends = [head.start() for head in heads[1:]] + [len(listing)]
    bundles = [listing[head.end() : end] for head, end in zip(heads, ends, strict=True)]
    branches = {
        i: Branch(short(found.group(2)) if found.group(2) else None, found.group(1) == "!", int(found.group(3)))
        for i, text in enumerate(bundles)
        for found in BRANCH.finditer(text)
    }
    code = [[one for part in text.split(";;") if (one := instruction(part))] for text in bundles]
    keep = steering([one for line in code for one in line], {b.predicate for b in branches.values() if b.predicate})
    starts = {0, *(branch.target for branch in branches.values()), *(i + delay + 1 for i in branches)}
    edges = [*sorted(start for start in starts if start < len(rows)), len(rows)]
    blocks = []
    for start, end in pairwise(edges):
        inside = [branch for i, branch in branches.items() if start <= i < end]
        if len(inside) > 1:
            raise ValueError(f"two branches within {delay} bundles of each other, in {start:#x}..{end:#x}")
        kept = [one for line in code[start:end] for one in line if one.target in keep]
        kept.sort(key=lambda one: one.operation != "sphi")  # what meets at a block's start comes before its uses
        slots = tuple(map(sum, zip(*rows[start:end], strict=True)))
        blocks.append(Block(start, end, slots, tuple(kept), inside[0] if inside else None))
    at, cores = {block.start: i for i, block in enumerate(blocks)}, 2 if "/* core id */" in listing else 1
    return Program(tuple(blocks), units, capacity, at, cores)


def instruction(text: str) -> Instruction | None:
    """One scalar instruction, or None for any other."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL).strip().rstrip("}").strip()
    if found := STORE.search(text):
        target, operation, rest = found.group(1), "sst", found.group(2)
    elif found := COPY.search(text):
        target, operation, rest = "dma", "dma", found.group(1)
    elif found := DEFINITION.match(text):
        target, operation, rest = found.groups()
    else:
        return None
    predicate, negated, otherwise = None, False, None
    if found := PREDICATE.search(rest):
        predicate, negated = found.group(2), found.group(1) == "!"
        otherwise = operand(found.group(3)) if found.group(3) else None
        rest = rest[: found.start()] + rest[found.end() :]
    if operation.startswith("inlined_call_operand"):
        index = re.search(r"index: (\d+)", rest)
        return Instruction(target, "smov", (f"#operand{index.group(1)}" if index else "#operand",))
    operation = re.sub(r"\.s32|\.totalorder|\.(hbm|vmem|smem|sflag|cmem)\b", "", operation)
    loaded = re.search(r"\[smem:(\[.*?\])\]", rest)
    operands = (loaded.group(1),) if loaded else tuple(operand(x) for x in rest.split(",") if x.strip())
    return Instruction(target, operation, operands, predicate, negated, otherwise)


def operand(text: str) -> int | str:
    """An immediate, the name of a value, or the `#name` of a place in memory."""
    text = text.strip()
    if found := NAME.search(text):
        return found.group(1)
    if re.fullmatch(r"-?\d+", text):
        return signed(int(text))
    return found.group(0) if (found := re.search(r"#\w+", text)) else text


def terms(address: str) -> list[int | str]:
    """The terms of an address such as `[#allocation3 + %s5_s1 + $0x2]`."""
    return [int(x[1:], 0) if x.startswith("$") else operand(x) for x in re.split(r"\s*\+\s*", address.strip("[] "))]


def steering(code: list[Instruction], predicates: set[str]) -> set[str]:
    """Targets on which the predicates depend, by way of scalar memory too."""
    sources: dict[str, set[str]] = {}
    for one in code:
        names = {x for x in (*one.operands, one.predicate, one.otherwise) if isinstance(x, str)}
        addresses = {x for x in (*names, one.target) if x.startswith("[")}
        names |= {term for address in addresses for term in terms(address) if isinstance(term, str)}
        sources.setdefault(one.target, set()).update(names)
        if one.operation == "sst":  # a load from this place depends on the store
            sources.setdefault(str(terms(one.target)[0]), set()).add(one.target)
    keep: set[str] = set()
    todo = {"dma", *predicates}
    while todo:
        name = todo.pop()
        keep.add(name)
        todo |= sources.get(name, set()) - keep
    return keep


def short(name: str) -> str:
    """The first of a value's two names."""
    return name.split("_")[0]


def signed(value: int) -> int:
    """Wrap to 32 bits."""
    return (value + 2**31) % 2**32 - 2**31
