"""Training: the configuration, the state, the step, the loop."""

from mmx.parallel import MeshConfig
from mmx.train.experiment import CheckpointConfig, Experiment, LogConfig, ModelConfig
from mmx.train.loop import Stopped, run
from mmx.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from mmx.train.state import TrainState, make_state
from mmx.train.step import Task, compile_step, train_step

__all__ = [
    "CheckpointConfig",
    "Experiment",
    "LogConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Stopped",
    "Task",
    "TrainState",
    "compile_step",
    "make_optimizer",
    "make_schedule",
    "make_state",
    "run",
    "train_step",
]
