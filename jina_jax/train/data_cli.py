"""`jina-jax data`: look at records, check them, and make records of others."""

import argparse
import contextlib
import gzip
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jina_jax import examples, hub
from jina_jax.arguments import Parser, one_of, option, positive, switch, whole
from jina_jax.examples import Example
from jina_jax.records import InputError, encode_json, whole_file
from jina_jax.train import filtering, index
from jina_jax.train.index import Index
from jina_jax.train.recipe import KINDS

DESCRIPTION = """Records to train on: look at them, check them, and make records of others.
Files end in .jsonl, .jsonl.gz, .jsonl.zst or .parquet. Kinds of records and their fields:

  text      text                        labelled  text, label
  pair      query, pos                  scored    a, b, score
  triplet   query, pos, neg (a list)

The names that sentence-transformers, FlagEmbedding, Tevatron and ms-swift give these fields are understood too."""
EXAMPLES = """examples:
  jina-jax data check pairs.jsonl
  jina-jax data stats pairs.jsonl.gz labelled.parquet
  jina-jax data filter pairs.jsonl --output filtered.jsonl --overlap 0.8
  jina-jax data mine filtered.jsonl --output triplets.jsonl --model jinaai/jina-embeddings-v3
"""
OUTPUTS = (".jsonl", ".jsonl.gz")
STRATEGIES = ("top", "random")
_SHOWN = 20


# ---- Arguments -------------------------------------------------------------------------------------------------


def add(commands: Any, raw: Any) -> Parser:
    """Add the command to a parser.

    Args:
        commands: What `add_subparsers` gave.
        raw: The formatter of help texts.

    Returns:
        Its parser, which has subcommands.
    """
    parser = commands.add_parser(
        "data", help="check and prepare records", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=raw
    )
    inner = parser.add_subparsers(dest="subcommand", metavar="SUBCOMMAND", required=True)

    def command(name: str, run: Any, help: str, several: bool) -> Parser:
        one = inner.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", formatter_class=raw)
        one.set_defaults(run=run)
        one.add_argument("inputs" if several else "input", nargs="+" if several else None, metavar="FILE")
        if name != "oasst":
            one.add_argument(
                "--kind", type=one_of(KINDS), metavar="KIND", help="kind of the records; by default told by the first"
            )
        if name not in ("check", "oasst"):
            how = "what to do with malformed records: fail (default), or skip, which counts them"
            one.add_argument("--on-bad-record", type=one_of(("fail", "skip")), default="fail", metavar="HOW", help=how)
        if not several:
            one.add_argument("--output", type=_output, required=True, metavar="FILE", help="file to write, .jsonl[.gz]")
        return one

    command("check", _check, "tell what is wrong with records", several=True)
    for name, run, help in (
        ("stats", _stats, "count records, tokens, languages and duplicates"),
        ("index", _index, "make the indexes that training reads"),
    ):
        one = command(name, run, help, several=True)
        _model(one, "whose tokenizer counts")
        one.add_argument("--index", metavar="DIR", help="directory for indexes; by default next to each file")

    command("convert", _convert, "write records with the field names of this program", several=False)

    one = command("filter", _filter, "leave out records whose texts say the same in the same words", several=False)
    overlap = "share of the shorter text's words that the longer one has too (default: 0.8)"
    one.add_argument("--overlap", type=_share, default=0.8, metavar="SHARE", help=overlap)
    one.add_argument("--min-words", type=whole, default=4, metavar="N", help="so many of them at least (default: 4)")

    one = command("oasst", _oasst, "make triplets of OpenAssistant conversations", several=False)
    one.add_argument("--negatives", type=positive, default=7, metavar="N", help="at most (default: 7)")
    margin = "how much worse an answer to the same question is (default: 0.3)"
    one.add_argument("--margin", type=float, default=0.3, metavar="X", help=margin)
    one.add_argument("--seed", type=whole, default=0, metavar="N", help="of the random answers")

    _mining_options(command("mine", _mine, "find hard negatives for pairs", several=False))
    return parser


def _mining_options(one: Parser) -> None:
    _model(one, "that finds what is near")
    tasks = "retrieval.query", "retrieval.passage"
    for flag, task in zip(("--query-task", "--passage-task"), tasks, strict=True):
        one.add_argument(flag, default=task, metavar="NAME", help=f"adapter, or none (default: {task})")
    one.add_argument("--corpus", metavar="FILE", help="further passages: records with a text")
    one.add_argument("--negatives", type=positive, default=7, metavar="N", help="at most (default: 7)")
    one.add_argument("--range-min", type=whole, default=0, metavar="N", help="leave out the N nearest (default: 0)")
    nearest = "look at the N nearest (default: 100)"
    one.add_argument("--range-max", type=positive, default=100, metavar="N", help=nearest)
    one.add_argument("--max-score", type=float, metavar="X", help="cosine to the query at most")
    one.add_argument("--absolute-margin", type=float, metavar="X", help="cosine below the positive's, by so much")
    relative = "the same as a share of the positive's (default: 0.05)"
    one.add_argument("--relative-margin", type=float, default=0.05, metavar="X", help=relative)
    strategy = "top (default, the nearest that are left) or random"
    one.add_argument("--strategy", type=one_of(STRATEGIES), default="top", metavar="HOW", help=strategy)
    switch(one, "--bm25", "take turns with passages that BM25 finds", default=False)
    one.add_argument("--seed", type=whole, default=0, metavar="N", help="of random")


def _model(parser: Parser, what: str) -> None:
    option(parser, "--model", f"directory, name on the hub, or mini (default), {what}", metavar="NAME")


def _output(value: str) -> Path:
    path = Path(value)
    if not value.endswith(OUTPUTS):
        raise argparse.ArgumentTypeError(f"{value!r} must end in {' or '.join(OUTPUTS)}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {str(path.parent)!r}; create it first")
    return path


def _share(value: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(value) <= 1:
            return float(value)
    raise argparse.ArgumentTypeError(f"{value!r} is not a number above 0 and at most 1")


# ---- Commands --------------------------------------------------------------------------------------------------


def _check(args: argparse.Namespace) -> None:
    """`jina-jax data check`."""
    failed = False
    for path in args.inputs:
        bad: list[str] = []
        kinds = [example.kind for example in examples.read(path, args.kind, "skip", bad)]
        failed |= bool(bad) or not kinds
        for line in bad[:_SHOWN]:
            _print(line)
        if len(bad) > _SHOWN:
            _print(f"... and {len(bad) - _SHOWN:,} more")
        of = f" {kinds[0]}" if kinds else ""
        _print(f"{path}: {len(kinds):,} good{of} records, {len(bad):,} bad")
    if failed:
        raise SystemExit(1)


def _stats(args: argparse.Namespace) -> None:
    """`jina-jax data stats`."""
    for number, found in enumerate(_indexes(args)):
        _print(("\n" if number else "") + statistics(found))


def _index(args: argparse.Namespace) -> None:
    """`jina-jax data index`."""
    for found in _indexes(args):
        _print(f"{found.path}: {len(found):,} {found.kind} records, {int(found.lengths.sum()):,} tokens")


def _convert(args: argparse.Namespace) -> None:
    """`jina-jax data convert`."""
    count = write(args.output, examples.read(args.input, args.kind, args.on_bad_record))
    _print(f"{args.output}: {count:,} records")


def _filter(args: argparse.Namespace) -> None:
    """`jina-jax data filter`."""
    seen = 0

    def kept() -> Iterable[Example]:
        nonlocal seen
        for example in examples.read(args.input, args.kind, args.on_bad_record):
            seen += 1
            if filtering.differs(example, args.overlap, args.min_words):
                yield example

    count = write(args.output, kept())
    _print(f"{args.output}: {count:,} of {seen:,} records kept, {seen - count:,} overlap")


def _oasst(args: argparse.Namespace) -> None:
    """`jina-jax data oasst`."""
    count = write(args.output, filtering.conversations(args.input, args.negatives, args.margin, args.seed))
    _print(f"{args.output}: {count:,} triplets")


def _mine(args: argparse.Namespace) -> None:
    """`jina-jax data mine`."""
    from jina_jax.embedder import Embedder
    from jina_jax.train import mining

    wanted = mining.Mining(
        negatives=args.negatives,
        range_min=args.range_min,
        range_max=args.range_max,
        max_score=args.max_score,
        absolute_margin=args.absolute_margin,
        relative_margin=args.relative_margin,
        strategy=args.strategy,
        lexical=args.bm25,
        seed=args.seed,
    )
    pairs = list(examples.read(args.input, args.kind, args.on_bad_record))
    corpus = [example.texts[0] for example in examples.read(args.corpus, "text")] if args.corpus else []
    embedder = Embedder.load(_find(args))
    tasks = tuple(None if task == "none" else task for task in (args.query_task, args.passage_task))
    try:
        embedder.config.task_ids(tasks)
    except ValueError as error:
        raise InputError(f"{error}; name others with --query-task and --passage-task") from error
    progress = sys.stderr.isatty()
    found = mining.mine(pairs, embedder, wanted, corpus=corpus, tasks=(tasks[0], tasks[1]), progress=progress)
    count = write(args.output, found)
    _print(f"{args.output}: {count:,} of {len(pairs):,} pairs have negatives now")


# ---- Parts -----------------------------------------------------------------------------------------------------


def write(path: Path, found: Iterable[Example]) -> int:
    """Write records as JSON lines, whole or not at all.

    Args:
        path: A file, packed if it ends in `.gz`.
        found: The records.

    Returns:
        How many there were.

    Raises:
        OSError: If it cannot be written; nothing is left behind then.
    """
    count = 0
    with whole_file(path) as plain:
        packed = path.suffix == ".gz"
        # Without a time, so that equal records make equal files.
        with gzip.GzipFile("", "wb", fileobj=plain, mtime=0) if packed else contextlib.nullcontext(plain) as file:
            for example in found:
                file.write(encode_json(json.dumps(examples.to_json(example), ensure_ascii=False)))
                count += 1
    return count


def statistics(found: Index) -> str:
    """What is in a file, as a table.

    Args:
        found: Its index.

    Returns:
        Lines, without a final newline.
    """
    total = len(found)
    rows = [f"{found.path}", f"  records     {total:,} of the kind {found.kind}"]
    if found.bad:
        rows.append(f"  left out    {found.bad:,} bad records")
    rows.append(f"  {'tokens':<20}{'texts':>12}{'min':>8}{'median':>8}{'p95':>8}{'max':>8}{'sum':>14}")
    roles = {"pair": ("query", "pos"), "triplet": ("query", "pos"), "scored": ("a", "b")}.get(found.kind, ("text",))
    starts, counts = found.starts[:-1], found.counts()
    columns = {name: found.lengths[starts + slot] for slot, name in enumerate(roles)}
    if found.kind == "triplet":
        place = np.arange(len(found.lengths)) - np.repeat(starts, np.diff(found.starts))
        columns["neg"] = found.lengths[(place > 1) & (place < np.repeat(counts, np.diff(found.starts)))]
    for name, lengths in columns.items():
        low, median, high, most = np.percentile(lengths, (0, 50, 95, 100), method="inverted_cdf")
        numbers = f"{int(low):>8,}{int(median):>8,}{int(high):>8,}{int(most):>8,}{int(lengths.sum()):>14,}"
        rows.append(f"    {name:<18}{len(lengths):>12,}{numbers}")
    rows += _table("languages", found.langs, found.lang_names)
    if found.kind == "labelled":
        rows += _table("labels", found.labels, [str(json.loads(name)) for name in found.label_names])
    records = [found.hashes[start:stop].tobytes() for start, stop in zip(starts, found.starts[1:], strict=True)]
    same = {"records": total - len(set(records))}
    if found.kind in ("pair", "triplet"):
        same |= {name: total - len(np.unique(found.hashes[starts + slot])) for slot, name in enumerate(roles)}
    shares = ", ".join(f"{name} {count:,} ({count / total:.1%})" for name, count in same.items())
    rows.append(f"  duplicates  {shares}")
    return "\n".join(rows)


def _table(title: str, codes: np.ndarray, names: list[str]) -> list[str]:
    """A line with the shares of some names, the most frequent first."""
    counts = np.bincount(codes + 1, minlength=len(names) + 1)
    pairs = sorted(zip(["none", *names], counts.tolist(), strict=True), key=lambda pair: -pair[1])
    shown = [f"{name} {count:,} ({count / len(codes):.1%})" for name, count in pairs[:10] if count]
    more = sum(count > 0 for _, count in pairs[10:])
    return [f"  {title:<12}{', '.join(shown)}" + (f", and {more} more" if more else "")]


def _indexes(args: argparse.Namespace) -> Iterable[Index]:
    from jina_jax.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(_find(args))
    return [index.open(path, tokenizer, args.kind, args.index, args.on_bad_record) for path in args.inputs]


def _find(args: argparse.Namespace) -> Path:
    """Directory of the model; says so where it is one that nobody asked for."""
    if args.model is None:
        print(f"jina-jax: note: this is {hub.BUNDLED_NOTE} with --model", file=sys.stderr)
    return hub.find(args.model or "mini")


def _print(text: str) -> None:
    """Print; what the terminal's encoding cannot say is escaped rather than an error."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
