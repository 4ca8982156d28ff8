"""Texts in, embeddings out: `jina_jax.Embedder.encode` next to sentence-transformers and transformers, on a CPU.

    pip install 'jina-jax[convert]' sentence-transformers
    python -m tests.benchmarks.embed [--models mini wide] [--profiles queries passages mix] [--scale 1] [--rounds 5]
                                     [--directory DIR] [--json FILE]

Models: "mini" is the bundled one, "wide" has six layers of the real width (hidden 1024, 16 heads, mlp 4096), random
weights and mini's tokenizer. Everybody loads the same weights, the peers from the -hf layout that `jina_jax.save`
writes, and runs the bare backbone (`task=None`, everybody's plain default). Ours holds five adapters all the same, the
peers load none.

Profiles, in tokens: queries (4 to 32), passages (64 to 512), mix (log-normal, from 4 to a few thousand, 8192 at most).
Texts are of twelve languages and end at a token's end.

Every engine and type has a process of its own, which loads once; the rounds take turns among them. torch gets as many
threads as there are cores. Peers are tuned for each profile, on runs of 64 texts next to each other in length: batch
sizes upwards until one is clearly slower than the best, in float32 and in bfloat16; attention is "sdpa". Batches are
sorted by length: by characters in sentence-transformers (its own way), by tokens in transformers. Ours has default
settings, in both types. A bfloat16 that is half again as slow as float32 is dropped after a round.

All runs are warm: each text set is encoded once before, which is when ours compiles (shapes that an earlier profile
has met are not compiled again). Ratios are texts per second, ours over the peer's, medians of the rounds' ratios.
Fails if two embeddings in float32 differ by more than 1e-5.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.load import peak

OURS, PEERS = "jina_jax", ("sentence-transformers", "transformers")
DTYPES = ("float32", "bfloat16")
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
MOST_TOKENS = 131_072  # of a batch, padding included: more is not tried, for the sake of the memory
WORSE = 1.5  # a batch size that is so much slower than the best ends the search
HOPELESS = 1.5  # a type that is so much slower than float32 is dropped
CLOSE = 1e-5
TEXTS = {
    "mini": {"queries": 1500, "passages": 60, "mix": 64},
    "wide": {"queries": 200, "passages": 16, "mix": 32},
}
MEDIAN, SPREAD = 64, 1.8  # of the mix: the median in tokens, and the standard deviation of its logarithm

Encode = Callable[[list[str], int], np.ndarray]
Key = tuple[str, str]  # engine and type

# Article 1 of the Universal Declaration of Human Rights.
ARTICLES = (
    "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience and "
    "should act towards one another in a spirit of brotherhood.",
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt und "
    "sollen einander im Geist der Brüderlichkeit begegnen.",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de "
    "conscience et doivent agir les uns envers les autres dans un esprit de fraternité.",
    "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón y "
    "conciencia, deben comportarse fraternalmente los unos con los otros.",
    "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью и должны "
    "поступать в отношении друг друга в духе братства.",
    "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. Akıl ve vicdana sahiptirler ve birbirlerine "
    "karşı kardeşlik zihniyeti ile hareket etmelidirler.",
    "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi. Mọi con người đều được tạo hóa "
    "ban cho lý trí và lương tâm và cần phải đối xử với nhau trong tình bằng hữu.",
    "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق. وقد وهبوا عقلا وضميرا وعليهم أن يعامل بعضهم بعضا بروح الإخاء.",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। उन्हें बुद्धि और अन्तरात्मा की देन "
    "प्राप्त है और परस्पर उन्हें भाईचारे के भाव से बर्ताव करना चाहिए।",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 천부적으로 이성과 양심을 부여받았으며 "
    "서로 형제애의 정신으로 행동하여야 한다.",
    "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
    "すべての人間は、生れながらにして自由であり、かつ、尊厳と権利とについて平等である。人間は、理性と良心とを授けられており、"
    "互いに同胞の精神をもって行動しなければならない。",
)


def main() -> None:
    """Run what is asked for and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(TEXTS), default=tuple(TEXTS))
    parser.add_argument("--profiles", nargs="+", choices=tuple(TEXTS["mini"]), default=tuple(TEXTS["mini"]))
    parser.add_argument("--scale", type=float, default=1, help="times as many texts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where the checkpoints are, or go (kept)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not all(map(importlib.util.find_spec, ("torch", "transformers", "sentence_transformers"))):
        sys.exit("the peers are missing: pip install 'jina-jax[convert]' sentence-transformers")
    os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}

    results = []
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.directory or Path(temporary)
        for model in options.models:
            with workers(model, directory) as connections:
                for profile in options.profiles:
                    texts, lengths = make_texts(model, profile, options.scale)
                    found = compare(connections, texts, lengths, options.rounds)
                    results.append({"model": model, "profile": profile} | found)
    print_tables(results)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "torch", *PEERS)}
    print(f"\n{cores()} cores, torch threads {cores()}, {', '.join(map(' '.join, versions.items()))}")
    if options.json:
        content = {"cores": cores(), "versions": versions, "rounds": options.rounds, "results": results}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    worst = max(row["difference"] for result in results for row in result["engines"] if row["dtype"] == "float32")
    print(f"largest difference in float32: {worst:.1e}, allowed: {CLOSE:.0e}")
    sys.exit(not worst <= CLOSE)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def note(text: str) -> None:
    """Say how far we are."""
    print(text, file=sys.stderr, flush=True)


# ---- Texts and checkpoints -------------------------------------------------------------------------------------


def make_texts(model: str, profile: str, scale: float) -> tuple[list[str], np.ndarray]:
    """Texts of a profile and their tokens, the same in every run.

    Args:
        model: Name of the model; it says how many there are.
        profile: Name of the profile.
        scale: Times as many.

    Returns:
        Texts, and the tokens of each, int64 [n].
    """
    from jina_jax import Config, hub
    from jina_jax.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(hub.find("mini"))
    limit = Config.from_json(hub.find("mini") / "config.json").max_tokens
    rng = np.random.default_rng(0)
    count = max(2, round(TEXTS[model][profile] * scale))
    if profile == "mix":  # quantiles rather than draws: few texts have a tail, too
        normal = [statistics.NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]
        wanted = rng.permutation(np.exp(np.log(MEDIAN) + SPREAD * np.array(normal)).clip(4, limit).astype(int))
    else:
        wanted = rng.integers(*{"queries": (4, 33), "passages": (64, 513)}[profile], count)
    texts = []
    for length in wanted.tolist():
        words = re.findall("[^ ，、。]+[ ，、。]*", ARTICLES[rng.integers(len(ARTICLES))] + " ")
        text = "".join(rng.choice(words, length))  # a word is a token at least
        texts.append(text[: tokenizer.encode(text).offsets[length - 2, 1]])
    lengths = np.array([len(tokens.ids) for tokens in tokenizer.encode_batch(texts)])
    assert np.abs(lengths - wanted).max() <= 2
    return texts, lengths


def write_checkpoints(model: str, directory: Path) -> None:
    """The model in the -hf layout, and "wide" in our own as well, unless it is there."""
    import jax

    import jina_jax
    from jina_jax import hub

    mini = hub.find("mini")
    if model == "mini":
        module, variables = jina_jax.load(mini)
    elif (directory / "wide-hf").exists():
        return
    else:
        vocabulary = jina_jax.Config.from_json(mini / "config.json").vocab_size
        module = jina_jax.Model(jina_jax.Config(vocab_size=vocabulary, num_hidden_layers=6))
        variables = jax.jit(module.init)(jax.random.key(0), np.zeros((1, 8), np.int32))
        jina_jax.save(directory / "wide", module, variables, tokenizer=mini, overwrite=True)
    jina_jax.save(directory / f"{model}-hf", module, variables, layout="hf", tokenizer=mini, overwrite=True)
    tokens = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    }
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": module.config.max_tokens} | tokens
    (directory / f"{model}-hf" / "tokenizer_config.json").write_text(json.dumps(content))


# ---- Engines, each in its own process --------------------------------------------------------------------------


def load_ours(model: str, directory: Path, dtype: str) -> Encode:
    """Ours; batches as it likes, and says what part of the tokens that it computed was padding."""
    from jina_jax import Embedder, Usage

    embedder = Embedder.load("mini" if model == "mini" else directory / model, dtype=dtype)

    def encode(texts: list[str], batch: int) -> tuple[np.ndarray, float]:
        usage = Usage()
        return embedder.encode(texts, usage=usage), 1 - usage.tokens / usage.computed_tokens

    return encode


def load_sentence_transformers(model: str, directory: Path, dtype: str) -> Encode:
    """The backbone, the mean of its tokens, unit length."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    torch.set_num_threads(cores())
    path = directory / f"{model}-hf"
    limit = json.loads((path / "tokenizer_config.json").read_text())["model_max_length"]
    options = {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"}
    backbone = Transformer(str(path), max_seq_length=limit, model_kwargs=options)
    pooling = Pooling(backbone.get_embedding_dimension(), "mean")
    embedder = SentenceTransformer(modules=[backbone, pooling, Normalize()], device="cpu")
    return lambda texts, batch: embedder.encode(texts, batch_size=batch, show_progress_bar=False)


def load_transformers(model: str, directory: Path, dtype: str) -> Encode:
    """The model as it is, with what a careful user writes around it."""
    import torch
    from transformers import AutoTokenizer, JinaEmbeddingsV3Model

    torch.set_num_threads(cores())
    path = directory / f"{model}-hf"
    tokenizer = AutoTokenizer.from_pretrained(path)
    backbone = JinaEmbeddingsV3Model.from_pretrained(
        path, dtype=getattr(torch, dtype), attn_implementation="sdpa", add_pooling_layer=False
    ).eval()

    @torch.inference_mode()
    def encode(texts: list[str], batch: int) -> np.ndarray:
        ids = tokenizer(texts, truncation=True)["input_ids"]
        order = np.argsort([-len(row) for row in ids], kind="stable")
        embeddings = np.empty((len(texts), backbone.config.hidden_size), np.float32)
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            inputs = tokenizer.pad({"input_ids": [ids[i] for i in chosen]}, return_tensors="pt")
            mask = inputs["attention_mask"][..., None]
            hidden = backbone(**inputs).last_hidden_state
            mean = (hidden * mask).sum(dim=1, dtype=torch.float32) / mask.sum(dim=1)
            embeddings[chosen] = torch.nn.functional.normalize(mean, dim=1).numpy()
        return embeddings

    return encode


ENGINES = {OURS: load_ours, PEERS[0]: load_sentence_transformers, PEERS[1]: load_transformers}


def work(connection: Connection, engine: str, dtype: str, model: str, directory: Path) -> None:
    """Load once, then encode whatever comes, until None does; the main function of a process."""
    if engine != OURS:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
    encode = ENGINES[engine](model, directory, dtype)
    while command := connection.recv():
        texts, batch, first = command
        run = functools.partial(encode, texts, batch)
        if first:
            reset_peak()
        start = time.perf_counter()
        embeddings, padding = run() if engine == OURS else (run(), None)
        seconds = time.perf_counter() - start
        connection.send({"seconds": seconds, "embeddings": embeddings, "padding": padding, "peak": peak()})


def reset_peak() -> None:
    """Let the peak of this process begin anew, where the system allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@contextlib.contextmanager
def workers(model: str, directory: Path) -> Any:
    """A process for each engine and type; gives their connections."""
    context = multiprocessing.get_context("spawn")
    writer = context.Process(target=write_checkpoints, args=(model, directory))
    writer.start()
    writer.join()
    if writer.exitcode:
        sys.exit("the checkpoints could not be written; see above")
    connections, processes = {}, []
    for engine in ENGINES:
        for dtype in DTYPES:
            connections[engine, dtype], theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, engine, dtype, model, directory), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
    yield connections
    for connection, process in zip(connections.values(), processes, strict=True):
        connection.send(None)
        process.join()


def ask(connection: Connection, texts: list[str], batch: int, first: bool = False) -> dict[str, Any]:
    """Have a process encode; `first` starts its peak of memory anew and counts our padding."""
    connection.send((texts, batch, first))
    try:
        return connection.recv()
    except EOFError:
        sys.exit("a process ended early; it says above why")


# ---- The comparison --------------------------------------------------------------------------------------------


def tune(connection: Connection, texts: list[str], lengths: np.ndarray) -> dict[int, float]:
    """Seconds by batch size, on every third run of 64 texts next to each other in length, the longest included."""
    order = np.argsort(-lengths, kind="stable")
    sample = np.concatenate(np.array_split(order, -(-len(order) // 64))[::3])
    chosen = [texts[i] for i in sample]
    ask(connection, chosen[-8:], 1)
    found: dict[int, float] = {}
    for batch in BATCH_SIZES:
        if batch > 1 and (batch * lengths.max() > MOST_TOKENS or batch >= 2 * len(chosen)):
            break
        found[batch] = min(ask(connection, chosen, batch)["seconds"] for _ in range(2))
        if found[batch] > WORSE * min(found.values()):
            break
    return found


def compare(connections: dict[Key, Connection], texts: list[str], lengths: np.ndarray, rounds: int) -> dict[str, Any]:
    """Tune the peers, warm up, check, and time everybody in turn.

    Args:
        connections: Of the processes.
        texts: What to encode.
        lengths: Tokens of each text.
        rounds: How often.

    Returns:
        What goes into the tables and the JSON file.
    """
    note(f"{len(texts)} texts, {lengths.sum()} tokens, {lengths.min()} to {lengths.max()}")
    tuned = {key: tune(pipe, texts, lengths) for key, pipe in connections.items() if key[0] != OURS}
    batches = {key: min(found, key=found.get) for key, found in tuned.items()}
    for key, found in tuned.items():
        note(f"{' '.join(key)}: " + ", ".join(f"{batch}: {seconds:.2f} s" for batch, seconds in found.items()))
    first = {key: ask(pipe, texts, batches.get(key, 0), first=True) for key, pipe in connections.items()}
    exact = first[OURS, "float32"]["embeddings"]
    assert np.abs(np.linalg.norm(exact, axis=1) - 1).max() < CLOSE

    runs: dict[Key, list[dict[str, Any]]] = {key: [] for key in connections}
    for turn in range(rounds):
        for key, pipe in connections.items():
            if turn and runs[key][0]["seconds"] > HOPELESS * runs[key[0], "float32"][0]["seconds"]:
                continue
            runs[key].append(ask(pipe, texts, batches.get(key, 0)))
    seconds = {key: [run["seconds"] for run in found] for key, found in runs.items()}
    median = {key: statistics.median(found) for key, found in seconds.items()}
    whole = [key for key in connections if len(runs[key]) == rounds]
    best = {engine: min((key for key in whole if key[0] == engine), key=median.get)[1] for engine in ENGINES}

    def ratio(peer: Key, ours: Key) -> float:
        return statistics.median(b / a for a, b in zip(seconds[ours], seconds[peer], strict=True))

    engines = [
        {
            "engine": key[0],
            "dtype": key[1],
            "batch": batches.get(key),
            "texts per second": len(texts) / median[key],
            "seconds": seconds[key],
            "first run over the median": first[key]["seconds"] - median[key],
            "peak": max(run["peak"] for run in (first[key], *runs[key])),
            "difference": float(np.abs(first[key]["embeddings"] - exact).max()),
            "tuning": tuned.get(key),
        }
        for key in connections
    ]
    return {
        "texts": len(texts),
        "tokens": int(lengths.sum()),
        "longest": int(lengths.max()),
        "padding": first[OURS, "float32"]["padding"],
        "best": best,
        "best ratio": {peer: ratio((peer, best[peer]), (OURS, best[OURS])) for peer in PEERS},
        "float32 ratio": {peer: ratio((peer, "float32"), (OURS, "float32")) for peer in PEERS},
        "engines": engines,
    }


def print_tables(results: list[dict[str, Any]]) -> None:
    """The comparison, and each process by itself, in Markdown."""
    titles = [f"{kind}: ours / {peer}" for kind in ("best", "float32") for peer in PEERS]
    print(table_row("model", "profile", "texts", "tokens", "longest", *titles, "our padding"))
    print(table_row(*["---"] * 10))
    for result in results:
        ratios = [f"{result[f'{kind} ratio'][peer]:.2f}" for kind in ("best", "float32") for peer in PEERS]
        head = (result[key] for key in ("model", "profile", "texts", "tokens", "longest"))
        print(table_row(*head, *ratios, f"{result['padding']:.1%}"))
    print("\nThe type that is the engine's best is in bold.\n")
    titles = ["texts/s", "first run over the median, s", "peak, MiB", "largest difference to ours, float32"]
    print(table_row("model", "profile", "engine", "type", "batch", *titles))
    print(table_row(*["---"] * 9))
    for result in results:
        for row in result["engines"]:
            dtype = f"**{row['dtype']}**" if result["best"][row["engine"]] == row["dtype"] else row["dtype"]
            numbers = f"{row['texts per second']:.1f}", f"{row['first run over the median']:.1f}"
            numbers += f"{row['peak'] / 2**20:.0f}", f"{row['difference']:.1e}"
            head = result["model"], result["profile"], row["engine"], dtype
            print(table_row(*head, row["batch"] or "", *numbers))


def table_row(*cells: object) -> str:
    """A line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
