"""Objectives: shared forward passes, labels, padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmx
from mmx import objectives
from mmx.errors import InputError
from mmx.objectives import Captioning, Context, Contrastive, Matching, run_views, view
from mmx.topologies import BEYOND, TOPOLOGIES

QUICK = ("early_summation", "multi_to_one")  # topologies that are tested while one works; the others in CI
ALL = {"contrastive": Contrastive(), "matching": Matching(), "captioning": Captioning()}


def setup(tiny, topology="multi_to_one"):
    model = dataclasses.replace(tiny, topology=topology).build_model()
    params = jax.jit(lambda key: model.init(key, mmx.example_batch(model)))(jax.random.key(0))["params"]
    return model, params


@pytest.mark.parametrize(
    "topology", [t if t in QUICK else pytest.param(t, marks=pytest.mark.slow) for t in (*TOPOLOGIES, *BEYOND)]
)
def test_views_that_are_shared_equal_views_of_their_own(tiny, batch, topology):
    model, params = setup(tiny, topology)
    wanted = [view("image"), view("text"), view("image", "text", causal=["text"])]
    shared = jax.jit(lambda p, b: [o.embeddings for o in run_views(model, p, b, wanted, None).values()])(params, batch)
    for v, embeddings in zip(wanted, shared, strict=True):
        (alone,) = run_views(model, params, batch, [v], None).values()
        for name in alone.embeddings:
            np.testing.assert_allclose(embeddings[name], alone.embeddings[name], atol=2e-5)


def test_a_view_is_read_off_a_larger_one_where_streams_keep_apart(tiny, batch):
    """Three wishes, two forward passes: counted in the program. Early summation mixes, and needs three."""
    wanted = [view("image"), view("text"), view("image", "text", causal=["text"])]

    def work(topology, views):
        model, params = setup(tiny, topology)
        return mmx.count_flops(lambda p: [o.embeddings for o in run_views(model, p, batch, views, None).values()], params)

    assert work("multi_to_one", wanted) < work("multi_to_one", wanted[:1]) + work("multi_to_one", wanted[1:])
    assert work("early_summation", wanted) == sum(work("early_summation", [v]) for v in wanted)


def entries_of(objective, model, batch, key):
    """What is swapped, and the labels."""
    ((entry, *_),) = [[e for m, e in view.reads if m == "text"] for view in objective.views()]
    out = objective.corrupt(batch, key, Context(model))
    return out[entry], out[f"{entry}:label"]


def test_matching_labels_say_what_is_swapped(tiny, batch):
    objective, model = Matching(swap_rate=0.5), tiny.build_model()
    corrupt = jax.jit(lambda key: entries_of(objective, model, batch, key))
    labels = []
    for seed in range(40):
        swapped, label = corrupt(jax.random.key(seed))
        np.testing.assert_array_equal(label, (np.asarray(swapped.array) == batch["text"].array).all(-1))
        labels.append(label)
    assert 0.4 < np.mean(labels) < 0.6


@pytest.mark.parametrize("kind", ["ids", "segments", "patches"])
def test_matching_calls_an_equal_text_equal(tiny, batch, rng, kind):
    """Twins with noise in the padding are equal; one that has fewer tokens, or other segments, is another one."""
    tables = {"tables": {"segment": 4}} if kind == "segments" else {}
    text = dataclasses.replace(tiny.modalities["text"], **tables)
    model = mmx.build_model({**tiny.modalities, "text": text}, width=16, depth=2, heads=2)
    entry, raw, length = ("image", batch["image"], 4) if kind == "patches" else ("text", batch["text"].array, 12)
    there = np.tile(np.arange(length) < length - 1, (8, 1))
    padding = np.zeros(raw.shape, bool)
    padding[(slice(None), slice(16, 32), slice(16, 32)) if kind == "patches" else ~there] = True  # of an image the last patch
    twins = np.where(padding, rng.integers(0, 255, raw.shape), raw[:1])
    segments = np.where(there, 1, rng.integers(0, 3, there.shape))
    objective = Matching(("text", "image") if kind == "patches" else ("image", "text"), swap_rate=1.0)

    def labels(array, mask, segments=segments):
        array = {"ids": array, "segment": segments} if kind == "segments" else array
        corrupted = objective.corrupt({**batch, entry: mmx.Masked(array, mask)}, jax.random.key(0), Context(model))
        return next(np.asarray(x) for name, x in corrupted.items() if name.endswith(":label"))

    assert labels(twins, there).all() and not labels(raw, there).any()
    lone = np.arange(8)[:, None] == 3
    assert (1 - labels(twins, there & ~(lone & (np.arange(length) == 1)))).sum() == 2  # the lone one, and who is given it
    if kind == "segments":
        assert (1 - labels(twins, there, segments + lone)).sum() == 2


def losses_of(model, params, batch, only=tuple(ALL)):
    chosen = {name: ALL[name] for name in only}

    def run(params, batch):
        corrupted = objectives.corrupt(chosen, batch, jax.random.key(3), Context(model, params))
        total, found = objectives.total_loss(chosen, objectives.forward(chosen, model, params, corrupted, None))
        return total, objectives.flatten_metrics(found)

    return jax.jit(run)(params, batch)


@pytest.mark.parametrize("topology", [t if t in QUICK else pytest.param(t, marks=pytest.mark.slow) for t in TOPOLOGIES])
def test_what_stands_in_padding_changes_no_loss(tiny, batch, topology):
    model, params = setup(tiny, topology)
    text = batch["text"]
    noise = mmx.Masked(np.where(text.mask, text.array, 299), text.mask)
    total, metrics = losses_of(model, params, batch)
    assert jnp.isfinite(total) and set(metrics) >= {f"loss/{name}" for name in ALL}
    np.testing.assert_allclose(losses_of(model, params, dict(batch, text=noise))[0], total, rtol=1e-5)


def test_captioning_predicts_the_next_token(tiny, batch):
    """The loss of one example, token by token in NumPy, from the model's own logits."""
    model, params = setup(tiny)
    out = model.apply({"params": params}, batch, ("text",))
    logits, ids, mask = (np.asarray(x) for x in (out.logits["captioning"], batch["text"].array, batch["text"].mask))
    losses = []
    for b, t in zip(*np.nonzero(mask[:, 1:]), strict=True):
        losses.append(np.log(np.exp(logits[b, t]).sum()) - logits[b, t, ids[b, t + 1]])
    np.testing.assert_allclose(losses_of(model, params, batch, ["captioning"])[0], np.mean(losses), rtol=1e-5)


def test_an_example_without_text_takes_no_part(tiny, batch):
    model, params = setup(tiny)
    present = np.arange(8) < 5
    partly = dict(batch, text=mmx.Masked(batch["text"].array, batch["text"].mask & present[:, None]))
    first = jax.tree.map(lambda x: x[:5], batch)
    for name in ("contrastive", "captioning"):
        a, b = (losses_of(model, params, x, [name])[0] for x in (partly, first))
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_matching_leaves_out_examples_that_lack_a_side(tiny, batch):
    model, params = setup(tiny)
    present = np.arange(8) < 5
    text = mmx.Masked(batch["text"].array, batch["text"].mask & present[:, None])
    objective = Matching()
    corrupted = objective.corrupt(dict(batch, text=text), jax.random.key(3), Context(model))
    (outputs,) = run_views(model, params, corrupted, objective.views(), None).values()
    values = objective.select([outputs], corrupted)
    there = np.asarray(entries_of(objective, model, dict(batch, text=text), jax.random.key(3))[0].mask).any(-1)
    np.testing.assert_array_equal(values["there"], there)
    assert 0 < there.sum() < 8
    expected = mmx.losses.cross_entropy(values["logits"], values["label"])[there].mean()
    np.testing.assert_allclose(objective.loss(values)[0], expected, rtol=1e-6)


def test_three_modalities_are_compared_in_pairs(rng):
    x = {name: rng.standard_normal((4, 8)).astype("f") for name in "abc"}
    objective = Contrastive(modalities=("a", "b", "c"))
    values = {"embeddings": x, "present": {n: jnp.ones(4, bool) for n in x}, "logit_scale": jnp.full(4, 2.0)}
    pairs = [mmx.losses.clip_loss(x[i], x[j], 2.0) for i, j in ("ab", "ac", "bc")]
    np.testing.assert_allclose(objective.loss(values)[0], np.mean(pairs), rtol=1e-6)


def compared(rng, entries, absent):
    """What `Contrastive` selects of six examples: unit vectors of each entry, where only `absent[entry]` are missing."""
    x = {name: np.array(mmx.losses.unit_vectors(rng.standard_normal((6, 8)).astype("f"))) for name in entries}
    there = {name: ~np.isin(np.arange(6), absent.get(name, ())) for name in entries}
    return x, there, {"embeddings": x, "present": there, "logit_scale": jnp.full(6, 2.0)}


def test_ranking_asks_that_a_partner_scores_more_by_the_margin(rng):
    x, _, values = compared(rng, ("image", "text"), {"text": [4]})
    scores, here = x["image"] @ x["text"].T, [i for i in range(6) if i != 4]
    short = [0.5 + s[i, j] - s[i, i] for s in (scores, scores.T) for i in here for j in here if i != j]
    loss, metrics = Contrastive(kind="ranking", margin=0.5).loss(values)
    np.testing.assert_allclose(loss, np.maximum(short, 0).mean(), rtol=1e-5)
    best = [scores[i, here].argmax() == here.index(i) for i in here]
    np.testing.assert_allclose(metrics["contrastive/recall"], np.mean(best), rtol=1e-6)
    best = [scores[here, i].argmax() == here.index(i) for i in here]
    np.testing.assert_allclose(metrics["contrastive/recall_back"], np.mean(best), rtol=1e-6)


@pytest.mark.parametrize("films", [("film",), ("film", "film/later")])
def test_any_text_of_a_clip_is_found(rng, films):
    """Each clip asks for the nearest of all texts; clips without a text, and texts that are absent, are not asked."""
    texts = ("text", "text/other")
    absent = {"film": [1], "text": [2, 3], "text/other": [2, 5]}
    x, there, values = compared(rng, (*films, *texts), absent)
    x["text/other"][0] = x["film"][0]  # one at least is found
    each = [(name, i) for name in texts for i in range(6) if there[name][i]]
    found = []
    for film in films:
        for i in range(6):
            if there[film][i] and any((name, i) in each for name in texts):
                found.append(max(each, key=lambda text: x[film][i] @ x[text[0]][text[1]])[1] == i)
    objective = Contrastive((*films, *texts), kind="mil_nce")
    metrics = objective.loss(values)[1]
    np.testing.assert_allclose(metrics["contrastive/recall"], np.mean(found), rtol=1e-6)
    assert 0 < np.mean(found) < 1
    clips = [(film, i) for film in films for i in range(6) if there[film][i]]
    back = [max(clips, key=lambda c: x[c[0]][c[1]] @ x[n][i])[1] == i for n, i in each if any((f, i) in clips for f in films)]
    np.testing.assert_allclose(metrics["contrastive/recall_back"], np.mean(back), rtol=1e-6)


def test_a_sigmoid_asks_of_every_pair_in_any_form(tiny, batch):
    """The same gradient dense and in a ring; it wants a bias, and softmax wants none."""
    siglip = dataclasses.replace(
        tiny,
        model=dataclasses.replace(tiny.model, logit_scale=10.0, logit_bias=-10.0),
        objectives={"contrastive": Contrastive(kind="sigmoid")},
    )
    model, params = setup(siglip)

    def value(form, kind="sigmoid"):
        mine = {"contrastive": Contrastive(kind=kind, form=form)}
        return lambda p: objectives.total_loss(mine, objectives.forward(mine, model, p, batch, None))

    dense, ring = (jax.jit(jax.value_and_grad(value(form), has_aux=True))(params) for form in ("dense", "ring"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), dense, ring)
    assert np.abs(ring[1]["logit_bias"]) > 1e-3
    with pytest.raises(InputError, match="set model.logit_bias to -10"):
        value("dense", "softmax")(params)
