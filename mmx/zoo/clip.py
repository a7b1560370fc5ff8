"""CLIP (arXiv 2103.00020): two towers that meet in the loss. Pre-norm, quick GELU, a causal text, eps 1e-5."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mmx.heads import Pooler, Projection
from mmx.layers import BlockConfig
from mmx.losses import clip_loss
from mmx.modalities import Ids, Patches
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import PerStream
from mmx.zoo import open_clip
from mmx.zoo.config import activation
from mmx.zoo.family import Family, Run, Runner, channels_last, padded
from mmx.zoo.tokenizer import Texts
from mmx.zoo.weights import Table, convolution, layers, reshaped

LAYER: Table = {
    "self_attn.q_proj": "self/query",
    "self_attn.k_proj": "self/key",
    "self_attn.v_proj": "self/value",
    "self_attn.out_proj": "self/out",
    "layer_norm1": "self_norm",
    "mlp.fc1": "mlp/up",
    "mlp.fc2": "mlp/down",
    "layer_norm2": "mlp_norm",
}


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """The published fields of CLIP's text tower."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    eos_token_id: int = 49407


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """The published fields of CLIP's image tower."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """The published fields of CLIP."""

    text_config: CLIPTextConfig = CLIPTextConfig()
    vision_config: CLIPVisionConfig = CLIPVisionConfig()
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592


def block(c: Any, dtype: str, **more: Any) -> BlockConfig:
    """The block of a tower."""
    return BlockConfig(
        width=c.hidden_size,
        heads=c.num_attention_heads,
        mlp=c.intermediate_size,
        activation=activation(c.hidden_act),
        eps=c.layer_norm_eps,
        dtype=dtype,
        **more,
    )


def image_embedder(c: Any) -> Patches:
    """Patches without bias, a class token in front, a learned position for each, and the norm on their sum."""
    return Patches(
        (c.image_size,) * 2,
        (c.patch_size,) * 2,
        c.num_channels,
        width=c.hidden_size,
        bias=False,
        special=("class",),
        special_position=True,
        norm=c.layer_norm_eps,
        resize=True,
    )


def _build(c: CLIPConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    image, text = c.vision_config, c.text_config
    return build_model(
        {
            "image": image_embedder(image),
            "text": Ids(text.vocab_size, text.max_position_embeddings, width=text.hidden_size),
        },
        (
            PerStream(
                {"image": image.num_hidden_layers, "text": text.num_hidden_layers},
                {"image": block(image, dtype, final_norm=False), "text": block(text, dtype)},
                causal=("text",),
            ),
        ),
        width=image.hidden_size,
        heads=image.num_attention_heads,
        embed=c.projection_dim,
        # The first OpenAI configurations say eos_token_id=2 and mean the highest id, which is the end of text.
        poolers={
            "image": Pooler("first", norm=image.layer_norm_eps),
            "text": Pooler("end", end=None if text.eos_token_id == 2 else text.eos_token_id),
        },
        projections={name: Projection(c.projection_dim) for name in ("image", "text")},
        dtype=dtype,
    )


def image_table(published: str, c: Any) -> Table:
    """The weights of the image tower in the first stage, but for the norm at its end."""
    return {
        f"{published}.embeddings.class_embedding": reshaped("modalities_image/special", c.hidden_size),
        f"{published}.embeddings.patch_embedding": convolution("modalities_image/patch", *(c.patch_size,) * 2),
        f"{published}.embeddings.position_embedding.weight": "modalities_image/position",
        f"{published}.pre_layrnorm": "modalities_image/norm",
        **layers(f"{published}.encoder.layers.{{}}", "stages_0/image/layers/block", LAYER),
    }


def _table(c: CLIPConfig) -> Table:
    return {
        "logit_scale": "logit_scale",
        "text_model.embeddings.token_embedding": "modalities_text/token",
        "text_model.embeddings.position_embedding.weight": "modalities_text/position",
        **layers("text_model.encoder.layers.{}", "stages_0/text/layers/block", LAYER),
        "text_model.final_layer_norm": "stages_0/text/norm",
        "text_projection": "projections_text/projection",
        **image_table("vision_model", c.vision_config),
        "vision_model.post_layernorm": "poolers_image/norm",
        "visual_projection": "projections_image/projection",
    }


def towers(run: Runner, inputs: Mapping[str, Any]) -> Run:
    """Runs both towers on what is given, or one of them."""
    batch = {}
    if "pixel_values" in inputs:
        batch["image"] = channels_last(inputs["pixel_values"])
    if "input_ids" in inputs:
        batch["text"] = padded(inputs["input_ids"], inputs.get("attention_mask"))
    return run(batch)


def tower_fields(r: Run) -> dict[str, Any]:
    """What both towers left, under `text_model_output` and `vision_model_output`."""
    fields: dict[str, Any] = {}
    for stream, name in (("text", "text_model_output"), ("image", "vision_model_output")):
        if stream in r.out.streams:
            fields[name] = {
                "last_hidden_state": r.out.streams[stream].values,
                "pooler_output": r.out.pooled[stream],
                "hidden_states": tuple(r.states("stages_0", stream)),
            }
            projected = r.intermediates.get(f"projections_{stream}", {})
            fields[f"{stream}_features"] = projected.get("features")  # before they are made unit vectors
    return fields


def _forward(run: Runner, c: CLIPConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    r = towers(run, inputs)
    image, text = r.out.embeddings.get("image"), r.out.embeddings.get("text")
    fields = {"image_embeds": image, "text_embeds": text, "logit_scale": r.out.logit_scale, **tower_fields(r)}
    if image is not None and text is not None:
        scale: Any = r.out.logit_scale
        fields["logits_per_text"] = scale * text @ image.T
        fields["logits_per_image"] = fields["logits_per_text"].T
        fields["loss"] = clip_loss(image, text, scale) if "return_loss" in inputs else None
    return fields


def _text(layers: int, width: int, heads: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "projection_dim": width,
    }


def _vision(layers: int, width: int, heads: int, patch: int, size: int = 224) -> dict[str, Any]:
    return _text(layers, width, heads) | {"patch_size": patch, "image_size": size}


_LARGE = {"text_config": _text(12, 768, 12), "projection_dim": 768}
FAMILIES = (
    Family(
        "clip",
        CLIPConfig,
        _build,
        _table,
        _forward,
        names={
            "clip-vit-base-patch32": {},
            "clip-vit-base-patch16": {"vision_config": {"patch_size": 16}},
            "clip-vit-large-patch14": {**_LARGE, "vision_config": _vision(24, 1024, 16, 14)},
            "clip-vit-large-patch14-336": {**_LARGE, "vision_config": _vision(24, 1024, 16, 14, 336)},
            **open_clip.clip_names(),
        },
        known=(r"position_ids$",),
        libraries=(open_clip.CLIP,),
        texts=Texts("<|startoftext|>", "<|endoftext|>", "<|endoftext|>", "<|endoftext|>", full=True, word_end="</w>"),
        length=lambda c: c.text_config.max_position_embeddings,
    ),
)
