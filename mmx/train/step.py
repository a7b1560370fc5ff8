"""The train step: a pure function, the same for every model and every objective."""

import dataclasses
import functools
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
from mmx.objectives import Context, Objective
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
    sampling: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def choices(self) -> dict[str, tuple[float, "Task"]]:
        """For each objective of which a step takes one: how often, and the task of that step; empty: every step takes all."""
        others = {name: objective for name, objective in self.objectives.items() if name not in self.sampling}
        return {
            name: (ratio, dataclasses.replace(self, objectives={**others, name: self.objectives[name]}, sampling={}))
            for name, ratio in self.sampling.items()
        }

    def drawn(self, key: jax.Array) -> jax.Array:
        """The number of the one among `choices` that a step takes, `()`."""
        ratios = jnp.asarray([ratio for ratio, _ in self.choices.values()])
        return jax.random.choice(key, len(ratios), p=ratios / ratios.sum())

    def corrupt(self, batch: Batch, key: jax.Array, context: Context | None = None) -> Batch:
        """Hides modalities, if wanted, and adds the objectives' own entries to the batch."""
        if self.modality_dropout:
            drop_key, key = jax.random.split(key)
            batch = drop_modalities(batch, self.model.modalities, self.modality_dropout, drop_key)
        return objectives_.corrupt(self.objectives, batch, key, context or Context(self.model))

    def forward(self, params: Params, batch: Batch, key: jax.Array | None) -> Any:
        """The forward passes: what the losses need, every leaf `(B, ...)`."""
        return objectives_.forward(self.objectives, self.model, params, batch, key)

    def flops(self, params: Params, batch: Batch) -> int:
        """FLOPs of one training step on `batch` (arrays or their shapes) by the rule of `mmx.flops`; of sampled ones the mean."""
        if self.choices:
            ratios, tasks = zip(*self.choices.values(), strict=True)
            return round(sum(r * task.flops(params, batch) for r, task in zip(ratios, tasks, strict=True)) / sum(ratios))
        memory = objectives_.memories(self.objectives, self.model)

        def run(params: Params, batch: Batch, key: jax.Array) -> Any:
            context = Context(self.model, params, params, memory)
            return self.forward(params, self.corrupt(batch, key, context), None)

        def prepare(params: Params, batch: Batch, key: jax.Array) -> Any:
            return self.corrupt(batch, key, Context(self.model, params, params, memory))

        args = params, batch, jax.random.key(0)
        return 3 * count_flops(run, *args) - 2 * count_flops(prepare, *args)  # what a batch is prepared by has no backward pass

    def loss(self, values: Any, memory: Any = None) -> tuple[jax.Array, dict[str, Metrics]]:
        """The weighted sum of the losses, and what each objective measured."""
        return objectives_.total_loss(self.objectives, values, memory)

    def remember(self, memory: Any, batch: Batch) -> Any:
        """What the objectives remember after a step."""
        return objectives_.remember(self.objectives, memory, batch) if memory else memory


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    ema: float = 0.0,
    parts: int | tuple[int, ...] = 1,
) -> tuple[TrainState, Metrics]:
    """One optimizer step. Pure: the same state and batch give the same result on any mesh.

    A step whose loss or gradient is not finite moves nothing but the counters.
    """
    (loss, found), grads, memory = _evaluate(state, batch, task, parts)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

    def move(state: TrainState, grads: Params) -> TrainState:
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = task.model.within_limits(optax.apply_updates(state.params, updates))
        return dataclasses.replace(state, params=params, opt_state=opt_state, ema=_average(state, params, ema), memory=memory)

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
        "loss": loss,
        **objectives_.flatten_metrics(found),
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        "skipped": state.skipped,
        "skipped_in_row": state.skipped_in_row,
    }
    return state, metrics


def _evaluate(
    state: TrainState, batch: Batch, task: Task, parts: int | tuple[int, ...]
) -> tuple[tuple[jax.Array, dict[str, Metrics]], Params, Any]:
    """Loss and what was measured, the gradient, and what is remembered. Of objectives that are sampled, a step takes one."""
    corrupt_key, dropout_key = jax.random.split(jax.random.fold_in(state.key, state.step))

    def run(task: Task) -> tuple[tuple[jax.Array, dict[str, Metrics]], Params, Any]:
        context = Context(task.model, state.params, state.ema, state.memory, parts if isinstance(parts, int) else len(parts))
        prepared = task.corrupt(batch, corrupt_key, context)
        loss = functools.partial(task.loss, memory=state.memory)
        found, grads = value_and_grad(task.forward, loss, state.params, prepared, dropout_key, parts)
        return found, grads, task.remember(state.memory, prepared)

    if not task.choices:
        return run(task)
    tasks = [each for _, each in task.choices.values()]
    shapes = [jax.eval_shape(functools.partial(run, each))[0][1] for each in tasks]
    nothing = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), {k: v for shape in shapes for k, v in shape.items()})

    def branch(each: Task) -> Any:
        (loss, found), grads, memory = run(each)
        return (loss, {**nothing, **found}), grads, memory  # what no one measured is not a number

    drawn = task.drawn(jax.random.fold_in(corrupt_key, len(tasks)))
    return jax.lax.switch(drawn, [functools.partial(branch, each) for each in tasks])


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
