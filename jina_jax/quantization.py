"""Embeddings in fewer bits, as sentence-transformers and the hosted Jina API define them; NumPy alone."""

import numpy as np
from jaxtyping import Float, Float32, Shaped

PRECISIONS = ("float32", "float16", "int8", "uint8", "binary", "ubinary")


def quantize(
    embeddings: Float32[np.ndarray, "*n E"], precision: str, ranges: Float[np.ndarray, "..."] | None = None
) -> Shaped[np.ndarray, "*n _"]:
    """Each embedding in fewer bits, whatever the embeddings beside it are.

    Without `ranges`, int8 scales each vector so that its largest magnitude becomes 127 and rounds. Signs and zeros
    stay, lengths do not: compare such vectors by their cosine. One of unit length, with the largest magnitude p, keeps
    a cosine of at least √(1 - E p² / 254²) with the original: 0.992 for 1024 dimensions at worst. With `ranges`, each
    dimension has 256 steps from its least to its largest value, and the middle of the steps is the new zero.

    Args:
        embeddings: Float32 [*n, E]; *n may be nothing, for one vector, or hold a 0.
        precision: One of `PRECISIONS`.
        ranges: Float [2, E], least and largest value of each dimension, as `calibrate` gives them; values beyond
            take the nearest of the two. Only int8 and uint8 use them.

    Returns:
        float32 (the array given) or float16 [*n, E]; int8 [*n, E], or uint8 [*n, E], which is 128 more; for ubinary,
        uint8 [*n, ⌈E/8⌉], a bit for each dimension, 1 where positive, the first dimension in the highest bit, zeros
        after the last; for binary, int8 [*n, ⌈E/8⌉], the same bytes less 128.

    Raises:
        ValueError: If the precision is unknown, a vector holds a value that is not a number, infinite or beyond
            float16 where that is asked for, or the ranges have the wrong shape or are not finite and in order.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"{precision=} must be one of {', '.join(PRECISIONS)}")
    peak = _peak(embeddings, np.float16 if precision == "float16" else np.float32)
    if precision in ("float32", "float16"):
        return embeddings.astype(precision, copy=False)
    if precision in ("binary", "ubinary"):
        packed = np.packbits(embeddings > 0, axis=-1)
        return packed if precision == "ubinary" else _less_128(packed)
    if ranges is None:
        # Dividing before multiplying: neither a subnormal peak nor a huge one overflows.
        levels = np.rint(embeddings / np.where(peak > 0, peak, 1)[..., None] * 127) + 128
    else:
        levels = _levels_within(embeddings, ranges)
    unsigned = levels.astype(np.uint8)
    return unsigned if precision == "uint8" else _less_128(unsigned)


def calibrate(embeddings: Float32[np.ndarray, "n E"]) -> Float32[np.ndarray, "2 E"]:
    """Least and largest value of each dimension, the `ranges` of `quantize`.

    Args:
        embeddings: Float32 [n, E], embeddings like those to quantize later, at best thousands.

    Returns:
        Float32 [2, E].

    Raises:
        ValueError: If there are fewer than two embeddings, or one holds a value that is not a finite number.
    """
    if len(embeddings) < 2:
        raise ValueError(f"ranges need at least two embeddings, not {len(embeddings)}")
    _peak(embeddings, np.float32)
    return np.stack([embeddings.min(axis=0), embeddings.max(axis=0)])


def _levels_within(
    embeddings: Float[np.ndarray, "*n E"], ranges: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "*n E"]:
    """Which of 256 equal steps from the least to the largest value each value falls in, clipped to 0 to 255."""
    if ranges.shape != (2, embeddings.shape[-1]):
        raise ValueError(f"ranges have shape {ranges.shape}, not (2, {embeddings.shape[-1]})")
    least, largest = ranges.astype(np.float32, copy=False)
    if not (np.isfinite(ranges).all() and (least <= largest).all()):
        raise ValueError("ranges must be finite, the least value of each dimension before the largest")
    # The operations of sentence-transformers 6.2, in float32, so that no value falls elsewhere. Version 5.1 did not
    # clip, and values beyond the ranges wrapped around; it also rounded int8 towards 0 instead of down.
    step = (largest - least) / 255
    step = np.where(step == 0, np.float32(1), step)
    return np.clip(np.floor((embeddings - least) / step), 0, 255)


def _less_128(unsigned: Shaped[np.ndarray, "*n E"]) -> Shaped[np.ndarray, "*n E"]:
    """A uint8 array less 128, as int8: in two's complement the highest bit turned over."""
    return (unsigned ^ np.uint8(128)).view(np.int8)


def _peak(embeddings: Float[np.ndarray, "*n E"], dtype: type[np.floating]) -> Shaped[np.ndarray, "*n"]:
    """Largest magnitude of each vector; a ValueError names the first row that holds what `dtype` cannot."""
    # NaN passes through both extremes, so no array of the embeddings' size is needed to find it.
    peak = np.asarray(np.maximum(embeddings.max(axis=-1, initial=0), -embeddings.min(axis=-1, initial=0)))
    bad = np.flatnonzero(~(peak <= np.finfo(dtype).max))
    if bad.size:
        raise ValueError(f"row {bad[0]} of the embeddings holds a value that is no finite {dtype.__name__}")
    return peak
