"""`jina-jax train` and `jina-jax ablate`: recipes from a Python file, changed by flags."""

import argparse
import inspect
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

from jina_jax.arguments import Parser, one_of, option, positive, switch, whole
from jina_jax.records import InputError
from jina_jax.train.recipe import Recipe, override

DESCRIPTION = """Train by a recipe: a Python file with get_config(), such as those in configs/."""
EXAMPLES = """examples:
  jina-jax train configs/new_adapter.py --data my_pairs.jsonl --task my-domain
  jina-jax train configs/adapters.py --adapter classification --data labelled/ --set phases.0.lr=1e-4
  jina-jax train configs/pairs.py --preset tiny --dry-run
  jina-jax train configs/pairs.py --data pairs/ --coordinator host0:1234 --num-processes 4 --process-id 0

exit codes: 0 done, 2 a mistake in the recipe or the arguments, 3 in the records, 4 the loss diverged, 75 asked to stop
(SIGTERM, Ctrl-C) and saved: the same command goes on; 1 anything else
"""
TABLES = ("table6", "table7", "table8")
ABLATE = """Run an ablation of the paper at the size of a recipe, and print its rows beside the paper's: table6 (data
against known failures, in or out), table7 (Matryoshka sizes), table8 (one or two retrieval adapters, with or without
instructions)."""
ABLATE_EXAMPLES = """examples:
  jina-jax ablate table8 --config configs/adapters.py --preset tiny
  jina-jax ablate table6 --config configs/adapters.py --model mini --data triplets/ --eval-data held_out/

"""
EXIT_DATA, EXIT_DIVERGED, EXIT_STOPPED = 3, 4, 75
# Flags that are arguments of get_config.
GIVEN = {
    "data": ("records: a file, a directory or a glob; may be repeated", "append"),
    "eval-data": ("held-out records", None),
    "task": ("name of the adapter that trains", None),
    "adapter": ("which of the paper's adapters", None),
    "model": ("where to start from: a directory, a name on the hub, or mini", None),
    "preset": ("size of the run, such as tiny", None),
}


def add(commands: Any, raw: Any) -> dict[str, Parser]:
    """Add the commands to a parser.

    Args:
        commands: What `add_subparsers` gave.
        raw: The formatter of help texts.

    Returns:
        Their parsers by name.
    """
    return {"train": _add_train(commands, raw), "ablate": _add_ablate(commands, raw)}


def _add_ablate(commands: Any, raw: Any) -> Parser:
    parser = commands.add_parser(
        "ablate", help="run an ablation of the paper", description=ABLATE, epilog=ABLATE_EXAMPLES, formatter_class=raw
    )
    parser.set_defaults(run=run_ablate)
    parser.add_argument("table", type=one_of(TABLES), metavar="TABLE", help=f"one of {', '.join(TABLES)}")
    parser.add_argument("--config", metavar="CONFIG", help="Python file with get_config(), such as configs/adapters.py")
    for name, (text, action) in GIVEN.items():
        if name != "adapter":
            parser.add_argument(f"--{name}", help=text, action=action or "store", metavar=name.upper())
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change all recipes")
    option(parser, "--run-dir", "directory of the runs (default: runs/TABLE)", metavar="DIR")
    return parser


def _add_train(commands: Any, raw: Any) -> Parser:
    parser = commands.add_parser(
        "train", help="train adapters or backbones", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=raw
    )
    parser.set_defaults(run=run)
    parser.add_argument("recipe", metavar="CONFIG", help="Python file with get_config() -> Recipe")
    for name, (text, action) in GIVEN.items():
        parser.add_argument(f"--{name}", help=text, action=action or "store", metavar=name.upper())
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change the recipe, such as phases.0.lr=1e-4"
    )
    option(parser, "--run-dir", "directory of the run (default: runs/CONFIG)", metavar="DIR")
    # No environment variable: that of embed-corpus --resume is 1 or 0.
    how = "auto (default), never, or the step of a checkpoint"
    parser.add_argument("--resume", help=how, default="auto", metavar="HOW")
    switch(parser, "--allow-plan-change", "go on although recipe or records have changed", default=False)
    switch(parser, "--dry-run", "say what would be done, and the memory it takes, and stop", default=False)
    option(parser, "--coordinator", "process 0, if not told by the cluster", metavar="HOST:PORT")
    option(parser, "--num-processes", "processes of the job", type=positive, metavar="N")
    option(parser, "--process-id", "number of this one, from 0", type=whole, metavar="I")
    return parser


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        InputError: If the recipe or an argument is wrong.
        SystemExit: With the exit code, if it is another one than 0, 1 and 2.
    """
    recipe = override(load(args.recipe, given_by(args)), args.set)
    directory = Path(args.run_dir or Path("runs") / Path(args.recipe).stem)
    from jina_jax import compilation, distributed

    compilation.enable_cache()
    try:
        distributed.start(args.coordinator, args.num_processes, args.process_id)
    except ValueError as error:
        raise InputError(str(error)) from error
    from jina_jax.train import loop

    try:
        if args.dry_run:
            print("\n".join(loop.rehearse(recipe, directory)), flush=True)
            return
        outcome = loop.train(
            recipe,
            directory,
            resume=args.resume,
            allow_plan_change=args.allow_plan_change,
            command=shlex.join(["jina-jax", *sys.argv[1:]]),
        )
    except loop.DataError as error:
        _leave(error, EXIT_DATA)
    except loop.DivergedError as error:
        _leave(error, EXIT_DIVERGED)
    else:
        if not outcome.finished:
            raise SystemExit(EXIT_STOPPED)


def run_ablate(args: argparse.Namespace) -> None:
    """Run an ablation.

    Raises:
        InputError: If a recipe or an argument is wrong.
        SystemExit: As in `run`.
    """
    if args.config is None:
        raise InputError("no --config; name a Python file with get_config(), such as configs/adapters.py")
    from jina_jax import compilation
    from jina_jax.train import ablate, loop

    compilation.enable_cache()

    def recipe(adapter: str) -> Recipe:
        return override(load(args.config, given_by(args) | {"adapter": adapter}), args.set)

    directory = Path(args.run_dir or Path("runs") / args.table)
    try:
        print(ablate.ablate(args.table, recipe, directory, shlex.join(["jina-jax", *sys.argv[1:]])), end="", flush=True)
    except loop.DataError as error:
        _leave(error, EXIT_DATA)
    except loop.DivergedError as error:
        _leave(error, EXIT_DIVERGED)


def given_by(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments for get_config; one file is no list."""
    given = {name: getattr(args, name, None) for name in (flag.replace("-", "_") for flag in GIVEN)}
    if given["data"] is not None and len(given["data"]) == 1:
        (given["data"],) = given["data"]
    return given


def _leave(error: Exception, code: int) -> None:
    print(f"jina-jax: error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(code) from error


def load(path: str, given: dict[str, Any]) -> Recipe:
    """The recipe of a file.

    Args:
        path: The file.
        given: Arguments for its get_config; those that are None are left out.

    Returns:
        The recipe.

    Raises:
        InputError: If there is no such file or function, or it does not take one of the arguments.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; a recipe is a Python file with get_config(), see configs/")
    get_config = runpy.run_path(path).get("get_config")
    if get_config is None:
        raise InputError(f"{path}: has no get_config()")
    given = {name: value for name, value in given.items() if value is not None}
    takes = inspect.signature(get_config).parameters
    for name in given:
        if name not in takes:
            flags = ", ".join(f"--{known.replace('_', '-')}" for known in takes if known.replace("_", "-") in GIVEN)
            raise InputError(f"{path}: takes no --{name.replace('_', '-')}; it takes: {flags or 'none'}, and --set")
    needed = [name for name, one in takes.items() if one.default is inspect.Parameter.empty and name not in given]
    if needed:
        raise InputError(f"{path}: needs {', '.join('--' + name.replace('_', '-') for name in needed)}")
    recipe = get_config(**given)
    if not isinstance(recipe, Recipe):
        raise InputError(f"{path}: get_config() must return a train.recipe.Recipe, not {type(recipe).__name__}")
    return recipe
