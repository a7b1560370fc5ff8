"""The train step: a pure function, the same for every model and every objective."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mmx import objectives as objectives_
from mmx.flops import count_flops
from mmx.modalities.masking import drop_modalities
from mmx.model import MultimodalTransformer
from mmx.objectives import Objective
from mmx.parallel import batch_sharding, replicated
from mmx.train.accumulate import value_and_grad
from mmx.train.state import TrainState
from mmx.types import Batch, Metrics, Params


@dataclasses.dataclass(frozen=True)
class Task:
    """A model and what it is trained to do: the parts of the loss, in the order in which they act."""

    model: MultimodalTransformer
    objectives: Mapping[str, Objective]
    modality_dropout: float = 0.0

    def corrupt(self, batch: Batch, key: jax.Array) -> Batch:
        """Hides modalities, if wanted, and adds the objectives' own entries to the batch."""
        if self.modality_dropout:
            drop_key, key = jax.random.split(key)
            batch = drop_modalities(batch, self.model.modalities, self.modality_dropout, drop_key)
        return objectives_.corrupt(self.objectives, batch, key)

    def forward(self, params: Params, batch: Batch, key: jax.Array | None) -> Any:
        """The forward passes: what the losses need, every leaf `(B, ...)`."""
        return objectives_.forward(self.objectives, self.model, params, batch, key)

    def flops(self, params: Params, batch: Batch) -> int:
        """FLOPs of one training step on `batch` (arrays or their shapes), by the rule of `mmx.flops`."""
        return 3 * count_flops(lambda p, b, key: self.forward(p, self.corrupt(b, key), None), params, batch, jax.random.key(0))

    def loss(self, values: Any) -> tuple[jax.Array, Metrics]:
        """The weighted sum of the losses, and the metrics."""
        return objectives_.total_loss(self.objectives, values)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    ema: float = 0.0,
    parts: int = 1,
) -> tuple[TrainState, Metrics]:
    """One optimizer step. Pure: the same state and batch give the same result on any mesh.

    A step whose loss or gradient is not finite moves nothing but the counters.
    """
    corrupt_key, dropout_key = jax.random.split(jax.random.fold_in(state.key, state.step))
    batch = task.corrupt(batch, corrupt_key)
    (loss, metrics), grads = value_and_grad(task.forward, task.loss, state.params, batch, dropout_key, parts)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

    def move(state: TrainState, grads: Params) -> TrainState:
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return dataclasses.replace(state, params=params, opt_state=opt_state, ema=_average(state, params, ema))

    # A branch, and not a choice between old and new numbers, which would need both at once: memory and three times the time.
    learning_rate = schedule(state.step - state.skipped)
    state = jax.lax.cond(finite, move, lambda state, grads: state, state, grads)
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        skipped=state.skipped + ~finite,
        skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1),
    )
    metrics = {
        **metrics,
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        "skipped": state.skipped,
        "skipped_in_row": state.skipped_in_row,
    }
    return state, metrics


def compile_step(step: Callable[..., Any], mesh: Mesh, layout: TrainState) -> Any:
    """Jits a step of `(state, batch)`: the state keeps its layout and gives up its memory, the batch is split."""
    return jax.jit(
        step,
        in_shardings=(layout, batch_sharding(mesh)),
        out_shardings=(layout, replicated(mesh)),
        donate_argnums=0,
    )


def _average(state: TrainState, params: Params, decay: float) -> Params | None:
    """The moving average, which follows faster in the first steps: min(decay, (1 + t) / (10 + t))."""
    if state.ema is None:
        return None
    t = (state.step - state.skipped).astype(jnp.float32)
    keep = jnp.minimum(decay, (1 + t) / (10 + t))
    return jax.tree.map(lambda average, p: average + (1 - keep) * (p - average), state.ema, params)
