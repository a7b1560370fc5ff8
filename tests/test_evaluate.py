"""Retrieval metrics, zero-shot classes, captions, the contact sheet, generation, FLOPs."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmx
from mmx.data import DataSet, Pipeline
from mmx.errors import InputError
from mmx.evaluate import Captions, Evaluation, Missing, Retrieval, ZeroShot, retrieval_metrics
from mmx.evaluate.contact_sheet import contact_sheet
from mmx.evaluate.report import due
from mmx.evaluate.retrieval import chance_metrics, embed_split
from mmx.parallel import MeshConfig, make_mesh
from mmx.pretrained import _own
from mmx.train.experiment import from_json, to_json


def test_ranks_equal_a_naive_count(rng):
    similarity = rng.standard_normal((50, 50))
    ranks = [1 + sorted(row, reverse=True).index(row[i]) for i, row in enumerate(similarity)]
    metrics = retrieval_metrics(similarity, "x")
    assert metrics == {
        "x_R@1": pytest.approx(np.mean(np.array(ranks) <= 1)),
        "x_R@5": pytest.approx(np.mean(np.array(ranks) <= 5)),
        "x_R@10": pytest.approx(np.mean(np.array(ranks) <= 10)),
        "x_mean_rank": pytest.approx(np.mean(ranks)),
        "x_median_rank": pytest.approx(np.median(ranks)),
    }


def test_perfect_collapsed_and_random_embeddings(rng):
    assert retrieval_metrics(np.eye(20), "x")["x_R@1"] == 1
    collapsed = retrieval_metrics(np.ones((20, 20)), "x")
    assert collapsed["x_R@1"] == 0 and collapsed["x_mean_rank"] == 10.5
    broken = retrieval_metrics(np.full((20, 20), np.nan), "x")
    assert broken["x_R@1"] == 0 and broken["x_mean_rank"] == 20
    random = [retrieval_metrics(rng.standard_normal((40, 40)), "x") for _ in range(200)]
    for name, value in chance_metrics(40).items():
        if name != "median_rank":
            np.testing.assert_allclose(np.mean([r[f"x_{name}"] for r in random]), value, rtol=0.1)


def evaluation(tiny, final=True, devices=1):
    model = tiny.build_model()
    data = Pipeline(tiny.data, tiny.modalities, tiny.batch_size)
    params = jax.jit(lambda key: model.init(key, mmx.example_batch(model)))(jax.random.key(0))["params"]
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    return Evaluation(model, params, data, mesh, tiny.batch_size, final)


def test_retrieval_report(tiny):
    report = Retrieval(split="composition[:20]")(evaluation(tiny))
    assert "chance" in report.text and "among 20" in report.text
    assert report.pictures["contact_sheet.png"].ndim == 3
    assert set(report.metrics) >= {"image_to_text_R@1", "text_to_image_median_rank"}
    eight = Retrieval(split="composition[:20]")(evaluation(tiny, devices=8))
    assert eight.metrics == report.metrics
    assert not Retrieval(split="composition[:20]")(evaluation(tiny, final=False)).pictures


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


NAMES, TEMPLATES = ["man", "flag", "cat"], ("a {}", "{}: dark skin tone", lambda name: name.upper())


def test_classes_are_means_of_unit_vectors(tiny):
    """Of a model bound to its parameters, of the same as a `Pretrained`, and of any function; as the formula in NumPy."""
    at = evaluation(tiny)
    tokenizer, variables = at.data.tokenizer, {"params": at.params}
    texts = [text for name in NAMES for text in (f"a {name}", f"{name}: dark skin tone", name.upper())]
    run = jax.jit(lambda raw: at.model.apply(variables, {"text": raw}).embeddings["text"])
    vectors = np.asarray(run(tokenizer(texts, 12))).reshape(3, 3, -1)
    expected = unit(unit(vectors).mean(1)).T  # (E, C), as open_clip returns it
    build = mmx.build_zero_shot_classifier
    np.testing.assert_allclose(build(at.model.bind(variables), tokenizer, NAMES, TEMPLATES), expected, atol=1e-6)
    np.testing.assert_allclose(build(at.model.bind(variables), tokenizer, NAMES, TEMPLATES, batch_size=4), expected, atol=1e-6)
    pretrained = _own(tiny, at.model, at.params, tokenizer)
    np.testing.assert_allclose(build(pretrained, None, NAMES, TEMPLATES), expected, atol=1e-6)
    longer = build(lambda raw: 3 * run(raw), lambda texts: tokenizer(texts, 12), NAMES, TEMPLATES)  # not of length 1
    np.testing.assert_allclose(longer, expected, atol=1e-6)


def test_classes_of_a_published_model():
    pretrained = mmx.load_pretrained(Path(__file__).parent / "published" / "CLIPModel")
    words = {"a cat": [5, 9, 3, 90], "a dog": [5, 7, 8, 90], "the cat": [4, 9, 3, 90], "the dog": [4, 7, 8, 90]}

    def tokenizer(texts):
        return {"input_ids": np.asarray([words[text] for text in texts])}

    vectors = {text: np.asarray(pretrained(**tokenizer([text]))["text_embeds"][0]) for text in words}
    expected = unit(np.stack([vectors[f"a {name}"] + vectors[f"the {name}"] for name in ("cat", "dog")]))
    found = mmx.build_zero_shot_classifier(pretrained, tokenizer, ["cat", "dog"], ["a {}", "the {}"])
    np.testing.assert_allclose(found, expected.T, atol=1e-5)


def test_wrong_classes_are_refused(tiny):
    model = tiny.build_model()
    for template, message in (
        ("a photo", "write {} where"),
        ("{} {}", "IndexError"),
        ("{name}", "KeyError"),
        ("{", "ValueError"),
    ):
        with pytest.raises(InputError, match=message):
            mmx.build_zero_shot_classifier(len, list, NAMES, [template])
    for given, message in (
        ((model, len), "model.bind"),
        ((3, len), "expected a Pretrained"),
        ((len, None), "expected a Pretrained"),
    ):
        with pytest.raises(InputError, match=message):
            mmx.build_zero_shot_classifier(*given, NAMES, ["{}"])
    with pytest.raises(InputError, match="0 classes"):
        mmx.build_zero_shot_classifier(len, list, [], ["{}"])


def test_zero_shot_report(tiny):
    """Beside the same by hand: those of one tone only, the nearest class, what chance and the commonest class give."""
    split, tones = "composition[:60]", {str(i): f"{name} skin tone" for i, name in enumerate(("light", "dark", "red"), 1)}
    at = evaluation(tiny)
    ask = ZeroShot(split=split, label="tones", classes=tones, templates=("{}", "man: {}"))
    ask.check(at.data)
    report = ask(at)
    source = at.data.source(split)
    said = [sorted({*np.asarray(source[i]["tones"]).tolist()}) for i in range(60)]
    rows = [i for i, values in enumerate(said) if len(values) == 1 and values[0] <= 3]
    answers = np.asarray([said[i][0] - 1 for i in rows])
    assert 0 < len(rows) < sum(len(values) == 1 for values in said) < 60
    images = embed_split(at, split, ("image",))["image"][rows]
    classes = mmx.build_zero_shot_classifier(
        at.model.bind({"params": at.params}), at.data.tokenizer, [*tones.values()], ask.templates
    )
    right = (images @ classes).argmax(1) == answers
    each = [right[answers == answer].mean() for answer in range(3)]
    assert report.metrics == {"top1": pytest.approx(right.mean()), "mean_per_class": pytest.approx(np.mean(each))}
    often = np.bincount(answers).max() / len(rows)
    assert f"{len(rows)} of {split}, 3 classes" in report.text
    assert [line.split()[-2:] for line in report.text.splitlines()[2:]] == [["0.333", "0.333"], [f"{often:.3f}", "0.333"]]
    assert ask(evaluation(tiny, devices=8)).metrics == report.metrics
    assert not ask(evaluation(tiny, final=False)).text


def test_zero_shot_finds_its_classes_in_the_training_split(tiny):
    """All that it says; a model that has learned nothing is near chance, one that knows the answers is always right."""
    at = evaluation(tiny)
    report = ZeroShot(split="train[64:128]", query="text", label="group")(at)
    groups = {at.data.source("train[:64]")[i]["group"] for i in range(64)}
    assert f"{len(groups)} classes" in report.text and set(report.metrics) == {"top1", "top5", "mean_per_class"}
    assert report.metrics["top1"] < report.metrics["top5"] < 1
    names = ZeroShot(split="train[:64]", query="text", label="name")(at)  # each text is its own class
    assert names.metrics["top1"] > 0.9 and names.metrics["top5"] == 1  # but for those that 12 tokens do not tell apart


def test_a_class_is_called_what_its_examples_are(tiny):
    """The mean of the vectors of several names; of two groups, those of the 64 names that are trained on."""
    at = evaluation(tiny)
    source = at.data.source("train[:64]")
    called = {}
    for i in range(64):
        called.setdefault(source[i]["group"], set()).add(source[i]["name"])
    bound = at.model.bind({"params": at.params})
    each = [mmx.build_zero_shot_classifier(bound, at.data.tokenizer, sorted(names), ["{}"]).mean(1) for names in called.values()]
    found = mmx.build_zero_shot_classifier(bound, at.data.tokenizer, [sorted(names) for names in called.values()], ["{}"])
    np.testing.assert_allclose(found.T, unit(np.stack(each)), atol=1e-5)
    report = ZeroShot(split="train[64:128]", label="group", names="name")(at)
    told = {group: tuple(sorted(called[group])) for group in sorted(called)}
    assert report.metrics == ZeroShot(split="train[64:128]", label="group", classes=told)(at).metrics
    with pytest.raises(InputError, match="class number 1 has no name"):
        mmx.build_zero_shot_classifier(bound, at.data.tokenizer, ["cat", ()], ["{}"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"names": "nam"}, "names: .*did you mean 'name'"),
        ({"label": "grup"}, "did you mean 'group'"),
        ({"split": "compositon"}, "did you mean 'composition'"),
        ({"query": "imag"}, "did you mean 'image'"),
        ({"text": "image"}, "not read as text"),
    ],
)
def test_a_wrong_zero_shot_is_refused_before_training(tiny, fields, message):
    data = Pipeline(tiny.data, tiny.modalities, tiny.batch_size)
    with pytest.raises(InputError, match=message):
        ZeroShot(**fields).check(data)


def test_a_zero_shot_without_examples_says_so(tiny):
    with pytest.raises(InputError, match="group of composition\\[:4\\] says people-body; none is among the classes person"):
        ZeroShot(split="composition[:4]", classes={"person": "person"})(evaluation(tiny))
    with pytest.raises(InputError, match="write {} where"):
        ZeroShot(templates=("a person",))
    with pytest.raises(InputError, match="both say what a class is called"):
        ZeroShot(classes={"person": "person"}, names="name")


def test_zero_shot_is_kept_with_the_run(tiny):
    ask = ZeroShot(label="tones", classes={"1": "light"}, templates=("{}", "man: {}"))
    again = from_json(json.loads(json.dumps(to_json(dataclasses.replace(tiny, evaluators={**tiny.evaluators, "tones": ask})))))
    assert again.evaluators["tones"] == ask


def test_greedy_is_the_likeliest_next_token_step_by_step(tiny):
    at = evaluation(tiny)
    tokenizer, model = at.data.tokenizer, at.model
    assert tokenizer is not None
    (batch, _) = next(at.data.evaluation("composition[:8]", 8))
    given = {"image": batch["image"]}
    ids = np.asarray(
        mmx.generate(model, at.params, given, length=12, begin=tokenizer.begin, decoding=mmx.Decoding(end=(tokenizer.end,)))
    )
    expected = np.full((8, 12), 0)
    expected[:, 0] = tokenizer.begin
    apply = jax.jit(lambda text: model.apply({"params": at.params}, {**given, "text": text}, ("text",)).logits["captioning"])
    for step in range(11):
        best = np.asarray(apply(expected))[:, step].argmax(-1)
        ended = (expected[:, 1 : step + 1] == tokenizer.end).any(1)
        expected[:, step + 1] = np.where(ended, 0, best)
    np.testing.assert_array_equal(ids, expected)


ENDS = mmx.Decoding(end=(0,))


def test_greedy_of_ids_with_tables(rng):
    """A table that is all one row is a constant added to every word, and the answer is that of a model with it in its positions."""
    image = mmx.modalities.Patches((8, 8), (4, 4))
    model, plain = (
        mmx.build_model(
            {"image": image, "text": mmx.modalities.Ids(9, 6, tables=tables)},
            width=8, depth=2, heads=2, outputs={"captioning": mmx.heads.TiedDecoder("text")},
        )
        for tables in ({"segment": 2}, {})
    )  # fmt: skip
    variables = jax.jit(model.init)(jax.random.key(0), mmx.example_batch(model))
    params = jax.tree.map(lambda x: x + rng.standard_normal(x.shape).astype("f"), variables["params"])
    given = {"image": rng.integers(0, 255, (32, 8, 8, 3), np.uint8)}
    ids = mmx.generate(model, params, given | {"text": {"segment": np.ones((32, 6), np.int32)}}, length=6, begin=1, decoding=ENDS)
    text = dict(params["modalities_text"])
    text["position"] = text["position"] + text.pop("segment")["embedding"][1]
    expected = mmx.generate(plain, params | {"modalities_text": text}, given, length=6, begin=1, decoding=ENDS)
    np.testing.assert_array_equal(ids, expected)
    assert len({tuple(row) for row in np.asarray(ids).tolist()}) > 1


def test_captions_report(tiny):
    report = Captions(split="composition[:20]", count=12, show=3)(evaluation(tiny))
    assert report.metrics["exact"] == 0 and "of 12 are right" in report.text and len(report.text.splitlines()) == 5
    mute = dataclasses.replace(tiny, objectives={"contrastive": mmx.objectives.Contrastive()})
    assert "no captions" in Captions()(evaluation(mute)).text


@pytest.mark.slow
def test_reports_of_texts_in_parts_and_images_that_may_be_absent(tiny):
    fields = {"image": "image", "text": ("question", "answer")}
    data = dataclasses.replace(tiny.data, fields=fields, also=(DataSet(fields={"text": "name"}),))
    at = evaluation(dataclasses.replace(tiny, data=data))
    assert Retrieval(split="composition[:20]")(at).pictures["contact_sheet.png"].ndim == 3
    assert "which skin tone?" in Captions(split="composition[:20]", count=12, show=12)(at).text


def test_contact_sheet_marks_the_right_answers(rng):
    images = list(rng.integers(0, 255, (12, 32, 32, 3), np.uint8))
    right, wrong = (
        contact_sheet(images, [f"text {i}" for i in range(12)], s)
        for s in (np.eye(12), np.roll(np.eye(12), 1, axis=1) - np.eye(12))
    )
    green = np.array([22, 130, 60])
    assert (right == green).all(-1).sum() > 1000 > (wrong == green).all(-1).sum()


def test_evaluators_say_when():
    assert [step for step in range(1, 11) if due(Retrieval(every=4), step, 10)] == [4, 8, 10]
    assert [step for step in range(1, 11) if due(Captions(every=0), step, 10)] == [10]


def test_flops_of_products_scans_and_branches():
    a, b = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((16, 16), jnp.float32)
    product = 2 * 8 * 16 * 16
    assert mmx.count_flops(lambda a, b: a @ b, a, b) == product
    assert mmx.count_flops(lambda a, b: jax.lax.scan(lambda x, _: (x @ b, None), a, length=7)[0], a, b) == 7 * product
    assert mmx.count_flops(lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: a), a, b) == product
    assert mmx.count_flops(jax.jit(jax.checkpoint(lambda a, b: (a @ b).sum())), a, b) == product
    image, kernel = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((4, 4, 3, 5), jnp.float32)
    convolution = mmx.count_flops(
        lambda x, k: jax.lax.conv_general_dilated(x, k, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")),
        image,
        kernel,
    )
    assert convolution == 2 * (2 * 2) * (4 * 4 * 3) * 5


def test_flops_of_a_model_equal_the_formula():
    model = mmx.build_model({"text": mmx.modalities.Ids(50, 10)}, "early_concatenation", width=32, depth=3, heads=4, embed=0)
    batch = mmx.example_batch(model, 4)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), batch))
    tokens, width, length = 40, 32, 10
    layer = 2 * tokens * (12 * width**2) + 2 * 2 * tokens * length * width
    assert mmx.count_flops(lambda v: model.apply(v, batch).pooled, variables) == 3 * layer


@pytest.mark.slow
def test_missing_tells_what_the_image_is_worth(tiny, batch):
    """The loss without the image is that of a batch whose images are masked; what stands in them plays no part."""
    moment = evaluation(tiny)
    report = Missing(split="composition[:16]")(moment)
    assert set(report.metrics) == {"loss_complete", "loss_without_image"}
    assert report.metrics["loss_complete"] != report.metrics["loss_without_image"]
    ((whole, _),) = moment.data.evaluation("composition[:16]", 16)
    objective = mmx.objectives.Captioning()
    masked = {**whole, "image": mmx.Masked(255 - whole["image"], np.zeros(16, bool))}
    for label, raw in (("complete", whole), ("without_image", masked)):
        out = moment.model.apply({"params": moment.params}, raw, ["text"])
        loss, _ = objective.loss(objective.select([out], raw))
        np.testing.assert_allclose(report.metrics[f"loss_{label}"], loss, rtol=1e-5)
    with pytest.raises(InputError, match="given is empty"):
        Missing(given=())
