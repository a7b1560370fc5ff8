"""Several data sets in one batch: ratios, order, what one of them lacks."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import mmx
from mmx.data import DataConfig, DataError, DataSet, Label, Pipeline, train_tokenizer
from mmx.data.sources import open_source
from mmx.errors import InputError
from mmx.modalities import Features, Ids, Patches
from mmx.modalities.masking import unmask
from mmx.objectives import Captioning
from mmx.train import Task, run

MODALITIES = {"image": Patches((32, 32), (8, 8)), "text": Ids(512, 24), "sound": Features(3, 5)}
PAIRS = DataConfig(
    split="train[:32]",
    fields={"image": "image", "text": "name"},
    labels={"tone": Label("tones", (1, 2, 3, 4, 5), several="leave_out")},
    words=True,
)
ALSO = (
    DataSet(name="talk", fields={"text": "said"}, ratio=2),
    DataSet(name="talk", fields={"sound": "sound", "text/answer": ("said", "said")}, labels={"length": Label("length")}),
)
MIXED = dataclasses.replace(PAIRS, also=ALSO)


def talk(index):
    return {"said": f"number {index}", "sound": np.full((2, 3), index, np.float32), "length": float(index), "key": str(index)}


@pytest.fixture
def own(monkeypatch):
    """Two data sets: the emoji, and `talk`, ten sentences with sounds."""

    def open_(name, split):
        if name != "talk":
            return open_source(name, split)
        return type("Talk", (list,), {"label": f"data set talk, split {split}"})(map(talk, range(10)))

    monkeypatch.setattr("mmx.data.pipeline.open_source", open_)


def first(config, count, start=0, batch_size=16, seed=0):
    return list(itertools.islice(Pipeline(config, MODALITIES, batch_size, seed).train(start), count))


def whence(batch):
    """The number of the data set of each example."""
    image, sound = (unmask(batch[name])[1].reshape(len(batch["text"].mask), -1).any(1) for name in ("image", "sound"))
    return np.where(image, 0, np.where(sound, 2, 1))


def test_ratios_hold_in_every_batch(own):
    for batch in first(MIXED, 6):
        assert np.bincount(whence(batch)).tolist() == [4, 8, 4]
    config = dataclasses.replace(PAIRS, ratio=3, also=(ALSO[1],))
    counts = np.sum([np.bincount(whence(batch), minlength=3) for batch in first(config, 5, batch_size=10)], 0)
    assert counts.tolist() in ([38, 0, 12], [37, 0, 13])  # 3 to 1 of 50


def test_each_set_is_shuffled_and_shown_once_before_it_is_shown_again(own):
    seen = [batch["label/length"][whence(batch) == 2] for batch in first(MIXED, 5)]
    first_round, second = np.split(np.concatenate(seen)[:20], 2)
    assert sorted(first_round) == sorted(second) == list(range(10)) and (first_round != second).any()


def test_a_mixture_goes_on_where_it_was(own):
    whole, again = first(MIXED, 6), first(MIXED, 2, start=4)
    jax.tree.map(np.testing.assert_array_equal, whole[4:], again)
    other = first(MIXED, 1, seed=1)
    assert not np.array_equal(other[0]["text"].array, whole[0]["text"].array)


@pytest.mark.parametrize("processes", [2, 4])
def test_a_mixture_is_the_same_on_any_number_of_hosts(own, monkeypatch, processes):
    (whole,) = first(MIXED, 1, start=3)
    parts = []
    for process in range(processes):
        monkeypatch.setattr(jax, "process_count", lambda: processes)
        monkeypatch.setattr(jax, "process_index", lambda p=process: p)
        parts += first(MIXED, 1, start=3)
    jax.tree.map(lambda x, *own: np.testing.assert_array_equal(np.concatenate(own), x), whole, *parts)


def test_what_a_set_lacks_is_absent(own):
    (batch,) = first(MIXED, 1)
    origin = whence(batch)
    assert set(batch) == {
        "image",
        "text",
        "sound",
        "text/answer",
        "label/tone",
        "label/length",
        "text/words",
        "text/answer/words",
    }
    for entry, where in {"image": [0], "text": [0, 1], "sound": [2], "text/answer": [2]}.items():
        array, mask = unmask(batch[entry])
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask.reshape(16, -1).any(1), np.isin(origin, where))
        assert not any(np.asarray(leaf)[~np.isin(origin, where)].any() for leaf in jax.tree.leaves(array))
    assert batch["image"].array.dtype == np.uint8 and batch["image"].mask.shape == (16,)
    assert (batch["label/tone"][origin > 0] == -1).all() and batch["label/tone"].dtype == np.int32
    np.testing.assert_array_equal(np.isfinite(batch["label/length"]), origin == 2)
    assert (batch["text/answer/words"][origin < 2] == -1).all() and (batch["text/words"][origin < 2].max(1) >= 0).all()
    np.testing.assert_array_equal(batch["sound"].array[origin == 2, 0, 0], batch["label/length"][origin == 2])


def test_evaluators_read_the_first_set_in_the_form_of_the_mixture(own):
    data = Pipeline(MIXED, MODALITIES, 16)
    ((batch, _),) = data.evaluation("train[:16]", 16)
    form = [jax.tree.map(lambda x: (x.shape, x.dtype), b) for b in (batch, next(data.train()))]
    assert form[0] == form[1] and (whence(batch) == 0).all() and batch["text"].mask.any(1).all()


def test_images_of_a_mixture_are_shifted(own):
    images = [next(Pipeline(c, MODALITIES, 16).train())["image"] for c in (MIXED, dataclasses.replace(MIXED, shift=0))]
    moved = [not np.array_equal(a, b) for a, b in zip(images[0].array, images[1].array, strict=True)]
    assert any(moved) and not any(np.asarray(moved)[~images[0].mask])


def test_a_text_in_one_piece_gets_a_group_where_another_set_has_parts(own):
    fields = {"image": "image", "text": ("question", "answer")}
    config = dataclasses.replace(PAIRS, fields=fields, also=(ALSO[0],))
    (batch,) = first(config, 1)
    group = batch["text"].array["group"]
    np.testing.assert_array_equal((group == 0).any(1), batch["image"].mask)
    assert batch["text"].mask.any(1).all() and not batch["image"].mask.all()


def test_a_model_trains_on_a_mixture(own):
    """The loss of captions is that of the examples that have image and text."""
    (batch,) = first(MIXED, 1)
    model = mmx.build_model(MODALITIES, "multi_to_one", width=16, depth=2, heads=2, outputs=Captioning().heads(MODALITIES))
    task = Task(model, {"captioning": Captioning()})
    params = jax.jit(model.init)(jax.random.key(0), mmx.example_batch(model))["params"]
    loss = jax.jit(jax.value_and_grad(lambda p, b: task.loss(task.forward(p, b, None))[0]))
    value, gradient = loss(params, batch)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    filled = {
        **batch,
        "image": batch["image"].replace(array=np.where(batch["image"].mask[:, None, None, None], *[batch["image"].array, 7])),
    }
    np.testing.assert_allclose(loss(params, filled)[0], value, rtol=1e-6)  # nothing is read of an image that is not there


@pytest.mark.slow
def test_a_run_on_a_mixture(tiny):
    """The whole loop, in uneven parts and with modalities dropped; the run folder knows the data it was made with."""
    labels = {"tone": Label("tones", (1, 2, 3, 4, 5), several="leave_out")}
    data = dataclasses.replace(tiny.data, labels=labels, words=True, also=(DataSet(fields={"text": "question"}, ratio=0.5),))
    experiment = dataclasses.replace(tiny, steps=3, data=data, microbatches=3, modality_dropout=0.2)
    found = run(experiment, devices=jax.devices()[:1])
    lines = [json.loads(line) for line in (Path(tiny.run) / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(list(found.values())).all() and len({line["loss"] for line in lines if "loss" in line}) == 3
    with pytest.raises(InputError, match="data.also"):
        run(dataclasses.replace(experiment, data=dataclasses.replace(data, also=())), devices=jax.devices()[:1])


@pytest.mark.parametrize(
    ("also", "message"),
    [
        (DataSet(name="talk", fields={"txt": "said"}), r"unknown modality in data.also\[0\].fields 'txt'; did you mean 'text'"),
        (DataSet(name="talk", fields={"text": "sad"}), r"data.also\[0\].fields.text\) 'sad'; did you mean 'said'"),
        (
            DataSet(name="talk", fields={}, labels={"tone": Label("length")}),
            r"data.also\[0\].labels.tone: its classes are others",
        ),
        (DataSet(name="talk", fields={"text/a": "sound"}), "expected at most"),
    ],
)
def test_wrong_mixtures_are_refused(own, also, message):
    with pytest.raises(InputError, match=message):
        Pipeline(dataclasses.replace(PAIRS, also=(also,)), MODALITIES, 16)


def test_entries_of_two_forms_are_refused(own):
    config = dataclasses.replace(PAIRS, labels={"tone": Label("tones")})
    with pytest.raises(DataError, match="entry 'label/tone' is .* in data set emoji, split train.*; make them equal"):
        also = DataSet(name="talk", fields={}, labels={"tone": Label("sound")})
        Pipeline(dataclasses.replace(config, also=(also,)), MODALITIES, 16)


def test_ratios_that_cannot_be():
    for ratio in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="ratio=.*; it has to be more than 0"):
            DataSet(ratio=ratio)


def test_a_tokenizer_is_learned_from_all_sets(own):
    data = Pipeline(MIXED, MODALITIES | {"text": Ids(1024, 24)}, 16)
    other = train_tokenizer([data.source("train[:32]")[i]["name"] for i in range(32)], 1024)
    assert data.tokenizer.encode("number 7", 24)[1].sum() < other.encode("number 7", 24)[1].sum()
