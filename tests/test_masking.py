"""Masked modelling: what is hidden, what is asked of it, and of whom."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval
from objectives_of_all import ALL, TEXT, entry_of, make, prepared, program, run

import mmx
from mmx import modalities, objectives
from mmx.errors import InputError
from mmx.objectives import (
    Captioning,
    Context,
    Mask,
    MaskedModelling,
)
from mmx.train import Task
from mmx.train.accumulate import value_and_grad
from mmx.types import Masked

REGIONS = {
    "thing": modalities.Features(5, 6, position="learned"),
    "text": modalities.Ids(20, 4, position="learned", mask_token=True),
}


@pytest.fixture
def seen(rng):
    """Four examples of up to six regions, and what a detector saw in them."""
    there = np.arange(6) < np.array([6, 4, 3, 5])[:, None]
    features, detected = rng.standard_normal((4, 6, 5)).astype("f"), rng.random((4, 6, 7)).astype("f") + 0.1
    return {
        "thing": Masked(features, there),
        "text": rng.integers(0, 20, (4, 4)),
        "label/objects": rng.integers(0, 7, (4, 6)),
        "label/attributes": rng.integers(0, 4, (4, 6)),
        "label/detected": detected / detected.sum(-1, keepdims=True),
        "label/sure": rng.random((4, 6)).astype("f"),
    }


def of_regions(chosen):
    """A small model of regions and words with the heads of these objectives, and its parameters."""
    heads = objectives.needed_heads(chosen, REGIONS)
    model = mmx.build_model(REGIONS, "early_concatenation", width=16, depth=1, heads=2, outputs=heads)
    objectives.check(chosen, model)
    return model, jax.jit(model.init)(jax.random.key(0), mmx.example_batch(model))["params"]


def test_of_hidden_words_four_in_five_are_masked_and_one_in_ten_is_another(tiny, labelled):
    objective = MaskedModelling(masks={"text": Mask(0.5, mask_id=4, spare=(2, 3))})
    model, _ = make(tiny, {"words": objective})
    batch = dict(labelled, text=jax.tree.map(lambda x: np.tile(x, (100, 1)), labelled["text"]))
    out = prepared(objective, model, batch)
    entry = entry_of(objective, "text")
    hidden, before, after = (np.asarray(x) for x in (out[f"{entry}:hidden"], batch["text"].array, out[entry].array["ids"]))
    assert not hidden[np.isin(before, (2, 3)) | ~batch["text"].mask].any()
    np.testing.assert_array_equal(after[~hidden], before[~hidden])
    np.testing.assert_array_equal(out[f"{entry}:asked"], before)
    assert 0.77 < (after[hidden] == 4).mean() < 0.83
    assert 0.08 < ((after != before) & (after != 4))[hidden].mean() < 0.12


def test_the_loss_is_the_cross_entropy_of_the_hidden_words(tiny, labelled):
    objective = ALL["words"]
    model, params = make(tiny, {"words": objective})
    out = prepared(objective, model, labelled)
    entry = entry_of(objective, "text")
    said = jax.jit(lambda p, b: model.apply({"params": p}, b).logits["masked_text"])(
        params, {"image": out["image"], "text": out[entry]}
    )
    losses = -jax.nn.log_softmax(said)[np.arange(8)[:, None], np.arange(12), labelled["text"].array]
    expected = np.asarray(losses)[np.asarray(out[f"{entry}:hidden"])].mean()
    values = objectives.forward({"words": objective}, model, params, out, None)
    loss, metrics = objective.loss(values["words"])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["masked_text/perplexity"], np.exp(expected), rtol=1e-5)


def test_what_is_hidden_does_not_reach_the_answer(tiny, labelled):
    """Other pixels and other words in the hidden places change no answer, where all of them are masked."""
    masks = {"image": Mask(0.4, replaced=(1, 0)), "text": Mask(0.3, replaced=(1, 0))}
    objective = MaskedModelling(masks=masks, given=())
    model, params = make(tiny, {"x": objective})
    out = prepared(objective, model, labelled)
    names = {n: entry_of(objective, n) for n in masks}
    hidden = {n: np.asarray(out[f"{entry}:hidden"]) for n, entry in names.items()}
    changed = dict(labelled, text=Masked(np.where(hidden["text"], 7, labelled["text"].array), labelled["text"].mask))
    pixels = np.repeat(np.repeat(hidden["image"].reshape(8, 4, 4), 8, 1), 8, 2)[..., None]
    changed["image"] = np.where(pixels, 255 - labelled["image"], labelled["image"])
    both = [prepared(objective, model, b) for b in (labelled, changed)]
    read = jax.jit(lambda b: model.apply({"params": params}, {n: b[entry] for n, entry in names.items()}).logits)
    a, b = (read(x) for x in both)
    np.testing.assert_allclose(a["masked_text"], b["masked_text"], atol=1e-5)
    np.testing.assert_allclose(a["masked_image"], b["masked_image"], atol=1e-5)
    entry = names["image"]
    assert np.abs(np.asarray(both[0][f"{entry}:asked"]) - np.asarray(both[1][f"{entry}:asked"])).max() > 0.5


def test_a_teacher_speaks_of_hidden_words(tiny, labelled):
    """Its share of the loss is the divergence from what the average believes, which is given no gradient."""
    objective = MaskedModelling(masks={"text": Mask(0.3)}, teacher=0.4)
    model, params = make(tiny, {"x": objective})
    average = jax.tree.map(lambda p: 1.3 * p, params)

    def loss(params, average):
        out = objective.corrupt(labelled, jax.random.key(3), Context(model, params, average))
        return objective.loss(objectives.forward({"x": objective}, model, params, out, None)["x"])[0], out

    (found, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, average)
    entry = entry_of(objective, "text")
    said, believed = (
        np.asarray(
            jax.nn.log_softmax(model.apply({"params": p}, {"image": out["image"], "text": out[entry]}).logits["masked_text"])
        )
        for p in (params, average)
    )
    own = -np.take_along_axis(said, np.asarray(labelled["text"].array)[..., None], 2)[..., 0]
    divergence = (np.exp(believed) * (believed - said)).sum(-1)
    expected = (0.6 * own + 0.4 * divergence)[np.asarray(out[f"{entry}:hidden"])].mean()
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert any(np.any(x) for x in jax.tree.leaves(gradients[0])) and not any(np.any(x) for x in jax.tree.leaves(gradients[1]))
    with pytest.raises(InputError, match=r"set optimizer\.ema"):
        objective.corrupt(labelled, jax.random.key(3), Context(model, params))


def test_dropped_patches_never_enter(tiny, labelled):
    objective = ALL["left"]
    model, params = make(tiny, {"x": objective})
    out = prepared(objective, model, labelled)
    raw = out[entry_of(objective, "image")]
    assert raw["kept"].shape == (8, 4)
    hidden = np.asarray(out[f"{entry_of(objective, 'image')}:hidden"])
    assert (hidden.sum(1) == 12).all() and not np.take_along_axis(hidden, np.asarray(raw["kept"]), 1).any()
    tokens = model.apply({"params": params}, {"image": raw}).streams["image"]
    assert tokens.values.shape[1] == 4


@pytest.mark.parametrize(
    ("embedder", "content"),
    [
        (modalities.Features(5, 6), 5),
        (modalities.Spectrogram(16, 4, mask_token=True), 4),
        (modalities.Spectrogram(16, 4, "strided", mask_token=True), 8),
        (modalities.Waveform(400, ((40, 40),), mask_token=True), 40),
        (modalities.Points(6, mask_token=True), 3),
        (modalities.Strokes(6, mask_token=True), 5),
        (modalities.Graph(6, channels=3, mask_token=True), 3),
        (modalities.Graph(6, vocab=20, mask_token=True), 20),
        (modalities.PackedPatches(6, (2, 2), mask_token=True), 12),
        (modalities.Patches((4, 8, 8), (2, 4, 4), mask_token=True), 96),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, int) else str(x),
)
def test_anything_can_be_hidden_and_told(embedder, content, rng):
    """What stood there is asked of every kind of token; its loss learns something of every parameter that reads it."""
    objective = MaskedModelling(masks={"thing": Mask(0.5)}, given=("text",))
    things = {"thing": embedder, "text": TEXT}
    heads = objectives.needed_heads({"x": objective}, things)
    model = mmx.build_model(things, "early_concatenation", width=16, depth=1, heads=2, outputs=heads)
    objective.check(model)
    batch = mmx.example_batch(model, 4)

    def fill(x):
        kind = jnp.asarray(x).dtype
        noise = rng.integers(0, 3, x.shape) if jnp.issubdtype(kind, jnp.integer) else rng.standard_normal(x.shape)
        return x if jnp.issubdtype(kind, jnp.bool_) else noise.astype(kind)

    batch = jax.tree.map(fill, batch)
    params = jax.jit(model.init)(jax.random.key(0), batch)["params"]
    value, _, gradient = run({"x": objective}, model, params, batch)
    assert jnp.isfinite(value) and all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradient))
    head = gradient["heads_masked_thing"]["classifier"]["kernel"]
    assert head.shape[-1] == content and np.abs(head).max() > 0


def test_a_token_behind_the_ids_is_never_hidden(rng):
    """The mask token stands where an id was hidden, and all answers are those of the ids."""
    objective = MaskedModelling(masks={"text": Mask(0.5)}, given=())
    embedder = {"text": modalities.Ids(20, 6, last=True, mask_token=True)}
    heads = objectives.needed_heads({"x": objective}, embedder)
    model = mmx.build_model(embedder, "early_concatenation", width=16, depth=1, heads=2, outputs=heads)
    objective.check(model)
    batch = {"text": Masked(rng.integers(0, 19, (4, 6)), np.arange(6) < [[6], [4], [5], [6]])}
    params = jax.jit(model.init)(jax.random.key(0), batch)["params"]
    out = prepared(objective, model, batch)
    entry = entry_of(objective, "text")
    masked, hidden = out[entry], np.asarray(out[f"{entry}:hidden"])
    text = params["modalities_text"]
    by_hand = text["token"]["embedding"].at[19].set(text["mask_token"])
    by_hand = {**params, "modalities_text": {**text, "token": {"embedding": by_hand}}}
    ids = np.where(np.asarray(masked.array["hidden"]) != 0, 19, np.asarray(masked.array["ids"]))
    a, b = (
        model.apply({"params": p}, {"text": x}).streams["text"].values
        for p, x in ((params, masked), (by_hand, Masked(ids, batch["text"].mask)))
    )
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert a.shape[1] == 7 and hidden.shape == (4, 6)
    value, metrics, _ = run({"x": objective}, model, params, batch)
    assert jnp.isfinite(value) and 0 <= metrics["masked_text/accuracy"] <= 1


@pytest.mark.parametrize(("kind", "length"), [(Captioning, 11), pytest.param(MaskedModelling, 12, marks=pytest.mark.slow)])
def test_scores_in_chunks_are_the_same_loss(tiny, labelled, kind, length):
    """In four chunks, as in one; and then the scores of all tokens are held nowhere."""
    plain, whole = kind(), kind(label_smoothing=0.1, z_loss=1e-3)
    chunked = dataclasses.replace(whole, chunks=4)
    model, params = make(tiny, {"x": whole})
    a, b = (run({"x": o}, model, params, labelled) for o in (whole, chunked))
    np.testing.assert_allclose(a[0], b[0], rtol=1e-6)
    assert a[1].keys() == b[1].keys() and abs(a[0] - run({"x": plain}, model, params, labelled)[0]) > 1e-3
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a[2], b[2])

    def held(objective):
        out = prepared(objective, model, labelled)

        def loss(p):
            return objectives.total_loss({"x": objective}, objectives.forward({"x": objective}, model, p, out, None))[0]

        program = jax.make_jaxpr(jax.grad(loss))(params).jaxpr
        return str(partial_eval.dce_jaxpr(program, [True] * len(program.outvars))[0])

    for shape in ("8,12,300]", f"8,{length},300]"):
        assert shape not in held(chunked) and shape in held(whole)


def test_what_scores_all_tokens_at_once_is_not_asked_in_chunks(tiny, labelled):
    with pytest.raises(InputError, match=r"chunks=2 with teacher=0.4"):
        MaskedModelling(teacher=0.4, chunks=2)
    with pytest.raises(InputError, match=r"objectives.x: chunks=2 .* ids"):
        make(tiny, {"x": MaskedModelling(masks={"image": Mask()}, given=(), chunks=2)})


def test_a_question_is_given_and_its_answer_is_asked(tiny, labelled):
    """The group of a text tells what is given: only the others are asked."""
    group = np.where(np.arange(12) < 4, 0, -1) + np.zeros((8, 1), int)
    text = labelled["text"]
    batch = {**labelled, "text": Masked({"ids": text.array, "group": group}, text.mask)}
    objective = Captioning()
    model, params = make(tiny, {"x": objective})
    values = objectives.forward({"x": objective}, model, params, batch, None)["x"]
    np.testing.assert_array_equal(values["tokens"], text.mask[:, 4:].sum(1))


def test_a_modality_without_a_mask_token_is_told_how_to_get_one(tiny):
    with pytest.raises(InputError, match="set --modalities.image.mask-token"):
        dataclasses.replace(tiny, objectives={"x": MaskedModelling(masks={"image": Mask()}, given=())})


@pytest.mark.parametrize("others", ["example", "batch"])
def test_padding_is_no_wrong_answer(rng, others):
    """Which of its own features was hidden: those that do not exist are not among them, whatever stands there."""
    things = {"thing": modalities.Features(5, 6, position="learned")}
    objective = MaskedModelling(masks={"thing": Mask(0.5, answer="contrast", others=others)}, given=())
    heads = objectives.needed_heads({"x": objective}, things)
    model = mmx.build_model(things, "early_concatenation", width=16, depth=1, heads=2, outputs=heads)
    features, there = rng.standard_normal((4, 6, 5)).astype("f"), np.arange(6) < np.array([6, 4, 3, 5])[:, None]
    params = jax.jit(model.init)(jax.random.key(0), mmx.example_batch(model))["params"]
    compiled = program({"x": objective}, model)
    found = [compiled(params, {"thing": Masked(np.where(there[..., None], features, fill), there)}) for fill in (0, 1, np.nan)]
    for (value, _), gradient in found:
        np.testing.assert_allclose(value, found[0][0][0], rtol=1e-5)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradient))
    whole = {"x": MaskedModelling(masks={"thing": Mask(1.0, answer="contrast", others=others)}, given=())}
    compiled, three = program(whole, model, gradient=False), np.ones((4, 6), bool) & (np.arange(6) < 3)
    padded, cut = (
        compiled(params, {"thing": raw})[0][0] for raw in (Masked(features, three), Masked(features[:, :3], three[:, :3]))
    )
    np.testing.assert_allclose(padded, cut, rtol=1e-5)  # as if the padding were not there


@pytest.mark.parametrize("unit", ["token", "block", "tube", "frame"])
@pytest.mark.parametrize("rate", [0.4, 0.575])
def test_what_is_dropped_is_what_is_asked(unit, rate):
    video = modalities.Patches((4, 16, 16), (1, 4, 4))
    objective = MaskedModelling(masks={"video": Mask(rate, unit, drop=True)}, given=())
    model = mmx.build_model({"video": video}, "early_concatenation", width=16, depth=1, heads=2)
    out = prepared(objective, model, mmx.example_batch(model, 3))
    (entry,) = [entry for view in objective.views() for _, entry in view.reads]
    hidden, kept = np.asarray(out[f"{entry}:hidden"]), np.asarray(out[entry]["kept"])
    assert (hidden.sum(1) + kept.shape[1] == 64).all() and not np.take_along_axis(hidden, kept, 1).any()


def test_classes_of_tokens_come_as_a_label(tiny, labelled):
    """Visual codes, one for each patch: numbers of classes however stored; of another shape, or none at all: refused."""
    objective = MaskedModelling(masks={"image": Mask(0.5, answer="classes", target="codes", classes=7)}, given=())
    model, params = make(tiny, {"x": objective})
    codes = (np.arange(16) % 7 + np.zeros((8, 1))).astype(np.float32)
    compiled = program({"x": objective}, model, gradient=False)
    value, metrics = compiled(params, {**labelled, "label/codes": codes})[0]
    assert jnp.isfinite(value) and "masked_image_codes/accuracy" in metrics
    with pytest.raises(InputError, match=r"label/codes has shape \(8, 16, 7\)"):
        compiled(params, {**labelled, "label/codes": np.zeros((8, 16, 7), "f")})
    with pytest.raises(InputError, match="name its field in data.labels"):
        compiled(params, labelled)


OBJECTS = {"answer": "classes", "target": "objects", "classes": 7}


DETECTED = {"answer": "distribution", "target": "detected", "classes": 7}


def of_thing(**mask):
    return MaskedModelling(masks={"thing": Mask(0.6, **mask)}, given=())


@pytest.mark.parametrize(
    ("asked", "nothing"),
    [
        (OBJECTS, -1),
        (OBJECTS, np.nan),
        (DETECTED, np.nan),
        (DETECTED, 0.0),
        ({**DETECTED, "answer": "likeliest"}, 0.0),
    ],
    ids=str,
)
def test_where_a_label_says_nothing_nothing_is_asked(seen, asked, nothing):
    """As a data set of a mixture that lacks it is filled up: the loss is the mean over the hidden places that have one."""
    objective, entry = of_thing(**asked), f"label/{asked['target']}"
    model, params = of_regions({"x": objective})
    label = np.array(seen[entry], "f" if isinstance(nothing, float) else None)
    label[:2], label[2, 1] = nothing, nothing
    label = np.where(seen["thing"].mask.reshape(4, 6, *[1] * (label.ndim - 2)), label, nothing)
    batch = {**seen, entry: label}
    (value, metrics), gradient = program({"x": objective}, model)(params, batch)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradient))
    out = objective.corrupt(batch, jax.random.fold_in(jax.random.key(3), 0), Context(model))
    hidden = np.asarray(out[f"{entry_of(objective, 'thing')}:hidden"])
    told = hidden & (np.arange(4) > 1)[:, None] & ~((np.arange(4) == 2)[:, None] & (np.arange(6) == 1))
    assert 0 < told.sum() < hidden.sum()
    said = model.apply({"params": params}, {"thing": out[entry_of(objective, "thing")]}).logits[f"masked_thing_{asked['target']}"]
    log, truth = np.asarray(jax.nn.log_softmax(said))[told], label[told]
    if asked["answer"] == "distribution":
        expected, best = (truth * (np.log(truth) - log)).sum(-1), truth.argmax(-1)
    else:
        best = truth.astype(int) if asked["answer"] == "classes" else truth[:, 1:].argmax(-1) + 1
        expected = -log[np.arange(len(log)), best]
    np.testing.assert_allclose(value, expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics[f"masked_thing_{asked['target']}/accuracy"], (log.argmax(-1) == best).mean(), rtol=1e-6)
    value, _ = program({"x": objective}, model, gradient=False)(params, {**seen, entry: np.full_like(label, nothing)})[0]
    assert value == 0


@pytest.mark.parametrize(
    ("asked", "wrong"),
    [
        (OBJECTS, 7),
        (OBJECTS, -2),
        (OBJECTS, 1.5),
        (DETECTED, -1 / 7),
        (DETECTED, 0.5),
        ({**DETECTED, "answer": "likeliest"}, 0.5),
    ],
    ids=str,
)
def test_a_label_that_cannot_be_right_is_not_a_number(seen, asked, wrong):
    """Where it is asked; what stands in a place that does not exist changes nothing."""
    objective, entry = MaskedModelling(masks={"thing": Mask(1.0, **asked)}, given=()), f"label/{asked['target']}"
    model, params = of_regions({"x": objective})
    compiled = program({"x": objective}, model)
    there = seen["thing"].mask.reshape(4, 6, *[1] * (seen[entry].ndim - 2))
    right = seen[entry].astype("f")
    ((value, _), gradient), ((other, _), same) = (
        compiled(params, {**seen, entry: np.where(there, right, x)}) for x in (right, wrong)
    )
    assert jnp.isfinite(value) and value == other
    jax.tree.map(np.testing.assert_array_equal, gradient, same)
    label = right.copy()
    label[1, 2] = wrong
    assert np.isnan(compiled(params, {**seen, entry: label})[0][0])


def test_each_answer_counts_as_surely_as_a_detector_saw_it(seen):
    """The mean is weighted; a place whose confidence is 0 or not a number asks nothing, and a negative one is wrong."""
    plain, sure = of_thing(**OBJECTS), of_thing(**OBJECTS, confidence="sure")
    model, params = of_regions({"x": plain})
    weights = np.where(np.arange(6) == 0, np.nan, seen["label/sure"])
    compiled = program({"x": sure}, model)
    (value, _), gradient = compiled(params, {**seen, "label/sure": weights})
    out = plain.corrupt(seen, jax.random.fold_in(jax.random.key(3), 0), Context(model))
    entry = entry_of(plain, "thing")
    log = np.asarray(jax.nn.log_softmax(model.apply({"params": params}, {"thing": out[entry]}).logits["masked_thing_objects"]))
    losses = -np.take_along_axis(log, seen["label/objects"][..., None], 2)[..., 0]
    weights = np.nan_to_num(weights) * np.asarray(out[f"{entry}:hidden"])
    np.testing.assert_allclose(value, (losses * weights).sum() / weights.sum(), rtol=1e-5)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradient))
    assert np.isnan(compiled(params, {**seen, "label/sure": -seen["label/sure"]})[0][0])
    with pytest.raises(InputError, match=r"label/sure has shape \(4, 5\), and confidence .* wants \(4, 6\)"):
        compiled(params, {**seen, "label/sure": weights[:, :5]})


def test_objects_attributes_and_features_of_the_same_regions_are_asked_in_one_pass(seen):
    """The visual set of LXMERT, with words hidden in the same pass, of which only one of the objectives asks."""
    words, unasked = Mask(0.5), Mask(0.5, answer="nothing")

    def of(text, **mask):
        return MaskedModelling(masks={"text": text, "thing": Mask(0.5, **mask)}, given=())

    chosen = {
        "features": of(words, answer="huber"),
        "objects": of(unasked, **OBJECTS, confidence="sure"),
        "attributes": of(unasked, answer="classes", target="attributes", classes=4),
        "detected": of(unasked, **DETECTED),
    }
    assert len({view for objective in chosen.values() for view in objective.views()}) == 1
    model, params = of_regions(chosen)
    names = {"masked_text", "masked_thing", *(f"masked_thing_{n}" for n in ("objects", "attributes", "detected"))}
    assert set(model.heads) == names and model.heads["masked_thing_attributes"].classes == 4
    _, metrics, gradient = run(chosen, model, params, seen)
    assert all(np.abs(x).max() > 0 for n, g in gradient.items() if n.startswith("heads_") for x in jax.tree.leaves(g))
    assert {m for m in metrics if m.endswith("accuracy")} == {f"{n}/accuracy" for n in names - {"masked_thing"}}
    alone = run({"features": chosen["features"]}, model, params, seen)[1]
    np.testing.assert_allclose(alone["loss/features"], metrics["loss/features"], rtol=1e-5)
    with pytest.raises(InputError, match=r"masks: nothing is asked"):
        objectives.check({"x": of(unasked, answer="nothing")}, model)


def test_which_of_the_whole_batch_it_was(seen):
    """Told from all tokens of the batch that exist, also where the batch is taken in parts."""
    objective = of_thing(answer="contrast", others="batch")
    model, params = of_regions({"x": objective})
    out = objective.corrupt(seen, jax.random.key(3), Context(model))
    entry, there = entry_of(objective, "thing"), seen["thing"].mask
    hidden = np.asarray(out[f"{entry}:hidden"])
    said = np.asarray(model.apply({"params": params}, {"thing": out[entry]}).logits["masked_thing_contrast"])
    said, keys = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (said, seen["thing"].array))
    scores = said[hidden] @ keys[there].T  # (hidden, those of the batch that exist)
    own = (np.cumsum(there) - 1).reshape(there.shape)[hidden]
    expected = -np.asarray(jax.nn.log_softmax(scores / 0.1))[np.arange(len(own)), own].mean()
    task = Task(model, {"x": objective})
    step = functools.partial(value_and_grad, task.forward, task.loss)
    ((value, metrics), whole), ((other, _), parts) = (
        jax.jit(functools.partial(step, parts=n))(params, out, jax.random.key(0)) for n in (1, 2)
    )
    np.testing.assert_allclose((value, other), expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["x"]["masked_thing_contrast/accuracy"], (scores.argmax(1) == own).mean(), rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), whole, parts)
    with pytest.raises(InputError, match="others='batch' with answer='content'"):
        Mask(others="batch")
