"""Objectives that take turns, what objectives remember, and all of them on a mesh."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from mmx import evaluate, modalities, objectives
from mmx.data import DataConfig, Label, Pipeline
from mmx.data.pipeline import put_batch
from mmx.errors import InputError
from mmx.objectives import (
    Captioning,
    Classification,
    Contrastive,
    Distillation,
    Grounding,
    Mask,
    MaskedModelling,
    Matching,
    Ordering,
)
from mmx.parallel import MeshConfig, batch_sharding, make_mesh
from mmx.train import Task, compile_step, make_optimizer, make_schedule, make_state, run, train_step

TURNS = {"words": MaskedModelling(), "language": Captioning(given=()), "near": Contrastive(teacher=0.4, queue=12)}
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
ALL = {
    **TURNS,
    "patches": MaskedModelling(masks={"image": Mask(0.4, "block", "normalised")}, given=("text",)),
    "which": MaskedModelling(masks={"image": Mask(0.4, answer="contrast")}, given=("text",)),
    "left": MaskedModelling(masks={"image": Mask(0.5, drop=True)}, given=()),
    "hard": Matching(negatives="hard", alignment=0.1),
    "order": Ordering(rate=0.5),
    "tone": Classification(label="tone", classes=5),
    "prefix": Captioning(prefix=0.5, chunks=2),
    "distilled": Distillation(),
    "soft": Distillation(what="logits", head="classify_tone"),
    "pooled": Distillation(what="pooled"),
    "states": Distillation(what="states"),
    "regions": Grounding(labels=("tone",), kind="binary"),
    "tokenwise": Contrastive(tokens=8),
    "ranked": Contrastive(kind="ranking"),
    "bags": Contrastive(("image", "text", "text/group"), kind="mil_nce"),
    "where": Grounding(labels=("tone",)),
    "believed": MaskedModelling(masks={"text": Mask(0.3)}, teacher=0.4),
}


@pytest.fixture
def several(tiny):
    embedders = {"image": modalities.Patches((32, 32), (8, 8), mask_token=True), "text": modalities.Ids(300, 12, mask_token=True)}
    labels = {"tone": Label("tones", (1, 2, 3, 4, 5), several="leave_out")}
    data = DataConfig(split="train[:64]", labels=labels)
    scores = {"held_out": evaluate.Scores({"language": TURNS["language"]}, split="composition[:16]")}
    checkpoint = dataclasses.replace(tiny.checkpoint, best="")
    return dataclasses.replace(tiny, modalities=embedders, objectives=TURNS, data=data, evaluators=scores, checkpoint=checkpoint)


def steps_of(experiment, mesh_config, devices, count):
    """The metrics of some steps."""
    mesh = make_mesh(mesh_config, jax.devices()[:devices])
    task = Task(experiment.build_model(), experiment.active_objectives, sampling=experiment.sampling)
    optimizer, schedule = (make(experiment.optimizer, experiment.steps) for make in (make_optimizer, make_schedule))
    batches = Pipeline(experiment.data, experiment.modalities, experiment.batch_size).train()
    found = []
    with jax.set_mesh(mesh):
        memory = objectives.memories(task.objectives, task.model)
        state, layout = make_state(task.model, optimizer, True, 0, mesh, memory=memory)
        step = functools.partial(train_step, task=task, optimizer=optimizer, schedule=schedule, ema=0.9)
        step = compile_step(step, mesh, layout)
        for _ in range(count):
            state, metrics = step(state, put_batch(next(batches), batch_sharding(mesh)))
            found.append({name: float(value) for name, value in metrics.items()})
    return found, state


@pytest.mark.slow
def test_every_objective_has_the_losses_of_one_device_on_a_mesh(several):
    fields = {"image": "image", "text": "name", "text/group": "group"}
    experiment = dataclasses.replace(several, objectives=ALL, data=dataclasses.replace(several.data, fields=fields))
    one, _ = steps_of(experiment, MeshConfig(), 1, 2)
    eight, state = steps_of(experiment, MeshConfig(data=2, fsdp=2, tensor=2), 8, 2)
    for a, b in zip(one, eight, strict=True):
        assert a.keys() == b.keys() >= {f"loss/{name}" for name in ALL}
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=2e-4, atol=1e-5, err_msg=name)
    assert np.asarray(state.memory["near"]["queue"]["there"]).all()


@pytest.mark.slow
def test_a_step_takes_one_of_those_that_are_sampled(several):
    """By the ratios; the others are not measured in it, and who is not sampled is in every step."""
    experiment = dataclasses.replace(several, sampling={"words": 3.0, "language": 1.0})
    found, _ = steps_of(experiment, MeshConfig(), 1, 12)
    words, language, near = (np.array([f[f"loss/{name}"] for f in found]) for name in ("words", "language", "near"))
    assert (np.isnan(words) ^ np.isnan(language)).all() and not np.isnan(near).any()
    assert 0 < (~np.isnan(words)).sum() < 12
    for f in found:
        mine = [f[f"loss/{name}"] for name in ("words", "language", "near")]
        np.testing.assert_allclose(f["loss"], np.nansum(mine), rtol=1e-5)
    assert steps_of(experiment, MeshConfig(), 1, 3)[0][2]["loss"] == found[2]["loss"]


def test_turns_are_taken_as_often_as_the_ratios_say(several):
    task = Task(several.build_model(), TURNS, sampling={"words": 6.0, "language": 1.0, "near": 3.0})
    drawn = jax.vmap(task.drawn)(jax.random.split(jax.random.key(0), 5000))
    np.testing.assert_allclose(np.bincount(drawn) / 5000, [0.6, 0.1, 0.3], atol=0.02)


@pytest.mark.slow
def test_metrics_of_one_name_are_told_apart_in_every_turn(several):
    chosen = {"alone": MaskedModelling(given=()), "both": MaskedModelling()}
    experiment = dataclasses.replace(several, objectives=chosen, sampling={"alone": 1.0, "both": 1.0}, evaluators={})
    found, _ = steps_of(experiment, MeshConfig(), 1, 8)
    drawn = [{name for name in ("alone", "both") if not np.isnan(f[f"{name}:masked_text/accuracy"])} for f in found]
    assert {tuple(names) for names in drawn} == {("alone",), ("both",)} and "masked_text/accuracy" not in found[0]


def test_sampling_names_what_there_is(several):
    with pytest.raises(InputError, match=r"sampling: unknown objective 'word'.*words"):
        dataclasses.replace(several, sampling={"word": 1.0})
    with pytest.raises(InputError, match=r"sampling\.words=0\.0; it has to be more than 0"):
        dataclasses.replace(several, sampling={"words": 0.0})


@pytest.mark.slow
def test_what_is_remembered_is_saved_and_goes_on(several, tmp_path):
    """A queue and turns: stopped behind step 4 and gone on to 6, the metrics are those of a run that never stopped."""
    several = dataclasses.replace(several, sampling={"words": 1.0, "language": 1.0})
    for name in ("whole", "stopped"):
        run(dataclasses.replace(several, run=str(tmp_path / name)), devices=jax.devices()[:1])
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "6")
    again = dataclasses.replace(several, run=str(tmp_path / "stopped"), resume="must")
    run(again, devices=jax.devices()[:1])

    def kept(name):
        lines = [json.loads(line) for line in (Path(tmp_path) / name / "metrics.jsonl").read_text().splitlines()]
        return [{n: x for n, x in line.items() if n.startswith("loss") or n == "step"} for line in lines]

    assert kept("whole") == kept("stopped")
    assert any("loss/words" not in line for line in kept("whole"))
    from mmx.pretrained import load_pretrained

    assert load_pretrained(tmp_path / "whole").params  # who looks at a run need not know what it remembered


@pytest.mark.slow
def test_a_trained_model_teaches_another(several, tmp_path):
    """Its weights are kept in the state, laid out on the run's own devices; another space is refused."""
    teacher = dataclasses.replace(several, run=str(tmp_path / "teacher"), objectives={"near": Contrastive()}, evaluators={})
    run(dataclasses.replace(teacher, steps=3), devices=jax.devices()[:1])
    student = dataclasses.replace(
        several,
        objectives={"distilled": Distillation(teacher=str(tmp_path / "teacher"))},
        evaluators={},
        run=str(tmp_path / "student"),
        model=dataclasses.replace(several.model, width=16),
    )
    run(student, devices=jax.devices()[:1])
    assert load_agreement(tmp_path / "student") > 0
    other = dataclasses.replace(
        student, run=str(tmp_path / "other"), data=dataclasses.replace(student.data, split="train[64:128]")
    )
    with pytest.raises(InputError, match=r"objectives\.distilled: teacher=.* another tokenizer.*--data\.tokenizer"):
        run(other, devices=jax.devices()[:1])
    images = dataclasses.replace(
        other, objectives={"distilled": Distillation(taught=("image",), teacher=str(tmp_path / "teacher"))}
    )
    run(dataclasses.replace(images, run=str(tmp_path / "images")), devices=jax.devices()[:1])  # who reads no text, has no words
    run(
        dataclasses.replace(other, data=dataclasses.replace(other.data, tokenizer=str(tmp_path / "teacher" / "tokenizer.json"))),
        devices=jax.devices()[:1],
    )
    other = dataclasses.replace(student, run=str(tmp_path / "third"), model=dataclasses.replace(several.model, embed=16))
    with pytest.raises(InputError, match="spaces of 16 and, of the teacher, 32"):
        run(other, devices=jax.devices()[:1])


def load_agreement(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return next(line["distillation/agreement"] for line in reversed(lines) if "distillation/agreement" in line)
