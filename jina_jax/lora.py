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
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jina_jax.config import Config
from jina_jax.sharding import constrain

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
        size = config.axis_sizes
        fan_in, out = tuple(size[axis] for axis in i), tuple(size[axis] for axis in o)
        normal = nn.initializers.normal(config.initializer_range)

        def used(x: Array, axes: str) -> Array:
            """A weight or an activation as the devices of a mesh need it: whole in D, split where heads and mlp are."""
            return constrain(x, " ".join(axes).replace("D", "_"))

        kernel = used(self.param("kernel", normal, fan_in + out, config.param_dtype), i + o)
        bias = self.param("bias", nn.initializers.zeros, out, config.param_dtype)
        y = used(dot(f"BT{i},{i}{o}->BT{o}", x, kernel, config), f"BT{o}")
        y = y + bias.astype(jnp.float32).reshape((1, 1, *out))
        if not (self.adapted and wants_adapters(self, adapters)):
            return y

        stack = (size["K"], size["R"])
        lora_a = used(self.param("lora_a", normal, fan_in + stack, config.param_dtype), f"{i}KR")
        lora_b = used(self.param("lora_b", nn.initializers.zeros, stack + out, config.param_dtype), f"KR{o}")
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
        config, size = self.config, self.config.axis_sizes
        normal, zeros = nn.initializers.normal(config.initializer_range), nn.initializers.zeros
        self.count = {"V": config.vocab_size, "Y": config.type_vocab_size}[self.rows]
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
        # On a mesh every device looks up its part of the table (types have a whole one), for the rows of all devices
        # that share it; then each gets what belongs to its own rows.
        ids = constrain(jnp.where(ids < self.count, ids, self.embedding.shape[0]), "G T")
        y = constrain(jnp.take(self.embedding, ids, axis=0, mode="fill"), "G T D" if self.rows == "V" else "G T _")
        y = constrain(y, "B T _").astype(jnp.float32)
        if not wants_adapters(self, adapters) or adapters is None:
            return y
        h = constrain(jnp.take(self.lora_a, ids, axis=0, mode="fill"), "G T _ _")
        h = constrain(h, "B T _ _").astype(jnp.float32) * adapters[..., None]
        return y + self.config.lora_scale * dot("BTKR,KRD->BTD", h, self.lora_b, self.config)


def dot(pattern: str, x: Array, y: Array, config: Config) -> Float[Array, "..."]:
    """Einsum of operands in the compute type, accumulated in float32.

    Float32 operands keep all their bits on every device: TPUs and recent GPUs would otherwise round them first. The
    second one may come `as_bits`.
    """
    dtype = jnp.dtype(config.dtype)
    y = jax.lax.bitcast_convert_type(y, jnp.bfloat16) if y.dtype == jnp.uint16 else y
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return jnp.einsum(
        pattern, x.astype(dtype), y.astype(dtype), precision=precision, preferred_element_type=jnp.float32
    )


def as_bits(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The layers' bfloat16 weights as integers of 16 bits, which `dot` takes as well, on the same memory.

    XLA's CPU backend makes float32 copies of bfloat16 arrays before it cuts a layer out of them: of all layers, in
    every call. Integers it cuts as they are.

    Args:
        variables: Variables of a model, on a CPU.

    Returns:
        Variables for `Model.apply`, not for anything else.
    """

    def held(path: tuple, x: Any) -> Any:
        weight = path[1].key == "layers" and path[-1].key in ("kernel", "lora_a", "lora_b")
        return jax.device_put(np.asarray(x).view(np.uint16)) if weight and x.dtype == jnp.bfloat16 else x

    return jax.tree_util.tree_map_with_path(held, dict(variables))


def holds_adapters(module: LoRADense | LoRAEmbed) -> bool:
    """Whether the module's parameters include adapters: those of a merged or bare model do not."""
    return bool(module.config.tasks) and (module.is_initializing() or module.has_variable("params", "lora_a"))


def wants_adapters(module: LoRADense | LoRAEmbed, adapters: Adapters) -> bool:
    """Whether to touch the adapters: to apply them, or to create them."""
    if adapters is not None and not holds_adapters(module):
        raise ValueError("a task was given, but these variables hold no adapters (merged already?); pass task=None")
    return adapters is not None or (module.is_initializing() and holds_adapters(module))


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
