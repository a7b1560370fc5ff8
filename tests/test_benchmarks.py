"""What benchmarks time is what it is called: at a published model's small size, the step of ours has the published loss."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import mmx
from mmx.data import Pipeline
from mmx.objectives import check_reached

FOLDER = Path(__file__).parents[1] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_step_begins_with_the_published_loss():
    zoo, folder = load("zoo"), Path(__file__).parent / "published" / "CLIPModel"
    batch = load_file(folder / "inputs.safetensors")
    step = zoo.our_side(mmx.load_pretrained(folder), zoo.CASES["clip"], batch, True, "float32")
    first, second = step(), step()
    np.testing.assert_allclose(first, load_file(folder / "outputs.safetensors")["loss"], rtol=1e-5)
    assert second < first


@pytest.mark.slow
def test_every_row_of_objectives_can_be_trained(tmp_path):
    """Each is checked against its model and a batch of its data, as before training."""
    objectives, batches = load("objectives"), {}
    for name, row in objectives.ROWS.items():
        wanted = objectives.experiment(row, str(tmp_path / name), 1000)
        model, data = wanted.build_model(), Pipeline(wanted.data, wanted.modalities, wanted.batch_size)
        batch = batches.setdefault(row.scenes, next(data.train()))
        for evaluator in wanted.evaluators.values():
            evaluator.check(data)
        check_reached(wanted.objectives, model, mmx.model.abstract_params(model), batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["captioning", "contrastive", "order"])
def test_an_objective_learns_what_it_asks(name):
    """One of each of three types, in half of the steps of docs/objectives.md: twice as far as chance, and as its beginning."""
    line = load("objectives").measure(name, 100)
    before, after, chance = map(float, line.strip(" |").split(" | ")[-3:])
    assert after > 2 * max(before, chance)
