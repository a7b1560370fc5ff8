"""Masked modelling, ordering, classification, distillation: what is asked, of whom, and what each refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval

import mmx
from mmx import modalities, objectives
from mmx.data import Pipeline
from mmx.errors import InputError
from mmx.evaluate import Evaluation, Missing, Scores
from mmx.modalities.masking import absent
from mmx.objectives import (
    Captioning,
    Classification,
    Context,
    Contrastive,
    Distillation,
    Grounding,
    Mask,
    MaskedModelling,
    Matching,
    Ordering,
)
from mmx.parallel import MeshConfig, make_mesh
from mmx.topologies import BEYOND, TOPOLOGIES, Joint, PerStream, Pool
from mmx.train import Task
from mmx.train.accumulate import value_and_grad
from mmx.types import Masked

IMAGE = modalities.Patches((32, 32), (8, 8), mask_token=True)
TEXT = modalities.Ids(300, 12, mask_token=True)
ALL = {
    "words": MaskedModelling(masks={"text": Mask(0.3)}),
    "patches": MaskedModelling(masks={"image": Mask(0.4, "block", "normalised")}, given=("text",)),
    "which": MaskedModelling(masks={"image": Mask(0.4, answer="contrast")}, given=("text",)),
    "together": MaskedModelling(masks={"image": Mask(0.4, "frame"), "text": Mask(0.3, "span", mask_id=4)}, given=()),
    "left": MaskedModelling(masks={"image": Mask(0.75, drop=True)}, given=("text",)),
    "modality": MaskedModelling(masks={"text": Mask(0.9, "modality")}),
    "believed": MaskedModelling(masks={"text": Mask(0.3)}, teacher=0.4),
    "hard": Matching(negatives="hard"),
    "aligned": Matching(alignment=0.1),
    "taught": Contrastive(teacher=0.4, queue=12),
    "tokenwise": Contrastive(tokens=8),
    "ranked": Contrastive(kind="ranking"),
    "bags": Contrastive(("image", "text", "text/other"), kind="mil_nce"),
    "where": Grounding(labels=("patch", "patches")),
    "answer": Grounding("text", ("image",), ("word",)),
    "regions": Grounding(labels=("patches",), kind="binary"),
    "order": Ordering(rate=0.5),
    "runs": Ordering("text", ("image",), 0.5, size=3),
    "group": Classification(label="group", classes=3),
    "number": Classification(label="size", classes=1, answer="regression"),
    "prefix": Captioning(prefix=0.5),
    "denoised": Captioning(masks={"image": Mask(0.5)}),
    "language": Captioning(given=()),
    "distilled": Distillation(),
    "soft": Distillation(what="logits", head="classify_group"),
    "pooled": Distillation(what="pooled"),
    "states": Distillation(what="states"),
}
SUMMED = {"left", "aligned", "tokenwise", "where", "answer", "regions"}  # what summation cannot do


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


@pytest.fixture
def labelled(batch):
    ids, here = batch["text"].array, batch["text"].mask
    return {
        "image": batch["image"],
        "text": Masked(ids, here & (np.arange(12) < 9)),
        "text/other": Masked(ids[::-1], here[::-1] & (np.arange(8) != 3)[:, None]),
        "label/group": np.arange(8, dtype=np.int32) % 3,
        "label/patch": np.arange(-1, 15, 2, dtype=np.int32),
        "label/patches": np.repeat(np.eye(8, dtype=np.float32), 2, 1) * (np.arange(8) != 4)[:, None],
        "label/word": np.array([0, 1, 0, 2, -1, 1, 0, 1], np.int32),
        "label/size": np.linspace(-1, 1, 8, dtype=np.float32),
    }


def make(tiny, chosen, topology="multi_to_one", image=IMAGE, **model):
    experiment = dataclasses.replace(
        tiny,
        topology=topology,
        modalities={"image": image, "text": TEXT},
        objectives=chosen,
        model=dataclasses.replace(tiny.model, **model),
    )
    model = experiment.build_model()
    params = jax.jit(lambda key: model.init(key, mmx.example_batch(model)))(jax.random.key(0))["params"]
    return model, params


def program(chosen, model, gradient=True):
    """`(params, batch) -> (total loss, metrics), gradient`, compiled once."""
    memory = objectives.memories(chosen, model)

    def loss(params, batch):
        context = Context(model, params, params, memory)
        prepared = objectives.corrupt(chosen, batch, jax.random.key(3), context)
        total, found = objectives.total_loss(chosen, objectives.forward(chosen, model, params, prepared, None), memory)
        return total, objectives.flatten_metrics(found)

    return jax.jit(jax.value_and_grad(loss, has_aux=True) if gradient else lambda *args: (loss(*args), None))


def run(chosen, model, params, batch):
    """Total loss, metrics and gradient."""
    (value, metrics), gradient = program(chosen, model)(params, batch)
    return value, metrics, gradient


QUICK = ("multi_to_one",)


@pytest.mark.parametrize("topology", [t if t in QUICK else pytest.param(t, marks=pytest.mark.slow) for t in TOPOLOGIES])
def test_padding_and_what_is_absent_change_no_loss(tiny, labelled, topology):
    """Noise where nothing is; and an example without text, in all objectives at once."""
    chosen = {n: o for n, o in ALL.items() if not (topology == "early_summation" and n in SUMMED)}
    model, params = make(tiny, chosen, topology)
    text, whole = labelled["text"], topology == "multi_to_one"
    there, seen = text.mask & (np.arange(8) != 5)[:, None], np.arange(8) != 2
    image = labelled["image"].astype(np.float32) / 255
    quiet, noisy = (
        dict(
            labelled,
            text=Masked(np.where(there, text.array, fill), there),
            image=Masked(np.where(seen[:, None, None, None], image, pixel), seen),
        )
        for fill, pixel in ((0, 0), (299, np.nan))
    )
    compiled = program(chosen, model, gradient=whole)
    ((total, metrics), gradient), ((_, again), other_gradient) = (compiled(params, b) for b in (quiet, noisy))
    assert jnp.isfinite(total) and set(metrics) >= {f"loss/{name}" for name in chosen}
    for name in chosen:
        np.testing.assert_allclose(metrics[f"loss/{name}"], again[f"loss/{name}"], rtol=2e-5, err_msg=name)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), gradient, other_gradient)


def test_what_summation_cannot_do_is_refused(tiny):
    for name in SUMMED:
        with pytest.raises(InputError, match=f"objectives.{name}.*sum"):
            make(tiny, {name: ALL[name]}, "early_summation")


def traced(chosen, model, params, batch):
    """The loss as a program, which is made and not run."""
    return jax.eval_shape(program(chosen, model, gradient=False), params, batch)[0][0]


@pytest.mark.parametrize(
    "topology",
    ["early_summation", *(pytest.param(t, marks=pytest.mark.slow) for t in (*TOPOLOGIES, *BEYOND) if t != "early_summation")],
)
def test_an_objective_can_be_trained_or_says_why_not(labelled, topology):
    """In every topology: what `check` lets pass can be traced."""
    embedders, refused = {"image": IMAGE, "text": TEXT}, set()
    for chosen in (ALL, {"by_text": Matching(stream="text")}):
        model = mmx.build_model(
            embedders, topology, width=16, depth=2, heads=2, outputs=objectives.needed_heads(chosen, embedders)
        )
        passed = dict(chosen)
        for name, objective in chosen.items():
            try:
                objectives.check({name: objective}, model)
            except InputError:
                refused.add(name)
                del passed[name]
        if passed:
            assert traced(passed, model, mmx.model.abstract_params(model), labelled).shape == ()
    assert refused == ({*SUMMED, "by_text"} if topology == "early_summation" else set())


@pytest.fixture(scope="module")
def small():
    """The smallest model that can be trained to do all of them."""
    embedders = {"image": IMAGE, "text": TEXT}
    heads = objectives.needed_heads(ALL, embedders)
    model = mmx.build_model(embedders, "early_concatenation", width=16, depth=1, heads=2, outputs=heads)
    return model, jax.jit(lambda key: model.init(key, mmx.example_batch(model)))(jax.random.key(0))["params"]


def test_what_is_no_key_is_absent(small, labelled):
    """All objectives take a batch without an entry; before training, where no batch would have it, each refuses it by name."""
    model, params = small
    for gone in (("image",), ("text", "text/other")):
        lacking = {name: x for name, x in labelled.items() if name not in gone}
        assert traced(ALL, model, params, lacking).shape == ()
        for name, objective in ALL.items():
            if named := [entry for entry in objective.entries if entry in gone]:
                with pytest.raises(InputError, match=f"objectives.{name}: the batch has no entry {', '.join(named)}; name"):
                    objectives.check_reached({name: objective}, model, params, lacking)
    lacking = {"image": labelled["image"]}
    with pytest.raises(InputError, match=r"objectives.x: the batch has no entry 'sound'.*a mask that is all False"):
        objectives.corrupt({"x": Distillation(taught=("sound",))}, lacking, jax.random.key(0), Context(model, params, params))


@pytest.mark.slow
def test_what_is_no_key_gives_the_loss_of_what_is_absent(small, labelled):
    model, params = small
    compiled = program(ALL, model, gradient=False)
    no_text = {name: x for name, x in labelled.items() if name != "text"}
    (_, found), (_, expected) = (compiled(params, b)[0] for b in (no_text, {**labelled, "text": absent(labelled["text"])}))
    for name in ALL:
        np.testing.assert_allclose(found[f"loss/{name}"], expected[f"loss/{name}"], rtol=1e-5, err_msg=name)


def test_who_is_absent_is_not_counted(small, labelled):
    """The loss is that of the examples that are there; others behind them, of which nothing is there but labels, change nothing."""
    model, params = small
    there = np.arange(8) < 5
    batch = {**labelled, "image": Masked(labelled["image"], there)}
    batch |= {n: Masked(labelled[n].array, labelled[n].mask & there[:, None]) for n in ("text", "text/other")}
    memory = objectives.memories(ALL, model)

    @jax.jit
    def values_of_all(params, batch):
        out = objectives.corrupt(ALL, batch, jax.random.key(3), Context(model, params, params, memory))
        return objectives.forward(ALL, model, params, out, None)

    values = values_of_all(params, batch)
    loss = jax.jit(lambda values: objectives.flatten_metrics(objectives.total_loss(ALL, values, memory)[1]))
    found, expected = loss(values), loss(jax.tree.map(lambda x: x[:5], values))
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_all_objectives_accumulate(small, labelled):
    """In parts of three, four and one."""
    model, params = small
    memory = objectives.memories(ALL, model)

    def forward(params, batch, key):
        return objectives.forward(ALL, model, params, batch, None)

    def gradients(parts):
        def run(params, batch):
            out = objectives.corrupt(ALL, batch, jax.random.key(3), Context(model, params, params, memory))
            return value_and_grad(forward, lambda x: objectives.total_loss(ALL, x, memory), params, out, jax.random.key(0), parts)

        return jax.jit(run)(params, labelled)

    ((loss, found), whole), ((other, parted), accumulated) = gradients(1), gradients((3, 4, 1))
    np.testing.assert_allclose(other, loss, rtol=1e-5)
    for name in ALL:
        np.testing.assert_allclose(parted[name]["loss"], found[name]["loss"], rtol=1e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), accumulated, whole)


def prepared(objective, model, batch, key=0):
    return jax.jit(lambda b: objective.corrupt(b, jax.random.key(key), Context(model)))(batch)


def entry_of(objective, modality):
    return next(entry for view in objective.views() for m, entry in view.reads if m == modality)


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


def values_of(objective, model, params, batch):
    batch = objective.corrupt(batch, jax.random.key(3), Context(model, params, params))
    return objectives.forward({"x": objective}, model, params, batch, None)["x"]


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


def test_tokens_that_change_places_are_moved_with_their_label(tiny, labelled):
    """The patches themselves are exchanged, positions stay: the model sees the same as in an image cut up by hand."""
    objective = Ordering(given=(), rate=0.5)
    model, params = make(tiny, {"order": objective})
    out = prepared(objective, model, labelled)
    entry = entry_of(objective, "image")
    label, moved = np.asarray(out[f"{entry}:label"]), np.asarray(out[f"{entry}:moved"])
    assert (moved.sum(1) == 8).all() and ((label != np.arange(16)) == moved).all() and (np.sort(label, 1) == np.arange(16)).all()
    patches = labelled["image"].reshape(8, 4, 8, 4, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(8, 16, 8, 8, 3)
    patches = np.take_along_axis(patches, label[..., None, None, None], 1)
    by_hand = patches.reshape(8, 4, 4, 8, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(8, 32, 32, 3)
    read = jax.jit(lambda image: model.apply({"params": params}, {"image": image}).logits["order_image"])
    np.testing.assert_allclose(read(out[entry]), read(by_hand), atol=1e-5)


def test_sentences_change_places_whole(tiny, labelled):
    objective = Ordering("text", (), 1.0, sentences="order", most=4)
    model, _ = make(tiny, {"order": objective})
    of = np.broadcast_to([-1, 0, 0, 0, 1, 1, 2, 2, -1, -1, -1, -1], (8, 12))
    out = prepared(objective, model, {**labelled, "label/order": of})
    entry = entry_of(objective, "text")
    for label, kept in zip(np.asarray(out[f"{entry}:label"]), np.asarray(out[entry].array["kept"]), strict=True):
        assert kept[0] == 0 and (kept[8:] == np.arange(8, 12)).all()
        starts = [i for i in range(1, 8) if label[i] != label[i - 1]]
        assert len(starts) == 3 and {tuple(kept[label == s]) for s in range(3)} == {(1, 2, 3), (4, 5), (6, 7)}


def test_a_wrong_label_is_no_number_and_no_label_is_no_question(tiny, labelled):
    chosen = {"group": ALL["group"]}
    model, params = make(tiny, chosen)
    some = np.where(np.arange(8) < 3, -1, labelled["label/group"]).astype(np.int32)
    compiled = program(chosen, model, gradient=False)
    (part, _), _ = compiled(params, {**labelled, "label/group": some})
    (first, _), _ = compiled(params, jax.tree.map(lambda x: x[3:], labelled))
    np.testing.assert_allclose(part, first, rtol=1e-5)
    wrong = np.where(np.arange(8) == 6, 3, some).astype(np.int32)
    assert jnp.isnan(compiled(params, {**labelled, "label/group": wrong})[0][0])
    ids = np.where((np.arange(12) == 2) & (np.arange(8) == 1)[:, None], 300, labelled["text"].array)
    for name in ("language", "words"):
        alone = {name: MaskedModelling(masks={"text": Mask(1.0)}) if name == "words" else ALL[name]}
        other, others = make(tiny, alone)
        unknown = {**labelled, "text": Masked(ids, labelled["text"].mask)}
        assert jnp.isnan(program(alone, other, gradient=False)(others, unknown)[0][0]), name
    with pytest.raises(InputError, match="expected a class of each example"):
        compiled(params, {**labelled, "label/group": labelled["label/size"]})
    with pytest.raises(InputError, match="name its field in data.labels"):
        compiled(params, {"image": labelled["image"], "text": labelled["text"]})


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


@pytest.mark.parametrize("what", ["logits", "embeddings", "pooled", "states"])
def test_who_has_no_teacher_learns_nothing_of_it(tiny, labelled, what):
    """The teacher reads texts, of which three examples have none: the loss is that of the others."""
    same = {"logits": "text", "embeddings": "image", "pooled": "image", "states": "image"}[what]
    objective = Distillation(("image",), ("text",) if same == "text" else ("image/better",), what=what, head="classify_group")
    chosen = {"group": ALL["group"], "x": objective}
    model, params = make(tiny, chosen)
    there = np.arange(8) < 5
    batch = {**labelled, "image/better": Masked(255 - labelled["image"], there)}
    batch["text"] = Masked(labelled["text"].array, labelled["text"].mask & there[:, None])
    average = jax.tree.map(lambda x: 1.3 * x, params)

    @jax.jit
    def values(batch):
        out = objective.corrupt(batch, jax.random.key(0), Context(model, params, average))
        return objectives.forward({"x": objective}, model, params, out, None)["x"]

    found = values(batch)
    np.testing.assert_array_equal(found["there"], there)
    expected = objective.loss(jax.tree.map(lambda x: x[:5], found))[0]
    np.testing.assert_allclose(objective.loss(found)[0], expected, rtol=1e-6)
    assert expected > 1e-4


def test_states_are_taught_token_by_token(tiny, labelled):
    """The mean cosine distance of the tokens that exist, in NumPy; other widths are refused by name."""
    objective = Distillation(("text",), ("text",), what="states")
    model, params = make(tiny, {"x": objective})
    average = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), params)
    a, b = (np.asarray(model.apply({"params": p}, {"text": labelled["text"]}).streams["text"].values) for p in (params, average))
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    there = labelled["text"].mask
    expected = np.mean([(1 - cosine)[i][there[i]].mean() for i in range(8)])
    out = objective.corrupt(labelled, jax.random.key(0), Context(model, params, average))
    values = objectives.forward({"x": objective}, model, params, out, None)["x"]
    np.testing.assert_allclose(objective.loss(values)[0], expected, rtol=1e-4)
    wide, wider = make(tiny, {"x": objective}, width=64, embed=32)
    out = Distillation(("text",), ("text",), what="states").corrupt(labelled, jax.random.key(0), Context(wide, wider, wider))
    with pytest.raises(InputError, match=r"'text' has \(12, 32\) of an example and, of the teacher, \(12, 64\)"):
        objectives.forward({"x": objective}, model, params, out, None)


def test_held_out_examples_are_scored_without_a_teacher(tiny, labelled, one_device):
    """What a teacher says is no measure, for in an evaluation it is the model itself."""
    chosen = {"words": MaskedModelling(masks={"text": Mask(0.3)}, teacher=0.4), "near": Contrastive(teacher=0.4, queue=12)}
    plain = {"words": ALL["words"], "near": Contrastive()}
    mesh, model = make_mesh(MeshConfig(), one_device), make(tiny, chosen)[0]
    params = jax.jit(lambda key: model.init(key, mmx.example_batch(model)))(jax.random.key(0))["params"]
    data = Pipeline(tiny.data, {"image": IMAGE, "text": TEXT}, 8)
    at = Evaluation(model, params, data, mesh, 8, True)
    found, expected = (Scores(objectives, split="composition[:24]")(at).metrics for objectives in (chosen, plain))
    assert found == expected and "masked_text/perplexity" in found and "contrastive/recall" in found


@pytest.mark.parametrize(("kind", "length"), [(Captioning, 11), (MaskedModelling, 12)])
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


def test_who_keeps_streams_apart_cannot_describe(tiny, labelled):
    """No image reaches the words; the loss would fall all the same. Retrieval and each alone are what such a model can do."""
    model, params = make(tiny, {"a": ALL["words"], "b": ALL["language"], "c": Contrastive(), "d": Captioning()})
    objectives.check_reached({"a": ALL["words"], "d": Captioning()}, model, params, labelled)
    apart = model.clone(stages=(PerStream(1, model.stages[0].block),))
    shapes = jax.eval_shape(lambda: apart.init(jax.random.key(0), mmx.example_batch(apart)))["params"]
    objectives.check_reached({"b": ALL["language"], "c": Contrastive()}, apart, shapes, labelled)
    for name, objective in {"a": ALL["words"], "d": Captioning()}.items():
        with pytest.raises(InputError, match=f"objectives.{name}: nothing of 'image' reaches"):
            objectives.check_reached({name: objective}, apart, shapes, labelled)


@pytest.mark.parametrize(
    ("objective", "reason"),
    [
        (MaskedModelling(masks={"text": Mask(unit="block")}), "needs rows and columns"),
        (MaskedModelling(masks={"text": Mask(answer="normalised")}), "is asked of numbers"),
        (MaskedModelling(masks={"image": Mask(mask_id=4)}, given=()), "mask_id=4 is an id"),
        (MaskedModelling(masks={"image": Mask()}, given=(), teacher=0.4), "speaks of ids and classes"),
        (MaskedModelling(masks={"image": Mask(unit="region")}, given=()), "needs the boxes"),
        (MaskedModelling(masks={"sound": Mask()}), "unknown modality 'sound'"),
        (Captioning(text="image", given=("text",)), "has no ids"),
        (Captioning(given=("text",)), "cannot be given and written"),
        (Matching(modalities=("text", "text/question")), "would be read by one modality"),
        (Contrastive(("image", "image/b", "text"), "mil_nce"), "mil_nce wants entries of two modalities"),
        (Grounding("image", ("text",), ("a", "a")), "each once"),
        (Grounding("image", ("text",), ("a",), head="nothing"), "'nothing'"),
        (MaskedModelling(masks={"text": Mask(head="nothing")}), "'nothing'"),
        (Contrastive(modalities=("image",)), "nothing to compare"),
        (Contrastive(kind="sigmoid"), "logit_bias"),
        (Ordering(size=16), "which has no order"),
        (Classification(classes=1), "nothing to choose"),
        (Distillation(what="logits", head="nothing"), "'nothing'"),
        (Matching(stream="words"), "unknown stream 'words'"),
    ],
    ids=lambda x: x.replace(" ", "_") if isinstance(x, str) else type(x).__name__,
)
def test_what_cannot_be_trained_is_refused_before_it_is(tiny, objective, reason):
    with pytest.raises(InputError, match=f"objectives.x: .*{reason}"):
        make(tiny, {"x": objective})


@pytest.mark.parametrize("other", [Captioning(), MaskedModelling(masks={"text": Mask()}), ALL["left"]])
def test_a_teacher_of_each_token_gives_no_logits(tiny, other):
    (head,) = other.heads({"image": IMAGE, "text": TEXT})
    with pytest.raises(InputError, match=f"objectives.x: head='{head}' is a .*, without one answer an example"):
        make(tiny, {"other": other, "x": Distillation(what="logits", head=head)})


def test_a_stream_that_is_summed_cannot_tell(tiny):
    with pytest.raises(InputError, match=r"objectives.x: stream='text'.*sums the streams.*leave `stream` empty"):
        make(tiny, {"x": Matching(stream="text")}, "early_summation")
    make(tiny, {"x": Matching(stream="fused")}, "early_summation")


def test_tables_that_tell_the_place_are_refused_and_segments_are_not(tiny):
    corners = {"tables": {"segment": 2, "row": 8, "column": 8}}
    sides = {"joined": {"box": (("x", 100, 16), ("y", 100, 16))}}
    for given, named in ((corners, "row, column"), (sides, "box"), ({"vectors": {"when": 1}}, "when")):
        with pytest.raises(InputError, match=f"objectives.x: modality='text': its {named} would move with the tokens"):
            text = dataclasses.replace(TEXT, **given)
            dataclasses.replace(tiny, modalities={"image": IMAGE, "text": text}, objectives={"x": ALL["runs"]})
    text = dataclasses.replace(TEXT, tables={"segment": 2})
    dataclasses.replace(tiny, modalities={"image": IMAGE, "text": text}, objectives={"x": ALL["runs"]})


@pytest.mark.parametrize(
    "objective",
    [Grounding(labels=("a",), head="ground_a_b"), Grounding("text", ("image",), ("a", "b"), head="ground_a_b")],
    ids=["size", "modality"],
)
def test_grounding_takes_no_head_of_another_form(tiny, objective):
    with pytest.raises(InputError, match=r"objectives.x: head='ground_a_b' is no TokenClassifier\("):
        make(tiny, {"other": Grounding(labels=("a", "b")), "x": objective})


def test_a_modality_without_a_mask_token_is_told_how_to_get_one(tiny):
    with pytest.raises(InputError, match="set --modalities.image.mask-token"):
        dataclasses.replace(tiny, objectives={"x": MaskedModelling(masks={"image": Mask()}, given=())})


def test_scores_are_those_of_the_whole_split_at_once(tiny, one_device):
    """In parts of 8, the last one filled up: the loss of captions is that which `Missing` finds, and nothing counts twice."""
    data = Pipeline(tiny.data, tiny.modalities, 8)
    model, mesh = tiny.build_model(), make_mesh(MeshConfig(), one_device)
    params = jax.jit(lambda key: model.init(key, mmx.example_batch(model)))(jax.random.key(0))["params"]
    evaluation = Evaluation(model, params, data, mesh, 8, True)
    split = "composition[:20]"
    scores = Scores({"words": Captioning()}, split=split)
    scores.check(data)
    found, missing = (evaluator(evaluation).metrics for evaluator in (scores, Missing(split=split)))
    np.testing.assert_allclose(found["loss/words"], missing["loss_complete"], rtol=1e-5)
    with pytest.raises(InputError, match="there are none to score"):
        Scores().check(data)


@pytest.mark.parametrize("name", ["alone", "distilled", "words"])
def test_an_objective_has_the_same_loss_beside_others(tiny, labelled, name):
    """What is asked of an image alone is not read off a pass in which a text is written beside it."""
    asked = {
        "alone": Classification(("image",), "group", 3),
        "distilled": Distillation(),
        "words": MaskedModelling(masks={"text": Mask(0.3)}, given=()),
    }[name]
    both = {name: asked, "captioning": Captioning()}
    model, params = make(tiny, both)
    alone, beside = (program(chosen, model, gradient=False)(params, labelled)[0][1] for chosen in ({name: asked}, both))
    np.testing.assert_allclose(alone[f"loss/{name}"], beside[f"loss/{name}"], rtol=1e-5)


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


def test_metrics_of_one_name_are_told_apart(tiny, labelled):
    chosen = {"alone": MaskedModelling(masks={"text": Mask(0.3)}, given=()), "both": MaskedModelling(masks={"text": Mask(0.3)})}
    metrics = run(chosen, *make(tiny, chosen), labelled)[1]
    assert metrics["alone:masked_text/accuracy"].shape == () == metrics["both:masked_text/accuracy"].shape
    assert "masked_text/accuracy" not in metrics


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
