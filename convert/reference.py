"""The original jina-embeddings-v3 model, restated in plain PyTorch: the judge of the JAX model.

Written from the observed behaviour of `jinaai/jina-embeddings-v3` with its remote code
(`jinaai/xlm-roberta-flash-implementation`): post-norm XLM-RoBERTa without a position table, rotary positions,
and one low-rank adapter per task on every embedding and every linear map, folded into the weights before
they are used. It shares no line with `jina_jax`, favours the obvious over the fast, and is differentiable in
every tensor of `state`. Axes: B rows, T tokens, S keys, N heads, H head dim, D width, K adapters, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

State = Mapping[str, Tensor]
Config = Mapping[str, Any]
Task = int | str | Tensor | None


class Result(NamedTuple):
    """What one forward pass yields.

    Attributes:
        hidden: `[B, T, D]`, the last layer's output. Rows of padding are computed and mean nothing.
        pooler: `[B, D]`, tanh of a dense layer on token 0; None if the checkpoint has no pooler. The encoder
            of the released model never reads it.
        hidden_states: L+1 tensors `[B, T, D]`: the embeddings after their LayerNorm, then every layer.
        pooled: `[B, D]`, the mean of `hidden` over `mask`, in float32 (float64 where the pass ran in it).
    """

    hidden: Tensor
    pooler: Tensor | None
    hidden_states: tuple[Tensor, ...]
    pooled: Tensor


def load_state(directory: str | Path) -> dict[str, Tensor]:
    """Read every tensor of an original checkpoint, as stored.

    Args:
        directory: a folder with `model.safetensors`, or with the `pytorch_model.bin` of early revisions.

    Returns:
        Tensors by the names of the original layout, in their stored dtype.
    """
    from safetensors.torch import load_file

    file = Path(directory) / "model.safetensors"
    if file.exists():
        return dict(load_file(file))
    return dict(torch.load(file.with_name("pytorch_model.bin"), map_location="cpu", weights_only=True))


def forward(
    state: State,
    config: Config,
    ids: Tensor,
    mask: Tensor,
    task: Task = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Result:
    """Run the original model.

    Args:
        state: tensors by original name (`roberta.` prefix). A module without adapters, spelt `*.weight`, is
            accepted too; it can only be run without a task.
        config: the parsed config.json.
        ids: `[B, T]` integers.
        mask: `[B, T]`, nonzero for real tokens, any pattern. Positions are array indices, masked or not; a
            row without tokens attends to all its keys, since -10000 is added to every score.
        task: None for the bare backbone, one task by name or index in `lora_adaptations`, or `[B]` indices
            with -1 for "no adapter" (our extension: the original would index its last adapter). As in the
            original, the rows of each task of a mixed batch run apart, with that task's merged weights.
        dtype: dtype of weights and activations: float64, float32 or bfloat16.

    Returns:
        The `Result`, in `dtype`.
    """
    if isinstance(task, str):
        task = config["lora_adaptations"].index(task)
    if task is None or isinstance(task, int):
        return _run(state, config, ids, mask, task, dtype)
    tasks = torch.as_tensor(task)
    if tasks.shape != ids.shape[:1]:
        raise ValueError(f"one task per row: {tuple(tasks.shape)=} for {len(ids)} rows")
    groups = [(int(t), torch.nonzero(tasks == t)[:, 0]) for t in torch.unique(tasks)]
    runs = [_run(state, config, ids[rows], mask[rows], t, dtype) for t, rows in groups]
    order = torch.argsort(torch.cat([rows for _, rows in groups]))

    def scatter(*parts: Tensor) -> Tensor:
        return torch.cat(parts)[order]

    return Result(
        hidden=scatter(*[r.hidden for r in runs]),
        pooler=None if runs[0].pooler is None else scatter(*[r.pooler for r in runs]),
        hidden_states=tuple(map(scatter, *[r.hidden_states for r in runs])),
        pooled=scatter(*[r.pooled for r in runs]),
    )


def mlm_logits(head_state: State, word_embeddings: Tensor, hidden: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Score the vocabulary for every token: dense, GELU, LayerNorm, then the tied decoder with its own bias.

    Args:
        head_state: `lm_head.dense.{weight,bias}`, `lm_head.layer_norm.{weight,bias}` and `lm_head.bias`.
        word_embeddings: `[V, D]`, the table that the decoder shares.
        hidden: `[B, T, D]`, which also sets the dtype.
        eps: the config's `layer_norm_eps`.

    Returns:
        Logits `[B, T, V]`.
    """
    head = {name.removeprefix("lm_head."): tensor.to(hidden.dtype) for name, tensor in head_state.items()}
    x = functional.gelu(functional.linear(hidden, head["dense.weight"], head["dense.bias"]))
    x = functional.layer_norm(x, x.shape[-1:], head["layer_norm.weight"], head["layer_norm.bias"], eps)
    return functional.linear(x, word_embeddings.to(hidden.dtype), head["bias"])


def embed(pooled: Tensor, dimensions: int | None = None) -> Tensor:
    """Turn pooled vectors into embeddings: cut first, then scale to unit length.

    Args:
        pooled: `[B, D]`.
        dimensions: components to keep; None keeps all.

    Returns:
        `[B, dimensions]` in float32 (float64 stays), of unit L2 norm; a zero vector stays zero (eps 1e-12).
    """
    return functional.normalize(_at_least_fp32(pooled)[:, :dimensions], dim=-1, eps=1e-12)


def _run(state: State, config: Config, ids: Tensor, mask: Tensor, task: int | None, dtype: torch.dtype) -> Result:
    """Run all rows with one task's weights; the arguments are those of `forward`."""
    if task is not None and not -1 <= task < len(config["lora_adaptations"]):
        raise ValueError(f"{task=} is neither -1 nor one of {len(config['lora_adaptations'])} adapters")
    adapter = None if task == -1 else task
    scaling = config["lora_alpha"] / config["lora_rank"]
    heads = config["num_attention_heads"]

    def fetch(module: str) -> list[Tensor]:
        """Fetch the weight of a module and, under a task, its A and B, as stored."""
        stem = f"roberta.{module}.parametrizations.weight"
        plain = f"{stem}.original" not in state
        weight = state[f"roberta.{module}.weight" if plain else f"{stem}.original"]
        if adapter is None:
            return [weight]
        return [weight, state[f"{stem}.0.lora_A"][adapter], state[f"{stem}.0.lora_B"][adapter]]

    def lookup(module: str, rows: Tensor) -> Tensor:
        """Read rows of `E + A @ B * alpha/rank`, A `[V, R]`, B `[R, D]`; other rows are not computed."""
        weight, *factors = fetch(module)
        x = weight[rows].to(dtype)
        if factors:
            a, b = factors
            x = x + a[rows].to(dtype) @ b.to(dtype) * scaling
        return x

    def linear(module: str, x: Tensor) -> Tensor:
        """Compute `x @ W.T + bias` with `W + B @ A * alpha/rank`, A `[R, in]`, B `[out, R]`."""
        weight, *factors = (tensor.to(dtype) for tensor in fetch(module))
        if factors:
            a, b = factors
            weight = weight + b @ a * scaling
        return functional.linear(x, weight, state[f"roberta.{module}.bias"].to(dtype))

    def norm(module: str, x: Tensor) -> Tensor:
        weight, bias = (state[f"roberta.{module}.{name}"].to(dtype) for name in ("weight", "bias"))
        return functional.layer_norm(x, x.shape[-1:], weight, bias, config["layer_norm_eps"])

    cos, sin = _rope(ids.shape[1], config["hidden_size"] // heads, config["rotary_emb_base"], dtype)
    bias = torch.where(mask.bool(), 0.0, -10000.0).to(dtype)[:, None, None, :]  # [B, 1, 1, S]

    x = lookup("embeddings.word_embeddings", ids)
    x = x + lookup("embeddings.token_type_embeddings", torch.zeros_like(ids))
    x = norm("emb_ln", x)
    hidden_states = [x]
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layers.{i}"
        qkv = linear(f"{layer}.mixer.Wqkv", x)
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(2)  # [B, T, N, H] each
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        scores = torch.einsum("btnh,bsnh->bnts", q, k * q.shape[-1] ** -0.5)
        weights = torch.softmax(scores + bias, dim=-1)
        attended = torch.einsum("bnts,bsnh->btnh", weights, v).flatten(2)
        x = norm(f"{layer}.norm1", linear(f"{layer}.mixer.out_proj", attended) + x)
        mlp = linear(f"{layer}.mlp.fc2", functional.gelu(linear(f"{layer}.mlp.fc1", x)))
        x = norm(f"{layer}.norm2", mlp + x)
        hidden_states.append(x)

    has_pooler = "roberta.pooler.dense.bias" in state
    pooler = torch.tanh(linear("pooler.dense", x[:, 0])) if has_pooler else None
    wide = _at_least_fp32(x)
    tokens = mask.to(wide.dtype)[:, :, None]
    pooled = (wide * tokens).sum(1) / tokens.sum(1).clamp(min=1e-9)
    return Result(x, pooler, tuple(hidden_states), pooled)


def _rope(length: int, width: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Make the rotary tables: angles, cos and sin in float32 whatever the dtype, then cast.

    Args:
        length: T.
        width: H.
        base: `rotary_emb_base`.
        dtype: of the activations.

    Returns:
        cos and sin, `[T, 1, H/2]`.
    """
    frequencies = 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)[:, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (j, j + H/2) of `x` `[B, T, N, H]` by its token's angles."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def _at_least_fp32(x: Tensor) -> Tensor:
    """Return `x` in float32, or in float64 if it is in it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
