"""Everything that changes during training, in one value."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mmx.model import MultimodalTransformer, example_batch
from mmx.parallel import shardings
from mmx.types import Params


@flax.struct.dataclass
class TrainState:
    """The state of a run. `step` is also the position in the data, and with `key` the source of all randomness.

    Attributes:
        step: steps done, those that were skipped included.
        params: float32.
        opt_state: Optax's.
        ema: the moving average of the parameters, or None.
        key: the run's random key; it never changes.
        skipped: steps whose gradient was not finite; they moved nothing.
        skipped_in_row: how many of them came last without a good one.
        memory: what objectives remember from step to step, by their names; None: nothing.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params | None
    key: jax.Array
    skipped: jax.Array
    skipped_in_row: jax.Array
    memory: Any = None

    @property
    def evaluated_params(self) -> Params:
        """The parameters to evaluate: the moving average where there is one."""
        return self.params if self.ema is None else self.ema


def make_state(
    model: MultimodalTransformer,
    optimizer: optax.GradientTransformation,
    ema: bool,
    seed: int,
    mesh: Mesh,
    params: Params | None = None,
    memory: Any = None,
) -> tuple[TrainState, Any]:
    """Creates the state in place, every part on its devices. Returns it and its shardings.

    Args:
        model: what is trained.
        optimizer: how.
        ema: whether there is a moving average of the parameters.
        seed: of all randomness.
        mesh: the devices.
        params: those to begin with; None: random ones.
        memory: what objectives remember at the beginning.
    """

    def init(key: jax.Array, given: Params | None, memory: Any) -> TrainState:
        init_key, train_key = jax.random.split(key)
        params: Params = model.init(init_key, example_batch(model))["params"] if given is None else given
        return dataclasses.replace(_first_state(params, optimizer, ema, train_key), memory=memory or None)

    key = jax.random.key(seed)
    shapes = jax.eval_shape(init, key, params, memory)
    layout = shardings(mesh, dataclasses.replace(shapes, memory=None), params=shapes.params)
    layout = dataclasses.replace(layout, memory=shardings(mesh, shapes.memory))  # a teacher's weights lie as its own shapes say
    with jax.set_mesh(mesh):
        return jax.jit(init, out_shardings=layout)(key, params, memory), layout


def planned_state(model: MultimodalTransformer, optimizer: optax.GradientTransformation, ema: bool, mesh: Mesh) -> TrainState:
    """The shapes, types and shardings of what `make_state` creates; nothing is computed."""

    def init(key: jax.Array) -> TrainState:
        return _first_state(model.init(key, example_batch(model))["params"], optimizer, ema, key)

    shapes = jax.eval_shape(init, jax.random.key(0))
    layout = shardings(mesh, shapes, params=shapes.params)
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, layout)


def _first_state(params: Params, optimizer: optax.GradientTransformation, ema: bool, key: jax.Array) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        key=key,
        skipped=zero,
        skipped_in_row=zero,
    )


def abstract_state(state: TrainState) -> TrainState:
    """The shapes, types and shardings of a state, without its values."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
