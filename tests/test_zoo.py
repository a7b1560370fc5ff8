"""Published models: parity with their reference implementations, weights in both directions, names."""

import json
import shutil
from pathlib import Path

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import mmx
from mmx.errors import InputError
from mmx.parallel import MeshConfig, make_mesh
from mmx.zoo import FAMILIES, NAMES, configuration
from mmx.zoo.weights import INDEX, flat, resolve, write

PUBLISHED = sorted(path for path in (Path(__file__).parent / "published").iterdir())
BERT, CLIP, GPT2, VIT = (
    Path(__file__).parent / "published" / name
    for name in ("BertForPreTraining", "CLIPModel", "GPT2LMHeadModel", "ViTForImageClassification")
)


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_the_numbers_of_the_reference(folder):
    shares = golden.compare(folder)
    assert {name: share for name, share in shares.items() if share > 1} == {}


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_saved_and_loaded_again_they_are_the_same(folder, tmp_path):
    family = golden.CLASSES.get(golden.class_of(folder), golden.Class()).family
    pretrained = mmx.load_pretrained(folder, family=family)
    mmx.save_pretrained(tmp_path, pretrained)
    again = mmx.load_pretrained(tmp_path, family=family)
    assert again.config == pretrained.config and again.heads == pretrained.heads
    jax.tree.map(np.testing.assert_array_equal, again.params, pretrained.params)
    old, new = (safetensors.numpy.load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert set(new) <= set(old)
    for name, array in new.items():
        np.testing.assert_array_equal(array, old[name], err_msg=name)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_named_model_builds_at_full_size(name):
    """Through shapes only; every parameter has a published name."""
    family, config = configuration(name)
    model = mmx.create_model(name, heads=tuple(family.heads))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), mmx.example_batch(model)))["params"]
    named = {weight.path for weight in resolve(family.table(config), params)}
    assert set(flat(params)) == named
    bare = mmx.create_model(name)
    assert jax.eval_shape(lambda: bare.init_with_output(jax.random.key(0), mmx.example_batch(bare))[0]).streams


def test_weights_in_several_files(tmp_path):
    pretrained = mmx.load_pretrained(BERT)
    mmx.save_pretrained(tmp_path, pretrained)
    weights = resolve(pretrained.family.table(pretrained.config), pretrained.params)
    (tmp_path / "model.safetensors").unlink()
    write(tmp_path, weights, pretrained.params, shard=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    jax.tree.map(np.testing.assert_array_equal, mmx.load_pretrained(tmp_path).params, pretrained.params)
    first = sorted(tmp_path.glob("model-*.safetensors"))[0]
    first.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=f"names {first.name}, which is not there"):
        mmx.load_pretrained(tmp_path)
    shutil.copy(BERT / "inputs.safetensors", first)
    with pytest.raises(InputError, match="missing: bert"):
        mmx.load_pretrained(tmp_path)
    first.write_bytes((tmp_path / "elsewhere").read_bytes()[:-100])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        mmx.load_pretrained(tmp_path)
    assert (tmp_path / INDEX).exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files(tmp_path, dtype):
    pretrained = mmx.load_pretrained(CLIP)
    mmx.save_pretrained(tmp_path, pretrained, dtype=dtype)
    assert (tmp_path / "model.safetensors").stat().st_size < 0.6 * (CLIP / "model.safetensors").stat().st_size
    again = mmx.load_pretrained(tmp_path)
    for old, new in zip(jax.tree.leaves(pretrained.params), jax.tree.leaves(again.params), strict=True):
        assert new.dtype == jnp.float32
        np.testing.assert_array_equal(new, old.astype(dtype).astype(np.float32))


def test_loading_onto_a_mesh():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    sharded, whole = mmx.load_pretrained(BERT, mesh=mesh), mmx.load_pretrained(BERT)
    kernel = sharded.params["stages_0"]["text"]["layers"]["block"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    jax.tree.map(np.testing.assert_array_equal, sharded.params, whole.params)


def test_weights_that_do_not_fit_are_named_all_at_once(tmp_path):
    mmx.save_pretrained(tmp_path, mmx.load_pretrained(BERT))
    file = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["bert.encoder.layer.1.output.dense.weight"] = tensors["bert.encoder.layer.1.output.dense.weight"].T.copy()
    tensors["bert.encoder.layer.7.output.dense.bias"] = np.zeros(3, "f")
    del tensors["bert.pooler.dense.bias"], tensors["bert.encoder.layer.0.attention.self.query.weight"]
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(InputError) as error:
        mmx.load_pretrained(tmp_path)
    for part in (
        "4 tensors",
        "missing: bert.pooler.dense.bias",
        "missing: bert.encoder.layer.0.attention.self.query.weight (32, 32)",
        "of another shape: bert.encoder.layer.1.output.dense.weight is (56, 32), the configuration asks for (32, 56)",
        "unexpected: bert.encoder.layer.7.output.dense.bias (3,)",
    ):
        assert part in str(error.value)


def test_configurations_that_are_not_supported_are_named(tmp_path):
    mmx.save_pretrained(tmp_path, mmx.load_pretrained(BERT))
    fields = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key' is not supported"),
        ({"hidden_act": "gelu_neww"}, "hidden_act: unknown activation 'gelu_neww'; did you mean 'gelu_new'"),
        ({"hidden_sise": 3}, "unknown field 'hidden_sise'; did you mean 'hidden_size'"),
        ({"hidden_size": "32"}, "BertConfig.hidden_size='32'; expected int"),
        ({"model_type": "berd"}, "unknown family 'berd'; did you mean 'bert'"),
        ({"model_type": None}, "has no model_type"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(fields | change))
        with pytest.raises(InputError) as error:
            mmx.load_pretrained(tmp_path)
        assert message in str(error.value)
    with pytest.raises(InputError, match="no config.json"):
        mmx.load_pretrained(tmp_path / "nowhere")


def test_a_bare_model_and_its_heads(tmp_path):
    """Without heads the published names lose their prefix, as those of the bare class; what was left out is no error."""
    bare = mmx.load_pretrained(BERT, heads=())
    assert not any(name.startswith("heads") for name in bare.params)
    given = safetensors.numpy.load_file(BERT / "inputs.safetensors")
    given = {name: given[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    fields, whole = bare(**given), mmx.load_pretrained(BERT)(**given)
    assert "prediction_logits" in whole and "prediction_logits" not in fields
    np.testing.assert_array_equal(fields["last_hidden_state"], whole["last_hidden_state"])
    tensors = safetensors.numpy.load_file(BERT / "model.safetensors")
    tensors = {n.removeprefix("bert."): x for n, x in tensors.items() if n.startswith("bert.")}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(BERT / "config.json", tmp_path)
    jax.tree.map(np.testing.assert_array_equal, mmx.load_pretrained(tmp_path).params, bare.params)
    with pytest.raises(InputError, match="unknown head 'masked-ml'; did you mean 'masked-lm'"):
        mmx.load_pretrained(BERT, heads=("masked-ml",))


def test_inputs_are_checked():
    pretrained = mmx.load_pretrained(BERT)
    ids = np.ones((2, 5), np.int64)
    with pytest.raises(InputError, match="unknown input 'atention_mask'; did you mean 'attention_mask'"):
        pretrained(input_ids=ids, atention_mask=ids)
    with pytest.raises(InputError, match="the input input_ids is missing"):
        pretrained(attention_mask=ids)
    with pytest.raises(InputError, match="it does not generate"):
        pretrained.generate(3, input_ids=ids)


def test_padding_changes_nothing_but_itself():
    """Published padding is embedded and seen by nobody: other ids behind the mask, the same numbers before it."""
    pretrained = mmx.load_pretrained(BERT)
    ids = np.arange(1, 11).reshape(2, 5)
    mask = np.asarray([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    other = np.where(mask, ids, 77)
    a, b = (pretrained(input_ids=x, attention_mask=mask)["last_hidden_state"] for x in (ids, other))
    np.testing.assert_array_equal(np.where(mask[..., None], a, 0), np.where(mask[..., None], b, 0))
    assert np.abs(a[0, 3:] - b[0, 3:]).max() > 1e-3
    short = pretrained(input_ids=ids[:1, :3])["last_hidden_state"]
    np.testing.assert_allclose(a[:1, :3], short, atol=1e-5)


def test_names():
    assert mmx.list_models("clip*") == sorted(n for n in NAMES if n.startswith("clip"))
    assert set(mmx.list_models(["gpt2", "bert-base-*"])) >= {"gpt2", "bert-base-uncased"}
    with pytest.raises(InputError, match="did you mean 'bert-base-uncased'"):
        mmx.create_model("bert-base-uncasd")
    with pytest.raises(InputError, match="unknown field 'num_layers'"):
        mmx.create_model("bert-base-uncased", num_layers=3)
    with pytest.raises(InputError, match="unknown field 'image_sise'; did you mean 'image_size'"):
        mmx.create_model("clip-vit-base-patch32", vision_config={"image_sise": 3})
    small = mmx.create_model("clip-vit-base-patch32", vision_config={"num_hidden_layers": 1}, dtype="bfloat16")
    assert small.stages[0].depth["image"] == 1 and small.stages[0].block["image"].dtype == "bfloat16"
    assert all(family.name == name for name, family in FAMILIES.items())


def test_generation_continues_prompts_padded_on_the_left():
    pretrained = mmx.load_pretrained(GPT2)
    prompt = np.asarray([[5, 9, 11]])
    alone = pretrained.generate(4, input_ids=prompt)
    padded = pretrained.generate(4, input_ids=np.pad(prompt, ((0, 0), (2, 0))), attention_mask=[[0, 0, 1, 1, 1]])
    np.testing.assert_array_equal(padded["sequences"][:, 2:], alone["sequences"])
    np.testing.assert_allclose(padded["logits"], alone["logits"], atol=1e-4)


def test_another_resolution():
    pretrained = mmx.load_pretrained(VIT)
    fields = pretrained(pixel_values=np.ones((1, 3, 32, 48), "f"))
    assert fields["last_hidden_state"].shape == (1, 1 + 4 * 6, 32) and np.isfinite(fields["logits"]).all()


def test_flags_choose_what_is_computed():
    folder = Path(__file__).parent / "published" / "BlipForImageTextRetrieval"
    pretrained, given = mmx.load_pretrained(folder), safetensors.numpy.load_file(folder / "inputs.safetensors")
    matched, apart = (pretrained(**given, use_itm_head=flag) for flag in (True, False))
    assert "itm_score" in matched and "itc_score" not in matched
    assert "itc_score" in apart and "itm_score" not in apart
    assert np.abs(matched["question_embeds"] - apart["question_embeds"]).max() > 1e-3
