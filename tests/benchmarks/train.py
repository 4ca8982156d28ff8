"""Training adapters: a step of `jina-jax train` next to sentence-transformers with PEFT, on a CPU.

    pip install 'jina-jax[convert,train]' sentence-transformers peft
    python -m tests.benchmarks.train [--models mini wide] [--profiles pairs passages search] [--rounds 5] [--steps 10]
                                     [--directory DIR] [--json FILE]

Models are those of `embed`: "mini" is the bundled one, "wide" has six layers of the real width and random weights.

Profiles, in records of a step and tokens: pairs (32 of two texts of 8 to 32), passages (16 of two texts of 64 to 256),
search (16 of a query of 8 to 32 and a passage of 64 to 256). Texts are of twelve languages; no two are equal.

A step goes from texts to updated adapters. Both sides train one LoRA of rank 4 and alpha 1, from the same numbers, on
queries, keys, values and outputs of the attention, both matrices of the MLP, and the tables of words and types; by
InfoNCE in both directions at tau 0.05, AdamW at 1e-4 without a schedule, gradients clipped at 1. Nobody has dropout,
remat or gradient caching. Queries, keys and values have one matrix A in ours, as in the published model, and three in
PEFT, which has so many more parameters.

Ours is the real thing: `train.plan` on a JSONL file (an index, threads that prepare batches, started anew in every
round), `train.partition` and `train.step`; metrics are fetched a step late, as in the loop. Journal, checkpoints and
evaluations are not in it. Theirs is a plain loop without a trainer: `preprocess`, MultipleNegativesRankingLoss (times
two, which is our sum; queries and passages are embedded one after the other), `backward`, the fused AdamW. The backbone
is that of transformers with "sdpa", torch has as many threads as there are cores. In bfloat16 frozen weights are
bfloat16 on both sides and adapters float32; theirs computes under autocast.

Every engine and type has a process of its own, which loads once; the rounds take turns among them. Before, there is a
step of each shape that will come, for ours to compile. Tokens are those of the texts, without what fills up; ratios are
tokens per second, ours over theirs, medians of the rounds' ratios. Peaks are of the process, compiling included.

Fails unless both sides have the same tokens, and in float32 the same losses in the first two steps, one update between
them, and the same norm of the first gradient, within 1e-3 of each. That of parameters differs by those two matrices A.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.benchmarks.embed import ARTICLES, cores, note, reset_peak, table_row, write_checkpoints
from tests.benchmarks.load import peak

OURS, THEIRS = "jina_jax", "sentence-transformers"
DTYPES = ("float32", "bfloat16")
CLOSE = 1e-3
TASK, RANK, ALPHA, TAU, RATE, CLIP = "text-matching", 4, 1.0, 0.05, 1e-4, 1.0
BETAS, EPSILON, DECAY = (0.9, 0.98), 1e-6, 0.01
CHECKED = 2  # steps before the rounds, whose numbers are compared

Key = tuple[str, str]  # engine and type
Texts = tuple[list[str], list[str]]  # queries and passages of a step


class Profile(NamedTuple):
    """Records of a file, and of a step; tokens of queries and of passages, from and below."""

    records: int
    batch: int
    queries: tuple[int, int]
    passages: tuple[int, int]


PROFILES = {
    "pairs": Profile(512, 32, (8, 33), (8, 33)),
    "passages": Profile(256, 16, (64, 257), (64, 257)),
    "search": Profile(256, 16, (8, 33), (64, 257)),
}

# The parameter of ours at which a module of theirs starts; its other factor is zero.
STARTS = {
    "word_embeddings": "embed/words/lora_b",
    "token_type_embeddings": "embed/types/lora_b",
    "q_proj": "layers/attention/qkv/lora_a",
    "k_proj": "layers/attention/qkv/lora_a",
    "v_proj": "layers/attention/qkv/lora_a",
    "o_proj": "layers/attention/out/lora_a",
    "fc1": "layers/mlp/up/lora_a",
    "fc2": "layers/mlp/down/lora_a",
}


class Job(NamedTuple):
    """What to train on.

    Attributes:
        profile: Its name.
        path: The records.
        texts: Those of each step.
        start: Our adapter at its start.
    """

    profile: str
    path: Path
    texts: list[Texts]
    start: dict[str, np.ndarray]


class Done(NamedTuple):
    """Some steps: the loss and the norm of the gradient of each; tokens of all, and the same with what fills up."""

    losses: list[float]
    norms: list[float]
    tokens: int
    padded: int


# Number of the first step and of the one after the last, to what has been done.
Run = Callable[[int, int], Done]
# A job, to the number of parameters that train and the run.
Open = Callable[[Job], tuple[int, Run]]


def main() -> None:
    """Run what is asked for and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("mini", "wide"), default=("mini", "wide"))
    parser.add_argument("--profiles", nargs="+", choices=tuple(PROFILES), default=tuple(PROFILES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="of a round")
    parser.add_argument("--directory", type=Path, help="where the checkpoints are, or go (kept)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not all(map(importlib.util.find_spec, ("torch", "transformers", "sentence_transformers", "peft"))):
        sys.exit("the peers are missing: pip install 'jina-jax[convert]' sentence-transformers peft")
    os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}

    results = []
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        for model in options.models:
            with workers(model, directory) as connections:
                for profile in options.profiles:
                    job, shapes = make_job(model, profile, directory, Path(temporary), options)
                    found = compare(connections, job, shapes, options)
                    results.append({"model": model, "profile": profile} | found)
    print_tables(results)
    names = ("jax", "optax", "grain", "torch", "transformers", THEIRS, "peft")
    versions = {name: importlib.metadata.version(name) for name in names}
    print(f"\n{cores()} cores, torch threads {cores()}, {', '.join(map(' '.join, versions.items()))}")
    if options.json:
        content = {"cores": cores(), "versions": versions, "rounds": options.rounds, "steps": options.steps}
        options.json.write_text(json.dumps(content | {"results": results}, indent=1) + "\n")
    worst = max(result["difference"]["float32"] for result in results)
    print(f"largest difference in float32, of losses and norms, relative: {worst:.1e}, allowed: {CLOSE:.0e}")
    sys.exit(not worst <= CLOSE)


# ---- Texts and their order -------------------------------------------------------------------------------------


def make_recipe(model: str, directory: Path, dtype: str, path: Path, profile: str, steps: int) -> Any:
    """Our recipe."""
    from jina_jax.train import recipe

    batch, most = PROFILES[profile].batch, PROFILES[profile].passages[1] - 1
    return recipe.Recipe(
        stage="adapter",
        init=recipe.Init("mini" if model == "mini" else str(directory / model)),
        phases=(recipe.Phase("benchmark", steps=steps, batch=batch, max_length=most, lr=RATE, tau=TAU),),
        data=recipe.Data((recipe.Dataset(profile, str(path), kind="pair"),)),
        optim=recipe.Optim(*BETAS, EPSILON, DECAY, CLIP, schedule="constant", warmup=1),
        adapters=recipe.Adapters((TASK,), instructions=False, start="fresh", rank=RANK, alpha=ALPHA),
        dropout=0.0,
        dtype=dtype,
        backbone_dtype=dtype,
    )


def make_job(model: str, name: str, directory: Path, temporary: Path, options: Any) -> tuple[Job, list[Any]]:
    """Texts of a profile, the same in every run, and which of them are in which step.

    Args:
        model: Name of the model.
        name: Name of the profile.
        directory: Where checkpoints are.
        temporary: Where the records go.
        options: Of the command.

    Returns:
        The job, and the shape of each step.
    """
    from jina_jax import hub
    from jina_jax.tokenizer import load_tokenizer
    from jina_jax.train import plan

    tokenizer, rng, seen = load_tokenizer(hub.find("mini")), np.random.default_rng(0), set()

    def text(least: int, most: int) -> str:
        length = int(rng.integers(least, most))
        words = re.findall("[^ ，、。]+[ ，、。]*", ARTICLES[rng.integers(len(ARTICLES))] + " ")
        whole = "".join(rng.choice(words, length))  # a word is a token at least
        cut = whole[: tokenizer.encode(whole).offsets[length - 2, 1]].strip()
        if cut in seen or len(tokenizer.encode(cut).ids) >= most:
            return text(least, most)
        seen.add(cut)
        return cut

    profile, path = PROFILES[name], temporary / f"{name}.jsonl"
    records = [(text(*profile.queries), text(*profile.passages)) for _ in range(profile.records)]
    lines = (json.dumps({"query": query, "pos": passage}) + "\n" for query, passage in records)
    path.write_text("".join(lines), encoding="utf-8")
    steps = CHECKED + options.rounds * options.steps
    recipe = make_recipe(model, directory, DTYPES[0], path, name, steps)
    order, texts = plan.make(recipe, recipe.phases[0], tokenizer), []
    for step in range(steps):
        source, rows = order.rows(step)
        queries, passages = zip(*(records[i] for i in source.records[rows]), strict=True)
        texts.append((list(queries), list(passages)))
    return Job(name, path, texts, {}), [order.shape(step) for step in range(steps)]


# ---- Engines, each in its own process --------------------------------------------------------------------------


def load_ours(model: str, directory: Path, dtype: str) -> Open:
    """Ours, as `jina_jax.train.loop` goes about it."""
    import jax

    from jina_jax import hub, sharding
    from jina_jax.tokenizer import load_tokenizer
    from jina_jax.train import loop, packing, partition, plan
    from jina_jax.train import step as steps

    mesh, kept = sharding.make_mesh(), {}
    tokenizer = load_tokenizer(hub.find("mini"))

    def open(job: Job) -> tuple[int, Run]:
        recipe = make_recipe(model, directory, dtype, job.path, job.profile, len(job.texts))
        if not kept:
            with sharding.use(mesh):
                kept["parts"] = partition.prepare(recipe, mesh)
            kept["start"] = jax.tree.map(partition.host, kept["parts"].trainable)
        parts, phase = kept["parts"], recipe.phases[0]
        first = jax.tree.map(lambda x, like: jax.device_put(x.copy(), like.sharding), kept["start"], parts.trainable)
        job.start.update(kept["start"][TASK])
        order, state = plan.make(recipe, phase, tokenizer), steps.start(steps.optimizer(recipe.optim, phase), first)
        advance = steps.make(parts.model, recipe, phase)

        def run(first: int, last: int) -> Done:
            nonlocal state
            losses, norms, tokens, padded, late = [], [], 0, 0, None

            def fetch() -> None:
                if late is not None:
                    losses.append(float(late["loss"]))
                    norms.append(float(late["gradient_norm"]))

            with sharding.use(mesh):
                for number, batch in enumerate(order.batches(first, last, None, packing.Split(1)), first):
                    how = {"loss": batch.loss, "roles": batch.roles, "in_batch": batch.in_batch}
                    arrays = loop.place(mesh, batch)
                    state, metrics = advance(state, parts.frozen, arrays, np.int32(number), **how)
                    fetch()
                    late, tokens, padded = metrics, tokens + batch.tokens, padded + batch.padded
                fetch()
                jax.block_until_ready(state)
            return Done(losses, norms, tokens, padded)

        return partition.count(parts.trainable), run

    return open


def load_theirs(model: str, directory: Path, dtype: str) -> Open:
    """sentence-transformers, with an adapter of PEFT in the model of transformers."""
    import torch
    import transformers
    from peft import LoraConfig
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(cores())
    options = {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    backbone = Transformer(str(directory / f"{model}-hf"), model_kwargs=options, config_kwargs=quiet)
    embedder = SentenceTransformer(
        modules=[backbone, Pooling(backbone.get_embedding_dimension(), "mean"), Normalize()], device="cpu"
    )
    embedder.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(STARTS)))
    trainable = {name: x for name, x in embedder.named_parameters() if x.requires_grad}
    assert all("lora" in name for name in trainable)
    for x in trainable.values():
        x.data = x.data.float()  # it gives them the model's type
    loss = MultipleNegativesRankingLoss(
        embedder, scale=1 / TAU, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    )

    def place(start: dict[str, np.ndarray]) -> None:
        for name, x in trainable.items():
            module = next(module for module in STARTS if f".{module}." in name)
            table, is_a = module.endswith("embeddings"), "_A." in name
            value = np.zeros(x.shape, np.float32)
            if table != is_a:
                value = start[STARTS[module]]
                value = value if table else value[int(re.findall(r"\.(\d+)\.", name)[0])]
                value = value.reshape(-1, RANK).T if is_a else value.T
            with torch.no_grad():
                x.copy_(torch.from_numpy(np.ascontiguousarray(value)))

    def open(job: Job) -> tuple[int, Run]:
        place(job.start)
        embedder.max_seq_length = PROFILES[job.profile].passages[1] - 1
        embedder.train()
        adam = torch.optim.AdamW(trainable.values(), RATE, BETAS, EPSILON, DECAY, fused=True)

        def run(first: int, last: int) -> Done:
            losses, norms, tokens, padded = [], [], 0, 0
            for step in range(first, last):
                features = [embedder.preprocess(texts) for texts in job.texts[step]]
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype != "float32"):
                    value = 2 * loss(features, None)
                value.backward()
                norm = torch.nn.utils.clip_grad_norm_(trainable.values(), CLIP, foreach=True)
                adam.step()
                adam.zero_grad(set_to_none=True)
                losses.append(value.item())
                norms.append(norm.item())
                tokens += sum(int(one["attention_mask"].sum()) for one in features)
                padded += sum(one["attention_mask"].numel() for one in features)
            return Done(losses, norms, tokens, padded)

        return sum(x.numel() for x in trainable.values()), run

    return open


ENGINES = {OURS: load_ours, THEIRS: load_theirs}


def work(connection: Connection, engine: str, dtype: str, model: str, directory: Path) -> None:
    """Load once, then take jobs and run steps of the last, until None comes; the main function of a process."""
    open, run = ENGINES[engine](model, directory, dtype), None
    while command := connection.recv():
        if isinstance(command, Job):
            count, run = open(command)
            reset_peak()
            connection.send((count, command.start))
            continue
        start = time.perf_counter()
        done = run(*command)
        seconds = time.perf_counter() - start
        connection.send({"seconds": seconds, "peak": peak()} | done._asdict())


@contextlib.contextmanager
def workers(model: str, directory: Path) -> Iterator[dict[Key, Connection]]:
    """A process for each engine and type; gives their connections."""
    context = multiprocessing.get_context("spawn")
    writer = context.Process(target=write_checkpoints, args=(model, directory))
    writer.start()
    writer.join()
    if writer.exitcode:
        sys.exit("the checkpoints could not be written; see above")
    connections, processes = {}, []
    for engine, dtype in itertools.product(ENGINES, DTYPES):
        connections[engine, dtype], theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, engine, dtype, model, directory), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
    yield connections
    for connection, process in zip(connections.values(), processes, strict=True):
        connection.send(None)
        process.join()


def ask(connection: Connection, command: Any) -> Any:
    """Have a process do something."""
    try:
        connection.send(command)
        return connection.recv()
    except (EOFError, BrokenPipeError):
        sys.exit("a process ended early; it says above why")


# ---- The comparison --------------------------------------------------------------------------------------------


def compare(connections: dict[Key, Connection], job: Job, shapes: list[Any], options: Any) -> dict[str, Any]:
    """Check, warm up, and time everybody in turn.

    Args:
        connections: Of the processes, ours first.
        job: What to train on.
        shapes: Of the tokens of each step.
        options: Of the command.

    Returns:
        What goes into the tables and the JSON file.
    """
    note(f"{job.profile}: {len(job.texts)} steps, shapes {sorted(set(shapes))}")
    counts = {}
    for key, pipe in connections.items():
        counts[key], start = ask(pipe, job)
        job.start.update(start)  # ours says where theirs begins
    rank, width = job.start["layers/mlp/down/lora_a"].shape[-1], job.start["embed/words/lora_b"].shape[-1]
    more = 2 * rank * width * len(job.start["layers/mlp/down/lora_a"])  # keys and values have a matrix A each
    # Steps that are checked, then one of each shape that they have not.
    first = [shapes.index(shape) for shape in sorted(set(shapes) - set(shapes[:CHECKED]))]
    warm = {key: [ask(pipe, (i, i + 1)) for i in (*range(CHECKED), *first)] for key, pipe in connections.items()}

    runs: dict[Key, list[dict[str, Any]]] = {key: [] for key in connections}
    for turn in range(options.rounds):
        begin = CHECKED + turn * options.steps
        for key, pipe in connections.items():
            runs[key].append(ask(pipe, (begin, begin + options.steps)))
        said = ", ".join(f"{' '.join(key)} {found[-1]['seconds']:.2f} s" for key, found in runs.items())
        note(f"round {turn + 1}: {said}")
    for dtype in DTYPES:
        assert counts[THEIRS, dtype] == counts[OURS, dtype] + more, counts
        for ours, theirs in zip(runs[OURS, dtype], runs[THEIRS, dtype], strict=True):
            assert ours["tokens"] == theirs["tokens"], "the texts are not the same"

    def ratio(ours: str, theirs: str) -> float:
        both = zip(runs[OURS, ours], runs[THEIRS, theirs], strict=True)
        return statistics.median(b["seconds"] / a["seconds"] for a, b in both)

    def difference(dtype: str) -> float:
        ours, theirs = warm[OURS, dtype], warm[THEIRS, dtype]
        pairs = [(ours[i]["losses"][0], theirs[i]["losses"][0]) for i in range(CHECKED)]
        pairs.append((ours[0]["norms"][0], theirs[0]["norms"][0]))
        return max(abs(a - b) / abs(a) for a, b in pairs)

    speed = {key: statistics.median(run["tokens"] / run["seconds"] for run in found) for key, found in runs.items()}
    best = {engine: max(DTYPES, key=lambda dtype: speed[engine, dtype]) for engine in ENGINES}
    engines = [
        {
            "engine": key[0],
            "dtype": key[1],
            "trainable": counts[key],
            "tokens per second": speed[key],
            "seconds": [run["seconds"] for run in found],
            "padding": 1 - sum(run["tokens"] for run in found) / sum(run["padded"] for run in found),
            "first steps": [run["seconds"] for run in warm[key]],
            "peak": max(run["peak"] for run in (*warm[key], *found)),
            "losses": [loss for run in (*warm[key][:CHECKED], *found) for loss in run["losses"]],
            "norms": [norm for run in (*warm[key][:CHECKED], *found) for norm in run["norms"]],
        }
        for key, found in runs.items()
    ]
    return {
        "records": PROFILES[job.profile].batch,
        "tokens": sum(run["tokens"] for run in runs[OURS, DTYPES[0]]) / (options.rounds * options.steps),
        "best": best,
        "ratio": {"best": ratio(best[OURS], best[THEIRS])} | {dtype: ratio(dtype, dtype) for dtype in DTYPES},
        "difference": {dtype: difference(dtype) for dtype in DTYPES},
        "engines": engines,
    }


def print_tables(results: list[dict[str, Any]]) -> None:
    """The comparison, and each process by itself, in Markdown."""
    titles = [f"{kind}: ours / theirs" for kind in ("best", *DTYPES)]
    differences = [f"{dtype}: difference" for dtype in DTYPES]
    print(table_row("model", "profile", "records", "tokens of a step", *titles, *differences))
    print(table_row(*["---"] * 9))
    for result in results:
        ratios = [f"{result['ratio'][kind]:.2f}" for kind in ("best", *DTYPES)]
        found = [f"{result['difference'][dtype]:.1e}" for dtype in DTYPES]
        head = result["model"], result["profile"], result["records"], round(result["tokens"])
        print(table_row(*head, *ratios, *found))
    print("\nThe type that is the engine's best is in bold. Times of first steps are those of one of each shape.\n")
    titles = ["tokens/s", "padding", "first steps, s", "peak, MiB", "trainable", "first loss", "norm"]
    print(table_row("model", "profile", "engine", "type", *titles))
    print(table_row(*["---"] * 11))
    for result in results:
        for row in result["engines"]:
            dtype = f"**{row['dtype']}**" if result["best"][row["engine"]] == row["dtype"] else row["dtype"]
            numbers = f"{row['tokens per second']:.0f}", f"{row['padding']:.1%}"
            numbers += " ".join(f"{seconds:.1f}" for seconds in row["first steps"]), f"{row['peak'] / 2**20:.0f}"
            numbers += f"{row['trainable']:,}", f"{row['losses'][0]:.4f}", f"{row['norms'][0]:.4f}"
            print(table_row(result["model"], result["profile"], row["engine"], dtype, *numbers))


if __name__ == "__main__":
    main()
