"""CLIP (arXiv 2103.00020): two towers that meet in the loss. Pre-norm, quick GELU, a causal text, eps 1e-5."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mmx.errors import InputError
from mmx.heads import Pooler, Projection
from mmx.layers import BlockConfig
from mmx.losses import clip_loss
from mmx.modalities import Ids, Patches
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import PerStream
from mmx.topologies.stage import given
from mmx.zoo import open_clip, open_clip_names
from mmx.zoo.config import Pixels, activation, sized
from mmx.zoo.family import Family, Run, Runner, channels_last, padded
from mmx.zoo.texts import Texts
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
class CLIPVisionConfig(Pixels):
    """The published fields of CLIP's image tower."""

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
        crop=True,
    )


def image_tower(c: CLIPVisionConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    """The image tower alone: no norm behind its blocks, one on the class token."""
    return build_model(
        {"image": image_embedder(c)},
        (PerStream({"image": c.num_hidden_layers}, {"image": block(c, dtype, final_norm=False)}),),
        width=c.hidden_size,
        heads=c.num_attention_heads,
        embed=0,
        poolers={"image": Pooler("first", norm=c.layer_norm_eps)},
        dtype=dtype,
    )


def text_tower(c: CLIPTextConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    """The text tower alone, causal, and read at the end of the text."""
    return build_model(
        {"text": Ids(c.vocab_size, c.max_position_embeddings, width=c.hidden_size)},
        (PerStream({"text": c.num_hidden_layers}, {"text": block(c, dtype, blind=True)}, causal=("text",)),),
        width=c.hidden_size,
        heads=c.num_attention_heads,
        embed=0,
        # The first OpenAI configurations say eos_token_id=2 and mean the highest id, which is the end of text.
        poolers={"text": Pooler("end", end=None if c.eos_token_id == 2 else c.eos_token_id)},
        dtype=dtype,
    )


def meet(
    towers: Mapping[str, MultimodalTransformer], embed: int, dtype: str, logit_scale: float = 1 / 0.07
) -> MultimodalTransformer:
    """Towers side by side, each one stream in one stack, and a space in which the vectors of their poolers meet.

    Every parameter of a tower keeps its path.
    """
    for name, tower in towers.items():
        if set(tower.modalities) != {name} or [type(stage) for stage in tower.stages] != [PerStream]:
            raise InputError(f"a tower for {name} reads nothing else, in one stack; this one reads {', '.join(tower.modalities)}")
    stages: Any = {name: tower.stages[0] for name, tower in towers.items()}
    blocks = {name: given(stage.block, stage, name) for name, stage in stages.items()}
    depths = {n: stage.depth[n] if isinstance(stage.depth, Mapping) else stage.depth for n, stage in stages.items()}
    first = next(iter(blocks.values()))
    return build_model(
        {name: tower.modalities[name] for name, tower in towers.items()},
        (PerStream(depths, blocks, causal=tuple(name for name, stage in stages.items() if name in stage.causal)),),
        width=first.width,
        heads=first.heads,
        head_size=first.head_size,
        embed=embed,
        poolers={name: tower.poolers[name] for name, tower in towers.items() if name in tower.poolers},
        projections={name: Projection(embed) for name in towers},
        logit_scale=logit_scale,
        dtype=dtype,
    )


def _build(c: CLIPConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    towers = {"image": image_tower(c.vision_config, (), dtype), "text": text_tower(c.text_config, (), dtype)}
    return meet(towers, c.projection_dim, dtype)


def image_table(published: str, c: Any) -> Table:
    """The weights of the image tower in the first stage, but for the norm at its end."""
    return {
        f"{published}.embeddings.class_embedding": reshaped("modalities_image/special", c.hidden_size),
        f"{published}.embeddings.patch_embedding": convolution("modalities_image/patch", *(c.patch_size,) * 2),
        f"{published}.embeddings.position_embedding.weight": "modalities_image/position",
        f"{published}.pre_layrnorm": "modalities_image/norm",
        **layers(f"{published}.encoder.layers.{{}}", "stages_0/image/layers/block", LAYER),
    }


def _vision_table(c: CLIPVisionConfig) -> Table:
    return {**image_table("vision_model", c), "vision_model.post_layernorm": "poolers_image/norm"}


def _text_table(c: CLIPTextConfig) -> Table:
    return {
        "text_model.embeddings.token_embedding": "modalities_text/token",
        "text_model.embeddings.position_embedding.weight": "modalities_text/position",
        **layers("text_model.encoder.layers.{}", "stages_0/text/layers/block", LAYER),
        "text_model.final_layer_norm": "stages_0/text/norm",
    }


MEETING: Table = {  # of `meet`
    "logit_scale": "logit_scale",
    "text_projection": "projections_text/projection",
    "visual_projection": "projections_image/projection",
}


def _table(c: CLIPConfig) -> Table:
    return {**MEETING, **_text_table(c.text_config), **_vision_table(c.vision_config)}


def towers(run: Runner, inputs: Mapping[str, Any]) -> Run:
    """Runs both towers on what is given, or one of them."""
    batch = {}
    if "pixel_values" in inputs:
        batch["image"] = channels_last(inputs["pixel_values"])
    if "input_ids" in inputs:
        batch["text"] = padded(inputs["input_ids"], inputs.get("attention_mask"))
    return run(batch)


def stream_fields(r: Run, stream: str) -> dict[str, Any]:
    """What one tower left."""
    return {
        "last_hidden_state": r.out.streams[stream].values,
        "pooler_output": r.out.pooled[stream],
        "hidden_states": tuple(r.states("stages_0", stream)),
    }


def tower_fields(r: Run) -> dict[str, Any]:
    """What both towers left, under `text_model_output` and `vision_model_output`."""
    fields: dict[str, Any] = {}
    for stream, name in (("text", "text_model_output"), ("image", "vision_model_output")):
        if stream in r.out.streams:
            fields[name] = stream_fields(r, stream)
            projected = r.intermediates.get(f"projections_{stream}", {})
            fields[f"{stream}_features"] = projected.get("features")  # before they are made unit vectors
    return fields


def similarities(image: Any, text: Any, scale: Any, loss: bool) -> dict[str, Any]:
    """The published logits of unit vectors, and the contrastive loss if it is asked for; nothing where one side is absent."""
    if image is None or text is None:
        return {}
    logits = scale * text @ image.T
    return {
        "logits_per_text": logits,
        "logits_per_image": logits.T,
        "loss": clip_loss(image, text, scale) if loss else None,
    }


def _forward(run: Runner, c: CLIPConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    r = towers(run, inputs)
    image, text = r.out.embeddings.get("image"), r.out.embeddings.get("text")
    fields = {"image_embeds": image, "text_embeds": text, "logit_scale": r.out.logit_scale, **tower_fields(r)}
    return {**fields, **similarities(image, text, r.out.logit_scale, inputs.get("return_loss", False))}


def _forward_image(run: Runner, c: CLIPVisionConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    return stream_fields(run({"image": channels_last(inputs["pixel_values"])}), "image")


def _forward_text(run: Runner, c: CLIPTextConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    return stream_fields(run({"text": padded(inputs["input_ids"], inputs.get("attention_mask"))}), "text")


_LARGE = {"text_config": sized(12, 768, 12, projection_dim=768), "projection_dim": 768}
_IMAGE = sized(24, 1024, 16, projection_dim=1024, patch_size=14)
TEXTS = Texts("<|startoftext|>", "<|endoftext|>", "<|endoftext|>", "<|endoftext|>", full=True, word_end="</w>")
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
            "clip-vit-large-patch14": {**_LARGE, "vision_config": _IMAGE},
            "clip-vit-large-patch14-336": {**_LARGE, "vision_config": {**_IMAGE, "image_size": 336}},
            **open_clip_names.clip_names(),
        },
        known=(r"position_ids$",),
        libraries=(open_clip.CLIP,),
        texts=TEXTS,
        length=lambda c: c.text_config.max_position_embeddings,
    ),
    Family(
        "clip_text_model",
        CLIPTextConfig,
        text_tower,
        _text_table,
        _forward_text,
        names={},
        prefix="text_model",
        known=(r"position_ids$",),
        texts=TEXTS,
        length=lambda c: c.max_position_embeddings,
    ),
    Family(
        "clip_vision_model",
        CLIPVisionConfig,
        image_tower,
        _vision_table,
        _forward_image,
        names={},
        prefix="vision_model",
        known=(r"position_ids$",),
    ),
)
