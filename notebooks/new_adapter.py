# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # An adapter of your own, from 500 pairs
#
# A crew calls its machines and their troubles by words of its own: *zuma* is a lamp, *pemi* says that it is broken. The
# handbook is in plain English. No model can know these words, and 500 pairs of a question and its page are all there
# is to learn them from.
#
# This trains a sixth adapter beside the five that the model has, on a frozen backbone, and looks at three things:
# whether held-out questions find their pages, at which sizes of the embeddings, and whether anything else has changed.
# It takes about a minute on two cores. The model is the small one that comes with jina_jax; for your own records and
# jina-embeddings-v3 the command line does the same:
#
#     jina-jax train configs/new_adapter.py --data my_pairs.jsonl --task my-domain --model jinaai/jina-embeddings-v3

# %%
"""A sixth adapter from 500 pairs of a made-up language."""

import json
import runpy
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import jina_jax
from jina_jax.train import loop

HERE = Path(__file__).parent if "__file__" in globals() else Path()
CONFIGS = HERE.resolve().parent / "configs"

with (CONFIGS / "data" / "jargon.jsonl").open() as file:
    pairs = [json.loads(line) for line in file]
with (CONFIGS / "data" / "jargon.eval.jsonl").open() as file:
    held_out = [json.loads(line) for line in file]
print(f"{len(pairs)} pairs to learn from, {len(held_out)} held out")
for pair in pairs[:4]:
    print(f"  {pair['query']!r}  ->  {pair['pos']!r}")

# %% [markdown]
# ## Train
#
# A recipe is data: where the weights come from, what trains, on which records, by which loss and for how long. Records
# are lines of JSON; `{"query": ..., "pos": ...}` is a pair. The loss is InfoNCE in both directions at six Matryoshka
# sizes, with all other records of the batch as negatives.

# %%
get_config = runpy.run_path(str(CONFIGS / "new_adapter.py"))["get_config"]
recipe = get_config(
    data=str(CONFIGS / "data" / "jargon.jsonl"),
    eval_data=str(CONFIGS / "data" / "jargon.eval.jsonl"),
    task="crew",
)
run = Path(tempfile.mkdtemp()) / "run"
outcome = loop.train(recipe, run)
print(f"{outcome.step} steps; the model is in {outcome.export.name}/")

# %% [markdown]
# ## What it learned

# %%
with (run / "metrics.jsonl").open() as file:
    rows = [row for row in map(json.loads, file) if "loss" in row]
before, after = (next(iter(outcome.results[when].values()))["metrics"]["ndcg@10"] for when in ("before", "after"))
sizes = sorted(int(size) for size in before)
before, after = ([{int(k): v for k, v in found.items()}[size] for size in sizes] for found in (before, after))

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
left.plot([row["step"] for row in rows], [row["accuracy"] for row in rows], color="#2a6f97")
left.set(xlabel="step", ylabel="share of queries", title="Queries whose passage is first, in the batch", ylim=(0, 1.02))
right.plot(sizes, before, "o--", color="#888888", label="base model")
right.plot(sizes, after, "o-", color="#d1495b", label="with the adapter")
right.set_xscale("log", base=2)
right.set_xticks(sizes, map(str, sizes))
right.minorticks_off()
right.set(xlabel="numbers kept of an embedding", ylabel="nDCG@10", title="Held-out pairs", ylim=(0, 1.02))
right.legend(frameon=False, loc="center right")
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# ## Use it
#
# The export is a directory like any other model. The new task is one more name; the other five, and texts without a
# task, may stand in the same batch.

# %%
embedder = jina_jax.Embedder.load(outcome.export)
print(embedder.config.tasks)
question, handbook = held_out[0]["query"], [pair["pos"] for pair in held_out]
print(f"\nasked: {question!r}; its page says {held_out[0]['pos']!r}")
for task in (None, "crew"):
    scores = embedder.encode(handbook, task=task) @ embedder.encode(question, task=task)
    found = [handbook[i] for i in np.argsort(-scores)[:3]]
    print(f"task={task}:", *found, sep="\n    ")

# %% [markdown]
# ## Nothing else has changed
#
# Only the new adapter had gradients. Everything else is the same to the last bit.

# %%
base = jina_jax.Embedder.load("mini")
texts = [question, *handbook[:8]]
for task in (None, *base.config.tasks):
    same = np.array_equal(base.encode(texts, task=task), embedder.encode(texts, task=task))
    print(f"{task!s:20} {'the same bits' if same else 'CHANGED'}")
    assert same
