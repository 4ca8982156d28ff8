"""Vectors that are kept in files by the hash of their text: each text is encoded once, whatever comes between."""

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jina_jax.records import whole_file

SHARD = 4096  # texts of a file


def vectors(texts: Sequence[str], folder: Path, encode: Callable[[list[str]], np.ndarray]) -> np.ndarray:
    """What an encoder gives, read from files where it was there before.

    Args:
        texts: Texts, which may repeat.
        folder: Where vectors are kept: those of one encoder.
        encode: Texts to vectors [n, D] of unit length, for those that are new.

    Returns:
        Float32 [n, D]; rounded to float16, in which vectors are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    keys = [_key(text) for text in texts]
    held: dict[bytes, int] = {}
    parts: list[np.ndarray] = []
    count = 0
    for file in sorted(folder.glob("*.npz")):
        with np.load(file) as shard:
            held |= {key: count + i for i, key in enumerate(shard["keys"].tolist())}
            parts.append(shard["vectors"])
        count += len(parts[-1])
    new = [one for one in dict(zip(keys, texts, strict=True)).items() if one[0] not in held]
    began = time.monotonic()
    for first in range(0, len(new), SHARD):
        part = dict(new[first : first + SHARD])
        parts.append(encode(list(part.values())).astype(np.float16))
        with whole_file(folder / f"{_key(''.join(part.values())).decode()}.npz") as handle:
            np.savez(handle, keys=np.array(list(part), "S32"), vectors=parts[-1])
        held |= {key: count + i for i, key in enumerate(part)}
        count += len(part)
        done = first + len(part)
        print(f"{done:,} of {len(new):,} texts, {done / (time.monotonic() - began):,.0f} a second", flush=True)
    if not texts:
        return np.empty((0, 0), np.float32)
    return np.concatenate(parts)[[held[key] for key in keys]].astype(np.float32)


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).hexdigest()[:32].encode()
