"""Generation: what is remembered gives the numbers of what is computed again, and costs what one token costs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmx
from mmx.layers import Buckets
from mmx.modalities import Ids, Patches
from mmx.topologies import BEYOND, TOPOLOGIES, Cross, Insert, Joint, PerStream

LENGTH = 7
NEVER = ("early_summation", "bottleneck", "latent")  # one stream of all, or tokens that are shared with what is written
STAGES = {
    "prefix": (PerStream({"image": 1}), Joint(2, places="continued")),
    "decoder": (PerStream({"image": 2}), Cross(2, None, "self cross mlp", {"text": ("image",)}, steps=("text",))),
    "inserted": (PerStream({"image": 1}), Insert(), PerStream({"text": 2}, causal=("text",))),
}
CASES = {name: (name, {}) for name in (*TOPOLOGIES, *BEYOND) if name not in NEVER} | {n: (s, {}) for n, s in STAGES.items()}
CASES["rotary"] = ("early_concatenation", {"rotary": 100.0})
CASES["relative"] = ("multi_to_one", {"relative": Buckets(8)})
CASES["unrolled"] = ("cross_attention", {"unroll": 8})


def build(topology, **block):
    model = mmx.build_model(
        {"image": Patches((8, 8), (4, 4), special=("class",)), "text": Ids(11, LENGTH)},
        topology,
        width=16,
        depth=4,
        heads=2,
        outputs={"captioning": mmx.heads.TiedDecoder("text"), "matching": mmx.heads.Classifier(2)},
        **block,
    )
    params = jax.jit(model.init)(jax.random.key(0), mmx.example_batch(model))["params"]
    return model, jax.tree.map(lambda p, k: p + 0.3 * jax.random.normal(k, p.shape), params, keys(params))


def keys(tree):
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, list(jax.random.split(jax.random.key(1), len(leaves))))


@pytest.mark.parametrize("case", CASES)
def test_what_is_remembered_is_what_is_computed_again(rng, case):
    """Rows are at different places at the same time; what stands further on in a row is no matter."""
    topology, block = CASES[case]
    model, params = build(topology, **block)
    assert model.caches
    image = mmx.Masked(rng.integers(0, 255, (3, 8, 8, 3), np.uint8), np.asarray([True, True, False]))
    ids, slots = rng.integers(0, 11, (3, LENGTH)), np.asarray([[0, -1, 3, -1, -1, -1, -1]] * 3)
    whole = {"image": image, "text": {"ids": ids, "slots": {"image": slots}} if case == "inserted" else ids}
    expected = model.apply({"params": params}, whole, ("text",)).logits["captioning"]
    known = np.where(np.arange(LENGTH) < 3, ids, 0)
    prompt = {**whole, "text": {**whole["text"], "ids": known} if case == "inserted" else known}
    out, cache = model.apply({"params": params}, prompt, ("text",), mutable=["cache"])
    np.testing.assert_allclose(out.logits["captioning"][:, :3], expected[:, :3], atol=2e-5)

    @jax.jit
    def step(cache, at):
        out, cache = model.apply({"params": params, **cache}, whole, ("text",), None, {"text": at}, mutable=["cache"])
        return out.logits["captioning"], cache

    for place in range(3, LENGTH):
        at = np.asarray([[place], [min(place, 5)], [place]])
        scores, cache = step(cache, at)
        np.testing.assert_allclose(scores[:, 0], np.take_along_axis(expected, at[..., None], 1)[:, 0], atol=2e-5)


@pytest.mark.parametrize("name", NEVER)
def test_where_nothing_can_be_remembered_all_is_computed_again(name):
    assert not mmx.build_model({"text": Ids(11, LENGTH)}, name, width=16, depth=2, heads=2).caches


def test_a_token_costs_what_one_token_costs():
    """Beside attention, whose keys are all before it, the work of a step is that of one token, however long the text may be."""

    def work(length, at):
        text = Ids(11, length)
        model = mmx.build_model({"text": text}, (PerStream(2, causal=("text",)),), width=64, heads=2, embed=0)
        model = dataclasses.replace(model, heads={"captioning": mmx.heads.TiedDecoder("text")})
        batch = mmx.example_batch(model, 1)
        variables = jax.eval_shape(lambda: model.init(jax.random.key(0), batch))
        (_, cache) = jax.eval_shape(lambda v: model.apply(v, batch, mutable=["cache"]), variables)
        places = {"text": jnp.zeros((1, 1), jnp.int32)} if at else None
        given = {**variables, **cache} if at else variables
        return mmx.count_flops(lambda v: model.apply(v, batch, (), None, places, mutable=["cache"])[0].logits, given)

    attention = 2 * 2 * 2 * 64  # layers x (scores, values) x multiply and add x width, for every key
    assert work(128, True) - work(64, True) == 64 * attention
    assert work(128, True) < 1.02 * work(128, False) / 128
