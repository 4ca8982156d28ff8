"""What is around the kernels of a compiled program: how often each runs, XLA's own work, what scalar memory holds."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.extend
import numpy as np

UNKNOWN = 2**62  # estimated_cycles beyond this mean "unknown"
COMPUTATION = re.compile(r"^(ENTRY )?%?(\S+) \([^\n]*\{\n(.*?)^\}$", re.MULTILINE | re.DOTALL)
START = re.compile(r"^  (?=(?:ROOT )?%\S+ = )", re.MULTILINE)  # of an operation, which may take several lines
OPERATION = re.compile(r"(?:ROOT )?%(\S+) = (?:\(.*?\)|\S+) ([a-z][\w-]*)\((.*)", re.DOTALL)
KERNEL = 'custom_call_target="tpu_custom_call"'


class Operations(NamedTuple):
    """What a program consists of.

    Attributes:
        kernels: Pallas kernels by name, and how often each runs.
        cycles: the compiler's estimate for everything else.
        unknown: number of operations for which it has none.
    """

    kernels: dict[str, int]
    cycles: int
    unknown: int


def operations(text: str) -> Operations:
    """Read a compiled program, loops included.

    Args:
        text: `compiled.as_text()`.

    Returns:
        Its operations. A loop whose number of trips is not in the text counts once.
    """
    bodies = {name: body for _, name, body in COMPUTATION.findall(text)}
    entry = next(name for start, name, _ in COMPUTATION.findall(text) if start)
    kernels: dict[str, int] = {}
    known: list[int] = []
    unknown: list[str] = []

    def walk(name: str, times: int) -> None:
        for label, operation, rest in (OPERATION.match(one).groups() for one in START.split(bodies[name])[1:]):
            called = dict(re.findall(r"(calls|body|condition|to_apply)=%?([^\s,]+)", rest))
            if KERNEL in rest or KERNEL in bodies.get(called.get("calls", ""), ""):  # alone, or with a little around it
                kernels[label] = kernels.get(label, 0) + times
            elif operation == "while":
                walk(called["body"], times * trips(rest, bodies[called["condition"]]))
            elif operation == "call":
                walk(called["to_apply"], times)
            elif found := re.search(r'"estimated_cycles":"?(\d+)', rest):
                cycles = int(found.group(1))
                known.append(cycles * times) if cycles < UNKNOWN else unknown.append(label)

    walk(entry, 1)
    if len(kernels) != text.count(KERNEL):
        raise ValueError(f"{text.count(KERNEL)} kernels, of which only {sorted(kernels)} seem to run")
    return Operations(kernels, sum(known), len(unknown))


COLLECTIVE = re.compile(r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}


def collective_bytes(text: str) -> int:
    """Bytes of the results of all collective operations of a compiled program, loops included.

    Args:
        text: `compiled.as_text()`.

    Returns:
        Bytes that they deliver to each device.
    """
    bodies = {name: body for _, name, body in COMPUTATION.findall(text)}
    entry = next(name for start, name, _ in COMPUTATION.findall(text) if start)

    def total(name: str) -> int:
        found = 0
        for one in START.split(bodies[name])[1:]:
            _, operation, rest = OPERATION.match(one).groups()
            called = dict(re.findall(r"(calls|body|condition|to_apply)=%?([^\s,]+)", rest))
            if collective := COLLECTIVE.fullmatch(operation):
                shapes = one.split(f" {operation}(")[0].split(" = ", 1)[1]
                sizes = [
                    BYTES[kind] * math.prod(int(size) for size in shape.split(",") if size)
                    for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
                ]
                # What starts and ends apart holds its input as well, but for sums.
                apart = collective.group(2) and collective.group(1) != "all-reduce"
                found += max(sizes) if apart else sum(sizes)
            elif operation == "while":
                found += trips(rest, bodies[called["condition"]]) * total(called["body"])
            elif operation == "call":
                found += total(called["to_apply"])
            elif operation == "fusion" or "calls" in called:
                found += total(called["calls"])
        return found

    return total(entry)


def flops(closed: jax.extend.core.ClosedJaxpr) -> int:
    """Multiplications and additions of the matrix products of a traced program, those of kernels left out.

    Args:
        closed: `traced.jaxpr`.

    Returns:
        Two for each product of two numbers, over all devices.
    """

    def total(jaxpr: Any) -> int:
        found = 0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                (contracted, _), _ = eqn.params["dimension_numbers"]
                shape = eqn.invars[0].aval.shape
                found += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
            elif eqn.primitive.name != "pallas_call":
                inner = [total(one) for one in jax.extend.core.jaxprs_in_params(eqn.params)]
                times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
                found += times * (max(inner, default=0) if eqn.primitive.name == "cond" else sum(inner))
        return found

    return total(closed.jaxpr)


def trips(loop: str, condition: str) -> int:
    """Trips of a loop, by what stands behind it or by its condition, if it counts from 0; 1 if neither says."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop):
        return int(known.group(1))
    bounds = re.findall(r"s32\[\]\S* constant\((\d+)\)", condition)
    return int(bounds[0]) if len(bounds) == 1 and "direction=LT" in condition else 1


def scalar_operands(jaxpr: jax.extend.core.ClosedJaxpr, args: Sequence) -> list[tuple[str, dict[int, np.ndarray]]]:
    """What each Pallas kernel is given, as far as it depends on known arguments only.

    Args:
        jaxpr: a program.
        args: its arguments; those that are no arrays are unknown.

    Returns:
        For each run of a kernel in order: its name, and its known operands of 32-bit types by their index.
    """
    found: list[tuple[str, dict[int, np.ndarray]]] = []

    def evaluate(closed: jax.extend.core.ClosedJaxpr, args: Sequence) -> list:
        jaxpr = closed.jaxpr
        values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *args), strict=True))
        for eqn in jaxpr.eqns:
            inputs = [x.val if isinstance(x, jax.extend.core.Literal) else values[x] for x in eqn.invars]
            inner = eqn.params.get("call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr")
            outputs: Sequence = [None] * len(eqn.outvars)
            if eqn.primitive.name == "pallas_call":
                known = {i: np.asarray(x) for i, x in enumerate(inputs) if x is not None}
                found.append((str(eqn.params["name"]), {i: x for i, x in known.items() if x.dtype.itemsize == 4}))
            elif eqn.primitive.name == "scan":
                outputs = scan(eqn.params, inputs)
            elif isinstance(inner, jax.extend.core.ClosedJaxpr):
                outputs = evaluate(inner, inputs)
            elif all(x is not None for x in inputs):
                result = eqn.primitive.bind(*inputs, **eqn.params)
                outputs = result if eqn.primitive.multiple_results else [result]
            values.update(zip(eqn.outvars, outputs, strict=True))
        return [x.val if isinstance(x, jax.extend.core.Literal) else values[x] for x in jaxpr.outvars]

    def scan(params: dict[str, Any], inputs: list) -> list:
        consts, carried = params["num_consts"], params["num_consts"] + params["num_carry"]
        carry, rows = inputs[consts:carried], []
        order = range(params["length"])
        for i in reversed(order) if params["reverse"] else order:
            each = [None if x is None else x[i] for x in inputs[carried:]]
            outputs = evaluate(params["jaxpr"], [*inputs[:consts], *carry, *each])
            carry = outputs[: len(carry)]
            rows.append(outputs[len(carry) :])
        rows = rows[::-1] if params["reverse"] else rows
        return carry + [None if any(y is None for y in x) else np.stack(x) for x in zip(*rows, strict=True)]

    evaluate(jaxpr, [x if isinstance(x, np.ndarray | jax.Array) else None for x in args])
    return found
