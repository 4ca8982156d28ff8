"""jina-embeddings-v3: XLM-RoBERTa with rotary positions, task adapters and mean pooling (Sturua et al., 2024).

Reads from top to bottom as the data flows: Embed, Block (attention, then mlp), Model, Output.

Axes: B batch rows, T tokens, D width, N heads, H head size, F mlp width, K adapters, P packed texts of a row,
J the three of query, key and value.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jina_jax import pooling, rope
from jina_jax.config import Config
from jina_jax.kernels.attention import attention
from jina_jax.lora import Adapters, LoRADense, LoRAEmbed, dot
from jina_jax.sharding import constrain

# What callers may pass: traced, on a device, or on the host.
In = Array | np.ndarray
Rope = tuple[Float[Array, "#B T half"], Float[Array, "#B T half"]]


class LayerNorm(nn.Module):
    """LayerNorm (Ba et al., 2016) with float32 statistics."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Normalise float32 sums over their last axis and round to the compute type."""
        D, dtype = x.shape[-1], self.config.param_dtype
        scale = self.param("scale", nn.initializers.ones, (D,), dtype).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (D,), dtype).astype(jnp.float32)
        x = x - x.mean(axis=-1, keepdims=True)
        variance = jnp.square(x).mean(axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(variance + self.config.layer_norm_eps)
        return (x * scale[None, None] + bias[None, None]).astype(self.config.dtype)


class Embed(nn.Module):
    """Word plus token type, normalised. Positions come in later, by rotation."""

    config: Config

    def setup(self) -> None:
        """Declare the two tables."""
        self.words = LoRAEmbed(self.config, "V")
        self.types = LoRAEmbed(self.config, "Y")
        self.norm = LayerNorm(self.config)
        self.dropout = nn.Dropout(self.config.hidden_dropout_prob)

    def __call__(
        self, tokens: Int[Array, "B T"], types: Int[Array, "#B #T"], adapters: Adapters, train: bool
    ) -> Float[Array, "B T D"]:
        """Token ids to vectors."""
        x = self.words(tokens, adapters) + self.types(types, adapters)
        return self.dropout(self.norm(x), deterministic=not train)


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions."""

    config: Config

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        segments: Int[Array, "B T"] | None,
        rope: Rope,
        adapters: Adapters,
        train: bool,
    ) -> Float[Array, "B T D"]:
        """Each token looks at the tokens of its own text."""
        config = self.config
        qkv = LoRADense(config, "D", "JNH", name="qkv")(x, adapters, train).astype(config.dtype)
        rate = config.attention_probs_dropout_prob if train else 0.0
        out = attention(
            *(qkv[:, :, j] for j in range(3)),
            segments=segments,
            rope=rope,
            dropout_rate=rate,
            dropout_key=self.make_rng("dropout") if rate else None,
            implementation=config.attention,
        )
        return LoRADense(config, "NH", "D", name="out")(out, adapters, train)


class Mlp(nn.Module):
    """Two dense layers with the exact (erf) GELU between them."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], adapters: Adapters, train: bool) -> Float[Array, "B T D"]:
        """Each token by itself."""
        x = LoRADense(self.config, "D", "F", name="up")(x, adapters, train)
        x = nn.gelu(x, approximate=False).astype(self.config.dtype)
        return LoRADense(self.config, "F", "D", name="down")(x, adapters, train)


class Block(nn.Module):
    """One encoder layer. The norms stand after the residual sums, as in the original Transformer."""

    config: Config

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        segments: Int[Array, "B T"] | None,
        rope: Rope,
        adapters: Adapters,
        train: bool,
    ) -> tuple[Float[Array, "B T D"], None]:
        """Apply the layer; the None is what `nn.scan` would collect."""
        dropout = nn.Dropout(self.config.hidden_dropout_prob, deterministic=not train)

        y = Attention(self.config, name="attention")(x, segments, rope, adapters, train)
        y = checkpoint_name(y, "attention")
        x = LayerNorm(self.config, name="attention_norm")(x.astype(jnp.float32) + dropout(y))

        y = Mlp(self.config, name="mlp")(x, adapters, train)
        y = checkpoint_name(y, "mlp")
        x = LayerNorm(self.config, name="mlp_norm")(x.astype(jnp.float32) + dropout(y))

        self.sow("intermediates", "hidden", x)
        return x, None


@struct.dataclass
class Output:
    """What the model computes; `jax.jit` drops what nobody reads.

    Attributes:
        hidden: Token vectors after the last layer, [B, T, D], compute type. Arbitrary but finite at padding.
        pooled: Mean over each text's tokens, float32 [B, D], or [B, P, D] for packed rows.
        embeddings: `pooled` at unit length. Zeros where there is no text.
    """

    hidden: Float[Array, "B T D"]
    pooled: Float[Array, "B *P D"]
    embeddings: Float[Array, "B *P D"]


class Model(nn.Module):
    """The encoder with its adapters: `model.apply(variables, tokens, mask, task)`.

    Pure, and safe under `jit`, `grad`, `vmap` and `shard_map`. Masks, segments and task arrays are traced, so one
    compilation serves every mixture of tasks and every pattern of padding of a shape. The output of each layer is
    collected as "intermediates" when asked for (`mutable=["intermediates"]`).

    Attributes:
        config: The configuration; the default is the released model.
    """

    config: Config = Config()

    def setup(self) -> None:
        """Declare the parts in the order in which data flows."""
        config = self.config
        self.embed = Embed(config)
        block = Block
        if config.remat != "none":
            block = nn.remat(Block, policy=_POLICIES[config.remat], prevent_cse=False, static_argnums=(5,))
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=config.num_hidden_layers,
            unroll=config.unroll,
        )(config)
        if config.pooler:
            self.pooler = LoRADense(config, "D", "E")
        if config.mlm_head:
            self.mlm_head = MlmHead(config)

    def __call__(
        self,
        tokens: Int[In, "B T"],
        mask: Bool[In, "B T"] | Int[In, "B T"] | None = None,
        task: str | Int[In, "..."] | None = None,
        *,
        segments: Int[In, "B T"] | None = None,
        num_texts: int | None = None,
        token_types: Int[In, "B T"] | None = None,
        train: bool = False,
    ) -> Output:
        """Embed a batch of token rows.

        Args:
            tokens: Token ids.
            mask: True (or 1) for valid tokens, in any pattern; None if all are.
            task: None for the bare backbone, a task name, or adapter indices, with -1 for none: [B], or [B, P] for
                packed rows.
            segments: Instead of a mask, several texts in one row: 0 for padding, p for the tokens of the row's
                p-th text, which stand side by side. Positions restart in each.
            num_texts: Places P for texts in every packed row. Needed with `segments` unless `task` is [B, P].
            token_types: Token type ids; None means 0.
            train: Whether dropout is on; needs `rngs={"dropout": key}`.

        Returns:
            Token vectors and embeddings.

        Raises:
            ValueError: If arguments contradict each other or a task is unknown.
        """
        if segments is not None and mask is not None:
            raise ValueError("give mask or segments, not both (0 in segments is padding)")
        # NumPy arrays become JAX's at the door.
        tokens = jnp.asarray(tokens)
        types = jnp.zeros((1, 1), jnp.int32) if token_types is None else jnp.asarray(token_types)
        packed = None if segments is None else jnp.asarray(segments)
        # A mask is one segment per row; no mask at all lets attention skip the comparison.
        visible = packed if mask is None else jnp.asarray(mask, bool).astype(jnp.int32)
        adapters, num_texts = _read_task(self.config, tokens, task, packed, num_texts)

        x = self.embed(tokens, types, adapters, train)
        self.sow("intermediates", "embedded", x)
        x, _ = self.layers(x, visible, self._rope(tokens.shape[1], packed), adapters, train)
        if self.is_initializing():
            self._init_heads(x)

        if packed is None:
            pooled = pooling.mean_pool(x, jnp.ones(tokens.shape, bool) if visible is None else visible > 0)
        else:
            assert num_texts is not None
            pooled = pooling.mean_pool_packed(x, packed, num_texts)
        return Output(hidden=x, pooled=pooled, embeddings=pooling.normalize(pooled))

    def pooler_output(self, hidden: Float[In, "B T D"], task: str | Int[In, "B"] | None = None) -> Float[Array, "B D"]:
        """The checkpoint's pooler, tanh(dense(first token)), which embeddings do not use.

        Args:
            hidden: `Output.hidden`.
            task: As in the call that made it.

        Returns:
            Float32 [B, D].

        Raises:
            ValueError: If the checkpoint had no pooler.
        """
        if not self.config.pooler:
            raise ValueError("this model has no pooler (Config.pooler is False)")
        first = jnp.asarray(hidden)[:, :1]
        adapters, _ = _read_task(self.config, first[:, :, 0], task, None, None)
        return jnp.tanh(self.pooler(first, adapters)[:, 0])

    def mlm_logits(self, hidden: Float[In, "B T D"]) -> Float[Array, "B T V"]:
        """Scores over the vocabulary for the given token vectors (gather the masked positions first: V is large).

        Args:
            hidden: Rows of `Output.hidden`.

        Returns:
            Float32 [B, T, V].

        Raises:
            ValueError: If the model has no MLM head.
        """
        return self._mlm_head()(jnp.asarray(hidden), self.embed.words.embedding)

    def mlm_features(self, hidden: Float[In, "B T D"]) -> Float[Array, "B T D"]:
        """What `mlm_logits` multiplies with the word table, for losses that never hold all scores.

        Args:
            hidden: Rows of `Output.hidden`.

        Returns:
            Compute type [B, T, D]; `mlm_logits` is its product with the rows of the word table, plus their bias.

        Raises:
            ValueError: If the model has no MLM head.
        """
        return self._mlm_head().features(jnp.asarray(hidden))

    def _mlm_head(self) -> "MlmHead":
        if not self.config.mlm_head:
            raise ValueError("this model has no MLM head; load it with mlm_head=True")
        return self.mlm_head

    def _rope(self, length: int, segments: Int[In, "B T"] | None) -> Rope:
        """Rotary tables of every token: shared by all rows, or by position within the text for packed rows."""
        config = self.config
        cos, sin = map(jnp.asarray, rope.tables(length, config.head_dim, config.rope_base))
        if segments is None:
            return cos[None], sin[None]
        positions = _positions(segments)
        return cos[positions], sin[positions]

    def _init_heads(self, x: Float[Array, "B T D"]) -> None:
        """Create the parameters of the parts that `__call__` does not run."""
        if self.config.pooler:
            self.pooler(x[:, :1])
        if self.config.mlm_head:
            self.mlm_logits(x[:, :1])


class MlmHead(nn.Module):
    """Masked-language-model head of XLM-R: dense, GELU, norm, and the word table as decoder."""

    config: Config

    def setup(self) -> None:
        """Declare the parts; the table is that of the words."""
        config = self.config
        self.dense = LoRADense(config, "D", "E", adapted=False)
        self.norm = LayerNorm(config)
        self.bias = self.param("bias", nn.initializers.zeros, (config.axis_sizes["V"],), config.param_dtype)

    def features(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Token vectors to what is compared with the word table, in the compute type."""
        return self.norm(nn.gelu(self.dense(x), approximate=False))

    def __call__(self, x: Float[Array, "B T D"], table: Float[Array, "rows D"]) -> Float[Array, "B T V"]:
        """Token vectors to scores over the vocabulary, float32."""
        x = self.features(x)
        scores = dot("BTD,VD->BTV", constrain(x, "B T _"), constrain(table, "V _"), self.config)
        scores = constrain(scores, "B T V") + self.bias.astype(jnp.float32)[None, None]
        return scores[:, :, : self.config.vocab_size]  # without the rows that nobody reads


# What the backward pass keeps of each layer; see Config.remat.
_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("attention", "mlp"),
}


def _positions(segments: Int[In, "B T"]) -> Int[Array, "B T"]:
    """Position of each token within its text."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32)[None], segments.shape)
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts = jnp.where(segments != before, index, 0)
    return index - jax.lax.cummax(starts, axis=1)


def _read_task(
    config: Config,
    tokens: In,
    task: str | In | None,
    segments: In | None,
    num_texts: int | None,
) -> tuple[Adapters, int | None]:
    """One-hot rows over the adapters, [B, 1, K] or [B, T, K], and the number of packed texts."""
    B = tokens.shape[0]
    ids = None if task is None else jnp.asarray(config.task_id(task) if isinstance(task, str) else task)
    if ids is not None:
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"task must be None, a name or integers, not {ids.dtype}")
        ids = jnp.broadcast_to(ids, (B,)) if ids.ndim == 0 else ids
        if ids.shape[0] != B or ids.ndim > (1 if segments is None else 2):
            axes = "[B]" if segments is None else "[B] or [B, P]"
            raise ValueError(f"task has shape {ids.shape}; expected {axes} with B = {B}")
        if not isinstance(ids, jax.core.Tracer):
            _check_ids(config, np.asarray(ids))

    if segments is not None and ids is not None and ids.ndim == 2:
        if num_texts not in (None, ids.shape[1]):
            raise ValueError(f"{num_texts=}, but task has room for {ids.shape[1]} texts per row")
        num_texts = ids.shape[1]
        text = jnp.clip(segments - 1, 0, num_texts - 1)
        ids = jnp.where(segments > 0, jnp.take_along_axis(ids, text, axis=1), -1)
    elif ids is not None:
        ids = ids[:, None]
    if (num_texts is None) != (segments is None):
        raise ValueError("packed rows need both segments and num_texts (or a task array [B, P])")
    if ids is None or not config.tasks:
        return None, num_texts
    return jax.nn.one_hot(ids, len(config.tasks), dtype=jnp.float32), num_texts


def _check_ids(config: Config, ids: np.ndarray) -> None:
    """Refuse adapter indices that do not exist; traced ones cannot be checked and mean "none"."""
    wrong = sorted({int(i) for i in ids.ravel() if not -1 <= i < len(config.tasks)})
    if wrong:
        names = ", ".join(f"{i} {name}" for i, name in enumerate(config.tasks)) or "no adapters"
        raise ValueError(f"task ids {wrong} are out of range; this model has: -1 none, {names}")


def count_parameters(variables: Mapping[str, Any]) -> int:
    """Number of scalars in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(variables))
