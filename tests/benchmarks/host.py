"""How much of the embedder's time no batch is being computed: `python -m tests.benchmarks.host`, the mini model."""

import time

import jina_jax
from jina_jax import bench


def main() -> None:
    """Embed each profile and print the share of the time outside compute."""
    embedder = jina_jax.Embedder.load("mini")
    compute, busy = embedder._compute, []

    def timed(arrays):
        start = time.perf_counter()
        means = compute(arrays)
        busy.append((start, time.perf_counter()))
        return means

    embedder._compute = timed
    for profile in bench.PROFILES:
        texts = bench.texts(embedder, bench.lengths(profile, 12_000, embedder.config.max_tokens))
        embedder.encode(texts)
        busy.clear()
        start = time.perf_counter()
        embedder.encode(texts)
        wall, covered, end = time.perf_counter() - start, 0.0, 0.0
        for first, last in sorted(busy):
            covered, end = covered + max(0.0, last - max(first, end)), max(end, last)
        print(f"{profile}: {1 - covered / wall:.1%} outside compute", flush=True)


if __name__ == "__main__":
    main()
