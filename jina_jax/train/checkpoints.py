"""Checkpoints of a run, by Orbax: what trains, the optimizer's state, and facts in JSON, each an item of its own."""

from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from jina_jax.records import InputError
from jina_jax.train.recipe import Save
from jina_jax.train.step import State


class Checkpoints:
    """The checkpoints of a run; a context, which waits for what is being written.

    A checkpoint has its final name only once it is whole: a kill in the middle of a save leaves the one before.
    """

    def __init__(self, directory: Path, save: Save) -> None:
        keep: list[Any] = [managers.LatestN(max(save.last, 1))]
        keep.append(managers.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False))
        if save.keep_every:
            keep.append(managers.EveryNSteps(save.keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(keep), cleanup_tmp_directories=True
        )
        self.directory, self._manager = directory, ocp.CheckpointManager(directory.absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._manager.close()

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints that there are, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: State, facts: dict[str, Any], score: float | None) -> None:
        """Begin to write a checkpoint; what was begun before is finished first.

        Args:
            step: Number of steps done.
            state: The state after them.
            facts: Fit for JSON.
            score: Of the evaluation of this step, the higher the better; None if there was none.

        Raises:
            OSError: If the one before could not be written.
        """
        items = {
            "trainable": ocp.args.StandardSave(state.trainable),
            "optimizer": ocp.args.StandardSave(state.optimizer),
            "facts": ocp.args.JsonSave(facts),
        }
        metrics = None if score is None else {"score": score}
        # Orbax skips steps by rules of its own unless it is forced to.
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)

    def wait(self) -> None:
        """Wait until all is written."""
        self._manager.wait_until_finished()

    def pick(self, resume: str) -> int | None:
        """The step to go on from.

        Args:
            resume: "auto" for the last one if there is one, "never", or a number.

        Returns:
            The step, or None to start anew.

        Raises:
            InputError: If there is no such checkpoint, or there are some and none is to be used.
        """
        there = self.steps
        listed = ", ".join(map(str, there)) or "none"
        if resume == "auto":
            return there[-1] if there else None
        if resume == "never":
            if there:
                raise InputError(
                    f"{self.directory} holds checkpoints ({listed}), which --resume never would overwrite; "
                    "name another --run-dir, or delete them"
                )
            return None
        if not resume.isdecimal() or int(resume) not in there:
            raise InputError(
                f"--resume {resume}: must be auto, never or one of the steps in {self.directory}: {listed}"
            )
        for step in there:  # those after it belong to a future that will be another one
            if step > int(resume):
                self._manager.delete(step)
        return int(resume)

    def facts(self, step: int) -> dict[str, Any]:
        """The facts of a checkpoint."""
        return self._manager.restore(step, args=ocp.args.Composite(facts=ocp.args.JsonRestore()))["facts"]

    def restore(self, step: int, like: State) -> State:
        """The state of a checkpoint.

        Args:
            step: Which one.
            like: A state with the shapes, types and places wanted: another mesh may have saved it.

        Returns:
            The state.

        Raises:
            InputError: If it belongs to another model.
        """
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        items = ocp.args.Composite(
            trainable=ocp.args.StandardRestore(abstract.trainable),
            optimizer=ocp.args.StandardRestore(abstract.optimizer),
        )
        try:
            found = self._manager.restore(step, args=items)
        except (ValueError, KeyError) as error:
            raise InputError(f"{self.directory}/{step} does not fit this model: {error}") from error
        return State(found["trainable"], found["optimizer"])


def _score(metrics: Any) -> float:
    return float(metrics["score"])
