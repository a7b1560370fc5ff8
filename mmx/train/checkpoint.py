"""Checkpoints: the one file that imports Orbax.

A checkpoint holds `state` (the TrainState), `data` (the position in the data) and `meta` (the configuration). It is
written beside the training and appears under its final name only when it is whole, so a process that dies while
writing leaves the one before it. It is restored onto any mesh.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import checkpoint_managers

from mmx.errors import InputError
from mmx.parallel.sharding import path_of
from mmx.train.experiment import CheckpointConfig
from mmx.train.state import TrainState, abstract_state


class CheckpointError(InputError):
    """A checkpoint is missing, damaged, or of something else."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they lie, one folder per step.
        config: when to save and what to keep.
        meta: the configuration, as JSON; it is saved with each.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, meta: dict[str, Any]):
        policies: list[Any] = [checkpoint_managers.preservation_policy.LatestN(config.keep)]
        if config.best:
            best = checkpoint_managers.preservation_policy.BestN(
                get_metric_fn=lambda metrics: metrics[config.best],
                reverse=config.best_is == "lowest",
                n=1,
                keep_checkpoints_without_metrics=False,
            )
            policies.append(best)
        self.config, self.folder, self._meta, self._saved_at = config, folder, meta, time.monotonic()
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                create=True,
                preservation_policy=checkpoint_managers.preservation_policy.AnyPreservationPolicy(policies),
                enable_async_checkpointing=True,
            ),
        )

    @property
    def latest(self) -> int | None:
        """The last step that was saved whole."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """All steps that are there."""
        return sorted(self._manager.all_steps())

    def due(self, step: int) -> bool:
        """Whether it is time to save, by steps or by minutes."""
        by_steps = self.config.every_steps and step % self.config.every_steps == 0
        minutes = (time.monotonic() - self._saved_at) / 60
        return bool(by_steps or (self.config.every_minutes and minutes >= self.config.every_minutes))

    def save(self, step: int, state: TrainState, metrics: dict[str, float] | None = None) -> None:
        """Starts to save; what is being saved may be changed as soon as this returns."""
        self._saved_at = time.monotonic()
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave({"next_index": step}),
            meta=ocp.args.JsonSave(self._meta),
        )
        known = {self.config.best: metrics[self.config.best]} if metrics and self.config.best in metrics else None
        with self._naming(step):
            self._manager.save(step, args=items, metrics=known)

    def restore(self, state: TrainState, step: int | None = None) -> tuple[TrainState, int]:
        """Returns the saved state, laid out like `state` (or the plan of one) on its mesh, and the position in the data.

        Raises:
            CheckpointError: there is none, its files are damaged, or it is of another model.
        """
        step = self.latest if step is None else step
        if step is None:
            raise CheckpointError(f"{self.folder} holds no checkpoint")
        where = f"checkpoint {self.folder / str(step)}"
        try:
            saved = self._manager.item_metadata(step)["state"].tree
        except Exception as error:
            raise CheckpointError(f"{where} cannot be read: {_first_line(error)}; {self._other(step)}") from error
        if state.memory is None and saved.get("memory"):  # who only looks need not know what objectives remember
            mesh: Any = state.step.sharding.mesh  # pyright: ignore[reportAttributeAccessIssue]
            whole = NamedSharding(mesh, PartitionSpec())
            kept = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), saved["memory"])
            state = dataclasses.replace(state, memory=kept)
        if lines := _shape_differences(saved, state):
            shown = "\n  ".join(lines[:20]) + (f"\n  and {len(lines) - 20} more" if len(lines) > 20 else "")
            raise CheckpointError(f"{where} is of another model:\n  {shown}")
        try:
            items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state(state)), data=ocp.args.JsonRestore())
            restored = self._manager.restore(step, args=items)
        except Exception as error:
            raise CheckpointError(f"{where} is damaged: {_first_line(error)}; {self._other(step)}") from error
        return restored["state"], restored["data"]["next_index"]

    def wait(self) -> None:
        """Waits until everything is written; raises what went wrong."""
        with self._naming(self.latest):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the threads."""
        self._manager.close()

    @contextlib.contextmanager
    def _naming(self, step: int | None) -> Iterator[None]:
        """Says which file could not be written; what an earlier save met beside the training shows up here too."""
        try:
            yield
        except Exception as error:
            raise CheckpointError(
                f"cannot save step {step} in {self.folder}: {_first_line(error)}; make room or correct the rights, then resume"
            ) from error

    def _other(self, step: int) -> str:
        others = [s for s in self.steps if s != step]
        if not others:
            return "there is no other checkpoint in this folder"
        return f"delete that folder to go on from step {others[-1]}"


def find_checkpoint(path: Path) -> tuple[Path, int | None]:
    """The folder of checkpoints, and the step, that a path to a run, its `checkpoints`, or one of them names.

    Raises:
        CheckpointError: there is none.
    """
    path = path.absolute()
    for folder in (path / "checkpoints", path):
        if folder.is_dir() and any(child.name.isdigit() for child in folder.iterdir()):
            return folder, None
    if path.name.isdigit() and path.is_dir():
        return path.parent, int(path.name)
    raise CheckpointError(f"{path} holds no checkpoint; name a run folder, or one of its checkpoints")


def open_checkpoints(folder: Path) -> Checkpoints:
    """The checkpoints of a folder, to restore from."""
    return Checkpoints(folder, dataclasses.replace(CheckpointConfig(), best="", keep=10**9), {})


def _shape_differences(saved: Any, state: TrainState) -> list[str]:
    """What a saved state has and this one has not, and the other way round: `path: saved shape, expected shape`."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
        return {path_of(path): tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, "shape")}

    old, new = shapes(saved), shapes(dataclasses.replace(state, key=jax.eval_shape(jax.random.key_data, state.key)))
    lines = []
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            lines.append(f"{name}: saved {old.get(name, 'nothing')}, this run has {new.get(name, 'nothing')}")
    of_params = [line for line in lines if line.startswith("params/")]  # the rest of the state repeats them
    return of_params or lines


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
