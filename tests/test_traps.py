"""What breaks parity in silence, trap by trap: a mechanism that is set wrong must leave the tolerance of a fixture.

`test_zoo.py` shows that the numbers are right; here it is shown that they would not be, had mmx walked into the trap.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import golden
import jax
import numpy as np
import pytest

import mmx
from mmx.layers import ACTIVATIONS, BlockConfig, Stack
from mmx.zoo import configuration
from mmx.zoo.config import ACTIVATION, override
from mmx.zoo.weights import flat

PUBLISHED = Path(__file__).parent / "published"


def square(kernel: jax.Array) -> jax.Array:
    """A kernel (layers, H, K, D) of as many outputs as inputs, transposed."""
    return kernel.reshape(len(kernel), -1, kernel.shape[-1]).swapaxes(1, 2).reshape(kernel.shape)


def turned(named: Mapping[str, Any]) -> dict[str, Any]:
    """The same in the other order."""
    return dict(reversed(named.items()))


def interleaved(texts: Mapping[str, Any]) -> dict[str, Any]:
    """One embedder for both texts, with sines and cosines in turns."""
    return dict.fromkeys(texts, texts["text"].clone(position="interleaved"))


LAST = "last_hidden_state"
# Fixture -> what is right -> what is set wrong, and the recorded output that is wrong then. Set are fields of the published
# configuration, or a field inside the model (`model/a/b`), a parameter (`params/a/b`), an input (`inputs/a`), to a value or to
# what a function makes of the old one.
TRAPS: Mapping[str, Mapping[str, tuple[Mapping[str, Any], str]]] = {
    "BertForPreTraining": {
        "GELU by the error function": ({"hidden_act": "gelu_new"}, LAST),
        "norms of eps 1e-12": ({"layer_norm_eps": 1e-6}, LAST),
        "norms behind residuals": ({"model/stages/0/block/norm": "pre", "model/stages/0/block/final_norm": False}, LAST),
        "a norm on the sum of embeddings": ({"model/modalities/text/norm": None}, LAST),
        "a pooler with tanh": ({"model/poolers/text/activation": None}, "seq_relationship_logits"),
    },
    "GPT2LMHeadModel": {
        "GELU by tanh": ({"activation_function": "gelu"}, "logits"),
        "matrices lie (in, out)": ({"params/stages_0/text/layers/block/self/out/kernel": square}, "logits"),
    },
    "ViTForImageClassification": {
        "norms of eps 1e-12": ({"layer_norm_eps": 1e-6}, LAST),
        "GELU by the error function": ({"hidden_act": "gelu_new"}, LAST),
    },
    "VisionTextDualEncoderModel": {
        "a pooler with tanh": ({"model/poolers/image/activation": None}, "image_embeds"),
    },
    "MulT": {
        "nobody reads what is further along, of others either": ({"model/stages/1/past": False}, "output"),
        "a number more may be read than lengths differ in": ({"attn_mask": False}, "output"),
        "embeddings times the root of the width": ({"model/stages/0/scale": 1.0}, "output"),
        "a step whose first number is 0 counts as padding": ({"model/stages/0/positions": None}, "output"),
        "one norm for what asks and what is read": ({"model/stages/1/block/context_norm": None}, "output"),
    },
    "BEiT3": {
        "places begin at row 2": ({"params/modalities_text/position": lambda table: np.roll(table, 2, 0)}, "encoder_out"),
        "norms inside attention and MLP": ({"model/stages/0/block/inner_norm": None}, "encoder_out"),
    },
    "BridgeTowerModel": {
        "links are added and normalised, eps": ({"layer_norm_eps": 1e-3}, "text_features"),
        "the image tower's GELU is quick": ({"model/stages/0/block/image/activation": "gelu"}, "image_features"),
    },
    "TapasModel": {
        "places begin again in every cell": ({"reset_position_index_per_cell": False}, LAST),
    },
    "BeitForMaskedImageModeling": {
        "relative positions in every layer": ({"model/stages/0/block/relative": None}, "logits"),
        "scaled residuals": ({"model/stages/0/block/layer_scale": None}, "logits"),
    },
    "MarianMTModel": {
        "embeddings times the root of the width": ({"scale_embedding": False}, "logits"),
        "sines lie before cosines": ({"model/modalities": interleaved}, "logits"),
    },
    "T5ForConditionalGeneration": {
        "scores are not divided": ({"model/stages/0/block/text/scale": None}, "logits"),
        "the furthest bucket": ({"relative_attention_max_distance": 128}, "logits"),
        "the tied scores are divided": ({"scale_decoder_outputs": False}, "logits"),
    },
    "ViTMAEForPreTraining": {
        "patches with the least noise are kept": ({"inputs/noise": lambda noise: 1 - noise}, "mask"),
    },
    "VisualBertForPreTraining": {
        "all regions have the first row of a table of their own": (
            {"params/modalities_image/line/embedding": lambda table: np.roll(table, 1, 0)},
            LAST,
        ),
    },
    "UNITER": {
        "features and boxes each have a norm": ({"model/modalities/image/each_norm": None}, "sequence_output"),
        "words and regions are packed": ({"inputs/gather_index": np.sort}, "sequence_output"),
        "a learned feature for what is hidden": (
            {"params/modalities_image/marked/embedding": np.zeros_like},
            "masked_image.sequence_output",
        ),
    },
    "ViltModel": {
        "types are added behind the norm": ({"model/modalities/text/type_outside": False}, "text_last_hidden_state"),
        "positions are resampled from corner to corner": ({"model/modalities/image/sampling": "linear"}, "pooler_output"),
    },
    "LayoutLMv3Model": {
        "patches behind words": ({"model/modalities": turned}, LAST),
        "relative positions are scaled as scores are": (
            {"params/stages_1/fused/relative/bias_0": lambda table: table * 8**0.5},
            LAST,
        ),
        "the page's norm has an eps of its own": ({"model/modalities/image/norm": 1e-3}, LAST),
    },
    "GitForCausalLM": {
        "the text sees the image": ({"model/stages/2/sees": {"text": ()}}, "logits"),
    },
    "ViLBERT": {
        "poolers with ReLU": ({"model/poolers/image/activation": "tanh"}, "pooled_output_v"),
        "pooled vectors are multiplied": ({"model/heads/matching/fuse": "sum"}, "seq_relationship_score"),
    },
    "LxmertForPreTraining": {
        "features and boxes are averaged": ({"model/modalities/image/average": False}, "vision_output"),
        "features and boxes each have a norm": ({"model/modalities/image/each_norm": None}, "vision_output"),
    },
    "InterBERT": {
        "poolers with ReLU": ({"model/poolers/text/activation": "tanh"}, "pooled_output_t"),
        "regions before words": ({"inputs/multimodal_mask": lambda mask: np.roll(mask, 6, 1)}, "sequence_output_t"),
    },
    "UniVL": {
        "the cross encoder tells text from video": ({"model/stages/1/type": False}, "cross_output"),
        "the cross encoder counts places": ({"model/stages/1/positions": None}, "cross_output"),
    },
    "MBT": {
        "GELU by tanh": ({"model/stages/1/block/activation": "gelu"}, "logits"),
        "norms that read their eps": ({"model/stages/1/block/eps": 1e-4}, "logits"),
        "class tokens' vectors are averaged": ({"model/heads/classification/fuse": "sum"}, "logits"),
    },
    "FlavaForPreTraining": {
        "norms before sublayers in the text too": ({"model/stages/0/block/text/norm": "post"}, "text_embeddings"),
        "a norm on the text's embeddings": ({"model/modalities/text/norm": None}, "text_embeddings"),
        "the image before the text": ({"model/modalities": turned}, "multimodal_embeddings"),
    },
    "ALBEFMultimodalEncoder": {
        "self, image, MLP": ({"model/stages/0/sublayers": "cross self mlp"}, LAST),
    },
    "CLIPModel": {
        "the quick GELU": ({"text_config.hidden_act": "gelu"}, "text_embeds"),
        "norms of eps 1e-5": ({"vision_config.layer_norm_eps": 1e-12}, "image_embeds"),
        "a causal text": ({"model/stages/0/causal": ()}, "text_embeds"),
        "read at the end of the text": ({"model/poolers/text/token": "last"}, "text_embeds"),
        "a norm before the blocks": ({"model/modalities/image/norm": None}, "image_embeds"),
    },
    "SiglipModel": {
        "GELU by tanh": ({"text_config.hidden_act": "gelu"}, "text_embeds"),
        "read at the last token": ({"model/poolers/text/token": "first"}, "text_embeds"),
    },
    "CoCa": {
        "the class token is behind the text": ({"model/poolers/text/token": "first"}, "text_features"),
        "the first query is contrasted and not read": ({"model/stages/2/drop": 0}, "logits"),
        "the own text before the image": ({"model/stages/4/sublayers": "cross mlp self mlp"}, "logits"),
    },
    "PerceiverForMaskedLM": {
        "the decoder's queries are replaced": ({"model/stages/0/answer/cross_residual": True}, "logits"),
    },
    "ASTForAudioClassification": {
        "both tokens in front are averaged": ({"model/poolers/audio/token": "first"}, "pooler_output"),
    },
    "VivitForVideoClassification": {
        "GELU by tanh": ({"hidden_act": "gelu"}, LAST),
    },
    "VideoMAEForVideoClassification": {
        "fixed positions": ({"model/modalities/video/position": "none"}, "logits"),
    },
    "TimesformerModel": {
        "time before space": ({"model/stages/0/sublayers": "space time mlp"}, LAST),
    },
    "LlavaForConditionalGeneration": {
        "the layer before the last": ({"vision_feature_layer": -1}, "logits"),
        "without the class token": ({"model/stages/1/special": True}, "logits"),
    },
    "PaliGemmaForConditionalGeneration": {
        "the prompt is read in both directions": ({"inputs/token_type_ids": np.ones_like}, "logits"),
        "scaled embeddings": ({"model/modalities/text/scale": 1.0}, "logits"),
        "norms of 1 + weight": ({"model/stages/2/block/text/norm_kind": "rms"}, "logits"),
    },
}


def changed(node: Any, path: list[str], value: Any) -> Any:
    """A configuration, model or nested dict with one thing inside it set to `value`, or to what that makes of the old one."""
    if not path:
        return value(node) if callable(value) else value
    name, *rest = path
    if isinstance(node, Mapping):
        return {**node, name: changed(node[name], rest, value)}
    if isinstance(node, tuple):
        return tuple(changed(x, rest, value) if str(i) == name else x for i, x in enumerate(node))
    new = {name: changed(getattr(node, name), rest, value)}
    return node.clone(**new) if isinstance(node, nn.Module) else dataclasses.replace(node, **new)


@pytest.mark.parametrize(("folder", "what"), [(folder, what) for folder, traps in TRAPS.items() for what in traps])
def test_a_trap_leaves_the_tolerance(folder, what):
    (wrong, field), folder = TRAPS[folder][what], PUBLISHED / folder
    names, expected = golden.CLASSES.get(golden.class_of(folder), golden.Class()), golden.recorded(folder)[field]
    pretrained = mmx.load_pretrained(folder, family=names.family)
    if fields := {name: value for name, value in wrong.items() if "/" not in name}:
        config = override(pretrained.config, fields)
        model = pretrained.family.build(config, pretrained.heads, "float32")
        pretrained = dataclasses.replace(pretrained, config=config, model=model)
    parts = {"model": pretrained.model, "params": pretrained.params, "inputs": golden.given(folder)}
    for name, value in wrong.items():
        if "/" in name:
            parts = changed(parts, name.split("/"), value)
    inputs = parts.pop("inputs")
    found = golden.flatten(dataclasses.replace(pretrained, **parts)(**inputs, **names.call))
    value = np.asarray(found[names.rename.get(field, field)])
    assert value.shape == expected.shape
    assert golden.share(value, expected) > 1


def test_one_cross_attention_serves_both_directions_of_lxmert():
    params = flat(mmx.load_pretrained(PUBLISHED / "LxmertForPreTraining").params)
    assert [path for path in params if path.endswith("cross/query/kernel")] == ["stages_1/layers/shared/cross/query/kernel"]


def test_perceiver_does_not_read_its_eps():
    """Its norms are made without one, so that all of them have 1e-5, whatever `layer_norm_eps` says."""
    family, config = configuration("language-perceiver", layer_norm_eps=0.5)
    stage: Any = family.build(config, (), "float32").stages[0]
    assert {block.eps for block in (stage.block, stage.read, stage.answer) if block is not None} == {1e-5}


def test_regions_of_visualbert_are_of_the_second_kind():
    folder = PUBLISHED / "VisualBertForPreTraining"
    pretrained, inputs = mmx.load_pretrained(folder), golden.given(folder)
    told = {**inputs, "visual_token_type_ids": np.ones_like(inputs.pop("visual_token_type_ids"))}
    np.testing.assert_array_equal(pretrained(**inputs)["prediction_logits"], pretrained(**told)["prediction_logits"])


def test_the_four_gelus():
    """Three published names are one function; the distances to the error function's are those that were measured."""
    x = np.linspace(-3, 3, 13, dtype="f")
    exact = x * (1 + np.asarray([math.erf(v / 2**0.5) for v in x])) / 2
    away = {name: np.abs(ACTIVATIONS[ours](x) - exact).max() for name, ours in ACTIVATION.items() if "gelu" in name}
    assert away["gelu"] < 1e-6 and away["gelu_python"] < 1e-6
    for name in ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"):
        assert ACTIVATION[name] == "gelu_tanh" and abs(away[name] - 4.4e-4) < 1e-4
    assert abs(away["quick_gelu"] - 1.9e-2) < 2e-3


def test_the_first_transformer_may_end_with_one_more_norm(rng):
    """`torch.nn.Transformer` has a norm behind stacks whose norms are behind residuals; the paper and Marian have not."""
    block = BlockConfig(width=8, heads=2, mlp=16, activation="relu", norm="post", eps=1e-5)
    without, with_norm = Stack(2, block), Stack(2, dataclasses.replace(block, final_norm=True))
    x = rng.standard_normal((2, 5, 8)).astype("f")
    params = with_norm.init(jax.random.key(0), x)["params"]
    params["norm"] = {"scale": rng.standard_normal(8), "bias": rng.standard_normal(8)}
    y = without.apply({"params": params}, x)
    normal = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
    expected = normal * params["norm"]["scale"] + params["norm"]["bias"]
    np.testing.assert_allclose(with_norm.apply({"params": params}, x), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("vit-base-patch16-224", {"layer_norm_eps": 1e-12}),
        ("uniter-base", {"vocab_size": 28996}),  # cased
        ("visualbert-vcr-coco-pre", {"visual_embedding_dim": 512}),
        ("vilt-b32-mlm", {"patch_size": 32, "image_size": 384, "max_position_embeddings": 40}),
        ("lxmert-base-uncased", {"l_layers": 9, "r_layers": 5, "x_layers": 5, "num_qa_labels": 9500}),
        ("interbert-base", {"v_num_attention_heads": 8, "num_attention_heads": 12}),
        ("blip-image-captioning-base", {"text_config.num_attention_heads": 12, "vision_config.image_size": 384}),
        ("ViT-B-32", {"vision_config.hidden_act": "gelu", "text_config.hidden_act": "gelu"}),
        ("ViT-B-32-quickgelu", {"vision_config.hidden_act": "quick_gelu", "text_config.hidden_act": "quick_gelu"}),
        ("coca_base", {"vision_cfg.attentional_pool": False, "vision_cfg.patch_size": 18}),
        ("coca_ViT-B-32", {"vision_cfg.attentional_pool": True}),
        ("layoutlmv3-base", {"rel_pos_bins": 32, "max_rel_pos": 128, "rel_2d_pos_bins": 64, "max_rel_2d_pos": 256}),
        ("videobert-large", {"visual_vocab_size": 20736, "hidden_size": 1024}),
    ],
)
def test_sizes_that_are_not_what_one_would_think(name, fields):
    _, config = configuration(name)
    for path, value in fields.items():
        assert functools.reduce(getattr, path.split("."), config) == value, path
