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
    return _cos_sin(angles)


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


# Pi in two parts; the first has 24 bits, so that its product with a half-integer is exact in float64.
_PI_HIGH, _PI_LOW = 3.1415927410125732, -8.742278000372485e-08
# sin(r) = r + r s (((c9 s + c7) s + c5) s + c3) with s = r r, on [-pi/2, pi/2]; least error in the maximum.
_SINE = (2.6057806406464854e-06, -0.00019809602903191571, 0.00833306624609863, -0.1666665955042822)


def _cos_sin(angles: Float[np.ndarray, "T half"]) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of float32 angles >= 0 with the very bits of `torch.cos` and `torch.sin` on x86 CPUs.

    PyTorch's wheels hand these to a vector library that takes off the nearest multiple of pi (for the cosine, the
    nearest odd multiple of pi/2), chosen in float32, and evaluates an odd polynomial of degree 9 in float64. The
    polynomial is off by up to a tenth of a float32 ulp, so 5% of its values are not the correctly rounded ones, and
    NumPy's and XLA's differ from them. The coefficients were fitted to its results and give the same rounding for
    every float32 up to 10000; beyond that, 1% of the values are one ulp off.
    """
    exact, results = angles.astype(np.float64), []
    for half in (0.5, 0.0):  # cosine, sine
        turns = np.rint((angles + np.float32(half * np.pi)) * np.float32(1 / np.pi)).astype(np.float64)
        r = (exact - (turns - half) * _PI_HIGH) - (turns - half) * _PI_LOW
        value = r + r * (r * r * np.polyval(_SINE, r * r))
        results.append(np.where(turns % 2 == 1, -value, value).astype(np.float32))
    return results[0], results[1]
