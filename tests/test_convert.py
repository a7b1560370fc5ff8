"""`mmx convert`: published folders and run folders hold the same weights, and give the same numbers."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

import mmx
from mmx import cli
from mmx.convert import Convert, convert
from mmx.errors import InputError
from mmx.model import abstract_params
from mmx.objectives import Contrastive
from mmx.pretrained import _own
from mmx.train.experiment import Published, from_json
from mmx.train.loop import run
from mmx.zoo import Pretrained, configuration

PUBLISHED = Path(__file__).parent / "published"


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["CLIPModel", "PerceiverModel"])
def test_there_and_back(name, tmp_path):
    """By value: the weights, config.json, what lies beside, and the numbers of a call."""
    source, there, back = tmp_path / "source", tmp_path / "run", tmp_path / "back"
    source.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(PUBLISHED / name / file, source)
    (source / "preprocessor_config.json").write_text((PUBLISHED.parent / "preprocessing/CLIP.json").read_text())
    (source / "tokenizer.json").write_text(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
    pretrained = mmx.load_pretrained(source)
    assert "a run folder at step 0" in convert(Convert(str(source), str(there)))
    assert f"the published layout of {pretrained.family.name}" in convert(Convert(str(there), str(back)))

    loaded = mmx.load_pretrained(there)
    assert loaded.config == pretrained.config and loaded.heads == pretrained.heads
    steps: tuple[Any, Any] = (loaded.preprocess, pretrained.preprocess)
    assert steps[0].images == steps[1].images is not None
    jax.tree.map(np.testing.assert_array_equal, loaded.params, pretrained.params)
    old, new = tensors(source), tensors(back)
    assert set(new) <= set(old)
    for tensor, array in new.items():
        np.testing.assert_array_equal(array, old[tensor], err_msg=tensor)
    for file in ("preprocessor_config.json", "tokenizer.json"):
        assert (back / file).read_bytes() == (source / file).read_bytes()
    assert json.loads((back / "config.json").read_text()) == json.loads(json.dumps(pretrained.fields))
    if name == "CLIPModel":  # the call is the same program: once is enough
        given = safetensors.numpy.load_file(PUBLISHED / name / "inputs.safetensors")
        wanted, found = (numbers(p, given) for p in (pretrained, mmx.load_pretrained(there / "checkpoints" / "0")))
        for field, array in wanted.items():
            np.testing.assert_array_equal(found[field], array, err_msg=field)


@pytest.mark.parametrize(
    ("name", "family"), [("OpenClipCLIP", ""), ("TimmBeit", ""), pytest.param("CoCa", "coca", marks=pytest.mark.slow)]
)
def test_folders_of_other_libraries_become_runs(name, family, tmp_path):
    """A run, and what is made of it, have the names of the family itself."""
    there, back = tmp_path / "run", tmp_path / "back"
    pretrained = mmx.load_pretrained(PUBLISHED / name, family=family or None)
    convert(Convert(str(PUBLISHED / name), str(there), family=family))
    convert(Convert(str(there), str(back)))
    image = np.random.default_rng(0).integers(0, 255, (26, 26, 3), np.uint8)
    for again in (mmx.load_pretrained(there), mmx.load_pretrained(back)):
        assert again.family.library is None and again.config == pretrained.config and again.heads == pretrained.heads
        jax.tree.map(np.testing.assert_array_equal, again.params, pretrained.params)
        if pretrained.family.library is not None:  # it tells how images are prepared
            made = [p.preprocess(images=[image]) for p in (pretrained, again)]
            np.testing.assert_allclose(*(next(iter(inputs.values())) for inputs in made), atol=1e-6)


def numbers(pretrained: Pretrained, given: dict[str, Any]) -> dict[str, np.ndarray]:
    return {n: np.asarray(x) for n, x in pretrained(**given).items() if hasattr(x, "shape")}


def test_half_precision_in_several_files(tmp_path, capsys):
    source, there, back = str(PUBLISHED / "BertForPreTraining"), str(tmp_path / "run"), tmp_path / "back"
    assert cli.main(["convert", source, there]) == 0
    assert cli.main(["convert", there, str(back), "--dtype", "bfloat16", "--shard", "1e-5"]) == 0
    assert "bfloat16" in capsys.readouterr().out and len(list(back.glob("model-*.safetensors"))) > 3
    expected = mmx.load_pretrained(source).params
    found = mmx.load_pretrained(back).params
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype("bfloat16").astype("f")), found, expected)


def test_how_a_run_is_loaded(tmp_path, capsys):
    """It computes in the type and in the way that are asked for; what it has of its own is not asked for."""
    there, own = tmp_path / "run", tmp_path / "own"
    convert(Convert(str(PUBLISHED / "BertForPreTraining"), str(there)))
    model = mmx.load_pretrained(there, dtype="bfloat16", unroll=3, remat="full").model
    block = model.stages[0].block
    assert (model.dtype, block.dtype, block.unroll, block.remat) == ("bfloat16", "bfloat16", 3, "full")
    experiment = mmx.Experiment(evaluators={})
    params = jax.tree.map(lambda x: np.zeros(x.shape, "f"), abstract_params(experiment.build_model()))
    mmx.save_pretrained(own, _own(experiment, experiment.build_model(), params, None))
    assert mmx.load_pretrained(own).model.stages[0].block.unroll == 2
    model = mmx.load_pretrained(own, dtype="bfloat16", unroll=3, remat="full").model
    block = model.stages[0].block
    assert (model.dtype, block.dtype, block.unroll, block.remat) == ("bfloat16", "bfloat16", 3, "full")
    for folder in (there, own):
        for name, value in {"heads": (), "family": "bert"}.items():
            with pytest.raises(InputError, match=f"{name}={value!r} has no effect".replace("(", r"\(").replace(")", r"\)")):
                mmx.load_pretrained(folder, **{name: value})
        assert cli.main(["convert", str(folder), str(tmp_path / "new"), "--family", "bert"]) == 2
        assert "family='bert' has no effect" in capsys.readouterr().err
    with pytest.raises(InputError, match="library 'timm': the model is of no published family"):
        mmx.load_pretrained(own).under("timm")


def test_what_cannot_be_converted_is_refused(tmp_path, capsys):
    source = str(PUBLISHED / "CLIPModel")
    full, odd, empty = (tmp_path / name for name in ("full", "odd", "empty"))
    for folder in (full, odd, empty):
        folder.mkdir()
    (full / "something").write_text("here")
    (odd / "config.json").write_text("{")
    for arguments, message in (
        ([source, str(full)], "is there and not empty"),
        ([str(tmp_path / "nowhere"), str(tmp_path / "new")], "there is no folder"),
        ([str(empty), str(tmp_path / "new")], "no config.json; expected a folder with config.json"),
        ([str(odd), str(tmp_path / "new")], "is not JSON"),
        ([str(PUBLISHED / "MBT"), str(tmp_path / "new")], "has no model_type, and is of no model"),
        ([source, str(tmp_path / "new"), "--dtype", "float16"], "becomes a run folder, whose weights are float32"),
        ([source, str(tmp_path / "new"), "--shard", "1"], "becomes a run folder, which has no published files"),
    ):
        assert cli.main(["convert", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_converted_model_is_trained_and_comes_out_as_published(tmp_path, tiny):
    """From a published folder, through a run of two steps that reads images and texts, into a published folder again."""
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    fields = {
        "text_config": {**tower, "vocab_size": 300, "max_position_embeddings": 12, "eos_token_id": 2},
        "vision_config": {**tower, "image_size": 32, "patch_size": 16},
        "projection_dim": 8,
    }
    family, config = configuration("clip-vit-base-patch32", **fields)
    model = mmx.create_model("clip-vit-base-patch32", **fields)
    params = jax.jit(lambda key: model.init(key, mmx.example_batch(model)))(jax.random.key(0))["params"]
    files = {"preprocessor_config.json": (PUBLISHED.parent / "preprocessing/CLIP.json").read_bytes()}
    mmx.save_pretrained(tmp_path / "source", Pretrained(model, params, config, family, files=files))
    convert(Convert(str(tmp_path / "source"), str(tmp_path / "start")))

    start = from_json(json.loads((tmp_path / "start/config.json").read_text()))
    assert isinstance(start.published, Published) and set(start.modalities) == {"image", "text"}
    experiment = dataclasses.replace(
        tiny,
        published=start.published,
        objectives={"contrastive": Contrastive()},
        optimizer=dataclasses.replace(start.optimizer, warmup=0),
        evaluators={},
        steps=2,
        resume=str(tmp_path / "start"),
    )
    run(experiment)
    convert(Convert(experiment.run, str(tmp_path / "trained")))
    trained = mmx.load_pretrained(tmp_path / "trained")
    assert trained.config == config and trained.files == files
    moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), trained.params, params)
    assert 0 < max(jax.tree.leaves(moved)) < 0.02  # two steps of 3e-3 away from where it began
    with pytest.raises(InputError, match="there are none"):
        run(dataclasses.replace(start, run=str(tmp_path / "other")))


@pytest.mark.slow
def test_a_run_of_ones_own_keeps_its_own_names(tmp_path, tiny):
    run(dataclasses.replace(tiny, evaluators={}, steps=3, checkpoint=dataclasses.replace(tiny.checkpoint, best="")))
    out, again = tmp_path / "out", tmp_path / "again"
    assert "in mmx's own layout" in convert(Convert(tiny.run, str(out)))
    assert "a run folder" in convert(Convert(str(out), str(again)))
    trained, saved, back = (mmx.load_pretrained(folder) for folder in (tiny.run, out, again))
    for other in (saved, back):
        jax.tree.map(np.testing.assert_array_equal, other.params, trained.params)
        np.testing.assert_array_equal(
            other.preprocess(text=["a cat"])["text"].array, trained.preprocess(text=["a cat"])["text"].array
        )
