"""Optimizers and schedules, from Optax, by name."""

import dataclasses
import re
from typing import Any, Literal

import jax
import optax
from optax import contrib

from mmx.errors import InputError, at_least
from mmx.parallel.sharding import logical_axes, path_of


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters move."""

    name: Literal["adamw", "lion", "adafactor", "muon"] = "adamw"
    """Muon moves matrices; what is no matrix (and embeddings) moves by Adam, at the same learning rate."""
    learning_rate: float = 3e-3
    """The highest one."""
    schedule: Literal["cosine", "rsqrt", "constant"] = "cosine"
    """After the warmup: cosine to zero at the last step; 1 / sqrt(step), with a linear cooldown; or constant."""
    warmup: int = 50
    """Steps of linear growth from zero."""
    cooldown: int = 0
    """Last steps of a linear fall to zero (rsqrt only)."""
    weight_decay: float = 0.01
    """Decoupled; multiplied by the learning rate."""
    decay: str = r"(kernel|embedding)$"
    """A pattern: the parameters whose path it is found in are decayed."""
    b1: float = 0.9
    """Decay of the first moment (adamw, lion; the momentum of muon is 0.95)."""
    b2: float = 0.98
    """Decay of the second moment (adamw, lion, and Muon's Adam)."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip: float = 1.0
    """Largest norm of the whole gradient; 0: no clipping."""
    ema: float = 0.0
    """Decay of the moving average of parameters, which is then what is evaluated; 0: none."""

    def __post_init__(self) -> None:
        at_least(self, learning_rate=0, warmup=0, cooldown=0, weight_decay=0, clip=0, ema=0, b1=0, b2=0)
        for name in ("ema", "b1", "b2"):
            if getattr(self, name) >= 1:
                raise InputError(f"optimizer: {name}={getattr(self, name)}; it has to be less than 1")


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of the number of updates.

    Raises:
        ValueError: warmup and cooldown do not fit into the steps.
    """
    if config.warmup + config.cooldown >= steps and config.schedule != "constant":
        raise InputError(
            f"optimizer: warmup={config.warmup} and cooldown={config.cooldown} do not fit into steps={steps}; "
            f"set --optimizer.warmup to less, or train longer"
        )
    peak, warmup = config.learning_rate, config.warmup
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps)
    ramp = optax.linear_schedule(0.0, peak, max(warmup, 1))
    if config.schedule == "constant":
        return optax.join_schedules([ramp, optax.constant_schedule(peak)], [warmup])

    def rsqrt(step: Any) -> jax.Array:
        """Zhai et al., arXiv 2106.04560, 3.5."""
        timescale = max(warmup, 1)
        rate = peak * jax.lax.rsqrt(jax.numpy.maximum(step / timescale, 1.0))
        left = (steps - step) / max(config.cooldown, 1)
        return rate * jax.numpy.clip(left, 0.0, 1.0) if config.cooldown else rate

    return optax.join_schedules([ramp, lambda step: rsqrt(step + warmup)], [warmup])


def decay_mask(config: OptimizerConfig, params: Any) -> Any:
    """Which parameters are decayed: True where the pattern is found in the path."""
    return jax.tree_util.tree_map_with_path(lambda path, _: bool(re.search(config.decay, path_of(path))), params)


def muon_dimensions(params: Any) -> Any:
    """For each parameter the axes that form its matrix, from the table of shardings; None for what is no matrix."""

    def one(path: Any, leaf: Any) -> contrib.MuonDimensionNumbers | None:
        axes = logical_axes(path_of(path))
        if axes is None or not axes.inputs or not axes.outputs or set(axes.inputs) & {"vocab", "length"}:
            return None
        first = leaf.ndim - len(axes.all)
        middle = first + len(axes.inputs)
        return contrib.MuonDimensionNumbers(tuple(range(first, middle)), tuple(range(middle, leaf.ndim)))

    return jax.tree_util.tree_map_with_path(one, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping, the optimizer, decoupled weight decay, the schedule."""
    schedule = make_schedule(config, steps)
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()

    def mask(params: Any) -> Any:
        return decay_mask(config, params)

    if config.name == "muon":
        muon = contrib.muon(
            schedule,
            weight_decay=config.weight_decay,
            weight_decay_mask=mask,
            eps=config.eps,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=muon_dimensions,
            consistent_rms=0.2,  # so that one learning rate serves both kinds (arXiv 2502.16982, 2.2)
        )
        return optax.chain(clip, muon)
    scale = {
        "adamw": lambda: optax.scale_by_adam(config.b1, config.b2, config.eps),
        "lion": lambda: optax.scale_by_lion(config.b1, config.b2),
        "adafactor": lambda: optax.scale_by_factored_rms(min_dim_size_to_factor=32),
    }[config.name]()
    return optax.chain(
        clip,
        scale,
        optax.add_decayed_weights(config.weight_decay, mask),
        optax.scale_by_learning_rate(schedule),
    )
