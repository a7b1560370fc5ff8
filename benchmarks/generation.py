"""Seconds a token while a text is written: keys and values kept (mmx), against every step computed again, at several lengths.

    python benchmarks/generation.py

Both write the same ids with the same weights, in turns. The last two columns tell the first and the last quarter of one text
apart, by the times at which `stream` is told the ids.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

import mmx
from mmx.decoding import write
from mmx.modalities import Ids, Patches

BATCH, WIDTH, DEPTH, HEADS, VOCAB = 2, 128, 4, 4, 1024
LENGTHS, ROUNDS = (32, 64, 128, 256), 3


@functools.partial(jax.jit, static_argnums=(0, 3))
def again(model, params, image, length):
    """The same ids by a whole pass for each of them."""

    def step(ids, cache, at):
        out = model.apply({"params": params}, {"image": image, "text": ids}, ("text",))
        return jnp.take_along_axis(out.logits["captioning"], at[..., None], 1), cache

    ids = jnp.zeros((BATCH, length), jnp.int32)
    return write(step, ids, jnp.ones(BATCH, jnp.int32), length - 1, mmx.Decoding(), jax.random.key(0))["sequences"]


def timed(run):
    start = time.perf_counter()
    ids = jax.block_until_ready(run())
    return time.perf_counter() - start, np.asarray(ids)


def quarters(run):
    """Seconds a token in the first and in the last quarter of a text."""
    times: list[float] = []
    run(stream=lambda ids: times.append(time.perf_counter()))
    gaps = np.diff(times)
    quarter = len(gaps) // 4
    return np.median(gaps[:quarter]), np.median(gaps[-quarter:])


def main() -> None:
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; {BATCH} texts about an image, width {WIDTH}, depth {DEPTH}")
    print("| ids | ms a step, kept | ms a step, computed again | ratio | kept: first quarter | last quarter |")
    print("|---|---|---|---|---|---|", flush=True)
    image = np.random.default_rng(0).integers(0, 255, (BATCH, 64, 64, 3), np.uint8)
    for length in LENGTHS:
        model = mmx.build_model(
            {"image": Patches((64, 64), (8, 8)), "text": Ids(VOCAB, length)},
            width=WIDTH,
            depth=DEPTH,
            heads=HEADS,
            unroll=DEPTH,
            outputs={"captioning": mmx.heads.TiedDecoder("text")},
        )
        params = jax.jit(model.init)(jax.random.key(0), mmx.example_batch(model))["params"]
        kept = functools.partial(mmx.generate, model, params, {"image": image}, length=length, begin=0)
        whole = functools.partial(again, model, params, image, length)
        assert np.array_equal(timed(kept)[1], timed(whole)[1]), "not the same ids"  # both are compiled here
        quarters(kept)
        a, b = 1e3 * np.median([(timed(kept)[0], timed(whole)[0]) for _ in range(ROUNDS)], 0) / (length - 1)
        first, last = 1e3 * np.median([quarters(kept) for _ in range(ROUNDS)], 0)
        print(f"| {length} | {a:.2f} | {b:.2f} | {b / a:.1f} | {first:.2f} | {last:.2f} |", flush=True)


if __name__ == "__main__":
    main()
