"""Attention: one entry, several implementations of the same function."""

from jina_jax.kernels.attention import IMPLEMENTATIONS, attention

__all__ = ["IMPLEMENTATIONS", "attention"]
