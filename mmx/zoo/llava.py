"""LLaVA (arXiv 2304.08485, 2310.03744): CLIP's image tower, a projector, and Llama, in whose text the image stands."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp

from mmx.errors import InputError
from mmx.heads import Pooler
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import Insert, PerStream
from mmx.zoo import clip, llama
from mmx.zoo.config import activation, only, sized
from mmx.zoo.family import Family, Generation, Run, Runner, channels_last
from mmx.zoo.texts import ImagePlaces
from mmx.zoo.weights import Table


@dataclasses.dataclass(frozen=True)
class LlavaVisionConfig(clip.CLIPVisionConfig):
    """The published fields of LLaVA's image tower, CLIP's."""

    model_type: str = "clip_vision_model"

    without_effect: ClassVar[frozenset[str]] = frozenset({"vocab_size"})  # published all the same


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """The published fields of LLaVA."""

    vision_config: LlavaVisionConfig = LlavaVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text_config: llama.LlamaConfig = llama.LlamaConfig()
    image_token_index: int = 32000
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    vision_feature_layer: int | tuple = -2
    vision_feature_select_strategy: str = "default"
    tie_word_embeddings: bool = False


def place_images(inputs: Mapping[str, Any], places: ImagePlaces) -> tuple[dict[str, Any], dict[str, Any]]:
    """The batch's images, in any number, and the slots that the texts keep for them; neither where there are no images.

    Wherever an id of a prompt is that of images stands the next token of the next image, text after text.
    """
    written = inputs.get("written", 0)
    if "pixel_values" not in inputs:
        return {}, {}
    images, size = channels_last(inputs["pixel_values"]), places.size(inputs["pixel_values"])
    at = (inputs["input_ids"] == places.token) & (written == 0)  # (B, L)
    count = jnp.cumsum(at).reshape(at.shape) - 1
    slots = jnp.where(at[..., None], jnp.stack([count // size, count % size], -1), -1)
    return {"image": images}, {"slots": {"image": slots}}


def check_images(inputs: Mapping[str, Any], places: ImagePlaces) -> None:
    """Raises an InputError where texts do not keep a place for each token of the images, which are those of `place_images`."""
    if "pixel_values" not in inputs or "input_ids" not in inputs:
        return
    images, token = inputs["pixel_values"], places.token
    kept, size = int(((inputs["input_ids"] == token) & (inputs.get("written", 0) == 0)).sum()), places.size(images)
    if kept != len(images) * size:
        raise InputError(
            f"input_ids: {kept} image tokens (id {token}), but pixel_values holds {len(images)} images of {size} tokens each, "
            f"{len(images) * size} in all; write the id {size} times for each image"
        )


def text_fields(r: Run, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The published outputs of the decoder behind two stages of images; its first states have them in their places."""
    return llama.text_fields(r, inputs, "stages_2", r.intermediates["stages_1"]["states"]["text"])


def _build(c: LlavaConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    image, text = c.vision_config, c.text_config
    only(c, vision_feature_select_strategy=("default", "full"))
    only(image, model_type="clip_vision_model")
    only(text, model_type="llama")
    depth, chosen = image.num_hidden_layers, c.vision_feature_layer
    taken = [layer if layer >= 0 else depth + 1 + layer for layer in ((chosen,) if isinstance(chosen, int) else chosen)]
    decoder = llama.block(text, dtype)
    return build_model(
        {"image": clip.image_embedder(image), "text": llama.text_embedder(text)},
        (
            # The norm at the end of the tower is stored, and what is taken goes past it.
            PerStream({"image": depth}, {"image": clip.block(image, dtype)}, taken={"image": tuple(taken)}),
            Insert(
                hidden=text.hidden_size,
                activation=activation(c.projector_hidden_act, "projector_hidden_act"),
                bias=c.multimodal_projector_bias,
                special=c.vision_feature_select_strategy == "full",
            ),
            PerStream({"text": text.num_hidden_layers}, {"text": decoder}, causal=("text",)),
        ),
        width=text.hidden_size,
        heads=text.num_attention_heads,
        head_size=decoder.head_size,
        embed=0,
        poolers={"text": Pooler("last")},
        outputs={"captioning": llama.decoder(c.tie_word_embeddings)} if "captioning" in heads else {},
        dtype=dtype,
    )


def _table(c: LlavaConfig) -> Table:
    return {
        **clip.image_table("vision_tower", c.vision_config),
        "vision_tower.post_layernorm": "stages_0/image/norm",
        "multi_modal_projector.linear_1": "stages_1/transform",
        "multi_modal_projector.linear_2": "stages_1/project",
        **llama.text_table("language_model.model", "stages_2"),
        "language_model.lm_head": "heads_captioning/decoder",
    }


def _places(c: LlavaConfig) -> ImagePlaces:
    full = c.vision_feature_select_strategy == "full"
    return ImagePlaces(c.image_token_index, c.vision_config.patch_size, special=int(full))


def _forward(run: Runner, c: LlavaConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    batch, beside = place_images(inputs, _places(c))
    r = run({**batch, "text": llama.read_text(inputs, **beside)})
    image = r.out.streams.get("image")
    fields = text_fields(r, inputs)
    return {**fields, "image_hidden_states": None if image is None else image.values.reshape(-1, image.values.shape[-1])}


OLDER = {  # first files have the whole class of the image tower; later ones a model inside, beside the decoder's matrix
    r"^vision_tower\.": "vision_tower.vision_model.",
    r"^language_model\.lm_head": "lm_head",
    r"^language_model\.(model\.)?": "model.language_model.",
    r"^(vision_tower|multi_modal_projector)\.": r"model.\1.",
}
_TEXT = {"vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
FAMILIES = (
    Family(
        "llava",
        LlavaConfig,
        _build,
        _table,
        _forward,
        names={
            "llava-1.5-7b-hf": {"text_config": _TEXT},
            "llava-1.5-13b-hf": {"text_config": sized(40, 5120, 40, 13824, **_TEXT)},
        },
        heads={"captioning": "language_model."},
        texts=llama.TEXTS,
        length=lambda c: c.text_config.max_position_embeddings,
        known=(r"position_ids$", r"rotary_emb\.inv_freq$", r"lm_head\.weight$"),
        older=OLDER,
        generation=Generation(beside={"written": 1}),
        places=_places,
        check=lambda c, inputs: check_images(inputs, _places(c)),
    ),
)
