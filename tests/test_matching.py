"""Matching, contrasting and grounding: what is near, what belongs together, and where."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives_of_all import ALL, IMAGE, TEXT, entry_of, make, values_of

import mmx
from mmx import objectives
from mmx.errors import InputError
from mmx.objectives import (
    Context,
    Contrastive,
    Grounding,
    Matching,
)
from mmx.topologies import Joint, PerStream, Pool


def test_hard_negatives_are_near_ones(tiny, labelled):
    """Of two groups of equal images, the text of the own group is taken, for the scores leave nothing else."""
    objective = Matching(negatives="hard", swap_rate=1.0)
    model, _ = make(tiny, {"x": objective})
    first = jnp.eye(8)[jnp.arange(8) // 4]

    class Near(Context):
        def embeddings(self, batch, entries, params):
            return {"image": first, "text": first, "scale": jnp.full(8, 100.0)}

    for key in range(5):
        out = objective.corrupt(labelled, jax.random.key(key), Near(model))
        swapped = np.asarray(out[entry_of(objective, "text")].array)
        of = [next(i for i in range(8) if (labelled["text"].array[i] == row).all()) for row in swapped]
        assert all(i != j and i // 4 == j // 4 for i, j in enumerate(of))


def test_a_queue_keeps_the_last_vectors_and_they_are_negatives(tiny, labelled):
    objective = Contrastive(teacher=0.4, queue=12)
    model, params = make(tiny, {"x": objective})
    memory = objective.memory(model)

    @jax.jit
    def step(memory, batch):
        context = Context(model, params, params, memory)
        out = objective.corrupt(batch, jax.random.key(0), context)
        values = objectives.forward({"x": objective}, model, params, out, None)["x"]
        return objective.remember(memory, out), objective.loss(values, memory)[0], values

    other = {**labelled, "image": 255 - labelled["image"]}
    memory, alone, values = step(memory, labelled)
    assert np.asarray(memory["queue"]["there"]).sum() == 8
    later, with_queue, _ = step(memory, other)
    _, without, _ = step(objective.memory(model), other)
    assert with_queue > without + 0.1  # more to tell apart
    np.testing.assert_allclose(later["queue"]["vectors"][0][8:], memory["queue"]["vectors"][0][:4], atol=1e-6)
    own, text = (np.asarray(values["embeddings"][n]) for n in ("image", "text"))
    scale = float(values["logit_scale"][0])

    def one(a, b):  # the student is the teacher here
        believed = jax.nn.softmax(scale * a @ b.T)
        return -((0.4 * believed + 0.6 * np.eye(8)) * jax.nn.log_softmax(scale * a @ b.T)).sum(-1)

    np.testing.assert_allclose(alone, (one(own, text) + one(text, own)).mean() / 2, rtol=1e-4)


def test_tokens_meet_one_by_one(tiny, labelled):
    """Each by a matrix of its own, learned tokens and padding aside: the score of a pair is the mean of each token's best match."""
    objective = Contrastive(tokens=8)
    model, params = make(tiny, {"x": objective}, image=dataclasses.replace(IMAGE, special=("class", "register")))
    outputs = [model.apply({"params": params}, {name: labelled[name]}) for name in ("image", "text")]
    sides = []
    for name, out in zip(("image", "text"), outputs, strict=True):
        x = np.asarray(out.streams[name].without_special.values) @ np.asarray(
            params[f"heads_tokenwise_{name}"]["classifier"]["kernel"]
        )
        sides.append(x / np.linalg.norm(x, axis=-1, keepdims=True))
    there, scale = labelled["text"].mask, float(outputs[0].logit_scale)
    each = np.einsum("bne,cle->bcnl", *sides)
    forth = np.stack([each[:, c][..., there[c]].max(-1).mean(-1) for c in range(8)], 1)
    back = np.stack([each[:, c][..., there[c]].max(1).mean(-1) for c in range(8)])
    expected = np.mean([-np.diagonal(np.asarray(jax.nn.log_softmax(scale * x))) for x in (forth, back)])
    loss, metrics = objective.loss(values_of(objective, model, params, labelled))
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["contrastive/recall"], (forth.argmax(1) == np.arange(8)).mean(), rtol=1e-6)


def test_one_of_a_bag_is_the_partner(tiny, labelled):
    """MIL-NCE over two texts of each image, one of which one example lacks."""
    objective = ALL["bags"]
    model, params = make(tiny, {"x": objective})
    image, text, other = (
        np.asarray(model.apply({"params": params}, {name: labelled[entry]}).embeddings[name])
        for name, entry in (("image", "image"), ("text", "text"), ("text", "text/other"))
    )
    e = np.exp(np.stack([image @ text.T, image @ other.T]) * float(model.logit_scale))  # (2, images, texts)
    e[1, :, 3] = 0  # the fourth has no other text
    positive = e[:, np.arange(8), np.arange(8)].sum(0)
    every = e.sum((0, 2)) + e.sum((0, 1)) - positive
    loss, _ = objective.loss(values_of(objective, model, params, labelled))
    np.testing.assert_allclose(loss, -np.log(positive / every).mean(), rtol=1e-4)


def test_a_place_is_chosen_among_those_that_exist(tiny, labelled):
    """By its number, and by how surely each is meant; what is not named is not asked, what does not exist is no number."""
    objective = ALL["where"]
    model, params = make(tiny, {"x": objective}, image=dataclasses.replace(IMAGE, special=("class", "register")))
    out = model.apply({"params": params}, {name: labelled[name] for name in ("image", "text")})
    log = np.asarray(jax.nn.log_softmax(out.logits["ground_patch_patches"][:, 2:], 1))  # (B, 16, 2)
    number, surely = labelled["label/patch"], labelled["label/patches"]
    one = [-log[b, number[b], 0] for b in range(8) if number[b] >= 0]
    two = [-log[b, surely[b] > 0, 1].mean() for b in range(8) if surely[b].any()]
    loss, metrics = objective.loss(values_of(objective, model, params, labelled))
    np.testing.assert_allclose(loss, np.mean(one) + np.mean(two), rtol=1e-4)
    assert len(one) == len(two) == 7 and 0 <= metrics["ground_patch_patches/accuracy"] < 1
    for wrong in ({"label/patch": np.full(8, 16, np.int32)}, {"label/patches": -surely}):
        assert np.isnan(objective.loss(values_of(objective, model, params, {**labelled, **wrong}))[0])
    words = ALL["answer"]
    model, params = make(tiny, {"x": words})
    assert np.isnan(words.loss(values_of(words, model, params, {**labelled, "label/word": np.full(8, 11, np.int32)}))[0])
    with pytest.raises(
        InputError, match=r"label/word: expected the number of a token \(B,\) as an integer, or how .*classes to 12"
    ):
        values_of(words, model, params, {**labelled, "label/word": np.zeros((8, 3), np.float32)})
    pooled = mmx.build_model(
        {"image": IMAGE, "text": TEXT},
        (PerStream(1), Pool("image", 2, 3), Joint(1)),
        width=32,
        heads=2,
        outputs=objective.heads({"image": IMAGE}),
    )
    with pytest.raises(InputError, match="of its 16 tokens the stages leave 3"):
        jax.eval_shape(
            lambda: values_of(objective, pooled, pooled.init(jax.random.key(0), mmx.example_batch(pooled))["params"], labelled)
        )


def test_each_token_is_asked_for_itself(tiny, labelled):
    """Binary: the sum over the regions of the cross-entropy of whether each is meant."""
    objective = ALL["regions"]
    model, params = make(tiny, {"x": objective})
    x = np.asarray(model.apply({"params": params}, {n: labelled[n] for n in ("image", "text")}).logits["ground_patches"][..., 0])
    named = labelled["label/patches"]
    each = np.log1p(np.exp(x)) - named * x
    loss, metrics = objective.loss(values_of(objective, model, params, labelled))
    np.testing.assert_allclose(loss, each.sum(1)[named.any(1)].mean(), rtol=1e-4)
    right = named[np.arange(8), x.argmax(1)][named.any(1)]
    np.testing.assert_allclose(metrics["ground_patches/accuracy"], right.mean(), rtol=1e-6)
    assert np.isnan(objective.loss(values_of(objective, model, params, {**labelled, "label/patches": 2 * named}))[0])


def test_a_stream_that_is_summed_cannot_tell(tiny):
    with pytest.raises(InputError, match=r"objectives.x: stream='text'.*sums the streams.*leave `stream` empty"):
        make(tiny, {"x": Matching(stream="text")}, "early_summation")
    make(tiny, {"x": Matching(stream="fused")}, "early_summation")


@pytest.mark.parametrize(
    "objective",
    [Grounding(labels=("a",), head="ground_a_b"), Grounding("text", ("image",), ("a", "b"), head="ground_a_b")],
    ids=["size", "modality"],
)
def test_grounding_takes_no_head_of_another_form(tiny, objective):
    with pytest.raises(InputError, match=r"objectives.x: head='ground_a_b' is no TokenClassifier\("):
        make(tiny, {"other": Grounding(labels=("a", "b")), "x": objective})
