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
    everywhere = jnp.ones((size, length), bool)  # what stands behind the place that is written is seen by nobody

    def scores_of(ids: jax.Array, place: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """Scores `(B, V)` of what comes behind a place, and the keys and values so far."""
        raw = {**beside, "ids": ids} if beside else ids
        batch = {**others, text: Masked(raw, everywhere)}
        at = {text: jnp.broadcast_to(place, (size, 1))} if cache else None
        left = ["cache"] if model.caches else []
        out: Any
        out, more = model.apply({"params": params, **cache}, batch, (text,), None, at, mutable=left)
        logits = out.logits[head]
        return logits[:, 0] if cache else jax.lax.dynamic_index_in_dim(logits, place, 1, keepdims=False), dict(more)

    def step(position: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        ids, scores, alive, cache = carry
        best = scores.argmax(-1).astype(jnp.int32)
        ids = ids.at[:, position].set(jnp.where(alive, best, pad))
        scores, cache = scores_of(ids, position, cache)
        return ids, scores, alive & (best != end), cache

    ids = jnp.full((size, length), pad, jnp.int32).at[:, 0].set(begin)
    scores, cache = scores_of(ids, jnp.int32(0), {})
    return jax.lax.fori_loop(1, length, step, (ids, scores, jnp.ones(size, bool), cache))[0]
