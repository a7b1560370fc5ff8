"""Generation: ids, one after the other, by the same weights that embed and match; keys and values are kept (KV cache)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mmx.decoding import Decoding, Step, check_prompts, decode, guided
from mmx.errors import InputError
from mmx.heads import scores_of
from mmx.modalities.masking import absent
from mmx.model import MultimodalTransformer
from mmx.streaming import Listener, listening
from mmx.types import Batch, Masked, Outputs, Params


def generate(
    model: MultimodalTransformer,
    params: Params,
    given: Batch,
    *,
    text: str = "text",
    head: str = "captioning",
    length: int,
    begin: int | None = None,
    prompt: Any = None,
    decoding: Decoding = Decoding(),
    key: jax.Array | None = None,
    stream: Listener | None = None,
) -> jax.Array:
    """Writes a text, or the codes of an image or a sound, about what is given: `(B * decoding.best, length)` int32.

    One compiled program writes all ids; it is made again only for other shapes, models or ways of decoding.

    Args:
        given: the other modalities, if any. If the text's tokens have tables or vectors beside their ids, they stand
            here under the text's name: `{"image": ..., "text": {"segment": (B, length)}}`.
        text: the modality that is generated, any of ids.
        head: the head that scores the next id.
        length: ids to return, those that are given included.
        begin: the first id; or
        prompt: the first ids, `Masked(ids (B, P), mask (B, P))`, which may differ in length, padded behind.
        decoding: how the next id is chosen.
        key: of what is drawn.
        stream: called with the new ids `(B * decoding.best,)` of every step while the program runs, padding for rows that
            have ended, until all have; all was told when `generate` returns. Not with beams, nor inside `jax.jit`.
    """
    if prompt is not None:
        check_prompts("generate: prompt", prompt.array, prompt.mask, "behind")
    with listening(stream, (params, given, prompt)) as listener:
        return _generate(model, params, given, text, head, length, begin, prompt, decoding, key, listener)


@functools.partial(jax.jit, static_argnames=("model", "text", "head", "length", "begin", "decoding"))
def _generate(
    model: MultimodalTransformer,
    params: Params,
    given: Batch,
    text: str,
    head: str,
    length: int,
    begin: int | None,
    prompt: Any,
    decoding: Decoding,
    key: jax.Array | None,
    listener: Any,
) -> jax.Array:
    beside, others = given.get(text, {}), {name: value for name, value in given.items() if name != text}
    if (begin is None) == (prompt is None):
        raise InputError("generate: give either begin, the first id, or prompt, the first ids")
    if not given and prompt is None:
        raise InputError("generate: nothing is given, and no prompt; how many texts to write nobody has told")
    if decoding.guidance != 1 and not others:
        raise InputError(
            f"generate: guidance={decoding.guidance} leads away from a text about nothing, but nothing is given; "
            f"give another modality than {text!r}, or leave guidance at 1"
        )
    size = jax.tree.leaves((given, prompt))[0].shape[0]
    if begin is not None:
        ids, start = jnp.full((size, 1), begin), jnp.ones(size, jnp.int32)
    else:
        ids, start = prompt.array, prompt.mask.sum(1)
        if ids.shape[1] >= length:
            raise InputError(f"generate: length={length}, but the prompts have {ids.shape[1]} ids; there is no room for more")
    spread = decoding.best if decoding.beams == 1 else 1
    ids = jnp.pad(ids.astype(jnp.int32), ((0, 0), (0, length - ids.shape[1])), constant_values=decoding.padding)
    ids, start, others, beside = jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x), spread, 0), (ids, start, others, beside))

    def step_with(others: Batch, ids: jax.Array, cache: Any, at: jax.Array) -> tuple[jax.Array, Any]:
        more = len(ids) // (size * spread)  # beams
        batch, tables = jax.tree.map(lambda x: jnp.repeat(x, more, 0), (others, beside))
        everywhere = jnp.ones(ids.shape, bool)  # what stands behind the place that is written is seen by nobody
        batch = {**batch, text: Masked({**tables, "ids": ids} if tables else ids, everywhere)}
        out: Any
        out, left = model.apply(
            {"params": params, **cache},
            batch,
            (text,),
            None,
            {text: at} if cache else None,
            mutable=["cache"] if model.caches else [],
        )
        return (out.logits[head] if cache else _scores_at(out, head, at, ids.shape[1])), dict(left)

    step: Step = functools.partial(step_with, others)
    if decoding.guidance != 1:
        nothing = {name: absent(value) for name, value in others.items()}
        step = guided(step, functools.partial(step_with, nothing), decoding.guidance)
    return decode(step, ids, start, length - 1, decoding, key, listener)["sequences"]


def _scores_at(outputs: Outputs, head: str, at: jax.Array, length: int) -> jax.Array:
    """Scores `(N, 1, V)` of what follows the places `at (N, 1)` of `length` ids; under jit those of others are never made."""
    scored = outputs.scored.get(head)
    if scored is not None:
        return scores_of(scored, jnp.take_along_axis(scored.states, at[..., None], 1))
    logits = outputs.logits[head]
    return jnp.take_along_axis(logits, (at + logits.shape[1] - length)[..., None], 1)  # an image may stand before the ids
