"""Arguments of commands: options that environment variables set as well, and complaints of one line."""

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jina_jax.records import InputError


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line like all others."""

    def error(self, message: str) -> NoReturn:
        """Raise rather than print and exit."""
        raise InputError(f"{message} (see {self.prog} --help)")


def option(parser: argparse.ArgumentParser, flag: str, help: str, **arguments: Any) -> None:
    """An option that an environment variable can set as well."""
    variable = "JINA_JAX_" + flag.removeprefix("--").replace("-", "_").upper()
    # argparse passes a default that is a string through `type`, like an argument.
    arguments["default"] = os.environ.get(variable) or arguments.get("default")
    parser.add_argument(flag, help=f"{help} [env: {variable}]", **arguments)


def switch(parser: argparse.ArgumentParser, flag: str, help: str, default: bool) -> None:
    """An on/off option, `--flag` and `--no-flag`, that an environment variable can set as well."""
    variable = "JINA_JAX_" + flag.removeprefix("--").replace("-", "_").upper()
    value = os.environ.get(variable) or str(int(default))
    words = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)
    if value.lower() not in words:
        raise InputError(f"environment variable {variable}={value!r} must be 1 or 0")
    parser.add_argument(
        flag,
        action=argparse.BooleanOptionalAction,
        default=words[value.lower()],
        help=f"{help}; {'on' if default else 'off'} by default [env: {variable}=1|0]",
    )


def positive(value: str) -> int:
    """A type for argparse: a whole number of at least 1."""
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a whole number of at least 1")
    return int(value)


def whole(value: str) -> int:
    """A type for argparse: a whole number of at least 0."""
    if not value.isdecimal():
        raise argparse.ArgumentTypeError(f"{value!r} is not a whole number of at least 0")
    return int(value)


def one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """A type for argparse whose message says what there is."""

    def check(value: str) -> str:
        if value not in choices:
            raise argparse.ArgumentTypeError(f"{value!r} is not one of {', '.join(choices)}")
        return value

    return check
