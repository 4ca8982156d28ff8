"""The command line of the file-to-file tools: `python -m convert to-jax|to-torch|merge|tokenizer|verify`.

Exit codes: 0 all well, 1 a failure (a damaged checkpoint, a check that missed), 2 something that was asked for
wrongly. JINA_JAX_DEBUG=1 shows the traceback of an error.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from convert import tokenizer
from convert.report import UsageError

FAILED, MISUSED = 1, 2
DTYPES = ("float32", "bfloat16", "keep")
PIP = "pip install 'jina-jax[convert]'"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments after the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parsed = None if arguments[:1] == ["tokenizer"] else _parser().parse_args(arguments)
    try:
        return _tokenizer(arguments[1:]) if parsed is None else _run(parsed)
    except ImportError as error:
        return _complain(error, f"{error}; this needs {PIP}", MISUSED)
    except (UsageError, FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        return _complain(error, str(error), MISUSED)
    except Exception as error:
        return _complain(error, str(error) or type(error).__name__, FAILED)


def _run(arguments: argparse.Namespace) -> int:
    """Run any command but `tokenizer`; imported here, since JAX and PyTorch take seconds."""
    from convert import rewrite

    if arguments.command in ("to-jax", "to-torch"):
        rewrite.rewrite(arguments.source, arguments.output, arguments.layout, arguments.dtype)
    elif arguments.command == "merge":
        rewrite.merge(arguments.source, arguments.output, arguments.task, arguments.layout, arguments.dtype)
    else:
        from convert import report, verify

        checks = verify.verify(arguments.source, tokens=arguments.tokens, dtype=arguments.dtype, fast=arguments.fast)
        judge = "float32" if arguments.fast else "float64"
        title = f"{arguments.source}: jina_jax in {arguments.dtype} against PyTorch in {judge}"
        return FAILED if report.show(title, checks) else 0
    return 0


def _tokenizer(arguments: Sequence[str]) -> int:
    """Run `tokenizer`, with this program's exit codes."""
    try:
        tokenizer.main(arguments)
    except SystemExit as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m convert", description="Checkpoints from one layout to another.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("source", metavar="SOURCE", help="a directory, in any layout, or a name on the hub")
        return added

    to_jax = command("to-jax", "Write a checkpoint in our own layout; reads pytorch_model.bin, too.")
    to_jax.add_argument("--layout", choices=("own", "orbax"), default="own", help="default: own")
    to_torch = command("to-torch", "Write a checkpoint in one of the two public layouts.")
    to_torch.add_argument("--layout", choices=("original", "hf"), required=True)
    merge = command("merge", "Fold one adapter into the weights.")
    merge.add_argument("--task", required=True, metavar="NAME", help="the adapter, such as retrieval.query")
    merge.add_argument("--layout", choices=("own", "hf"), default="own", help="default: own")
    for each, default in ((to_jax, "keep"), (to_torch, "keep"), (merge, "float32")):
        each.add_argument("output", metavar="OUTPUT", type=Path, help="the directory to create")
        each.add_argument("--dtype", choices=DTYPES, default=default, help=f"default: {default}")

    commands.add_parser("tokenizer", add_help=False, help="Write a SentencePiece .model from a tokenizer.json.")

    verify = command("verify", "Compare ours with PyTorch on a checkpoint, and with published values.")
    verify.add_argument("--tokens", type=int, default=64, metavar="N", help="length of the longest row; default: 64")
    verify.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="ours; default: float32")
    verify.add_argument("--fast", action="store_true", help="PyTorch in float32, not float64; wider limits")
    return parser


def _complain(error: Exception, message: str, code: int) -> int:
    if os.environ.get("JINA_JAX_DEBUG"):
        raise error
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
