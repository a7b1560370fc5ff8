"""The configurations in configs/: each can be trained, by its parts and by the loop."""

import dataclasses
from pathlib import Path

import jax
import pytest

import mmx
from mmx import objectives, train
from mmx.data import Pipeline
from mmx.train.experiment import from_json, load_config, to_json

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = [*sorted((CONFIGS / "recipes").glob("*.py")), CONFIGS / "one_model.py", CONFIGS / "emoji_zero_shot.py"]

TABLES = {  # what their evaluation is to tell
    "one_model": (
        "composition/image_to_text_R@1",
        "held_out/matching/accuracy",
        "captions/exact",
        "answers/exact",
        "held_out/captioning/alone/perplexity",
    ),
    "emoji_zero_shot": ("tones/mean_per_class", "groups/mean_per_class"),
}


def small(path, tmp_path):
    """The recipe as it is, on a few examples for two steps."""
    experiment = load_config(path)
    model = dataclasses.replace(experiment.model, width=32, mlp=64, embed=32)
    return dataclasses.replace(
        experiment,
        model=model,
        steps=2,
        batch_size=8,
        run=str(tmp_path / "run"),
        data=dataclasses.replace(experiment.data, split="train[:64]"),
        optimizer=dataclasses.replace(experiment.optimizer, warmup=0),
        evaluators={name: dataclasses.replace(e, split="composition[:16]") for name, e in experiment.evaluators.items()},
        log=train.LogConfig(every=1, tensorboard=False),
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_all_a_recipe_reads_reaches_what_it_asks(path, tmp_path):
    experiment = small(path, tmp_path)
    assert to_json(from_json(to_json(experiment))) == to_json(experiment)
    model = experiment.build_model()
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), mmx.example_batch(model)))["params"]
    batch = next(Pipeline(experiment.data, experiment.modalities, experiment.batch_size).train())
    objectives.check_reached(experiment.active_objectives, model, params, batch)


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_and_is_evaluated(path, tmp_path):
    found = train.run(small(path, tmp_path), devices=jax.devices()[:1])
    assert found and found.keys() >= {*TABLES.get(path.stem, ())}
    assert all(value == value for value in found.values())
