"""Generation: ids, one after the other, by the same weights that embed and match."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mmx.model import MultimodalTransformer
from mmx.types import Batch, Masked, Params


@functools.partial(jax.jit, static_argnames=("model", "text", "head", "length", "begin", "end", "pad"))
def greedy(
    model: MultimodalTransformer,
    params: Params,
    given: Batch,
    *,
    text: str = "text",
    head: str = "captioning",
    length: int,
    begin: int,
    end: int,
    pad: int = 0,
) -> jax.Array:
    """Returns the likeliest next id, again and again: `(B, length)` int32, from `begin` to `end`, then `pad`.

    Args:
        given: the other modalities, at least one. If the text's tokens have tables or vectors beside their ids, they stand
            here under the text's name: `{"image": ..., "text": {"segment": (B, length)}}`.
        text: the modality that is generated.
        head: the head that scores the next id.
        length: ids to return, `begin` and `end` included.
        begin: the first id.
        end: the id after which nothing follows.
        pad: the id of what does not exist.
    """
    size = jax.tree.leaves(given)[0].shape[0]
    beside, others = given.get(text, {}), {name: value for name, value in given.items() if name != text}

    def step(position: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        ids, alive = carry
        mask = jnp.broadcast_to(jnp.arange(length) <= position, ids.shape)
        raw = {**beside, "ids": ids} if beside else ids
        out: Any = model.apply({"params": params}, {**others, text: Masked(raw, mask)}, (text,))
        best = out.logits[head][:, position].argmax(-1).astype(jnp.int32)
        ids = ids.at[:, position + 1].set(jnp.where(alive, best, pad))
        return ids, alive & (best != end)

    ids = jnp.full((size, length), pad, jnp.int32).at[:, 0].set(begin)
    return jax.lax.fori_loop(0, length - 1, step, (ids, jnp.ones(size, bool)))[0]
