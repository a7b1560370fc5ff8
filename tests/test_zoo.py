"""Published models: parity with their reference implementations, weights in both directions, names."""

import json
import shutil
from pathlib import Path
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import mmx
from mmx.errors import InputError
from mmx.parallel import MeshConfig, make_mesh
from mmx.topologies import Joint, PerStream
from mmx.zoo import FAMILIES, NAMES, Pretrained, configuration
from mmx.zoo.family import Chosen
from mmx.zoo.weights import INDEX, flat, resolve, write

PUBLISHED = sorted(path for path in (Path(__file__).parent / "published").iterdir())
BERT, CLIP, GPT2, T5, VIT, WAV2VEC2 = (
    Path(__file__).parent / "published" / name
    for name in (
        "BertForPreTraining",
        "CLIPModel",
        "GPT2LMHeadModel",
        "T5ForConditionalGeneration",
        "ViTForImageClassification",
        "Wav2Vec2Model",
    )
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


def test_roberta_counts_places_over_what_is_no_padding(tmp_path):
    """By value against the published rule, wherever the padding stands; and under published names."""
    small = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    family, config = configuration("roberta-base", **small, max_position_embeddings=9)
    model = mmx.create_model("roberta-base", heads=("masked-lm",), **small, max_position_embeddings=9)
    params = jax.jit(lambda key: model.init(key, mmx.example_batch(model)))(jax.random.key(0))["params"]
    pretrained = Pretrained(model, params, config, family, ("masked-lm",))
    ids = np.asarray([[1, 1, 4, 7, 5], [4, 5, 6, 7, 8], [9, 4, 1, 1, 1]])
    expected = np.asarray([[1, 1, 2, 3, 4], [2, 3, 4, 5, 6], [2, 3, 1, 1, 1]])
    found = pretrained(input_ids=ids, output_hidden_states=True)
    table = params["modalities_text"]
    x = table["token"]["embedding"][ids] + table["position"][expected] + table["segment"]["embedding"][0]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(found["hidden_states"][0], x, atol=1e-5)
    told = pretrained(input_ids=ids, position_ids=expected)
    np.testing.assert_array_equal(found["logits"], told["logits"])
    with pytest.raises(InputError, match="8 tokens; places are counted from 2, up to 7 fit"):
        pretrained(input_ids=np.full((1, 8), 4))
    mmx.save_pretrained(tmp_path, pretrained)
    names = set(safetensors.numpy.load_file(tmp_path / "model.safetensors"))
    assert names >= {"roberta.embeddings.position_embeddings.weight", "lm_head.layer_norm.weight", "lm_head.bias"}
    assert mmx.load_pretrained(tmp_path).family.name == "roberta"
    assert sum(x.size for x in jax.tree.leaves(_shapes("roberta-base", type_vocab_size=2))) == 124_646_400


def _shapes(name, heads=(), **fields):
    model = mmx.create_model(name, heads=heads, **fields)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), mmx.example_batch(model)))["params"]


def test_names():
    assert mmx.list_models("clip*") == sorted(n for n in NAMES if n.startswith("clip"))
    assert set(mmx.list_models(["gpt2", "bert-base-*"])) >= {"gpt2", "bert-base-uncased"}
    with pytest.raises(InputError, match="did you mean 'bert-base-uncased'"):
        mmx.create_model("bert-base-uncasd")
    with pytest.raises(InputError) as error:
        mmx.create_model("whisper-tinny")
    assert "did you mean 'whisper-tiny'" in str(error.value) and f"{len(NAMES)} in all" in str(error.value)
    assert len(str(error.value)) < 400
    with pytest.raises(InputError, match=r"pixel_values: expected images \(B, C, H, W\)"):
        mmx.load_pretrained(VIT)(pixel_values=[[1.0]])
    with pytest.raises(InputError, match="unknown field 'num_layers'"):
        mmx.create_model("bert-base-uncased", num_layers=3)
    with pytest.raises(InputError, match="unknown field 'image_sise'; did you mean 'image_size'"):
        mmx.create_model("clip-vit-base-patch32", vision_config={"image_sise": 3})
    small = mmx.create_model("clip-vit-base-patch32", vision_config={"num_hidden_layers": 1}, dtype="bfloat16")
    assert small.stages[0].depth["image"] == 1 and small.stages[0].block["image"].dtype == "bfloat16"
    assert all(family.name == name for name, family in FAMILIES.items())


def test_how_a_published_model_runs_changes_nothing():
    ids = np.arange(1, 7).reshape(2, 3)
    one, other = mmx.load_pretrained(BERT), mmx.load_pretrained(BERT, unroll=9, remat="full")
    block = other.model.stages[0].block
    assert (block.unroll, block.remat) == (9, "full") and jax.tree.structure(one.params) == jax.tree.structure(other.params)

    def gradient(pretrained):
        return jax.grad(lambda p: pretrained.apply(p, input_ids=ids)["last_hidden_state"][:, 0, 0].sum())(pretrained.params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient(one), gradient(other))


def test_generation_continues_prompts_padded_on_the_left():
    pretrained = mmx.load_pretrained(GPT2)
    prompt = np.asarray([[5, 9, 11]])
    alone = pretrained.generate(4, input_ids=prompt)
    padded = pretrained.generate(4, input_ids=np.pad(prompt, ((0, 0), (2, 0))), attention_mask=[[0, 0, 1, 1, 1]])
    np.testing.assert_array_equal(padded["sequences"][:, 2:], alone["sequences"])
    np.testing.assert_allclose(padded["logits"], alone["logits"], atol=1e-4)


def test_older_names_are_read(tmp_path):
    shutil.copytree(WAV2VEC2, tmp_path, dirs_exist_ok=True)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    old = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    for new, name in old.items():
        tensors = {n.replace(new, name): x for n, x in tensors.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    params = mmx.load_pretrained(tmp_path).params
    jax.tree.map(np.testing.assert_array_equal, params, mmx.load_pretrained(WAV2VEC2).params)


@pytest.mark.parametrize(
    ("folder", "name"), [("LlavaForConditionalGeneration", "llama"), ("PaliGemmaForConditionalGeneration", "gemma")]
)
def test_a_decoder_alone_is_the_one_inside(tmp_path, folder, name):
    """The text's weights under the names of the decoder's own class give what the whole gives without an image."""
    source = PUBLISHED[0].parent / folder
    fields = json.loads((source / "config.json").read_text())["text_config"] | {"use_bidirectional_attention": None}
    fields.pop("use_bidirectional_attention" if name == "llama" else "num_image_tokens")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    inside = {n.removeprefix("language_model."): x for n, x in tensors.items() if n.startswith("language_model.")}
    safetensors.numpy.save_file(inside, tmp_path / "model.safetensors")
    alone, ids = mmx.load_pretrained(tmp_path), np.arange(2, 12).reshape(2, 5)
    assert alone.family.name == name
    whole = mmx.load_pretrained(source)(input_ids=ids, output_hidden_states=True)
    found = alone(input_ids=ids, position_ids=np.arange(5)[None] + 3, output_hidden_states=True)
    for field in ("logits", "last_hidden_state"):
        np.testing.assert_allclose(found[field], whole[field], atol=2e-5)
    assert len(found["hidden_states"]) == len(whole["hidden_states"])


def test_another_resolution():
    pretrained = mmx.load_pretrained(VIT)
    fields = pretrained(pixel_values=np.ones((1, 3, 32, 48), "f"))
    assert fields["last_hidden_state"].shape == (1, 1 + 4 * 6, 32) and np.isfinite(fields["logits"]).all()


def test_parts_of_one_model_in_another(rng):
    """A BERT in the text tower and a ViT of another resolution in the image tower of a model with a joint encoder on top."""
    bert, vit = mmx.load_pretrained(BERT), mmx.load_pretrained(VIT)
    text, image = bert.model.modalities["text"].clone(), vit.model.modalities["image"].clone(size=(32, 32))
    blocks = {"text": bert.model.stages[0].block, "image": vit.model.stages[0].block}
    stages = (PerStream(3, blocks), Joint(1))
    model = mmx.build_model({"image": image, "text": text}, stages, width=32, heads=4)
    params = model.init(jax.random.key(0), mmx.example_batch(model))["params"]
    towers = {part: part for part in ("modalities_text", "stages_0/text")}
    new = mmx.zoo.transplant(params, bert.params, towers)
    grids = {"modalities_image/position": ((3, 4), (4, 4))}
    new = mmx.zoo.transplant(new, vit.params, {part: part for part in ("modalities_image", "stages_0/image")}, grids)
    assert new["modalities_image"]["position"].shape == (17, 32)
    np.testing.assert_array_equal(new["stages_1"]["stack"]["norm"]["scale"], params["stages_1"]["stack"]["norm"]["scale"])
    ids = rng.integers(1, 90, (2, 7))
    raw = {"ids": ids, "segment": np.zeros_like(ids)}
    towers_only = model.clone(stages=stages[:1], embed=None)
    out: Any = towers_only.apply({"params": {k: v for k, v in new.items() if "1" not in k}}, {"text": raw})
    found = out.streams["text"].values
    np.testing.assert_allclose(found, bert(input_ids=ids)["last_hidden_state"], atol=1e-5)
    with pytest.raises(InputError) as error:
        mmx.zoo.transplant(params, vit.params, {"modalities_image": "modalities_image", "stages_0/image": "stages_1/stack"})
    assert "modalities_image/position is (13, 32), modalities_image/position is (17, 32)" in str(error.value)
    with pytest.raises(InputError, match="the model has nothing at stages_9"):
        mmx.zoo.transplant(params, vit.params, {"stages_0": "stages_9"})


def test_fields_whose_length_hangs_on_values():
    array = np.arange(12).reshape(2, 3, 2)
    kept = Chosen(jnp.asarray(array), jnp.asarray([True, False, True]), 1).take()
    np.testing.assert_array_equal(kept, array[:, [0, 2]])
    pretrained = mmx.load_pretrained(Path(__file__).parent / "published" / "ViltModel")
    pixels, mask = np.ones((2, 3, 24, 32), "f"), np.zeros((2, 24, 32), int)
    mask[0, :8, :24], mask[1, :16, :8] = 1, 1
    fields = pretrained(input_ids=np.ones((2, 4), int), pixel_values=pixels, pixel_mask=mask)
    assert fields["last_hidden_state"].shape == (2, 4 + 1 + 3, 32)  # as long as the largest image of the batch
    assert fields["image_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_what_is_written_may_be_told_by_its_labels():
    """Without decoder_input_ids, the labels stand one place later behind the first id; -100 is read as padding."""
    pretrained = mmx.load_pretrained(T5)
    ids, labels = np.arange(1, 11).reshape(2, 5), np.asarray([[5, 9, 1], [7, -100, -100]])
    told = pretrained(input_ids=ids, labels=labels)
    given = pretrained(input_ids=ids, labels=labels, decoder_input_ids=np.asarray([[0, 5, 9], [0, 7, 0]]))
    np.testing.assert_array_equal(told["logits"], given["logits"])
    np.testing.assert_array_equal(told["loss"], given["loss"])


def test_the_matrix_of_scores_is_tied_where_the_file_has_no_other(tmp_path):
    """Flan-T5's is its own, whatever config.json says of it; then nothing is scaled."""
    shutil.copytree(T5, tmp_path, dirs_exist_ok=True)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"scale_decoder_outputs": False}))
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    given = {"input_ids": np.arange(1, 6)[None], "decoder_input_ids": np.asarray([[0, 3]])}
    tied = mmx.load_pretrained(tmp_path)(**given)
    np.testing.assert_allclose(tied["logits"], tied["last_hidden_state"] @ tensors["shared.weight"].T, atol=1e-4)
    tensors["lm_head.weight"] = 2 * tensors["shared.weight"]
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    np.testing.assert_allclose(mmx.load_pretrained(tmp_path)(**given)["logits"], 2 * tied["logits"], rtol=1e-4, atol=1e-4)


def test_flags_choose_what_is_computed():
    folder = Path(__file__).parent / "published" / "BlipForImageTextRetrieval"
    pretrained, given = mmx.load_pretrained(folder), safetensors.numpy.load_file(folder / "inputs.safetensors")
    matched, apart = (pretrained(**given, use_itm_head=flag) for flag in (True, False))
    assert "itm_score" in matched and "itc_score" not in matched
    assert "itc_score" in apart and "itm_score" not in apart
    assert np.abs(matched["question_embeds"] - apart["question_embeds"]).max() > 1e-3
