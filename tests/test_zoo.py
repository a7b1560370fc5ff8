"""Published models: parity with their reference implementations, weights in both directions, names."""

import dataclasses
import functools
import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import golden
import golden_losses
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import mmx
from mmx.errors import InputError
from mmx.model import abstract_params
from mmx.parallel import MeshConfig, make_mesh
from mmx.topologies import Joint, PerStream
from mmx.zoo import FAMILIES, NAMES, Pretrained, build, configuration
from mmx.zoo.config import override, parse
from mmx.zoo.family import Chosen
from mmx.zoo.folders import _names
from mmx.zoo.loss import class_loss
from mmx.zoo.pages import counts_of
from mmx.zoo.tensors import INDEX, write
from mmx.zoo.weights import flat, resolve

COUNTS = counts_of((Path(__file__).parent.parent / "docs" / "models.md").read_text())
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
    old, new = (safetensors.numpy.load_file(next(path.glob("*model.safetensors"))) for path in (folder, tmp_path))
    assert set(new) <= set(old)
    older = {before for name in new for before in _names(name, pretrained.family.older)}
    left = {n for n in set(old) - set(new) - older if not any(re.search(pattern, n) for pattern in pretrained.family.known)}
    assert left == set(), "neither written nor known to be a buffer or a copy"
    for name, array in new.items():
        np.testing.assert_array_equal(array, old[name], err_msg=name)


FIRST = {next(iter(family.names), "") for family in FAMILIES.values()}


@pytest.mark.parametrize("name", [n if n in FIRST else pytest.param(n, marks=pytest.mark.slow) for n in sorted(NAMES)])
def test_every_named_model_builds_at_full_size(name):
    """Through shapes only; every parameter has a published name."""
    family, config = configuration(name)
    model = mmx.create_model(name, heads=tuple(family.heads))
    params = abstract_params(model)
    named = {weight.path for weight in resolve(family.table(config), params)}
    assert set(flat(params)) == named
    bare = mmx.create_model(name)
    out, variables = jax.eval_shape(lambda: bare.init_with_output(jax.random.key(0), mmx.example_batch(bare)))
    assert out.streams and mmx.count_parameters(variables["params"]) == COUNTS[name], "run: python tests/test_pages.py"


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


def test_weights_that_were_there_before_are_read_no_more(tmp_path):
    """One file is written over by several, these by fewer, and by one; what is not of this layout stays."""
    pretrained = mmx.load_pretrained(BERT)
    mmx.save_pretrained(tmp_path, pretrained)
    (tmp_path / "model-card.safetensors").write_bytes(b"")
    for shard, factor in ((20_000, 1.5), (60_000, 2.0), (1 << 30, 3.0)):
        other = dataclasses.replace(pretrained, params=jax.tree.map(lambda x, factor=factor: factor * x, pretrained.params))
        mmx.save_pretrained(tmp_path, other, shard=shard)
        jax.tree.map(np.testing.assert_array_equal, mmx.load_pretrained(tmp_path).params, other.params)
        files = {path.name for path in tmp_path.glob("*.safetensors")} - {"model-card.safetensors"}
        index = tmp_path / INDEX
        assert files == (set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"})
    assert (tmp_path / "model-card.safetensors").exists()


def _random(folder, **fields):
    """A fixture's model with some fields changed, and random parameters."""
    source = mmx.load_pretrained(folder)
    config = override(source.config, fields)
    model = build(source.family, config, source.heads, "float32")
    shapes, random = abstract_params(model), np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), "float32"), shapes)
    return dataclasses.replace(source, model=model, params=params, config=config)


@pytest.mark.parametrize(
    ("folder", "read", "unread"),
    [
        (BERT, "cls.predictions.decoder.bias", "cls.predictions.bias"),
        (PUBLISHED[0].parent / "MarianMTModel", "model.decoder.embed_tokens.weight", "model.shared.weight"),
    ],
    ids=["bert", "marian"],
)
def test_one_leaf_under_two_names(tmp_path, folder, read, unread):
    """Where the matrix of scores is not tied, one of two tensors is read by nobody."""
    pretrained = _random(folder, tie_word_embeddings=False)
    mmx.save_pretrained(tmp_path, pretrained)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    np.testing.assert_array_equal(tensors[read], tensors[unread])
    safetensors.numpy.save_file({**tensors, unread: tensors[unread] + 1}, file)
    for mesh in (None, make_mesh(MeshConfig(data=8))):
        jax.tree.map(np.testing.assert_array_equal, mmx.load_pretrained(tmp_path, mesh=mesh).params, pretrained.params)


@pytest.mark.parametrize("folder", [CLIP, PUBLISHED[0].parent / "SiglipModel"], ids=lambda folder: folder.name)
def test_a_published_temperature_has_no_limit(folder):
    """SigLIP's is exp(4.77); the limit of 100 is one of training."""
    pretrained = mmx.load_pretrained(folder)
    params = {**pretrained.params, "logit_scale": jnp.full_like(pretrained.params["logit_scale"], 4.77)}
    found = pretrained.apply(params, **{n: x for n, x in golden.given(folder).items() if n in ("input_ids", "pixel_values")})
    text, image = (np.asarray(found[f"{n}_embeds"], np.float64) for n in ("text", "image"))
    expected = np.exp(4.77) * text @ image.T + np.asarray(params.get("logit_bias", 0.0))
    np.testing.assert_allclose(found["logits_per_text"], expected, atol=1e-3)
    np.testing.assert_allclose(found["logit_scale"], np.exp(4.77), rtol=1e-5)


def test_heads_that_are_left_out_are_told_by_how_their_names_begin(tmp_path):
    for folder, name, known in (
        (BERT, "bert.encoder.extra.cls.predictions.w", "cls.predictions.more"),
        (PUBLISHED[0].parent / "TimmVisionTransformer", "blocks.0.head.weight", "head.more"),
    ):
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
        safetensors.numpy.save_file({**tensors, name: np.ones(1, "f"), known: np.ones(1, "f")}, tmp_path / "model.safetensors")
        with pytest.raises(InputError) as error:
            mmx.load_pretrained(tmp_path, heads=())
        assert f"unexpected: {name}" in str(error.value) and "(1 tensors)" in str(error.value)


def test_files_that_are_not_json_are_named(tmp_path):
    shutil.copytree(PUBLISHED[0].parent / "OpenClipCLIP", tmp_path, dirs_exist_ok=True)
    for content, message in (("{", "is not JSON"), ("[]", "is a list; expected an object")):
        (tmp_path / "open_clip_config.json").write_text(content)
        with pytest.raises(InputError, match=f"open_clip_config.json {message}"):
            mmx.load_pretrained(tmp_path)


def test_what_is_not_finite_is_compared():
    one, nan, inf = np.ones(3, "f"), np.asarray([1, np.nan, 1], "f"), np.asarray([1, -np.inf, 1], "f")
    assert golden.share(nan, one) == golden.share(inf, one) == golden.share(one, nan) == golden.share(-inf, inf) == np.inf
    assert golden.share(nan, nan) == golden.share(inf, inf) == golden.share(one, one) == 0
    assert golden.share(one + 4e-5, one) > 1 > golden.share(inf + 1e-5, inf) > 0


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


@pytest.mark.parametrize("folder", [path for path in PUBLISHED if not golden_losses.call_of(path)], ids=lambda path: path.name)
def test_what_is_inside_any_head_loads_alone(folder):
    """Every published file gives its bare model: its tensors as they were, and nothing of a head."""
    family = golden.CLASSES.get(golden.class_of(folder), golden.Class()).family
    bare, whole = mmx.load_pretrained(folder, family=family, heads=()), mmx.load_pretrained(folder, family=family)
    assert bare.heads == () and not {f"heads_{head}" for head in bare.family.heads} & {*bare.params}
    leaves, kept = flat(bare.params), flat(whole.params)
    for name in {*leaves} & {*kept}:
        np.testing.assert_array_equal(leaves[name], kept[name])


@pytest.mark.parametrize(("folder", "heads"), [(BERT, ("masked-lm",)), (BERT, ()), (VIT, ())], ids=["words", "bert", "vit"])
def test_a_pooler_only_where_the_file_has_one(tmp_path, folder, heads):
    """BertForMaskedLM is published without a pooler, as are bare models of some; the numbers of the others are the same."""
    names = ("pooler", "seq_relationship", "classifier", *(() if heads else ("cls.",)))
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors = {name: x for name, x in tensors.items() if not any(part in name for part in names)}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    found, given = mmx.load_pretrained(tmp_path), golden.given(folder)
    assert found.heads == heads and not [name for name in found.params if name.startswith("poolers")]
    given = {name: given[name] for name in ("input_ids", "attention_mask", "token_type_ids", "pixel_values") if name in given}
    fields, whole = found(**given), mmx.load_pretrained(folder)(**given)
    assert "pooler_output" not in fields
    np.testing.assert_array_equal(fields["last_hidden_state"], whole["last_hidden_state"])
    mmx.save_pretrained(tmp_path / "again", found)
    again = safetensors.numpy.load_file(tmp_path / "again" / "model.safetensors")
    assert {n.removeprefix("bert.").removeprefix("vit.") for n in again} <= {
        n.removeprefix("bert.").removeprefix("vit.") for n in tensors
    }
    assert mmx.load_pretrained(tmp_path / "again").heads == heads


def test_weights_of_attention():
    """By value against softmax(q k) of the first layer; a family that returns none says so."""
    pretrained, given = mmx.load_pretrained(BERT), golden.given(BERT)
    given = {name: given[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    fields = pretrained(**given, output_hidden_states=True, output_attentions=True)
    own, x = pretrained.params["stages_0"]["text"]["layers"]["block"]["self"], np.asarray(fields["hidden_states"][0])
    q, k = (np.einsum("bld,dhk->blhk", x, own[n]["kernel"][0]) + own[n]["bias"][0] for n in ("query", "key"))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores) * (given["attention_mask"][:, None, None] != 0)
    assert len(fields["attentions"]) == pretrained.config.num_hidden_layers and "attentions" not in pretrained(**given)
    np.testing.assert_allclose(fields["attentions"][0], weights / weights.sum(-1, keepdims=True), atol=1e-5)
    assert "attentions" in mmx.load_pretrained(VIT)(**golden.given(VIT), output_attentions=True)
    with pytest.raises(InputError, match="t5: it returns no attentions; call it without output_attentions=True"):
        mmx.load_pretrained(T5)(**golden.given(T5), output_attentions=True)


RECORDED: dict[str | None, Path] = {}
for _folder in PUBLISHED:
    _config = _folder / "config.json"
    _told = json.loads(_config.read_text()).get("model_type") if _config.exists() else None
    if _folder.name != "PerceiverForMaskedLM":  # whose bare model reads what is embedded already
        RECORDED.setdefault(golden.CLASSES.get(golden.class_of(_folder), golden.Class()).family or _told, _folder)
_IDS = {"input_ids": np.ones((2, 5), np.int32)}
UNRECORDED = {
    **dict.fromkeys(("clip_text_model", "gemma", "llama", "roberta", "xlm-roberta", "videobert"), _IDS),
    "clip_vision_model": {"pixel_values": np.ones((1, 3, 224, 224), np.float32)},
    "hero": {"f_sub_input_ids": np.ones((2, 5), np.int32), "f_v_feats": np.ones((2, 3, 4352), np.float32)},
}
OF_HEADS = {"flava": "input_ids$", "univl": "decoder"}  # beside labels and targets, inputs that the bare model does not take


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_inside_is_returned_or_refused_by_name(name):
    """Of every family's bare model, by shapes alone: no call that asks for states or attentions gets an answer without them."""
    family = FAMILIES[name]
    if name in UNRECORDED:
        config, given = (configuration(next(iter(family.names)))[1] if family.names else family.config()), UNRECORDED[name]
    else:
        config = mmx.load_pretrained(RECORDED[name], family=name, heads=()).config
        unread = re.compile(f"{OF_HEADS.get(name, 'ans$')}|ans$|.*(label|target)")
        given = {n: x for n, x in golden.given(RECORDED[name]).items() if not unread.match(n)}
    model = build(family, config, (), "float32")
    pretrained = Pretrained(model, abstract_params(model), config, family)

    def asked(**flags):
        fields = golden.flatten(jax.eval_shape(lambda p: pretrained.apply(p, **flags, **given), pretrained.params))
        return [n for n in fields if re.search(r"(hidden_states|attentions)\.\d", n)]

    try:
        inside = asked(output_hidden_states=True, output_attentions=True)
        assert any("attentions." in n for n in inside)
    except InputError as error:
        assert str(error).startswith(f"{name}: it returns no attentions; call it without output_attentions=True")
        inside = asked(output_hidden_states=True)
    assert any("hidden_states.1" in n for n in inside)


LAST = {  # families whose originals have no such outputs -> those that end with the last state
    "ALBEFMultimodalEncoder": {"hidden_states": "last_hidden_state"},
    "InterBERT": {"text_hidden_states": "sequence_output_t", "image_hidden_states": "sequence_output_v"},
    "UNITER": {"hidden_states": "sequence_output"},
    "UniVL": {
        "text_hidden_states": "text_output",
        "visual_hidden_states": "visual_output",
        "cross_hidden_states": "cross_output",
    },
    "ViLBERT": {"text_hidden_states": "sequence_output_t", "image_hidden_states": "sequence_output_v"},
}


@pytest.mark.parametrize("name", LAST)
def test_states_end_with_what_comes_out(name):
    """Post-norm, so that the last layer's are the outputs; those before differ from it and from each other."""
    folder = PUBLISHED[0].parent / name
    pretrained = mmx.load_pretrained(folder, family=golden.CLASSES[golden.class_of(folder)].family)
    fields = pretrained(**golden.given(folder), output_hidden_states=True)
    for inside, output in LAST[name].items():
        states = fields[inside]
        np.testing.assert_allclose(states[-1], fields[output], atol=1e-5)
        assert all(np.abs(a - b).max() > 1e-2 for a, b in itertools.combinations(states, 2))


def test_the_loss_of_classes():
    """By the published `problem_type`, told or seen, against its formula; labels that do not fit it are named."""
    rng = np.random.default_rng(0)
    logits, numbers = rng.normal(size=(4, 3)).astype(np.float32), rng.random((4, 3)).astype(np.float32)
    labels = np.asarray([0, 2, 1, -100])
    squares = np.square(logits - numbers).mean()
    each = np.logaddexp(0, logits) - numbers * logits
    one = (np.log(np.exp(logits).sum(-1)) - logits[np.arange(4), labels.clip(0)])[:3].mean()
    for expected, *given in (
        (one, logits, labels),
        (one, logits, labels[:, None], "single_label_classification"),
        (each.mean(), logits, numbers),
        (squares, logits, numbers, "regression"),
        (np.square(logits[:, 0] - numbers[:, 0]).mean(), logits[:, :1], numbers[:, 0]),
        (each[:, 0].mean(), logits[:, :1], numbers[:, :1], "multi_label_classification"),
    ):
        np.testing.assert_allclose(class_loss(*given), expected, rtol=1e-5)
    with pytest.raises(InputError, match=r"labels: expected \(4, 3\) where problem_type is 'regression', got \(4,\)"):
        class_loss(logits, numbers[:, 0], "regression")
    with pytest.raises(InputError, match="labels: expected integers where problem_type is 'single_label_classification'"):
        class_loss(logits, numbers[:, 0])
    with pytest.raises(InputError, match="unknown problem 'regresion'; did you mean 'regression'"):
        class_loss(logits, numbers, "regresion")
    small = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    for classes, problem, target in ((1, None, numbers[:2, 0]), (3, "regression", numbers[:2])):
        family, config = configuration("roberta-base", **small, num_labels=classes, problem_type=problem)
        model = build(family, config, ("classification",), "float32")
        params = jax.jit(lambda key, model=model: model.init(key, mmx.example_batch(model)))(jax.random.key(0))["params"]
        fields = Pretrained(model, params, config, family, ("classification",))(input_ids=np.full((2, 5), 4), labels=target)
        expected = np.square(np.asarray(fields["logits"]) - target.reshape(2, -1)).mean()
        np.testing.assert_allclose(fields["loss"], expected, rtol=1e-5)


def test_classes_of_published_names():
    for name, family in NAMES.items():
        if name.startswith(("vit-", "deit-")) and family.name in ("vit", "deit"):
            classes = configuration(name)[1].num_labels
            assert classes == (2 if name.endswith("-in21k") else 1000), (name, family.name)


def test_a_mapping_in_a_configuration(tmp_path):
    """It is a part of what a program is made for, and written back as it came."""
    shutil.copytree(PUBLISHED[0].parent / "CoCa", tmp_path, dirs_exist_ok=True)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["text_cfg"] |= {"tokenizer_kwargs": {"clean": ["lower", {"strip": True}]}, "act_kwargs": {}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    pretrained = mmx.load_pretrained(tmp_path, family="coca")
    given = golden.given(tmp_path)
    assert np.isfinite(pretrained(**given)["loss"])
    mmx.save_pretrained(tmp_path / "again", pretrained)
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {n: again["text_cfg"][n] for n in ("tokenizer_kwargs", "act_kwargs")} == {
        n: fields["text_cfg"][n] for n in ("tokenizer_kwargs", "act_kwargs")
    }
    changed = override(pretrained.config, {"text_cfg": {"tokenizer_kwargs": {"clean": []}}})
    assert hash(changed) != hash(pretrained.config) and mmx.load_pretrained(tmp_path, family="coca").config == pretrained.config


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
    return abstract_params(model)


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
    for fields, message in (
        ({"hidden_size": "32"}, "BertConfig.hidden_size='32'; expected int"),
        ({"hidden_size": {"a": 1}}, "BertConfig.hidden_size={'a': 1}; expected int"),
    ):
        with pytest.raises(InputError, match=message):
            mmx.create_model("bert-base-uncased", **fields)
    with pytest.raises(InputError, match="VisionConfig.patch_size='32'; expected int"):
        mmx.create_model("clip-vit-base-patch32", vision_config={"patch_size": "32"})
    assert configuration("vit-base-patch16-224", image_size=[32, 48])[1].image_size == (32, 48)
    with pytest.raises(InputError, match="unknown field 'image_sise'; did you mean 'image_size'"):
        mmx.create_model("clip-vit-base-patch32", vision_config={"image_sise": 3})
    small = mmx.create_model("clip-vit-base-patch32", vision_config={"num_hidden_layers": 1}, dtype="bfloat16")
    assert small.stages[0].depth["image"] == 1 and small.stages[0].block["image"].dtype == "bfloat16"
    assert all(family.name == name for name, family in FAMILIES.items())


@pytest.mark.parametrize(
    "folder", ["CLIPModel", "CoCa", "OpenClipCLIP", "TimmVisionTransformerDistilled", "TimmBeit", "SiglipModel"]
)
def test_under_the_names_of_another_library_and_back(tmp_path, folder):
    """The same tensors, and the same numbers under other names; live, the other library reads what is written, and agrees."""
    source = PUBLISHED[0].parent / folder
    pretrained = mmx.load_pretrained(source, family=golden.CLASSES.get(folder, golden.Class()).family)
    own, other = pretrained.under(None), pretrained.under(pretrained.family.libraries[0].name)
    if folder == "CLIPModel":
        inputs, recorded = (safetensors.numpy.load_file(source / f"{n}.safetensors") for n in ("inputs", "outputs"))
        found = other(image=inputs["pixel_values"], text=inputs["input_ids"])
        for name, theirs in {"image_embeds": "image_features", "logits_per_text": "text_logits"}.items():
            np.testing.assert_allclose(found[theirs], recorded[name], atol=1e-4)
    if folder == "SiglipModel":  # timm has no image tower so small
        with pytest.raises(InputError, match="timm has no image tower"):
            mmx.save_pretrained(tmp_path, other)
        return
    for form in (other, own):
        mmx.save_pretrained(tmp_path / str(form is own), form)
        again = mmx.load_pretrained(tmp_path / str(form is own), family="coca" if folder == "CoCa" else None)
        assert again.family.library is form.family.library and again.heads == pretrained.heads
        jax.tree.map(np.testing.assert_array_equal, again.params, pretrained.params)
        if folder in ("OpenClipCLIP", "TimmBeit"):  # images lie in the configuration of the one, and beside that of the other
            image = np.random.default_rng(0).integers(0, 255, (26, 26, 3), np.uint8)
            made = [p.preprocess(images=[image]) for p in (pretrained, again)]
            np.testing.assert_allclose(*(next(iter(inputs.values())) for inputs in made), atol=1e-6)
        assert folder == "CLIPModel" or again.config == pretrained.config  # the end of its texts has two names
    with pytest.raises(InputError, match="unknown library 'open_clap'"):
        pretrained.under("open_clap")


def test_siglip_under_the_names_of_open_clip(tmp_path):
    """The state_dict of open_clip 3.3.0's `create_model("ViT-B-16-SigLIP")`, with how many layers have each name; and by value."""
    recorded = json.loads((Path(__file__).parent / "siglip_under_open_clip.json").read_text())
    (library,) = FAMILIES["siglip"].libraries
    family, config = configuration("ViT-B-16-SigLIP")
    weights = resolve(family.under(library).table(config), _shapes("ViT-B-16-SigLIP"))
    found: dict[str, Any] = {}
    for name, shape in {w.name: w.shape for w in weights}.items():
        pattern = re.sub(r"(blocks)\.\d+\.", r"\1.{}.", name)
        found[pattern] = [found.get(pattern, [0])[0] + 1, list(shape)]
    assert found == recorded
    assert parse(type(config), library.read(library.write(config, (), None, {}))) == config
    p = mmx.load_pretrained(PUBLISHED[0].parent / "SiglipModel")
    write(tmp_path, resolve(p.under("open_clip").family.table(p.config), p.params), p.params)
    theirs = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    own = safetensors.numpy.load_file(PUBLISHED[0].parent / "SiglipModel" / "model.safetensors")
    head, width = own["vision_model.head.attention.in_proj_weight"], p.config.vision_config.hidden_size
    np.testing.assert_array_equal(theirs["visual.trunk.attn_pool.q.weight"], head[:width])
    np.testing.assert_array_equal(theirs["visual.trunk.attn_pool.kv.weight"], head[width:])
    layer = [own[f"vision_model.encoder.layers.1.self_attn.{n}_proj.weight"] for n in "qkv"]
    np.testing.assert_array_equal(theirs["visual.trunk.blocks.1.attn.qkv.weight"], np.concatenate(layer))
    layer = [own[f"text_model.encoder.layers.1.self_attn.{n}_proj.bias"] for n in "qkv"]
    np.testing.assert_array_equal(theirs["text.transformer.resblocks.1.attn.in_proj_bias"], np.concatenate(layer))


@pytest.mark.parametrize(
    ("folder", "change", "message"),
    [
        ("OpenClipCLIP", {"model_cfg.vision_cfg.no_ln_pre": True}, "VisionConfig: no_ln_pre=True is not supported"),
        ("OpenClipCLIP", {"model_cfg.text_cfg.pool_type": "eos"}, "pool_type='eos' is not supported; it has to be 'argmax'"),
        ("OpenClipCLIP", {"model_cfg.text_cfg.act_kwargs": {"beta": 1}}, "act_kwargs={'beta': 1} with quick_gelu=False"),
        ("OpenClipCLIP", {"model_cfg.vision_cfg.norm_kwargs": {"affine": 1}}, "norm_kwargs={'affine': 1}; only eps"),
        ("OpenClipCLIP", {"model_cfg.vision_cfg.hidth": 3}, "unknown field 'hidth'; did you mean 'width'"),
        ("OpenClipCLIP", {"model_cfg.vision_cfg.timm_model_name": "resnet50"}, "timm_pool='avg' is not supported"),
        ("OpenClipCLIP", {"preprocess_cfg.resize_mode": "shorter"}, "unknown resize mode 'shorter'; did you mean 'shortest'"),
        ("TimmVisionTransformer", {"model_args.reg_tokens": 4}, "Arguments has unknown field 'reg_tokens'"),
        ("TimmVisionTransformer", {"global_pool": "avg", "model_args.global_pool": "avg"}, "global_pool='avg' is not supported"),
        ("TimmVisionTransformer", {"architecture": "vit_wee_patch16_224"}, "architecture='vit_wee_patch16_224' is not supported"),
        ("TimmVisionTransformer", {"architecture": "resnet50"}, "has no model_type"),
        ("TimmBeit", {"model_args.img_size": [24, 32]}, "the grid has to be a square"),
    ],
)
def test_what_is_not_supported_of_other_libraries_is_named(tmp_path, folder, change, message):
    shutil.copytree(PUBLISHED[0].parent / folder, tmp_path, dirs_exist_ok=True)
    file = next(tmp_path.glob("*config.json"))
    fields = json.loads(file.read_text())
    for name, value in change.items():
        *parts, last = name.split(".")
        functools.reduce(lambda inner, part: inner[part], parts, fields)[last] = value
    file.write_text(json.dumps(fields))
    with pytest.raises(InputError) as error:
        mmx.load_pretrained(tmp_path)
    assert message in str(error.value)


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
    with pytest.raises(InputError, match=r"attention_mask: the mask of prompt 0 is \[1, 1, 1, 0, 0\]; prompts are padded before"):
        pretrained.generate(4, input_ids=np.pad(prompt, ((0, 0), (0, 2))), attention_mask=[[1, 1, 1, 0, 0]])


_RENAMED = {r"encoder\.layer\.": "layers.", r"attention\.attention\.(query|key|value)": r"attention.\1_proj"}
_RENAMED |= {
    "query_proj": "q_proj",
    "key_proj": "k_proj",
    "value_proj": "v_proj",
    r"attention\.output\.dense": "attention.o_proj",
}
_RENAMED |= {r"intermediate\.dense": "mlp.fc1", r"output\.dense": "mlp.fc2"}
_MODEL = {r"^language_model\.lm_head": "lm_head", r"^language_model\.model": "model.language_model", "^multi": "model.multi"}


@pytest.mark.parametrize(
    ("folder", "changes"),
    [
        (
            "Wav2Vec2Model",
            {r"parametrizations\.weight\.original0": "weight_g", r"parametrizations\.weight\.original1": "weight_v"},
        ),
        ("BertForPreTraining", {r"LayerNorm\.weight": "LayerNorm.gamma", r"LayerNorm\.bias": "LayerNorm.beta"}),
        ("ViTForImageClassification", _RENAMED),
        ("BeitForMaskedImageModeling", {r"attention\.attention\.relative": "relative"} | _RENAMED),
        ("ViTMAEForPreTraining", {r"decoder\.decoder_encoder\.layer": "decoder.decoder_layers"}),
        ("ViTMAEForPreTraining", {r"decoder\.decoder_encoder\.layer": "decoder.decoder_layers"} | _RENAMED),
        (
            "VideoMAEForVideoClassification",
            {r"\.([qv])_bias$": r".\1.bias", r"\.q\.bias$": ".query.bias", r"\.v\.bias$": ".value.bias"},
        ),
        ("LlavaForConditionalGeneration", {r"^vision_tower": "vision_tower.vision_model"}),
        ("LlavaForConditionalGeneration", {r"^vision_tower": "model.vision_tower.vision_model"} | _MODEL),
        ("PaliGemmaForConditionalGeneration", {r"^vision_tower": "vision_tower.vision_model"}),
        ("PaliGemmaForConditionalGeneration", {r"^vision_tower": "model.vision_tower"} | _MODEL),
        ("OpenClipCLIP", {r"^(?!visual|logit)": "text."}),
    ],
)
def test_names_of_another_age_are_read(tmp_path, folder, changes):
    source = PUBLISHED[0].parent / folder
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    file = next(tmp_path.glob("*model.safetensors"))
    tensors = safetensors.numpy.load_file(file)
    renamed = {functools.reduce(lambda n, pair: re.sub(*pair, n), changes.items(), name): x for name, x in tensors.items()}
    assert not set(tensors) & set(renamed) >= set(tensors)
    safetensors.numpy.save_file(renamed, file)
    again, pretrained = mmx.load_pretrained(tmp_path), mmx.load_pretrained(source)
    assert again.heads == pretrained.heads
    jax.tree.map(np.testing.assert_array_equal, again.params, pretrained.params)


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


@pytest.mark.parametrize("name", ["LlavaForConditionalGeneration", "PaliGemmaForConditionalGeneration"])
def test_places_and_images_that_do_not_match_are_refused(name):
    pretrained = mmx.load_pretrained(PUBLISHED[0].parent / name)
    token, vision = pretrained.config.image_token_index, pretrained.config.vision_config
    size = (vision.image_size // vision.patch_size) ** 2
    pixels = np.zeros((1, 3, vision.image_size, vision.image_size), "f")
    for kept in (size - 1, size + 1):
        ids = np.asarray([[token] * kept + [9, 10]])
        for call in (pretrained, functools.partial(pretrained.generate, 1)):
            with pytest.raises(
                InputError, match=f"input_ids: {kept} image tokens .* 1 images of {size} tokens each, {size} in all"
            ):
                call(input_ids=ids, pixel_values=pixels)


@pytest.mark.parametrize("name", ["LlavaForConditionalGeneration", "PaliGemmaForConditionalGeneration"])
def test_rows_with_different_numbers_of_images(name, rng):
    """Image tokens are filled in order over the batch: each text gives what it gives alone with its own images."""
    pretrained = mmx.load_pretrained(PUBLISHED[0].parent / name)
    token, images = pretrained.config.image_token_index, rng.standard_normal((4, 3, 16, 16)).astype("f")  # of 4 tokens each
    ids = rng.integers(10, 60, (3, 15))
    ids[0, 1:5] = ids[0, 6:14] = ids[2, 2:4] = ids[2, 5:7] = token
    types = {"token_type_ids": np.zeros_like(ids)} if name.startswith("Pali") else {}
    written = np.zeros_like(ids)
    together = pretrained(input_ids=ids, pixel_values=images, written=written, **types)
    assert np.isfinite(together["logits"]).all()
    for row, own in ((0, images[:3]), (1, None), (2, images[3:])):
        alone = pretrained(input_ids=ids[row : row + 1], pixel_values=own, **{n: x[:1] for n, x in types.items()})
        np.testing.assert_allclose(alone["logits"][0], together["logits"][row], atol=2e-5)
    written[1, -1], ids[1, -1] = 1, token  # what was written by chance keeps no place for an image
    again = pretrained(input_ids=ids, pixel_values=images, written=written, **types)
    np.testing.assert_allclose(again["logits"][2], together["logits"][2], atol=2e-5)


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
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype("f"), abstract_params(model))
    towers = {part: part for part in ("modalities_text", "stages_0/text")}
    new = mmx.zoo.transplant(params, bert.params, towers)
    grids = {"modalities_image/position": ((3, 4), (4, 4))}
    new = mmx.zoo.transplant(new, vit.params, {part: part for part in ("modalities_image", "stages_0/image")}, grids)
    assert new["modalities_image"]["position"].shape == (17, 32)
    np.testing.assert_array_equal(new["stages_1"]["stack"]["norm"]["scale"], params["stages_1"]["stack"]["norm"]["scale"])
    ids = rng.integers(1, 90, (2, 7))
    raw = {"ids": ids, "segment": np.zeros_like(ids)}
    towers_only = model.clone(stages=stages[:1], embed=None)
    out: Any = jax.jit(towers_only.apply)({"params": {k: v for k, v in new.items() if "1" not in k}}, {"text": raw})
    found = out.streams["text"].values
    np.testing.assert_allclose(found, bert(input_ids=ids)["last_hidden_state"], atol=1e-5)
    with pytest.raises(InputError) as error:
        mmx.zoo.transplant(params, vit.params, {"modalities_image": "modalities_image", "stages_0/image": "stages_1/stack"})
    assert "modalities_image/position is (13, 32), modalities_image/position is (17, 32)" in str(error.value)
    with pytest.raises(InputError, match="the model has nothing at stages_9"):
        mmx.zoo.transplant(params, vit.params, {"stages_0": "stages_9"})


def test_any_two_towers_meet_in_one_space():
    """By names, by folders, by fields; the parameters of two folders in their towers give the vectors of the two alone."""
    name = "vision-text-dual-encoder"
    one = {"vision_config.num_hidden_layers": 1, "text_config.num_hidden_layers": 2}
    model = mmx.create_model(name, vision_config="clip-vit-base-patch32", text_config="roberta-base", projection_dim=9, **one)
    assert model.embed == 9 and model.stages[0].depth == {"image": 1, "text": 2} and model.modalities["text"].vocab == 50265
    towers = {"image": mmx.load_pretrained(CLIP), "text": mmx.load_pretrained(BERT)}
    family, config = configuration(name, vision_config=towers["image"], text_config=towers["text"])
    model = mmx.create_model(name, vision_config=towers["image"], text_config=towers["text"])
    params = jax.jit(lambda key: model.init(key, mmx.example_batch(model)))(jax.random.key(0))["params"]
    for part, tower in towers.items():
        same = {path: path for path in (f"modalities_{part}", f"stages_0/{part}", f"poolers_{part}")}
        params = mmx.zoo.transplant(params, tower.params, same)
    ids, pixels = np.arange(1, 11).reshape(2, 5), np.ones((2, 3, 24, 24), "f")
    found = Pretrained(model, params, config, family)(input_ids=ids, pixel_values=pixels, return_loss=True)
    text = towers["text"](input_ids=ids)
    np.testing.assert_allclose(found["text_model_output"]["pooler_output"], text["pooler_output"], atol=2e-5)
    image = towers["image"](pixel_values=pixels)["vision_model_output"]
    np.testing.assert_allclose(found["vision_model_output"]["pooler_output"], image["pooler_output"], atol=2e-5)
    z = image["pooler_output"] @ params["projections_image"]["projection"]["kernel"]
    np.testing.assert_allclose(found["image_embeds"], z / np.linalg.norm(z, axis=-1, keepdims=True), atol=2e-5)
    assert np.isfinite(found["loss"]) and found["logits_per_image"].shape == (2, 2)
    for tower, message in (
        ("t5-small", "a tower for text reads nothing else, in one stack"),
        ("vit-base-patch16-224", "a tower for text reads nothing else"),
        ("siglip-base-patch16-224", "unknown family 'siglip_text_model'"),
        (3, "text_config=3; name a model of the zoo"),
    ):
        with pytest.raises(InputError, match=message):
            mmx.create_model(name, text_config=tower)
    with pytest.raises(InputError, match="unknown field 'hidden_sise'"):
        mmx.create_model(name, text_config={"hidden_sise": 3})


def test_towers_of_clip_alone(tmp_path):
    """Under the names of their own classes, those of older files, and inside a dual encoder of older files."""
    whole = mmx.load_pretrained(CLIP)
    tensors, fields = safetensors.numpy.load_file(CLIP / "model.safetensors"), json.loads((CLIP / "config.json").read_text())
    pixels = np.ones((1, 3, 24, 24), "f")
    expected = whole(pixel_values=pixels)["vision_model_output"]["pooler_output"]
    (tmp_path / "config.json").write_text(json.dumps(fields["vision_config"]))
    for before in ("vision_model.", ""):
        inside = {before + n.removeprefix("vision_model."): x for n, x in tensors.items() if n.startswith("vision_model.")}
        safetensors.numpy.save_file(inside, tmp_path / "model.safetensors")
        np.testing.assert_array_equal(mmx.load_pretrained(tmp_path)(pixel_values=pixels)["pooler_output"], expected)
    fields |= {"model_type": "vision-text-dual-encoder"}
    fields = {n: fields[n] for n in ("model_type", "vision_config", "text_config", "projection_dim")}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    old = {n.replace("_model.", f"_model.{n.split('.')[0]}.", 1) if "_model." in n else n: x for n, x in tensors.items()}
    safetensors.numpy.save_file(old, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, mmx.load_pretrained(tmp_path).params, whole.params)


def test_videobert_is_a_bert_over_words_and_visual_words(tmp_path, rng):
    """Both kinds in one sequence, wherever the padding of the words is, and each alone: the numbers of BERT with its table."""
    small = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 20}
    small["max_position_embeddings"] = 10
    heads = ("masked-lm", "matching")
    family, c = configuration("videobert-base", **small, visual_vocab_size=16)
    model = family.build(c, heads, "float32")
    params = jax.jit(lambda key: model.init(key, mmx.example_batch(model)))(jax.random.key(0))["params"]
    mmx.save_pretrained(tmp_path / "video", Pretrained(model, params, c, family, heads))
    shutil.copytree(tmp_path / "video", tmp_path / "text")
    fields = json.loads((tmp_path / "video" / "config.json").read_text())
    del fields["visual_vocab_size"]
    (tmp_path / "text" / "config.json").write_text(json.dumps(fields | {"model_type": "bert", "vocab_size": 20 + 1 + 16}))
    tensors = safetensors.numpy.load_file(tmp_path / "video" / "model.safetensors")
    tensors = {name.replace("videobert.", "bert."): x for name, x in tensors.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "text" / "model.safetensors")
    both, bert = mmx.load_pretrained(tmp_path / "video"), mmx.load_pretrained(tmp_path / "text")

    words = np.asarray([[1, 5, 6, c.joint_token_id, 0], [1, 7, 8, 9, c.joint_token_id]])
    mask, ones = np.asarray([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]), np.ones((2, 5), int)
    codes = np.append(c.first_code + rng.integers(0, 16, (2, 4)), [[2], [2]], 1)
    labels, video_labels = np.where(words == 6, 6, -100), np.where(codes > 25, codes, -100)
    told = {"labels": labels, "video_labels": video_labels, "alignment_labels": np.asarray([0, 1])}
    found = both(input_ids=words, attention_mask=mask, video_ids=codes, **told, output_hidden_states=True)
    one = bert(
        input_ids=np.append(words, codes, 1),
        attention_mask=np.append(mask, ones, 1),
        token_type_ids=np.append(0 * ones, ones, 1),
        position_ids=np.append(np.arange(5) + 0 * ones, mask.sum(1, keepdims=True) + np.arange(5), 1),
        labels=np.append(labels, video_labels, 1),
        next_sentence_label=told["alignment_labels"],
        output_hidden_states=True,
    )
    for ours, theirs in {"alignment_logits": "seq_relationship_logits", "hidden_states": "hidden_states"}.items():
        np.testing.assert_allclose(found[ours], one[theirs], atol=2e-5)
    for field in ("loss", "prediction_logits", "last_hidden_state", "pooler_output"):
        np.testing.assert_allclose(found[field], one[field], atol=2e-5)

    video, text = both(video_ids=codes, video_labels=video_labels), both(input_ids=words, attention_mask=mask, labels=labels)
    for alone, ids, kind, there, asked in ((video, codes, ones, ones, video_labels), (text, words, 0 * ones, mask, labels)):
        one = bert(input_ids=ids, token_type_ids=kind, attention_mask=there, labels=asked)
        for field in ("loss", "prediction_logits", "last_hidden_state"):
            np.testing.assert_allclose(alone[field], one[field], atol=2e-5)
    assert "alignment_logits" not in text and "alignment_logits" not in video and "pooler_output" not in video
    with pytest.raises(InputError, match="11 words and visual words; up to 10 fit"):
        both(input_ids=words, video_ids=np.zeros((2, 6), int))
    sizes = {name: configuration(name)[1] for name in ("videobert-base", "videobert-large")}
    assert {c.first_code + c.visual_vocab_size for c in sizes.values()} == {30522 + 1 + 12**4}
    assert sizes["videobert-large"].num_hidden_layers == 24


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


def test_mult_may_end_in_one_stream(tmp_path):
    """Alone, a stream reads what it reads beside the others; two of three are not published."""
    folder = Path(__file__).parent / "published" / "MulT"
    fields = json.loads((folder / "config.json").read_text())
    tensors, given = (safetensors.numpy.load_file(folder / f"{name}.safetensors") for name in ("model", "inputs"))
    expected = safetensors.numpy.load_file(folder / "outputs.safetensors")["trans_a_mem"]
    tensors = {name: x for name, x in tensors.items() if not name.startswith(("trans_l_with", "trans_v_with"))}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**fields, "lonly": False, "vonly": False}))
    found = mmx.load_pretrained(tmp_path, family="mult", heads=())(**given)
    np.testing.assert_allclose(found["trans_a_mem"], expected, atol=2e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(found["last_hs"], found["trans_a_mem"][:, -1])
    assert found.keys() == {"last_hs", "trans_a_mem", "trans_a_with_l", "trans_a_with_v"}
    for change, message in (({"lonly": False}, "lonly=False, aonly=True, vonly=True"), ({"d_a": 10}, "d_a=10 is not supported")):
        with pytest.raises(InputError, match=message):
            mmx.create_model("mult-mosei", **change)


def _numpy(tensors, heads):
    """Parts of a post-norm Transformer in NumPy, on published tensors: a linear map, a norm, a stack over `x (L, D)`."""

    def linear(x, name):
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(x, name, eps=1e-5):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def gelu(x):
        return 0.5 * x * (1 + np.asarray(jax.lax.erf(x / np.sqrt(2))))

    def stack(x, name, depth):
        for layer in (f"{name}.encoder.layer.{i}" for i in range(depth)):
            query, key, value = (
                linear(x, f"{layer}.attention.self.{n}").reshape(len(x), heads, -1).swapaxes(0, 1)
                for n in ("query", "key", "value")
            )
            weights = np.asarray(jax.nn.softmax(query @ key.swapaxes(1, 2) / np.sqrt(query.shape[-1])))
            read = (weights @ value).swapaxes(0, 1).reshape(x.shape)
            x = norm(x + linear(read, f"{layer}.attention.output.dense"), f"{layer}.attention.output.LayerNorm", 1e-12)
            read = linear(gelu(linear(x, f"{layer}.intermediate.dense")), f"{layer}.output.dense")
            x = norm(x + read, f"{layer}.output.LayerNorm", 1e-12)
        return x

    return linear, norm, gelu, stack


def test_hero_reads_clip_by_clip_and_then_along_time(tmp_path, rng):
    """By value from the formula: frames with the words said over them, one clip at a time; then all frames of a video."""
    part = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "max_position_embeddings": 9}
    parts = {"f_config": {**part, "num_hidden_layers": 2, "vocab_size": 30}, "c_config": {**part, "num_hidden_layers": 1}}
    family, config = configuration("hero-base", **parts, vfeat_dim=5, max_frm_seq_len=4, max_clip_len=6)
    model = build(family, config, tuple(family.heads), "float32")
    params = abstract_params(model)
    params = jax.tree.map(lambda p: (0.5 * rng.standard_normal(p.shape)).astype("f"), params)
    mmx.save_pretrained(tmp_path, Pretrained(model, params, config, family, tuple(family.heads)))
    fields = json.loads((tmp_path / "config.json").read_text())
    for name in ("vfeat_dim", "max_frm_seq_len", "max_clip_len"):  # which the published file does not tell
        del fields[name]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    pretrained = mmx.load_pretrained(tmp_path)
    assert pretrained.config == config
    t = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    linear, norm, gelu, stack = _numpy(t, 2)
    clip, whole = "v_encoder.f_encoder", "v_encoder.c_encoder"
    frame_of = [[0, 1], [1, 3, 4], [0, 2]]  # two clips of one video, which share a frame, and one of another video
    words = [[5, 6, 7], [8, 9], [4, 3, 2, 7]]
    videos = rng.standard_normal((2, 5, 5)).astype("f")
    clips, video_of = np.zeros((3, 3, 5), "f"), (0, 0, 1)
    ids, mask, gather = np.ones((3, 4), int), np.zeros((3, 7), int), np.tile(np.arange(7), (3, 1))
    for i, (frames, said) in enumerate(zip(frame_of, words, strict=True)):
        clips[i, : len(frames)], ids[i, : len(said)] = videos[video_of[i], frames], said
        mask[i, : len(frames) + len(said)] = 1
        gather[i, len(frames) : len(frames) + len(said)] = 3 + np.arange(len(said))
    given = {
        "f_sub_input_ids": ids,
        "f_sub_pos_ids": np.arange(4)[None],
        "f_v_feats": clips,
        "f_attn_masks": mask,
        "f_gather_index": gather,
        "c_v_feats": videos,
        "c_v_masks": np.asarray([[0, 0, 1, 0, 0], [0] * 5]),
        "c_attn_masks": np.asarray([[1] * 5, [1] * 4 + [0]]),
        "shuffled_orders": np.asarray([[2, 0, 1, 4, 3], [0, 1, 2, 3, 4]]),
        "targets": np.asarray([[1, 2, 0, -1, -1], [-1] * 5]),
        "num_subs": np.asarray([2, 1]),
        "sub_idx2frame_idx": np.asarray([[*frames, -1, -1][:3] for frames in frame_of]),
    }
    found = pretrained(**given, output_hidden_states=True)

    def read(i):
        table = {n: t[f"{clip}.embeddings.{n}_embeddings.weight"] for n in ("word", "position", "token_type")}
        said = table["word"][words[i]] + table["position"][: len(words[i])] + table["token_type"][1]
        image = f"{clip}.img_embeddings"
        frames = linear(norm(clips[i, : len(frame_of[i])], f"{image}.img_LayerNorm"), f"{image}.img_linear")
        frames = frames + t[f"{image}.position_embeddings.weight"][: len(frames)] + table["token_type"][1]
        x = np.concatenate([norm(frames, f"{image}.LayerNorm"), norm(said, f"{clip}.embeddings.LayerNorm")])
        return stack(x, clip, 2)

    def transform(frames):
        return np.maximum(linear(norm(frames, "v_encoder.frame_transform.LayerNorm"), "v_encoder.frame_transform.net.1"), 0)

    def along_time(videos):
        places, name = t[f"{whole}.embeddings.position_embeddings.weight"], f"{whole}.embeddings.LayerNorm"
        return [stack(norm(x[:n] + places[:n], name), whole, 1) for x, n in zip(videos, (5, 4), strict=True)]

    def same(found, expected, atol):
        """The frames that exist."""
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one[: len(other)], other, atol=atol)

    entered = transform(np.where(given["c_v_masks"][..., None], t["v_encoder.mask_embedding.weight"][1], videos))
    for i, frames in enumerate(frame_of):
        own = read(i)
        for answer in (found["sequence_output"], found["clip_hidden_states"][-1]):
            np.testing.assert_allclose(answer[i, : len(own)], own, atol=1e-4)
        entered[video_of[i], frames] += own[: len(frames)]
    np.testing.assert_allclose(found["transformed_c_v_feats"], entered, atol=1e-4)
    left = along_time(entered)
    same(found["clip_outputs"], left, 1e-4)
    same(found["hidden_states"][-1], left, 1e-4)
    said = norm(gelu(linear(found["sequence_output"][2, 2:6], f"{clip}.lm_head.dense")), f"{clip}.lm_head.LayerNorm")
    scores = said @ t[f"{clip}.embeddings.word_embeddings.weight"].T + t[f"{clip}.lm_head.bias"]
    np.testing.assert_allclose(found["prediction_scores"][2], scores, atol=1e-3)
    head = "v_encoder.feat_regress.net"
    same(found["prediction_feat"], [linear(norm(gelu(linear(x, f"{head}.0")), f"{head}.2"), f"{head}.3") for x in left], 1e-3)

    # Frames in another order are asked where they stood.
    shuffled, head = np.zeros_like(entered), "v_encoder.fom_output"
    np.put_along_axis(shuffled, given["shuffled_orders"][..., None], entered, 1)
    asked = [norm(gelu(linear(x, f"{head}.linear_1")), f"{head}.LayerNorm") for x in along_time(shuffled)]
    asked = [linear(x, f"{head}.linear_2") for x in asked]
    same(found["frame_reorder_outputs"], asked, 1e-3)
    likely = np.asarray(jax.nn.log_softmax(asked[0]))[[0, 1, 2], [1, 2, 0]]
    np.testing.assert_allclose(found["fom_loss"], -likely.mean(), atol=1e-4)

    # Other words over a clip move its own frames at first, and behind the second stack all those of its video.
    other = pretrained(**{**given, "f_sub_input_ids": np.where(ids == 8, 12, ids)}, output_hidden_states=True)
    moved = {n: np.abs(other[n] - found[n]).max(-1) > 1e-5 for n in ("transformed_c_v_feats", "clip_outputs")}
    np.testing.assert_array_equal(moved["transformed_c_v_feats"], [[0, 1, 0, 1, 1], [0] * 5])
    np.testing.assert_array_equal(moved["clip_outputs"], [[1] * 5, [0] * 5])

    # A text alone, whose places are counted as RoBERTa's are.
    alone = pretrained(input_ids=np.asarray([[5, 6, 1]]), attn_masks=np.asarray([[1, 1, 0]]))
    table = {n: t[f"{clip}.embeddings.{n}_embeddings.weight"] for n in ("word", "position", "token_type")}
    x = norm(table["word"][[5, 6]] + table["position"][[2, 3]] + table["token_type"][1], f"{clip}.embeddings.LayerNorm")
    np.testing.assert_allclose(alone["sequence_output"][0, :2], stack(x, clip, 2), atol=1e-4)
    assert alone.keys() == {"sequence_output", "prediction_scores"}
