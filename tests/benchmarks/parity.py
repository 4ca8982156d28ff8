"""The parity table of the README: how far this implementation is from PyTorch's and from the truth.

    python -m tests.benchmarks.parity

The truth is the original code, restated in PyTorch and run in float64 on the same weights. "transformers" is its own
JinaEmbeddingsV3Model with PEFT adapters, in float32. Every row covers no task and all five; differences are the
largest over all components of all valid tokens.
"""

import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import torch

import jina_jax
from convert import hf_reference, reference
from jina_jax import TASKS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from torch_checkpoints import make_config, random_state, write_hf, write_original  # noqa: E402


def main() -> None:
    """Print the table, in Markdown."""
    print("| checkpoint | compared with | token vectors | embeddings |")
    print("|---|---|---|---|")
    goldens()
    with tempfile.TemporaryDirectory() as directory:
        real_width(Path(directory))


def row(checkpoint: str, judge: str, hidden: float, embeddings: float) -> None:
    """One line of the table."""
    print(f"| {checkpoint} | {judge} | {hidden:.1e} | {embeddings:.1e} |", flush=True)


def largest(differences: list[np.ndarray]) -> float:
    """Largest absolute value; NaN if there is one."""
    return max(float(np.abs(np.asarray(x)).max()) for x in differences)


def goldens() -> None:
    """Six layouts of one tiny checkpoint against stored float64 results."""
    golden = np.load(ROOT / "data" / "tiny_checkpoints" / "goldens.npz")
    tokens, mask = golden["ids"].astype(np.int32), golden["mask"]
    hidden, embeddings = [], []
    for layout in ("original", "original_bf16", "hf", "hf_bf16", "native_new", "native_saved"):
        model, variables = jina_jax.load(ROOT / "data" / "tiny_checkpoints" / layout)
        run = jax.jit(model.apply)
        for task in (None, *TASKS):
            key = "none" if task is None else task.replace(".", "_").replace("-", "_")
            key = f"bf16_weights/{key}" if "bf16" in layout else key
            out = run(variables, tokens, mask, model.config.task_ids([task] * len(tokens)))
            exact = golden[f"{key}/last_hidden_state_f64"]
            mean = (exact * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
            hidden.append((out.hidden - exact)[mask > 0])
            embeddings.append(out.embeddings - mean / np.linalg.norm(mean, axis=-1, keepdims=True))
    row("tiny (3 × 64), six published layouts", "original, float64", largest(hidden), largest(embeddings))


def real_width(directory: Path) -> None:
    """A random checkpoint of the real width and depth, in both public layouts and both types."""
    config = make_config(
        vocab_size=1000, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    state = random_state(config, 0, torch.bfloat16)
    original, hf = write_original(directory / "o", state, config), write_hf(directory / "h", state, config)
    rng = np.random.default_rng(0)
    tokens, mask = rng.integers(3, 1000, (4, 64)).astype(np.int32), rng.integers(0, 4, (4, 64)) > 0
    ids, valid = torch.tensor(tokens).long(), torch.tensor(mask).long()

    def judge(task: str | None, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            result = reference.forward(state, config, ids, valid, task, dtype=dtype)
        return result.hidden.double().numpy()[mask], reference.embed(result.pooled).double().numpy()

    exact = {task: judge(task, torch.float64) for task in (None, *TASKS)}
    theirs = hf_reference.load_hf(hf)
    for dtype in ("float32", "bfloat16"):
        model, variables = jina_jax.load(original, dtype=dtype)
        run = jax.jit(model.apply)
        ours = {}
        for task in exact:
            out = run(variables, tokens, mask, model.config.task_ids([task] * 4))
            ours[task] = np.asarray(out.hidden, np.float64)[mask], np.asarray(out.embeddings, np.float64)
        name = f"random 24 × 1024, {dtype}"
        if dtype == "float32":
            row(name, "original, float64", *(largest([ours[t][i] - exact[t][i] for t in exact]) for i in range(2)))
            native = {}
            for task in exact:
                with torch.no_grad():
                    hidden = hf_reference.run_hf(theirs, ids, valid, task)[0].double()
                pooled = (hidden * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
                native[task] = hidden.numpy()[mask], reference.embed(pooled).numpy()
            row(name, "transformers", *(largest([ours[t][i] - native[t][i] for t in exact]) for i in range(2)))
            row(
                "(transformers itself)",
                "original, float64",
                *(largest([native[t][i] - exact[t][i] for t in exact]) for i in range(2)),
            )
        else:
            torchs = {task: judge(task, torch.bfloat16) for task in exact}
            ratios = [
                np.sqrt(
                    sum(np.square(ours[t][i] - exact[t][i]).mean() for t in exact)
                    / sum(np.square(torchs[t][i] - exact[t][i]).mean() for t in exact)
                )
                for i in range(2)
            ]
            print(f"| {name} | PyTorch's own bfloat16 error = 1 | {ratios[0]:.2f} × | {ratios[1]:.2f} × |")


if __name__ == "__main__":
    main()
