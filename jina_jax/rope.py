"""Rotary position embedding (Su et al., 2021, section 3.4), with the published model's exact tables."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def frequencies(head_dim: int, base: float) -> Float[np.ndarray, "half"]:
    """Angular frequency of every rotary pair, bit for bit as PyTorch computes them in float32.

    The power is taken in float64, rounded, and inverted in float32. Both shorter ways (all in float32, or all in
    float64 and rounded once) differ in the last bit, which moves cosines by up to 6e-5 at position 8191.

    Args:
        head_dim: Size H of a head.
        base: Base of the geometric series (20000 for the released model).

    Returns:
        Float32 [H/2], radians per token.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.power(np.float64(base), exponents.astype(np.float64)).astype(np.float32)
    return np.float32(1) / powers


def tables(length: int, head_dim: int, base: float) -> tuple[Float[np.ndarray, "T half"], Float[np.ndarray, "T half"]]:
    """Cosines and sines for positions 0 to `length - 1`.

    Args:
        length: Number T of positions.
        head_dim: Size H of a head.
        base: Base of the frequencies.

    Returns:
        Two float32 arrays [T, H/2].
    """
    positions = np.arange(length, dtype=np.float32)
    angles = positions[:, None] * frequencies(head_dim, base)[None, :]
    return np.cos(angles.astype(np.float64)).astype(np.float32), np.sin(angles.astype(np.float64)).astype(np.float32)


def apply(
    x: Float[Array, "B T N H"], cos: Float[Array, "#B T half"], sin: Float[Array, "#B T half"]
) -> Float[Array, "B T N H"]:
    """Rotate queries or keys by their positions.

    Pairs are the two halves of a head (element i with i + H/2), as in GPT-NeoX; computed in float32.

    Args:
        x: Queries or keys.
        cos: Cosines of every token's angles; rows of one batch may share them.
        sin: Sines, likewise.

    Returns:
        The rotated vectors, in the type of `x`.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
