"""The folder of a run: what lies where, and whether a run may go on in it."""

import json
import os
import time
from pathlib import Path

from jax.sharding import Mesh

from mmx.data import Tokenizer
from mmx.errors import InputError, writing
from mmx.model import MultimodalTransformer
from mmx.train.checkpoint import find_checkpoint, open_checkpoints
from mmx.train.experiment import Experiment, differences, from_json, to_json
from mmx.train.optimizer import make_optimizer
from mmx.train.state import planned_state
from mmx.types import Params


class RunFolder:
    """Paths of a run.

    config.json            the complete configuration
    metrics.jsonl          one record a line
    tokenizer.json         how texts became ids
    published/             tokenizer and preprocessing of a published model
    checkpoints/STEP/      the state
    tensorboard/           the metrics as events
    *.png                  what evaluators drew
    """

    def __init__(self, path: Path):
        self.path = path
        self.config, self.metrics, self.tokenizer = path / "config.json", path / "metrics.jsonl", path / "tokenizer.json"
        self.checkpoints, self.tensorboard = path / "checkpoints", path / "tensorboard"
        self.published = path / "published"

    def __str__(self) -> str:
        return os.fspath(self.path)

    @property
    def has_checkpoint(self) -> bool:
        """Whether any step was saved whole."""
        return self.checkpoints.is_dir() and any(child.name.isdigit() for child in self.checkpoints.iterdir())

    @property
    def has_metrics(self) -> bool:
        """Whether any step was recorded."""
        return self.metrics.is_file() and self.metrics.stat().st_size > 0

    def keep(self, experiment: Experiment, tokenizer: Tokenizer | None) -> None:
        """Writes the configuration and the tokenizer, each whole or not at all."""
        with writing(self.config):
            temporary = self.config.with_suffix(".tmp")
            temporary.write_text(json.dumps(to_json(experiment), indent=1) + "\n")
            temporary.replace(self.config)
            if tokenizer is not None and not self.tokenizer.exists():
                tokenizer.save(self.tokenizer)


def load_run(path: Path, mesh: Mesh) -> tuple[Experiment, MultimodalTransformer, Params, Tokenizer | None]:
    """What a run has learned: its configuration, its model, the parameters it is evaluated with, and its tokenizer.

    Args:
        path: the run folder, or one of its checkpoints.
        mesh: devices to restore onto.

    Raises:
        InputError: there is no checkpoint, it is damaged, or its configuration cannot be made again from config.json.
    """
    checkpoints, step = find_checkpoint(path)
    folder = RunFolder(checkpoints.parent)
    if not folder.config.exists():
        raise InputError(f"{folder}: no config.json beside its checkpoints")
    experiment = from_json(json.loads(folder.config.read_text()))
    model = experiment.build_model()
    optimizer = make_optimizer(experiment.optimizer, experiment.steps)
    opened = open_checkpoints(checkpoints)
    state, _ = opened.restore(planned_state(model, optimizer, experiment.optimizer.ema > 0, mesh), step)
    opened.close()
    tokenizer = Tokenizer.load(folder.tokenizer) if folder.tokenizer.exists() else None
    return experiment, model, state.evaluated_params, tokenizer


def open_folder(experiment: Experiment) -> RunFolder:
    """Makes or finds the folder of a run, and refuses what would mix two runs in one.

    Raises:
        InputError: the folder cannot be written, or `resume` does not allow to go on in it, or its run was another one.
    """
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{experiment.topology}-{os.getpid()}"
    folder = RunFolder(Path(experiment.run) if experiment.run else Path("runs") / name)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        probe = folder.path / ".writable"
        probe.write_text("yes")
        probe.unlink()
    except OSError as error:
        raise InputError(f"run folder {folder} cannot be written: {error}; choose another one with --run") from error
    if experiment.resume == "must" and not folder.has_checkpoint:
        raise InputError(f"--resume must: {folder} holds no checkpoint; correct --run, or use --resume auto to start anew")
    if experiment.resume == "never" and folder.has_checkpoint:
        raise InputError(f"--resume never: {folder} holds checkpoints; choose another --run, or use --resume auto to go on")
    if experiment.resume not in ("auto", "must", "never"):
        find_checkpoint(Path(experiment.resume))
    if folder.config.exists() and (folder.has_checkpoint or folder.has_metrics):
        _check_config(folder, experiment)
    return folder


def _check_config(folder: RunFolder, experiment: Experiment) -> None:
    try:
        old = json.loads(folder.config.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{folder.config} is not JSON: {error}; restore it, or choose another --run") from error
    if lines := differences(old, json.loads(json.dumps(to_json(experiment)))):
        raise InputError(
            f"the run in {folder} has another configuration:\n  "
            + "\n  ".join(lines)
            + f"\nGive the same configuration to go on, or choose another --run; "
            f"--resume {folder} --run NEW --steps MORE starts a new run from its last state"
        )
