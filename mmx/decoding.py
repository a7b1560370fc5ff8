"""Decoding: how one id follows the other. `write` and `search` are the two loops, of which each is one compiled program.

They know a model only by its step:

    step(ids (N, L), cache, at (N, 1)) -> scores (N, 1, V) of what follows these places, and what is kept

With an empty cache all that stands before is read, else only these places, and of the others what was kept.

`guided` makes one step of two: with what is given, and without.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mmx.errors import InputError, at_least
from mmx.losses import LOWEST
from mmx.streaming import tell

Step: TypeAlias = Callable[[jax.Array, Any, jax.Array], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How the next id is chosen."""

    temperature: float = 0.0
    """Scores are divided by it and an id is drawn; 0: the likeliest is taken."""
    top_k: int | None = None
    """Drawn from so many of the likeliest; None: from all."""
    top_p: float | None = None
    """Drawn from the likeliest that have this probability together (nucleus sampling, arXiv 1904.09751, 3.1); None: from all."""
    repetition_penalty: float = 1.0
    """What is written already becomes so much less likely (CTRL, arXiv 1909.05858, 4.1); 1: not."""
    minimum: int = 0
    """Ids that are written before an end may be."""
    beams: int = 1
    """Sentences that are followed at a time; more than one: beam search, and nothing is drawn."""
    length_penalty: float = 1.0
    """A found sentence is as good as its log probability divided by its length to this power."""
    best: int = 1
    """Sentences that are returned of each prompt: the best beams, or so many draws."""
    guidance: float = 1.0
    """How far from what would be written if nothing were given (classifier-free guidance, arXiv 2207.12598, 1 + w in its eq. 6):
    1: as the model says; more: what is given weighs more; 0: as if nothing were given."""
    end: tuple[int, ...] | None = None
    """Ids behind which nothing follows; (): there are none; None: those that were published with the weights, if any were."""
    pad: int | None = None
    """The id of what does not exist; None: the one that was published with the weights, or 0."""
    allowed: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    """`(ids (N, L), place (N,)) -> (N, V)`: which ids may stand there (constrained generation); None: all. A function is compiled
    once: give the same one again, and not one that is made for every call."""

    def __post_init__(self) -> None:
        at_least(self, temperature=0, minimum=0, beams=1, best=1, guidance=0)
        if self.top_k is not None:
            at_least(self, top_k=1)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"decoding: top_p={self.top_p}; it is a probability, more than 0 and at most 1")
        if self.repetition_penalty <= 0:
            raise InputError(f"decoding: repetition_penalty={self.repetition_penalty}; it is a factor, more than 0")
        if self.beams > 1 and (self.best > self.beams or self.temperature):
            raise InputError(
                f"decoding: beams={self.beams} with best={self.best}, temperature={self.temperature}; a search returns at most "
                f"its beams, and draws nothing"
            )

    def scores(self, scores: jax.Array, ids: jax.Array, place: jax.Array, written: jax.Array) -> jax.Array:
        """Scores `(N, V)` of the id at `place (N,)` in sentences `ids (N, L)`, of which `written` ids are the model's own."""
        scores = scores.astype(jnp.float32)
        if self.repetition_penalty != 1:
            before = jnp.arange(ids.shape[1]) < place[:, None]
            seen = jnp.zeros(scores.shape, bool).at[jnp.arange(len(ids))[:, None], ids].max(before)
            lower = jnp.where(scores < 0, scores * self.repetition_penalty, scores / self.repetition_penalty)
            scores = jnp.where(seen, lower, scores)
        if self.minimum and self.end:
            scores = jnp.where(written < self.minimum, scores.at[:, jnp.asarray(self.end)].set(LOWEST), scores)
        if self.allowed is not None:
            scores = jnp.where(self.allowed(ids, place), scores, LOWEST)
        return scores

    def choose(self, scores: jax.Array, key: jax.Array) -> jax.Array:
        """The next ids `(N,)`."""
        if not self.temperature:
            return scores.argmax(-1).astype(jnp.int32)
        scores = scores / self.temperature
        if self.top_k is not None:
            lowest = jax.lax.top_k(scores, min(self.top_k, scores.shape[-1]))[0][:, -1:]
            scores = jnp.where(scores < lowest, LOWEST, scores)
        if self.top_p is not None:
            ordered = jnp.sort(scores, -1)[:, ::-1]
            before = jnp.cumsum(jax.nn.softmax(ordered), -1) - jax.nn.softmax(ordered)  # what the likelier ones have together
            lowest = jnp.where(before < self.top_p, ordered, jnp.inf).min(-1, keepdims=True)
            scores = jnp.where(scores < lowest, LOWEST, scores)
        return jax.random.categorical(key, scores).astype(jnp.int32)

    def ends(self, ids: jax.Array) -> jax.Array:
        """Which ids are an end."""
        return functools.reduce(jnp.logical_or, [ids == end for end in self.end or ()], jnp.zeros(ids.shape, bool))

    @property
    def padding(self) -> int:
        """The id of what does not exist."""
        return self.pad or 0


def check_prompts(name: str, ids: Any, mask: Any, padded: Literal["behind", "before"]) -> None:
    """Refuses prompts `ids (B, P)` behind whose ids that exist, by `mask (B, P)`, nothing can be written, or that have none.

    Those padded behind have all their ids in front; of those padded before their ids the last place is one.

    It looks at what this process holds; of values inside `jax.jit`, or spread over others, it sees the shapes alone.
    """
    if mask.shape != ids.shape:
        raise InputError(f"{name}: ids {ids.shape} with a mask {mask.shape}; the mask says of each id whether it exists")
    if isinstance(mask, Tracer) or not getattr(mask, "is_fully_addressable", True):
        return
    there = np.asarray(mask) != 0
    front = np.arange(there.shape[1]) < there.sum(1, keepdims=True)
    wrong = (there != front).any(1) | ~there.any(1) if padded == "behind" else ~there[:, -1]
    for i in np.flatnonzero(wrong)[:1]:
        raise InputError(
            f"{name}: the mask of prompt {i} is {there[i].astype(int).tolist()}; prompts are padded {padded} their ids, "
            f"of which there is one at least"
        )


def guided(given: Step, alone: Step, guidance: float) -> Step:
    """A step that is led away from what is written `alone`, without what is given (arXiv 2207.12598, 3.2, eq. 6).

        log p(id | nothing) + guidance * (log p(id | given) - log p(id | nothing))

    On log probabilities, as `guidance_scale` in transformers (UnbatchedClassifierFreeGuidanceLogitsProcessor); on the scores
    themselves, as its models of music do, all ids of a place would move by one number, which a softmax does not see.
    """

    def both(ids: jax.Array, cache: Any, at: jax.Array) -> tuple[jax.Array, Any]:
        steps = {"given": given, "alone": alone}
        found = {name: step(ids, cache.get(name, {}), at) for name, step in steps.items()}
        log = {name: jax.nn.log_softmax(scores.astype(jnp.float32)) for name, (scores, _) in found.items()}
        return log["alone"] + guidance * (log["given"] - log["alone"]), {name: kept for name, (_, kept) in found.items()}

    return both


def write(
    step: Step, ids: jax.Array, start: jax.Array, count: int, decoding: Decoding, key: jax.Array, listener: Any = None
) -> dict[str, jax.Array]:
    """Writes `count` ids from the place `start (N,)` on into `ids (N, L)`, greedily or by drawing; it stops when all have ended.

    Returns:
        `sequences (N, L)`, `logits (N, count, V)` as the step gave them, 0 behind the last step, and `scores (N,)`: the log
        probability of what was written.
    """
    rows = jnp.arange(len(ids))

    def goes_on(carry: tuple[Any, ...]) -> jax.Array:
        i, _, _, alive, *_ = carry
        return (i < count) & alive.any()

    def one(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        i, ids, logits, alive, cache, left, total = carry
        place = start + i
        scores = decoding.scores(logits, ids, place, i)
        chosen = decoding.choose(scores, jax.random.fold_in(key, i))
        total += jnp.where(alive, jax.nn.log_softmax(scores)[rows, chosen], 0)
        new = jnp.where(alive, chosen, decoding.padding).astype(ids.dtype)
        if listener is not None:
            tell(listener, new)
        ids = ids.at[rows, place].set(new)
        left = left.at[:, i].set(logits)
        logits, cache = step(ids, cache, jnp.minimum(place, ids.shape[1] - 1)[:, None])
        alive &= ~decoding.ends(chosen) & (place + 1 < ids.shape[1])  # where there is room for another one
        return i + 1, ids, logits[:, 0], alive, cache, left, total

    logits, cache = step(ids, {}, (start - 1)[:, None])
    logits = logits[:, 0]
    left = jnp.zeros((len(ids), count, logits.shape[-1]), logits.dtype)
    carry = jnp.int32(0), ids, logits, start < ids.shape[1], cache, left, jnp.zeros(len(ids))
    steps, ids, _, _, _, left, total = jax.lax.while_loop(goes_on, one, carry)
    ids = jnp.where(jnp.arange(ids.shape[1]) < (start + steps)[:, None], ids, decoding.padding)
    return {"sequences": ids, "logits": left, "scores": total}


def search(step: Step, ids: jax.Array, start: jax.Array, count: int, decoding: Decoding) -> dict[str, jax.Array]:
    """Beam search: the likeliest sentences of at most `count` ids behind each prompt, as far as there is room.

    In every step each of K beams is followed by its likeliest ids; those that end are found sentences, the best K of the others
    go on. A prompt is done when K sentences are found and no beam is better than the worst of them.

    Returns:
        `sequences (B * best, L)`, best first, and their `scores (B * best,)`: log probability / length ** length_penalty.
    """
    size, beams, length = len(ids), decoding.beams, ids.shape[1]
    batch = jnp.arange(size)[:, None]
    keep = 2 * beams  # at most half of them end

    def spread(x: jax.Array) -> jax.Array:  # (B, ...) -> (B * K, ...)
        return jnp.repeat(x, beams, 0)

    def rows(cache: Any, order: jax.Array) -> Any:  # keys and values are (layers, B, L, G, K)
        return jax.tree.map(lambda x: jnp.take(x, order, x.ndim - 4), cache)

    logits, cache = step(ids, {}, (start - 1)[:, None])
    logits, cache = logits[:, 0], rows(cache, spread(jnp.arange(size)))
    alive = jnp.where(jnp.arange(beams) == 0, 0.0, LOWEST) + jnp.zeros((size, 1))
    nothing = jnp.full((size, beams), LOWEST)
    every = jnp.repeat(ids[:, None], beams, 1)
    carry = jnp.int32(0), spread(ids), spread(logits), cache, alive, every, nothing, jnp.zeros(size, bool)

    def goes_on(carry: tuple[Any, ...]) -> jax.Array:
        i, *_, done = carry
        return (i < count) & (~done & (start + i < length)).any()

    def one(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        i, ids, logits, cache, *state = carry
        alive, found, found_scores, done = state
        place = spread(start) + i
        each = decoding.scores(jax.nn.log_softmax(logits.astype(jnp.float32)), ids, place, i)
        vocab = each.shape[-1]
        total = (alive[:, :, None] + each.reshape(size, beams, vocab)).reshape(size, -1)
        total, best = jax.lax.top_k(total, keep)  # (B, 2 K)
        beam, chosen = best // vocab, best % vocab
        before, sentences = ids, ids.reshape(size, beams, length)[batch, beam]
        sentences = jnp.where(
            jnp.arange(length) == (start[:, None] + i)[..., None], chosen[..., None].astype(ids.dtype), sentences
        )
        ended = decoding.ends(chosen)
        weight = (i + 1.0) ** decoding.length_penalty
        among = (jnp.arange(keep) < beams) & ended & ~done[:, None]  # an end counts if its beam is one of the best
        new = jnp.concatenate([found_scores, jnp.where(among, total / weight, LOWEST)], 1)
        found_scores, order = jax.lax.top_k(new, beams)
        found = jnp.concatenate([found, sentences], 1)[batch, order]
        alive, order = jax.lax.top_k(jnp.where(ended, LOWEST, total), beams)
        ids, chosen_beam = sentences[batch, order].reshape(-1, length), beam[batch, order]
        done |= (found_scores[:, -1] > LOWEST / 2) & (found_scores[:, -1] >= alive[:, 0] / weight)
        cache = rows(cache, (batch * beams + chosen_beam).reshape(-1))
        logits, cache = step(ids, cache, jnp.minimum(place, length - 1)[:, None])
        new = ids.reshape(size, beams, length), alive, found, found_scores, done
        old = before.reshape(size, beams, length), *state
        room = start + i < length  # a row without any stays as it is
        ids, *state = (jnp.where(room.reshape(-1, *[1] * (x.ndim - 1)), x, y) for x, y in zip(new, old, strict=True))
        return i + 1, ids.reshape(-1, length), logits[:, 0], cache, *state

    _, ids, _, _, alive, found, found_scores, done = jax.lax.while_loop(goes_on, one, carry)
    written = jnp.minimum(count, length - start).astype(jnp.float32)[:, None]
    rest = jnp.where(done[:, None], LOWEST, alive / jnp.maximum(written, 1) ** decoding.length_penalty)
    scores, order = jax.lax.top_k(jnp.concatenate([found_scores, rest], 1), decoding.best)
    sequences = jnp.concatenate([found, ids.reshape(size, beams, length)], 1)[batch, order].reshape(-1, length)
    return {"sequences": _padded(sequences, jnp.repeat(start, decoding.best), decoding), "scores": scores.reshape(-1)}


def _padded(ids: jax.Array, start: jax.Array, decoding: Decoding) -> jax.Array:
    """What stands behind an end is padding."""
    own = jnp.arange(ids.shape[1]) >= start[:, None]
    ended = jnp.cumsum(decoding.ends(ids) & own, 1) - (decoding.ends(ids) & own)
    return jnp.where(ended > 0, decoding.padding, ids)


def decode(
    step: Step,
    ids: jax.Array,
    start: jax.Array,
    count: int,
    decoding: Decoding,
    key: jax.Array | None = None,
    listener: Any = None,
) -> dict[str, jax.Array]:
    """`search` where there are beams, else `write`; `ids (B, L)` have room for `count` ids behind `start (B,)`."""
    if decoding.beams > 1 and listener is not None:
        raise InputError(f"stream: beams={decoding.beams} are known only at their end; stream with beams=1, or leave stream out")
    if decoding.beams > 1:
        return search(step, ids, start, count, decoding)
    if decoding.temperature and key is None:
        raise InputError(f"decoding: temperature={decoding.temperature} draws ids; give a key, such as jax.random.key(0)")
    return write(step, ids, start, count, decoding, jax.random.key(0) if key is None else key, listener)
