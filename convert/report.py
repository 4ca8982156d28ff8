"""What the tools tell their user: the lines of `verify`, one check each, and the error for a wrong request."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

WIDTHS = (56, 16, 10)


class UsageError(ValueError):
    """What was asked for cannot be done; the message says what can."""


class Check(NamedTuple):
    """One line.

    Attributes:
        name: What was compared.
        found: What was found, such as the largest difference.
        limit: What it had to be.
        passed: Whether it was so; None where the check does not apply, and counts neither way.
    """

    name: str
    found: str
    limit: str
    passed: bool | None


def within(name: str, found: float, limit: float) -> Check:
    """A difference that must not exceed a limit (and must not be NaN)."""
    return Check(name, f"{found:.2e}", f"{limit:.1e}", bool(found <= limit))


def same(name: str, equal: bool) -> Check:
    """Two things that must be equal."""
    return Check(name, "equal" if equal else "differs", "equal", equal)


def skipped(name: str, why: str) -> Check:
    """A check that does not apply, and why."""
    return Check(name, why, "", None)


def show(title: str, checks: Iterable[Check]) -> int:
    """Print checks as they come in, then how many passed.

    Args:
        title: The line above them; nothing is printed before the first check is there.
        checks: The checks.

    Returns:
        The number that failed.
    """
    passed = failed = 0
    for number, check in enumerate(checks):
        if number == 0:
            print(title)
            _line("check", "found", "limit", "")
        if check.passed is None:
            print(f"{check.name:<{WIDTHS[0]}}  {check.found}", flush=True)
            continue
        passed, failed = passed + bool(check.passed), failed + (not check.passed)
        _line(check.name, check.found, check.limit, "ok" if check.passed else "MISS")
    print(f"{passed} checks passed, {failed} failed", flush=True)
    return failed


def _line(name: str, found: str, limit: str, verdict: str) -> None:
    cells = f"{name:<{WIDTHS[0]}}  {found:>{WIDTHS[1]}}  {limit:>{WIDTHS[2]}}  {verdict}"
    print(cells.rstrip(), flush=True)
