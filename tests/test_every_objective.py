"""What holds for every objective: who counts, what is refused and why, and that it is the same beside others and in parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives_of_all import ALL, IMAGE, SUMMED, TEXT, make, program, run, traced

import mmx
from mmx import objectives
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
from mmx.topologies import BEYOND, TOPOLOGIES, PerStream
from mmx.train.accumulate import value_and_grad
from mmx.types import Masked


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
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


def test_metrics_of_one_name_are_told_apart(tiny, labelled):
    chosen = {"alone": MaskedModelling(masks={"text": Mask(0.3)}, given=()), "both": MaskedModelling(masks={"text": Mask(0.3)})}
    metrics = run(chosen, *make(tiny, chosen), labelled)[1]
    assert metrics["alone:masked_text/accuracy"].shape == () == metrics["both:masked_text/accuracy"].shape
    assert "masked_text/accuracy" not in metrics
