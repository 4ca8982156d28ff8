"""Every tolerance of the suite, in one table, with the reason for it; and the comparison that uses them."""

import numpy as np

# Token vectors in float32 have components of order 1 to 4; two correct programs differ by the order of their sums.
HIDDEN = 1e-5
# Embeddings have unit length, so components are about ten times smaller, and pooling averages errors away.
EMBEDDING = 1e-6
# Folding an adapter in rounds each weight once more.
MERGED = 3e-6
# Gradients, relative to the largest component of the tensor's gradient.
GRADIENT = 1e-5
# One attention call in float32 against float64.
ATTENTION = 2e-6
# bfloat16 has 8 bits: allowed error as a multiple of what PyTorch's own bfloat16 run has.
BFLOAT16_FACTOR = 1.5


def assert_close(actual: object, expected: object, atol: float, where: object = ...) -> None:
    """Largest absolute difference at most `atol`, all values finite (NumPy: XLA's reductions may drop NaN)."""
    actual, expected = np.asarray(actual)[where], np.asarray(expected)[where]
    assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    assert np.isfinite(actual).all()
    assert np.isfinite(expected).all()
    difference = np.abs(actual - expected).max(initial=0.0)
    assert difference <= atol, f"largest difference {difference:.3g} > {atol:.3g}"


def assert_close_relative(actual: object, expected: object, rtol: float, floor: float = 1e-6) -> None:
    """Largest difference at most `rtol` times the largest value expected, or times `floor` if that is larger.

    The floor is for values that vanish in exact arithmetic, such as the gradient of a softmax over one key.
    """
    scale = np.abs(np.asarray(expected, np.float64)).max(initial=floor)
    assert_close(actual, expected, rtol * scale)
