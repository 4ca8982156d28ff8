"""What every implementation of attention is given, and what several of them need."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from jina_jax import rope as rotary

NO_KEYS = -1e30  # logsumexp of a query without keys
LOG2_E = math.log2(math.e)

Rope = tuple[Float[Array, "#B T half"], Float[Array, "#B T half"]]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What attention is computed from.

    An implementation that makes its gradients by hand has two functions. `forward(inputs, dtype)` gives the output
    [B, T, D] in the type asked for, zeros where a query has no keys, and the logsumexp of the scaled scores, float32
    [B, N, T], there NO_KEYS. `backward(inputs, out, logsumexp, d_out, dtype)` gives the gradients of q, k and v; the
    keys may be a part of those that `out` and `logsumexp` stem from, and the results are then that part's share.

    Attributes:
        q: Queries, float32 or bfloat16, heads side by side: D = N * H.
        k: Keys, same type.
        v: Values, same type.
        q_segments: 0 for padding; queries see the keys of the same segment. None, for both, means one segment.
        k_segments: Segments of the keys.
        rope: Cosines and sines that rotate queries and keys, which are then of one length.
        words: Seed and origin for dropout, see `dropout.keep`.
        heads: Number N of heads.
        rate: Share of probabilities to drop.
    """

    q: Float[Array, "B T D"]
    k: Float[Array, "B S D"]
    v: Float[Array, "B S D"]
    q_segments: Int[Array, "B T"] | None
    k_segments: Int[Array, "B S"] | None
    rope: Rope | None
    words: UInt32[Array, "6"]
    heads: int
    rate: float

    @property
    def head_dim(self) -> int:
        """Size H of a head."""
        return self.q.shape[2] // self.heads

    def rotated(self) -> "Inputs":
        """The same without rope, which is applied to queries and keys."""
        if self.rope is None:
            return self
        rope = self.rope
        q, k = (join(rotary.apply(split(x, self.heads), *rope)) for x in (self.q, self.k))
        return dataclasses.replace(self, q=q, k=k, rope=None)


def split(x: Float[Array, "B T D"], heads: int) -> Float[Array, "B T N H"]:
    """Give heads an axis of their own."""
    return x.reshape(*x.shape[:2], heads, -1)


def join(x: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
    """Put heads side by side."""
    return x.reshape(*x.shape[:2], -1)


def dot(pattern: str, x: Array, y: Array) -> Float[Array, "..."]:
    """Product accumulated in float32; float32 operands are never rounded to fewer bits."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(pattern, x, y, precision=precision, preferred_element_type=jnp.float32)


def clean(x: Float[Array, "B T N H"], segments: Int[Array, "B T"]) -> Float[Array, "B T N H"]:
    """Zero what stands in padding: 0 times it must be 0."""
    return jnp.where((segments > 0)[:, :, None, None], x, jnp.zeros((), x.dtype))


def target() -> Any:
    """The device that programs are traced for, with its `platform` and `device_kind`.

    That of the mesh in context (`jax.sharding.use_abstract_mesh`, to compile ahead of time), or the default one.
    """
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
