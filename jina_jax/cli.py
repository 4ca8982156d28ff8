"""The command line: `jina-jax embed`, `embed-corpus`, `train`, `data`, `ablate`, `serve`, `bench` and `info`.

Exit codes: 0 done; 2 a mistake in what the user gave; 1 anything else that went wrong, such as a damaged checkpoint or
a full disk; 130 interrupted; 141 nobody reads the output any more. Errors are short, without a traceback;
JINA_JAX_DEBUG=1 shows it.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from jina_jax import compilation, hub, records
from jina_jax._version import __version__
from jina_jax.arguments import Parser, one_of, option, positive, switch, whole
from jina_jax.quantization import PRECISIONS
from jina_jax.records import InputError, Record

TABLE_LIMIT = 50
MESSAGE_LINES = 20
OUTPUTS = (".jsonl", ".npy")
PROFILES = ("queries", "passages", "mix")
DTYPES = ("float32", "bfloat16")
LONG: dict[str, Any] = {"cut": True, "error": "error", "windows": False}

DESCRIPTION = "Text embeddings with jina-embeddings-v3 in JAX."
EMBED = """Embed texts; write JSON lines with "index", "id" (if the record has one), "text" and "embedding".
With --chunks, a line for each chunk, with "chunk" (its number), "start" and "end" (characters) too."""
NOTES = """environment:
  JINA_JAX_CACHE   directory for compiled programs (default: ~/.cache/jina_jax/xla), or "off"
  JINA_JAX_DEBUG   1 shows the traceback of an error

exit codes: 0 done, 1 failed, 2 a mistake in what was given, 130 interrupted
"""
CORPUS = """Embed a corpus of any size into Parquet files DIR/shards/*.parquet with columns "id" and "embedding".
With --chunks, a row for each chunk, with "chunk", "start", "end" and "status" too. A run that was killed goes on with
--resume; --verify alone checks a directory."""
CORPUS_EXAMPLES = """examples:
  jina-jax embed-corpus corpus.jsonl.gz --output embedded --task retrieval.passage
  jina-jax embed-corpus s3://bucket/parquet/ --output s3://bucket/embedded --id-column url --precision float16 --resume
  jina-jax embed-corpus texts/*.parquet --output embedded --num-processes 4 --process-id 0   # and 1, 2, 3 elsewhere
  jina-jax embed-corpus --output embedded --verify

"""
EXAMPLES = """examples:
  jina-jax embed "Hello" "Hallo" --similarity
  jina-jax embed corpus.jsonl --task retrieval.passage --dimensions 256 --output corpus.npy
  sort -u names.txt | jina-jax embed - --model jinaai/jina-embeddings-v3 > names.jsonl
  jina-jax embed article.jsonl --chunks sentences --task retrieval.passage > chunks.jsonl
  jina-jax embed -- "-texts that begin with a dash"

"""


# ---- Arguments -------------------------------------------------------------------------------------------------


def _chunker(value: str) -> str | int:
    if value == "sentences" or (value.isdecimal() and int(value)):
        return value if value == "sentences" else int(value)
    raise argparse.ArgumentTypeError(f"{value!r} is neither 'sentences' nor a number of tokens")


def _output(value: str) -> Path:
    path = Path(value)
    if path.suffix.lower() not in OUTPUTS:
        raise argparse.ArgumentTypeError(f"{value!r} must end in {' or '.join(OUTPUTS)}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{value!r} is a directory")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {str(path.parent)!r}; create it first")
    if not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"the directory {str(path.parent)!r} cannot be written to")
    return path


def _parsers() -> tuple[Parser, dict[str, argparse.ArgumentParser]]:
    """The parser of everything, and that of each command."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="jina-jax", description=DESCRIPTION, epilog=NOTES, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"jina-jax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    dtype = {"type": one_of(DTYPES), "default": "float32", "metavar": "TYPE"}
    embed = commands.add_parser(
        "embed", help="embed texts", description=EMBED, epilog=EXAMPLES + NOTES, formatter_class=raw
    )
    embed.set_defaults(run=_embed)
    embed.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="a text; - for the lines of standard input; FILE.txt (a text on every line, empty ones included); "
        'FILE.jsonl (a string or {"text": ..., "id": ..., "task": ...} on every line); also .txt.gz and .jsonl.gz',
    )
    _encoding_options(embed)
    option(embed, "--output", "write to this file, .jsonl or .npy, rather than stdout", type=_output, metavar="FILE")
    switch(embed, "--similarity", "print a table of cosine similarities", default=False)

    corpus = commands.add_parser(
        "embed-corpus",
        help="embed a corpus of any size into Parquet",
        description=CORPUS,
        epilog=CORPUS_EXAMPLES + NOTES,
        formatter_class=raw,
    )
    corpus.set_defaults(run=_embed_corpus)
    formats = ".parquet, .jsonl, .txt (a text on every line), the last two also with .gz or .zst"
    corpus.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help=f"files ({formats}), directories of them, directories of Hugging Face data sets (save_to_disk), globs, or "
        "URLs such as s3://...",
    )
    option(corpus, "--output", "directory or URL to write to", metavar="DIR")
    option(corpus, "--text-column", "column, or key, of the text (default: text)", default="text", metavar="NAME")
    ids = "of the id, a string or whole number (default: id, where there is one; without one ids are INPUT:ROW)"
    option(corpus, "--id-column", ids, metavar="NAME")
    option(
        corpus, "--task-column", "of the row's task (default: task, where there is one; '' for none)", metavar="NAME"
    )
    _encoding_options(corpus)
    option(corpus, "--ranges", "for int8: least and largest value of each dimension, [2, E]", metavar="FILE.npy")
    option(corpus, "--shard-rows", "rows of a shard (default: 8192)", type=positive, default=8192, metavar="N")
    switch(corpus, "--resume", "finish a run that was interrupted", default=False)
    switch(corpus, "--verify", "check that all is there and whole, after the run or, without INPUT, alone", False)
    option(corpus, "--coordinator", "process 0, if not told by the cluster", metavar="HOST:PORT")
    option(corpus, "--num-processes", "processes that share the work", type=positive, metavar="N")
    option(corpus, "--process-id", "number of this one, from 0", type=whole, metavar="I")

    bench = commands.add_parser(
        "bench", help="measure speed", description="Measure how fast a model embeds here, by length of text."
    )
    bench.set_defaults(run=_bench)
    option(bench, "--model", f"directory, name on the hub such as {hub.REAL_MODEL}, or mini (default)", metavar="NAME")
    option(bench, "--revision", "branch, tag or commit on the hub", metavar="NAME")
    option(bench, "--task", "task of the texts; without one, no adapter and no prompt", metavar="NAME")
    option(bench, "--dtype", "type to compute in: float32 (default, exact) or bfloat16", **dtype)
    profiles = "texts of 4-32 tokens (queries), of 64-512 (passages), of 4-8192, most of them short (mix); default: all"
    bench.add_argument("--profile", help=profiles, type=one_of(PROFILES), action="append", metavar="NAME")
    bench.add_argument("--tokens", help="tokens in all, for each profile", type=positive, default=20_000, metavar="N")
    bench.add_argument("--rounds", help="timed runs; the median counts", type=positive, default=3, metavar="N")
    bench.add_argument("--json", action="store_true", help="print JSON")

    from jina_jax.serve import cli as serve_cli
    from jina_jax.train import cli as train_cli
    from jina_jax.train import data_cli

    training = train_cli.add(commands, raw)
    data_cli.add(commands, raw)
    serve = serve_cli.add(commands, raw, NOTES)

    info = commands.add_parser("info", help="describe a model", description="Describe a model without loading it.")
    info.set_defaults(run=_info)
    model = os.environ.get("JINA_JAX_MODEL")
    info.add_argument("model", nargs="?", default=model, help="as for embed --model [env: JINA_JAX_MODEL]")
    option(info, "--revision", "branch, tag or commit on the hub", metavar="NAME")
    info.add_argument("--json", action="store_true", help="print JSON")
    return parser, {"embed": embed, "embed-corpus": corpus, **training, "serve": serve, "bench": bench, "info": info}


def _encoding_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that embeds texts: the model, and what becomes of a text."""
    model = f"directory, name on the hub such as {hub.REAL_MODEL}, or mini (default)"
    option(parser, "--model", model, metavar="NAME")
    option(parser, "--revision", "branch, tag or commit on the hub", metavar="NAME")
    option(parser, "--task", "task of texts that name none; without one, no adapter and no prompt", metavar="NAME")
    switch(parser, "--prompts", "put the task's prompt before each text", default=True)
    option(parser, "--dimensions", "numbers to keep of each embedding", type=positive, metavar="N")
    switch(parser, "--normalize", "scale embeddings to unit length", default=True)
    dtype = {"type": one_of(DTYPES), "default": "float32", "metavar": "TYPE"}
    option(parser, "--dtype", "float32 (default, exact) or bfloat16", **dtype)
    batch = "tokens computed at once, padding included (default: 1024 on a CPU, else 32768)"
    option(parser, "--batch-tokens", batch, type=positive, metavar="N")
    long = "texts that are too long: cut (default), error, or windows (embed all of it in parts that overlap)"
    option(parser, "--long", long, type=one_of(tuple(LONG)), default="cut", metavar="HOW")
    chunks = "late chunking: an embedding for each sentence (sentences) or for each N tokens"
    option(parser, "--chunks", chunks, type=_chunker, metavar="sentences|N")
    precision = {"type": one_of(PRECISIONS), "default": "float32", "metavar": "TYPE"}
    option(parser, "--precision", f"type of the numbers: {', '.join(PRECISIONS)}", **precision)


# ---- Commands --------------------------------------------------------------------------------------------------


def _embed(args: argparse.Namespace) -> None:
    """`jina-jax embed`."""
    inputs = [*args.inputs, *args.literal]
    if not inputs and (sys.stdin is None or sys.stdin.isatty()):
        raise InputError("nothing to embed; pass texts, a FILE.txt or FILE.jsonl, or - for standard input")
    found = records.read(inputs or ["-"], args.task)
    if args.similarity and len(found) > TABLE_LIMIT:
        raise InputError(
            f"--similarity prints a table of at most {TABLE_LIMIT} texts, not {len(found)}; "
            "use --output FILE.npy and compare the embeddings"
        )
    directory = _find(args)
    compilation.enable_cache()
    from jina_jax.embedder import Embedder

    embedder = Embedder.load(directory, dtype=args.dtype)
    for record in found:  # here rather than in `encode`, because here the line is known
        try:
            embedder.config.task_ids([record.task])
        except ValueError as error:
            raise InputError(f"{record.where}: {error}") from error
    options = _encoding(args)
    progress = sys.stderr.isatty()
    try:
        if args.chunks is None:
            tasks = [record.task for record in found]
            task = tasks if any(tasks) else None
            embeddings = embedder.encode([record.text for record in found], task=task, progress=progress, **options)
        else:
            found, embeddings = _embed_chunks(embedder, found, args.chunks, progress, options)
    except ValueError as error:
        raise InputError(str(error)) from error
    if not np.isfinite(embeddings).all():
        raise ValueError(f"the model gave embeddings that are not finite; are the weights in {directory} whole?")

    if args.output is not None:
        records.write(args.output, found, embeddings)
    if args.similarity:
        columns = shutil.get_terminal_size((100, 24)).columns
        _print(records.similarity_table([record.text for record in found], embeddings, columns))
    elif args.output is None:
        for line in records.json_lines(found, embeddings):
            sys.stdout.buffer.write(records.encode_json(line))
        sys.stdout.buffer.flush()


def _encoding(args: argparse.Namespace) -> dict[str, Any]:
    """What `_encoding_options` say to `Embedder.encode`."""
    return {
        "dimensions": args.dimensions,
        "normalize": args.normalize,
        "prompts": args.prompts,
        "precision": args.precision,
        "batch_tokens": args.batch_tokens,
        "truncate": LONG[args.long],
    }


def _embed_chunks(
    embedder: Any, found: list[Record], chunker: str | int, progress: bool, options: dict[str, Any]
) -> tuple[list[Record], np.ndarray]:
    """A record and an embedding for each chunk of each record."""
    from tqdm import tqdm

    chunks, embeddings = [], [embedder.encode([], dimensions=options["dimensions"], precision=options["precision"])]
    with tqdm(total=len(found), unit="document", disable=not progress) as bar:
        # Tasks are one for a stream of documents, so each run of records with the same task is a stream.
        for task, group in itertools.groupby(found, key=lambda record: record.task):
            records = list(group)
            documents = embedder.encode_documents([one.text for one in records], chunker=chunker, task=task, **options)
            for record, document in zip(records, documents, strict=True):
                for number, (start, stop) in enumerate(document.spans.tolist()):
                    chunks.append(
                        dataclasses.replace(record, text=record.text[start:stop], chunk=(number, start, stop))
                    )
                embeddings.append(document.embeddings)
                bar.update()
    return chunks, np.concatenate(embeddings)


def _embed_corpus(args: argparse.Namespace) -> None:
    """`jina-jax embed-corpus`."""
    inputs = [*args.inputs, *args.literal]
    if args.output is None:
        raise InputError("no --output; name the directory to write to")
    if not inputs and not args.verify:
        raise InputError("nothing to embed; pass files, directories, globs or URLs, or --verify to check an output")
    from jina_jax import corpus

    process = 0
    if inputs:
        process, processes = _place(args)
        directory = _find(args)
        compilation.enable_cache()
        from jina_jax.embedder import Embedder

        job = corpus.Job(
            inputs=inputs,
            output=args.output,
            columns=corpus.Columns(args.text_column, args.id_column, args.task_column),
            task=args.task,
            chunker=args.chunks,
            encode=_encoding(args) | {"ranges": _ranges(args.ranges)},
            shard_rows=args.shard_rows,
            resume=args.resume,
            process=process,
            processes=processes,
        )
        model = corpus.describe_model(args.model or "mini", directory)
        with _termination():
            done = corpus.run(job, Embedder.load(directory, dtype=args.dtype, mesh=_local_mesh()), model)
        if process == 0:
            _print(done)
    if args.verify and process == 0:
        done, problems = corpus.verify(args.output)
        more = [f"... and {len(problems) - MESSAGE_LINES:,} more"] if len(problems) > MESSAGE_LINES else []
        _print("\n".join([done, *problems[:MESSAGE_LINES], *more]))
        if problems:
            raise SystemExit(1)


def _place(args: argparse.Namespace) -> tuple[int, int]:
    """Number of this process, and of all of them."""
    given = (args.coordinator, args.num_processes, args.process_id)
    if (args.num_processes is None) != (args.process_id is None):
        raise InputError("--num-processes and --process-id go together")
    if args.process_id is not None and args.process_id >= args.num_processes:
        raise InputError(f"--process-id {args.process_id} must be less than --num-processes {args.num_processes}")
    # Shards are shared out by number; nothing else is needed where the numbers are given.
    if args.coordinator is None and args.process_id is not None:
        return args.process_id, args.num_processes
    import jax

    from jina_jax import distributed

    process, processes = distributed.start(*given)
    if processes > 1:
        jax.distributed.shutdown()  # the numbers are all that is needed: nobody shall fall with another
    return process, processes


def _local_mesh() -> Any:
    """All devices of this process; None if there is but one."""
    import jax

    from jina_jax import sharding

    devices = jax.local_devices()
    return sharding.make_mesh(devices=devices) if len(devices) > 1 else None


def _ranges(name: str | None) -> np.ndarray | None:
    if name is None:
        return None
    try:
        return np.load(name).astype(np.float32)
    except ValueError as error:
        raise InputError(f"{name}: not an array of numbers ({error}); quantization.calibrate makes one") from error


@contextlib.contextmanager
def _termination() -> Iterator[None]:
    """End tidily when asked to by SIGTERM, as cluster managers do."""

    def end(*_: Any) -> NoReturn:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _bench(args: argparse.Namespace) -> None:
    """`jina-jax bench`."""
    directory = _find(args)
    import jax

    from jina_jax import bench
    from jina_jax.embedder import Embedder

    embedder = Embedder.load(directory, dtype=args.dtype)
    try:
        embedder.config.task_ids([args.task])
    except ValueError as error:
        raise InputError(str(error)) from error
    rows = [
        bench.measure(embedder, profile, tokens=args.tokens, rounds=args.rounds, task=args.task)
        for profile in args.profile or PROFILES
    ]
    about = {"device": jax.devices()[0].device_kind, "dtype": args.dtype, "jax": jax.__version__, "profiles": rows}
    _print(json.dumps(about, indent=2) if args.json else bench.table(rows))


def _info(args: argparse.Namespace) -> None:
    """`jina-jax info`."""
    from jina_jax import info

    facts = info.describe(_find(args), args.model or "mini")
    _print(json.dumps(facts, indent=2, ensure_ascii=False) if args.json else info.readable(facts))


def _find(args: argparse.Namespace) -> Path:
    """Directory of the model; says so where it is one that nobody asked for."""
    if args.model is None:
        _print(f"jina-jax: note: this is {hub.BUNDLED_NOTE} with --model", sys.stderr)
    return hub.find(args.model or "mini", args.revision)


# ---- Entry -----------------------------------------------------------------------------------------------------


def _message(error: BaseException) -> str:
    """An error in a line, or a few where it lists problems."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'output'}: {error.strerror}"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "out of memory; a smaller --batch-tokens needs less, and so do shorter texts"
    lines = (str(error) or type(error).__name__).splitlines()
    if len(lines) > MESSAGE_LINES:
        lines[MESSAGE_LINES:] = [f"  ... and {len(lines) - MESSAGE_LINES} more"]
    return "\n".join(lines)


def _print(text: str, stream: Any = None) -> None:
    """Print; what the terminal's encoding cannot say is escaped rather than an error."""
    stream = stream or sys.stdout
    encoding = stream.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    try:
        arguments = list(sys.argv[1:] if argv is None else argv)
        parser, commands = _parsers()
        # Commands parse their own arguments, because only so may options stand between texts.
        if arguments and arguments[0] in commands:
            end = arguments.index("--") if "--" in arguments else len(arguments)
            args = commands[arguments[0]].parse_intermixed_args(arguments[1:end])
            args.literal = arguments[end + 1 :]
        else:
            args = parser.parse_args(arguments)
        args.run(args)
    except SystemExit as error:  # --help and --version
        return int(error.code or 0)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _abandon_stdout()
        return 141
    except (ValueError, OSError, MemoryError, RuntimeError, ImportError) as error:
        if os.environ.get("JINA_JAX_DEBUG"):
            traceback.print_exc()
        _print(f"jina-jax: error: {_message(error)}", sys.stderr)
        _abandon_stdout()
        return 2 if isinstance(error, InputError | FileNotFoundError | NotADirectoryError) else 1
    return 0


def _abandon_stdout() -> None:
    """If stdout takes nothing more, let what is left go nowhere: Python would complain once again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
