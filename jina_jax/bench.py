"""`jina-jax bench`: how fast a model embeds on this device, by length of text."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np

from jina_jax.embedder import Embedder, Usage

# Tokens of a text: (shortest, longest), spread evenly; of the mix they are spread like those of documents, many short
# and few very long.
_WORDS = "the river runs under an old bridge while children of the town look for small fish in it"
PROFILES = {"queries": (4, 32), "passages": (64, 512), "mix": (4, 8192)}


def lengths(profile: str, tokens: int, limit: int, seed: int = 0) -> np.ndarray:
    """Lengths of texts with about so many tokens in all.

    Args:
        profile: A name in `PROFILES`.
        tokens: Tokens wanted in all.
        limit: Most tokens of a text.
        seed: Seed.

    Returns:
        Int64 [n], at least one.
    """
    rng, (low, high) = np.random.default_rng(seed), PROFILES[profile]
    count = 2 + 2 * tokens // low
    drawn = np.exp(rng.normal(5.0, 1.3, count)) if profile == "mix" else rng.uniform(low, high + 1, count)
    drawn = np.clip(drawn.astype(np.int64), low, min(high, limit))
    return drawn[: max(1, int(np.searchsorted(np.cumsum(drawn), tokens)))]


def texts(embedder: Embedder, wanted: np.ndarray, seed: int = 0) -> list[str]:
    """Texts of so many tokens, `<s>` and `</s>` included, give or take a few.

    Args:
        embedder: Whose tokenizer counts.
        wanted: Lengths.
        seed: Seed.

    Returns:
        One for each length: words in a random order.
    """
    words = _WORDS.split()
    rng = np.random.default_rng(seed)
    line = " ".join(rng.choice(words, 2 * int(wanted.max())))
    ends = embedder.tokenizer.encode(line).offsets[1:-1, 1]
    starts = rng.integers(0, np.maximum(1, len(ends) - wanted))
    cuts = [(ends[start], ends[start + max(0, int(n) - 2)]) for start, n in zip(starts, wanted, strict=True)]
    return [line[start:stop].strip() for start, stop in cuts]


def measure(embedder: Embedder, profile: str, *, tokens: int, rounds: int, task: str | None = None) -> dict[str, Any]:
    """Embed the texts of one profile.

    Args:
        embedder: The embedder.
        profile: A name in `PROFILES`.
        tokens: Tokens in all.
        rounds: Timed runs after one that compiles.
        task: Task of the texts.

    Returns:
        texts_per_second and tokens_per_second (medians), texts, tokens, longest, padding (share of the tokens
        computed), programs (compiled in the first run), compile_seconds (how much longer that took), peak_bytes (of
        the process so far, or of the device's memory where it can be asked).
    """
    found = texts(embedder, lengths(profile, tokens, embedder.config.max_tokens))
    usage, before = Usage(), embedder.programs
    start = time.perf_counter()
    embedder.encode(found, task=task, usage=usage)
    first, times = time.perf_counter() - start, []
    for _ in range(rounds):
        start = time.perf_counter()
        embedder.encode(found, task=task)
        times.append(time.perf_counter() - start)
    median = statistics.median(times)
    return {
        "profile": profile,
        "texts_per_second": len(found) / median,
        "tokens_per_second": usage.tokens / median,
        "texts": len(found),
        "tokens": usage.tokens,
        "longest": max(len(one.ids) for one in embedder.tokenizer.encode_batch(found, offsets=False)),
        "padding": 1 - usage.tokens / usage.computed_tokens,
        "programs": embedder.programs - before,
        "compile_seconds": max(0.0, first - median),
        "peak_bytes": peak_bytes(),
    }


def peak_bytes() -> int:
    """Peak memory: of the first accelerator, or of this process."""
    statistics_of = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics_of:
        return statistics_of["peak_bytes_in_use"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def table(rows: list[dict[str, Any]]) -> str:
    """Results as lines for a terminal.

    Args:
        rows: What `measure` gave.

    Returns:
        Lines, without a final newline.
    """
    heads = ("profile", "texts/s", "tokens/s", "texts", "longest", "padding", "programs", "compile s", "peak MiB")
    cells = [
        (
            row["profile"],
            f"{row['texts_per_second']:.1f}",
            f"{row['tokens_per_second']:.0f}",
            str(row["texts"]),
            str(row["longest"]),
            f"{row['padding']:.1%}",
            str(row["programs"]),
            f"{row['compile_seconds']:.1f}",
            f"{row['peak_bytes'] / 2**20:.0f}",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    # Names to the left, numbers to the right.
    lines = [
        [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        for row in (heads, *cells)
    ]
    return "\n".join("  ".join(line) for line in lines)
