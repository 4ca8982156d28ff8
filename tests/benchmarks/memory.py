"""Memory of the embedder: a stream of any length, and one long text.

    python -m tests.benchmarks.memory stream      # 1,000 and then 100,000 short texts from an iterator, the mini model
    python -m tests.benchmarks.memory long        # one text of 8192 tokens, 6 layers of the real width

Peak memory of a process of its own for each case; `long` also says what the weights take.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator

import jax
import numpy as np

import jina_jax
from tests.benchmarks.load import peak, resident

SIZES = (1_000, 100_000)
WORDS = "the river runs under an old bridge while children of the town look for small fish"


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("stream", "long"))
    parser.add_argument("--texts", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what == "long":
        long()
    elif options.texts:
        stream(options.texts)
    else:
        for count in SIZES:
            subprocess.run(
                [sys.executable, "-m", "tests.benchmarks.memory", "stream", "--texts", str(count)], check=True
            )


def stream(count: int) -> None:
    """Embed so many texts from an iterator."""
    embedder = jina_jax.Embedder.load("mini")
    embedder.warmup(adapters=False)
    found = sum(1 for _ in embedder.encode_stream(texts(count)))
    print(f"{found} texts: peak {peak() / 2**20:.0f} MiB", flush=True)


def texts(count: int) -> Iterator[str]:
    """Texts of one to eight words."""
    words = WORDS.split()
    for number in range(count):
        yield " ".join(words[number * place % len(words)] for place in range(1, 2 + number % 8))


def long() -> None:
    """Embed one text of 8192 tokens."""
    vocabulary = jina_jax.Embedder.load("mini")
    model = jina_jax.Model(jina_jax.Config(num_hidden_layers=6, vocab_size=vocabulary.config.vocab_size, pooler=False))
    variables = jax.block_until_ready(jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8), np.int32)))
    embedder = jina_jax.Embedder(model, variables, vocabulary.tokenizer)
    weights = sum(x.nbytes for x in jax.tree.leaves(variables))
    before, usage = resident(), jina_jax.Usage()
    embedder.encode("of " * 9000, usage=usage)
    print(
        f"{usage.tokens} tokens: weights {weights / 2**20:.0f} MiB, peak over them {(peak() - before) / 2**20:.0f} MiB"
    )


if __name__ == "__main__":
    main()
