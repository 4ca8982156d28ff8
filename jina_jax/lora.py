"""Dense layers and embeddings that carry a stack of low-rank adapters (Hu et al., 2021), and how to fold one in.

Every token says by a one-hot row over the K adapters which one it uses; a row of zeros means none. All adapters
are applied to all tokens at once, `h = x @ A` with A [D, K*R], the columns of the other tasks are zeroed, and
`h @ B` is added to the output. K*R is 20 for the released model, so any mixture of tasks in one batch costs 2.6%
more multiplications than no adapter at all, without gathers and without a second compilation.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jina_jax.config import Config

Adapters = Float[Array, "#B #T K"] | None


class LoRADense(nn.Module):
    """`x @ kernel + bias`, plus the adapter that each token asks for.

    Attributes:
        config: The model's configuration.
        inputs: Axis letters of the input's last axes, such as "D" or "NH".
        outputs: Axis letters that take their place.
        adapted: Whether the layer has adapters.
    """

    config: Config
    inputs: str
    outputs: str
    adapted: bool = True

    @nn.compact
    def __call__(self, x: Array, adapters: Adapters = None, train: bool = False) -> Array:
        """Apply the layer.

        Args:
            x: [B, T, *inputs].
            adapters: One-hot rows over the adapters for each token, or None for no adapter at all.
            train: Whether dropout is on.

        Returns:
            Float32 [B, T, *outputs]: sums and nonlinearities that follow are done before anything is rounded.
        """
        config, i, o = self.config, self.inputs, self.outputs
        size = axis_sizes(config)
        fan_in, out = tuple(size[axis] for axis in i), tuple(size[axis] for axis in o)
        normal = nn.initializers.normal(config.initializer_range)

        kernel = self.param("kernel", normal, fan_in + out, config.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, out, config.param_dtype)
        y = dot(f"BT{i},{i}{o}->BT{o}", x, kernel, config)
        y = y + bias.astype(jnp.float32).reshape((1, 1, *out))
        if not (self.adapted and wants_adapters(self, adapters)):
            return y

        stack = (size["K"], size["R"])
        lora_a = self.param("lora_a", normal, fan_in + stack, config.param_dtype)
        lora_b = self.param("lora_b", nn.initializers.zeros, stack + out, config.param_dtype)
        if adapters is not None:
            x = nn.Dropout(config.lora_dropout)(x, deterministic=not train)
            h = dot(f"BT{i},{i}KR->BTKR", x, lora_a, config) * adapters[..., None]
            # Rounded, so that it is half as large in memory; y stands beside it before anything else is rounded.
            delta = dot(f"BTKR,KR{o}->BT{o}", config.lora_scale * h, lora_b, config).astype(config.dtype)
            y = y + delta.astype(jnp.float32)
        return y


class LoRAEmbed(nn.Module):
    """Rows of a table, plus the adapter that each token asks for.

    Attributes:
        config: The model's configuration.
        rows: Axis letter of the table's rows: "V" or "Y".
    """

    config: Config
    rows: str

    def setup(self) -> None:
        """Declare the table, which the MLM head reads too, and its adapters."""
        config, size = self.config, axis_sizes(self.config)
        normal, zeros = nn.initializers.normal(config.initializer_range), nn.initializers.zeros
        rows, stack = size[self.rows], (size["K"], size["R"])
        self.embedding = self.param("embedding", normal, (rows, size["D"]), config.param_dtype)
        if holds_adapters(self):
            self.lora_a = self.param("lora_a", zeros, (rows, *stack), config.param_dtype)
            self.lora_b = self.param("lora_b", normal, (*stack, size["D"]), config.param_dtype)

    def __call__(self, ids: Int[Array, "#B #T"], adapters: Adapters = None) -> Float[Array, "#B #T D"]:
        """Look rows up.

        Args:
            ids: Row numbers. One beyond the table gives NaN rather than some other token's row.
            adapters: One-hot rows over the adapters for each token, or None for no adapter at all.

        Returns:
            Float32 [B, T, D].
        """
        y = jnp.take(self.embedding, ids, axis=0, mode="fill").astype(jnp.float32)
        if not wants_adapters(self, adapters) or adapters is None:
            return y
        h = jnp.take(self.lora_a, ids, axis=0, mode="fill").astype(jnp.float32) * adapters[..., None]
        return y + self.config.lora_scale * dot("BTKR,KRD->BTD", h, self.lora_b, self.config)


def dot(pattern: str, x: Array, y: Array, config: Config) -> Float[Array, "..."]:
    """Einsum of operands in the compute type, accumulated in float32.

    Float32 operands keep all their bits on every device: TPUs and recent GPUs would otherwise round them first.
    """
    dtype = jnp.dtype(config.dtype)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return jnp.einsum(
        pattern, x.astype(dtype), y.astype(dtype), precision=precision, preferred_element_type=jnp.float32
    )


def holds_adapters(module: LoRADense | LoRAEmbed) -> bool:
    """Whether the module's parameters include adapters: those of a merged or bare model do not."""
    return bool(module.config.tasks) and (module.is_initializing() or module.has_variable("params", "lora_a"))


def wants_adapters(module: LoRADense | LoRAEmbed, adapters: Adapters) -> bool:
    """Whether to touch the adapters: to apply them, or to create them."""
    if adapters is not None and not holds_adapters(module):
        raise ValueError("a task was given, but these variables hold no adapters (merged already?); pass task=None")
    return adapters is not None or (module.is_initializing() and holds_adapters(module))


def axis_sizes(config: Config) -> dict[str, int]:
    """Size of every axis that parameters have, by its letter."""
    return {
        "V": config.vocab_size,
        "Y": config.type_vocab_size,
        "D": config.hidden_size,
        "E": config.hidden_size,
        "F": config.intermediate_size,
        "J": 3,
        "N": config.num_attention_heads,
        "H": config.head_dim,
        "K": len(config.tasks),
        "R": config.lora_rank,
        "L": config.num_hidden_layers,
    }


def merge(variables: Mapping[str, Any], task: str | int, config: Config | None = None) -> dict[str, Any]:
    """Fold one adapter into the weights, so that it costs nothing at all.

    Args:
        variables: What `load` or `Model.init` gave, with stacked adapters.
        task: The adapter, by name or index.
        config: The model's configuration; None means the released one (its tasks, rank and alpha).

    Returns:
        New variables without adapters, to be applied with `task=None`. Computed in float32 and rounded once to
        the parameters' type.

    Raises:
        ValueError: If the task is unknown or the variables have other adapters than the configuration says.
    """
    config = config or Config()
    index = config.task_id(task) if isinstance(task, str) else range(len(config.tasks))[task]
    expected = (len(config.tasks), config.lora_rank)

    def fold(tree: Mapping[str, Any], path: str, axes: int) -> dict[str, Any]:
        if "lora_a" not in tree:
            return {
                name: fold(child, f"{path}/{name}", axes + (name == "layers")) if isinstance(child, Mapping) else child
                for name, child in tree.items()
            }
        a, b = tree["lora_a"], tree["lora_b"]
        found = b.shape[axes : axes + 2]
        if found != expected:
            raise ValueError(
                f"{path} has {found} (adapters, rank), but the configuration says {expected}: pass config="
            )
        name = "kernel" if "kernel" in tree else "embedding"
        base = tree[name]

        def product(a: Array, b: Array) -> Array:
            return jnp.tensordot(a[..., index, :], b[index], axes=1, precision=jax.lax.Precision.HIGHEST)

        for _ in range(axes):
            product = jax.vmap(product)
        delta = config.lora_scale * product(a.astype(jnp.float32), b.astype(jnp.float32))
        merged = (base.astype(jnp.float32) + delta.reshape(base.shape)).astype(base.dtype)
        rest = {key: value for key, value in tree.items() if key not in ("lora_a", "lora_b", name)}
        return {name: merged, **rest}

    return fold(variables, "variables", 0)
