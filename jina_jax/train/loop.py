"""The training loop: `train` reads from top to bottom as a run goes."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import math
import platform
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jina_jax import sharding
from jina_jax._version import __version__
from jina_jax.config import Config
from jina_jax.records import InputError
from jina_jax.tokenizer import TrainingTokenizer, load_tokenizer
from jina_jax.train import evaluation, packing, partition, plan
from jina_jax.train import step as steps
from jina_jax.train.batches import Batch
from jina_jax.train.checkpoints import Checkpoints
from jina_jax.train.export import export
from jina_jax.train.journal import Journal
from jina_jax.train.partition import Parts, Tree
from jina_jax.train.recipe import Phase, Recipe, differences, to_json
from jina_jax.train.step import State

# Parts of a recipe that may change between a checkpoint and going on from it: they change no number but by rounding.
FREE = ("log", "save", "mesh", "eval", "data.threads", "data.index", "max_bad_steps")
# Processes ask each other whether to stop only every so many steps.
AGREE_EVERY = 5


class DataError(InputError):
    """Something is wrong with the records."""


class DivergedError(RuntimeError):
    """The loss or the gradient was not finite too many times in a row."""


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
        step: Steps done.
        finished: Whether these are all; otherwise it was asked to stop, and has saved.
        export: The exported model, if finished.
        results: Evaluations "before" and "after".
    """

    step: int
    finished: bool
    export: Path | None
    results: dict[str, Any]


def train(
    recipe: Recipe,
    run: str | Path,
    *,
    resume: str = "auto",
    allow_plan_change: bool = False,
    command: str = "",
) -> Outcome:
    """Train what a recipe says, and export it.

    A run that ended early, however it did, goes on from its last checkpoint as if nothing had happened: with the same
    versions and devices to the bit, in parameters and in `metrics.jsonl`. All processes of a job call this alike; the
    directory must be one for all of them.

    Args:
        recipe: The recipe.
        run: Directory of the run: `checkpoints/`, `metrics.jsonl`, `tensorboard/`, and at the end `export/`.
        resume: "auto", "never", or the step of a checkpoint.
        allow_plan_change: Whether to go on although the recipe or the records have changed.
        command: What started the run, for the model card.

    Returns:
        How it ended.

    Raises:
        InputError: If the recipe cannot be run, or is another one than that of the run's checkpoints.
        DataError: If something is wrong with the records.
        DivergedError: If the loss stays infinite or not a number.
        OSError: If something cannot be written.
    """
    run, began = Path(run), time.monotonic()
    first = jax.process_index() == 0
    mesh = _mesh(recipe)
    run.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(sharding.use(mesh))
        stopping = stack.enter_context(_signals())
        parts = partition.prepare(recipe, mesh)
        tokenizer = load_tokenizer(parts.base)
        plans = make_plans(recipe, parts, tokenizer, mesh)
        base = partition.fingerprint(parts.frozen)
        facts: dict[str, Any] = {
            "recipe": to_json(recipe),
            "plans": [one.hash for one in plans],
            "frozen": base,
            "versions": versions(),
            "bad": 0,
            "results": {},
            "best": None,
        }

        checkpoints = stack.enter_context(Checkpoints(run / "checkpoints", recipe.save))
        resumed = checkpoints.pick(resume) or 0
        if resumed:
            facts |= _saved_facts(checkpoints.facts(resumed), facts, allow_plan_change, first)
        journal = stack.enter_context(Journal(run, recipe, resumed, writes=first))
        for line in describe(recipe, parts, plans, mesh, run):
            journal.say(line)
        evaluate = evaluation.Evaluator(recipe, parts, tokenizer, mesh)

        state, total, done, end = State(parts.trainable, None), recipe.steps, resumed, 0
        if not done and recipe.eval.on_start:
            _measured(evaluate(state.trainable), "before", 0, facts, journal)
        for number, (phase, batches) in enumerate(zip(recipe.phases, plans, strict=True)):
            start, end = end, end + phase.steps
            if resumed >= end and number < len(plans) - 1:
                continue
            # The optimizer starts anew with each phase, unless the run goes on in the middle of one.
            begin = functools.partial(steps.start, steps.optimizer(recipe.optim, phase))
            state = begin(state.trainable)
            if resumed and start <= resumed:
                state, resumed = checkpoints.restore(resumed, state), 0
                state = begin(state.trainable) if done == start else state
            advance, rate = steps.make(parts.model, recipe, phase), steps.learning_rate(recipe.optim, phase)
            late: _Late = _Late(journal, facts, recipe, phase, rate, start)
            for step, batch in _numbered(recipe, phase, parts.model.config, batches, done - start, start, mesh):
                arrays = place(mesh, batch)
                state, metrics = advance(
                    state,
                    parts.frozen,
                    arrays,
                    np.int32(step),
                    loss=batch.loss,
                    roles=batch.roles,
                    in_batch=batch.in_batch,
                )
                late.put(step + 1, batch, metrics)
                done, stop = step + 1, _agreed(stopping, step + 1)
                due = recipe.eval.every and done % recipe.eval.every == 0 and done < total
                save = done % recipe.save.every == 0 or done == total or stop
                score = None
                if due or save:
                    late.flush()
                if due:
                    score = _measured(evaluate(state.trainable), None, done, facts, journal)
                if done == total:
                    score = _measured(evaluate(state.trainable), "after", done, facts, journal)
                if save:
                    journal.sync()
                    checkpoints.save(done, state, facts, score)
                if stop and done < total:
                    checkpoints.wait()
                    journal.say(f"stopped after step {done}, which is saved; the same command goes on from there")
                    return Outcome(done, False, None, facts["results"])
            late.flush()

        checkpoints.wait()
        if partition.fingerprint(parts.frozen) != base:
            raise RuntimeError("frozen parameters have changed; this must not happen")
        trained = jax.tree.map(partition.host, state.trainable)
        path = run / "export"
        model, variables = partition.finish(recipe, parts, trained)
        if first:
            told = {
                "command": command,
                "seconds": time.monotonic() - began,
                "steps": done,
                "data": [line for one in plans for line in one.describe()],
                "versions": facts["versions"],
                "plans": facts["plans"],
                "frozen": base,
            }
            export(path, recipe, model, variables, parts.base, facts["results"], told)
            journal.say(f"exported {path}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("exported")
    return Outcome(done, True, path, facts["results"])


# ---- Before the first step -------------------------------------------------------------------------------------


def _mesh(recipe: Recipe) -> jax.sharding.Mesh:
    try:
        return sharding.make_mesh(**dataclasses.asdict(recipe.mesh))
    except ValueError as error:
        raise InputError(f"mesh: {error}") from error


def make_plans(recipe: Recipe, parts: Parts, tokenizer: TrainingTokenizer, mesh: jax.sharding.Mesh) -> list[plan.Plan]:
    """The order of the records of each phase; the first process makes indexes that are missing, for all.

    Args:
        recipe: The recipe.
        parts: What trains.
        tokenizer: The model's tokenizer.
        mesh: The mesh.

    Returns:
        A plan for each phase.

    Raises:
        DataError: If something is wrong with the records.
        InputError: If a batch cannot be split over the mesh.
    """
    count = sharding.parts(mesh)[0]
    for phase in recipe.phases:
        for name, size in [(phase.name, phase.batch), *((d.name, d.batch) for d in recipe.datasets if d.batch)]:
            if size % (count * phase.grad_cache):
                raise InputError(
                    f"{name}: batch={size} must be a multiple of {count} devices times grad_cache={phase.grad_cache}"
                )
    if jax.process_count() > 1 and jax.process_index() > 0:
        multihost_utils.sync_global_devices("indexes")
    try:
        plans = [
            plan.make(recipe, phase, tokenizer, (parts.prompts[0], parts.prompts[-1]), parts.model.config.max_tokens)
            for phase in recipe.phases
        ]
    except (InputError, FileNotFoundError) as error:
        raise DataError(str(error)) from error
    if jax.process_count() > 1 and jax.process_index() == 0:
        multihost_utils.sync_global_devices("indexes")
    if jax.process_count() > 1:
        hashes = np.array([list(bytes.fromhex(one.hash)[:8]) for one in plans], np.int32)
        multihost_utils.assert_equal(hashes, "processes see different records or recipes")
    return plans


def rehearse(recipe: Recipe, run: Path) -> list[str]:
    """What `train` would do, and the memory that its first step takes, without doing it.

    Args:
        recipe: The recipe.
        run: Directory of the run.

    Returns:
        Lines.

    Raises:
        InputError: As `train`.
        DataError: As `train`.
    """
    mesh = _mesh(recipe)
    with sharding.use(mesh):
        parts = partition.prepare(recipe, mesh)
        plans = make_plans(recipe, parts, load_tokenizer(parts.base), mesh)
        lines = describe(recipe, parts, plans, mesh, run)
        for phase, one in zip(recipe.phases, plans, strict=True):
            batches = list(one.batches(0, min(phase.steps, 5), *_held(recipe, phase, parts.model.config, mesh)))
            for number, batch in enumerate(batches):
                length = batch.arrays["tokens"].shape[-1]
                shape = f"{batch.size} records in {batch.padded // length} rows of {length} tokens"
                lines.append(f"{phase.name} {number}  {batch.dataset} {batch.lang or ''} {batch.loss}: {shape}")
            state = steps.start(steps.optimizer(recipe.optim, phase), parts.trainable)
            advance, batch = steps.make(parts.model, recipe, phase), batches[0]
            how = {"loss": batch.loss, "roles": batch.roles, "in_batch": batch.in_batch}
            lowered = advance.lower(state, parts.frozen, place(mesh, batch), np.int32(0), **how)
            memory = lowered.compile().memory_analysis()
            held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            lines.append(
                f"memory  of a step of {phase.name}, on each device: {held / 2**20:,.0f} MiB held, "
                f"{memory.temp_size_in_bytes / 2**20:,.0f} MiB for activations and gradients"
            )
    return lines


def describe(recipe: Recipe, parts: Parts, plans: Sequence[plan.Plan], mesh: jax.sharding.Mesh, run: Path) -> list[str]:
    """What is about to be done, in lines.

    Args:
        recipe: The recipe.
        parts: What trains.
        plans: A plan for each phase.
        mesh: The mesh.
        run: Directory of the run.

    Returns:
        Lines.
    """
    axes = " ".join(f"{name}={size}" for name, size in mesh.shape.items())
    count = partition.count(parts.trainable)
    whole = count + partition.count(parts.frozen)
    device = f"{jax.default_backend()} x{jax.device_count()} (mesh {axes})"
    lines = [
        f"jina_jax {__version__} | {recipe.stage} | run {run} | seed {recipe.seed} | jax {jax.__version__} {device}",
        f"model   {_millions(whole)} params, trainable {_millions(count)} ({100 * count / whole:.3g}%) | "
        f"{recipe.dtype} compute, float32 trainable | remat {recipe.remat}",
        *(f"note    {note}" for note in parts.notes),
    ]
    for phase, one in zip(recipe.phases, plans, strict=True):
        lines.append(
            f"phase   {phase.name}: {phase.steps} steps of {phase.batch} records up to {phase.max_length} tokens | "
            f"lr {phase.lr:g} tau {phase.tau:g} | grad-cache {phase.grad_cache} | plan {one.hash[:8]}"
        )
        lines += [f"data    {line}" for line in one.describe()]
    return lines


def _millions(count: int) -> str:
    return f"{count / 1e6:.3g}M" if count >= 1e6 else f"{count:,}"


def versions() -> dict[str, str]:
    """Versions of what computes."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {"jina_jax": __version__, "python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in names
    }


def _saved_facts(saved: dict[str, Any], now: dict[str, Any], allowed: bool, first: bool) -> dict[str, Any]:
    """Facts of a checkpoint that the run takes over; refuses to go on with something else."""
    changed = [
        line
        for line in differences(saved["recipe"], now["recipe"], "")
        if not line.startswith(FREE) and not line.partition(":")[0].endswith(".path")
    ]
    changed += [
        f"plan of phase {number}: the records, their order or the tokenizer are others ({old[:8]} -> {new[:8]})"
        for number, (old, new) in enumerate(zip(saved["plans"], now["plans"], strict=False))
        if old != new
    ]
    if saved["frozen"] != now["frozen"]:
        changed.append("frozen parameters: those of the base model are others")
    if changed and not allowed:
        raise InputError(
            "this is not the run that was saved; --allow-plan-change goes on all the same, another --run-dir starts "
            "anew:\n  " + "\n  ".join(changed)
        )
    if saved["versions"] != now["versions"] and first:
        for line in differences(saved["versions"], now["versions"], ""):
            print(f"note    version of {line}: results may differ by rounding", file=sys.stderr)
    return {name: saved[name] for name in ("bad", "results", "best")}


# ---- In every step ---------------------------------------------------------------------------------------------


def _numbered(
    recipe: Recipe,
    phase: Phase,
    config: Config,
    batches: plan.Plan,
    first: int,
    offset: int,
    mesh: jax.sharding.Mesh,
) -> Iterator[tuple[int, Batch]]:
    """Batches of a phase from one on, with the number of the step in the run."""
    try:
        yield from enumerate(batches.batches(first, phase.steps, *_held(recipe, phase, config, mesh)), offset + first)
    except InputError as error:
        raise DataError(str(error)) from error


def _held(recipe: Recipe, phase: Phase, config: Config, mesh: jax.sharding.Mesh) -> tuple[Any, packing.Split | None]:
    """Which rows of a batch are here, and how its texts are packed."""
    noisy = max(config.hidden_dropout_prob, config.attention_probs_dropout_prob, config.lora_dropout) > 0
    split = packing.Split(sharding.parts(mesh)[0], phase.grad_cache, fixed=noisy)
    return functools.partial(rows_of, mesh), split if recipe.data.pack else None


def rows_of(mesh: jax.sharding.Mesh, size: int) -> np.ndarray:
    """Rows of a batch that this process holds.

    Args:
        mesh: The mesh.
        size: Rows of the whole batch.

    Returns:
        Their numbers, ascending.
    """
    held = np.zeros(size, bool)
    for index in sharding.placed(mesh, "B").addressable_devices_indices_map((size,)).values():
        held[index or ...] = True
    return np.flatnonzero(held)


def place(mesh: jax.sharding.Mesh, batch: Batch) -> Tree:
    """The arrays of a batch on their devices.

    Args:
        mesh: The mesh.
        batch: The rows that this process holds.

    Returns:
        Arrays over the rows of all processes.
    """
    count, target = rows_of(mesh, batch.size).size, sharding.placed(mesh, "B")

    def put(held: np.ndarray) -> jax.Array:
        # Of records, or of the rows that their texts share: either way each device has an equal part.
        size = len(held) * batch.size // count
        rows = rows_of(mesh, size)

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(size)
            return held[np.searchsorted(rows, start) : np.searchsorted(rows, stop)]

        return jax.make_array_from_callback((size, *held.shape[1:]), target, part)

    return {name: put(held) for name, held in batch.arrays.items()}


class _Late:
    """Metrics of a step, fetched while the device is at the next one."""

    def __init__(
        self, journal: Journal, facts: dict[str, Any], recipe: Recipe, phase: Phase, rate: Any, start: int
    ) -> None:
        self._journal, self._facts, self._recipe, self._phase = journal, facts, recipe, phase
        self._rate, self._start, self._then = rate, start, time.monotonic()
        self._waiting: tuple[int, Batch, Tree] | None = None

    def put(self, step: int, batch: Batch, metrics: Tree) -> None:
        self.flush()
        self._waiting = (step, batch, metrics)

    def flush(self) -> None:
        if self._waiting is None:
            return
        (step, batch, metrics), self._waiting = self._waiting, None
        numbers = {name: np.asarray(value).item() for name, value in metrics.items()}
        now = time.monotonic()
        finite, seconds, self._then = numbers.pop("finite"), now - self._then, now
        row = {
            "step": step,
            "phase": self._phase.name,
            "dataset": batch.dataset,
            "lang": batch.lang,
            **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
            "lr": float(self._rate(step - 1 - self._start)),
            "tokens": batch.tokens,
            "padding": 1 - batch.tokens / max(batch.padded, 1),
            "seconds": seconds,
            "tokens_per_second": batch.tokens / max(seconds, 1e-9),
        }
        self._journal.row(row)
        self._facts["bad"] = 0 if finite else self._facts["bad"] + 1
        if finite:
            self._journal.progress(row, self._recipe.steps)
            return
        some = ", ".join(batch.records[:20]) + (f", ... ({len(batch.records)})" if len(batch.records) > 20 else "")
        what = (
            f"step {step}: loss {numbers['loss']}, gradient norm {numbers['gradient_norm']}, in {batch.dataset}: {some}"
        )
        self._journal.say(f"{what}; left out")
        if self._facts["bad"] >= self._recipe.max_bad_steps:
            raise DivergedError(f"{self._facts['bad']} steps in a row were not finite; the last was {what}")


def _measured(
    found: dict[str, Any], name: str | None, step: int, facts: dict[str, Any], journal: Journal
) -> float | None:
    """Write an evaluation down; returns its score."""
    if not found["tasks"]:
        return None
    for task, result in found["tasks"].items():
        for metric, sizes in result["metrics"].items():
            numbers = {f"{metric}@{size}": value for size, value in sizes.items()}
            journal.row({"step": step, "eval": f"{task}/", **numbers})
        sizes = result["metrics"][result["main"]]
        told = " ".join(f"{value:.4f} ({size})" for size, value in sorted(sizes.items(), reverse=True))
        journal.say(f"eval @{step}  {task} {result['main']} {told}")
    score = found["score"]
    if facts["best"] is None or score > facts["best"]["score"]:
        facts["best"] = {"step": step, "score": score}
    if name is not None:
        facts["results"][name] = found["tasks"]
    return score


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Signals that ask to stop, as they come; a second one is not waited for."""
    came: list[int] = []

    def note(number: int, _: Any) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    before = {}
    with contextlib.suppress(ValueError):  # signals belong to the main thread
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _agreed(came: list[int], step: int) -> bool:
    """Whether to stop now: all processes or none."""
    if jax.process_count() == 1:
        return bool(came)
    if step % AGREE_EVERY:
        return False
    return bool(np.asarray(multihost_utils.process_allgather(np.array([len(came)]))).sum())
