"""Whether what an objective reads can reach its answer at all: a question to the traced program, not to the numbers."""

from typing import Any

import jax
from jax.interpreters import partial_eval

from mmx.errors import InputError
from mmx.modalities.masking import unmask
from mmx.model import MultimodalTransformer
from mmx.objectives.objective import Context, Objective
from mmx.objectives.views import run_views
from mmx.types import Batch, Params


def check_reach(objective: Objective, model: MultimodalTransformer, params: Params, batch: Batch) -> None:
    """Raises an InputError if an entry that a forward pass reads changes nothing of what the loss is given.

    A topology that never joins image and text cannot caption; nothing would tell, since the loss falls all the same.

    Args:
        objective: what is trained; its `check` has passed.
        model: with its heads.
        params: their shapes.
        batch: shapes of a batch, with the entries of `corrupt`.
    """
    views = objective.views()
    entries = {entry: batch[entry] for view in views for _, entry in view.reads}

    def values(entries: Any, batch: Any, params: Any) -> Any:
        outputs = run_views(model, params, entries, views, None)
        return objective.select([outputs[view] for view in views], batch)

    program = jax.make_jaxpr(values)(entries, batch, params)
    _, used = partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.out_avals))
    leaves, structure = jax.tree.flatten((entries, batch, params))
    reached = jax.tree.unflatten(structure, used[len(used) - len(leaves) :])[0]
    for entry in entries:
        if not any(jax.tree.leaves(unmask(reached[entry])[0])):
            raise InputError(
                f"nothing of {entry!r} reaches what is asked: the stages of this topology keep it apart; choose a topology that "
                f"joins it with the others, or do not read it"
            )


def prepared(objective: Objective, model: MultimodalTransformer, params: Params, batch: Batch, memory: Any) -> Batch:
    """The shapes of a batch with what `corrupt` adds."""

    def corrupt(batch: Batch, key: jax.Array, params: Params, memory: Any) -> Batch:
        return objective.corrupt(batch, key, Context(model, params, params, memory))

    return jax.eval_shape(corrupt, batch, jax.random.key(0), params, memory)
