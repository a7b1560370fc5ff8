"""PaliGemma (arXiv 2407.07726): SigLIP's image tower, one linear map, and Gemma, that reads its prompt in both directions."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp

from mmx.errors import InputError
from mmx.heads import Pooler
from mmx.modalities import Patches
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import Insert, PerStream
from mmx.zoo import clip, gemma, llama
from mmx.zoo.config import only, sized
from mmx.zoo.family import Family, Generation, Runner
from mmx.zoo.llava import OLDER, check_images, place_images, text_fields
from mmx.zoo.texts import ImagePlaces
from mmx.zoo.weights import Table, convolution, layers


@dataclasses.dataclass(frozen=True)
class PaliGemmaVisionConfig:
    """The published fields of PaliGemma's image tower, SigLIP's without its pooler."""

    model_type: str = "siglip_vision_model"
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    vision_use_head: bool = False
    vocab_size: int | None = None  # without effect, as the next one
    projection_dim: int | None = None

    without_effect: ClassVar[frozenset[str]] = frozenset({"projector_hidden_act"})


@dataclasses.dataclass(frozen=True)
class PaliGemmaConfig:
    """The published fields of PaliGemma."""

    vision_config: PaliGemmaVisionConfig = PaliGemmaVisionConfig()
    text_config: gemma.GemmaConfig = gemma.GemmaConfig(
        **sized(18, 2048, 8, 16384, num_key_value_heads=1),
    )
    image_token_index: int = 256000
    projection_dim: int = 2048
    tie_word_embeddings: bool = True
    vocab_size: int | None = None  # without effect, as the next one
    hidden_size: int | None = None


def _build(c: PaliGemmaConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    image, text = c.vision_config, c.text_config
    only(image, model_type="siglip_vision_model", vision_use_head=False)
    if c.projection_dim != text.hidden_size:
        raise InputError(f"PaliGemmaConfig: projection_dim={c.projection_dim} has to be the text's {text.hidden_size}")
    decoder = gemma.block(text, dtype)
    size, patch = (image.image_size,) * 2, (image.patch_size,) * 2
    patches = Patches(size, patch, image.num_channels, width=image.hidden_size, resize=True, crop=True)
    return build_model(
        {"image": patches, "text": llama.text_embedder(text, text.hidden_size**0.5)},
        (
            PerStream({"image": image.num_hidden_layers}, {"image": clip.block(image, dtype)}),
            Insert(),
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


def _table(c: PaliGemmaConfig) -> Table:
    patch = (c.vision_config.patch_size,) * 2
    return {
        "vision_tower.embeddings.patch_embedding": convolution("modalities_image/patch", *patch),
        "vision_tower.embeddings.position_embedding.weight": "modalities_image/position",
        **layers("vision_tower.encoder.layers.{}", "stages_0/image/layers/block", clip.LAYER),
        "vision_tower.post_layernorm": "stages_0/image/norm",
        "multi_modal_projector.linear": "stages_1/project",
        **llama.text_table("language_model.model", "stages_2"),
        "language_model.lm_head": "heads_captioning/decoder",
    }


def _places(c: PaliGemmaConfig) -> ImagePlaces:
    return ImagePlaces(c.image_token_index, c.vision_config.patch_size, begin=gemma.TEXTS.begin)


def _forward(run: Runner, c: PaliGemmaConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    ids = inputs["input_ids"]
    batch, beside = place_images(inputs, _places(c))
    # A prompt is of type 0, which is read in both directions; where no types are told, all of it is causal, as published.
    prefix = inputs.get("token_type_ids", jnp.ones_like(ids)) == 0
    starts = prefix & ~jnp.pad(prefix, ((0, 0), (1, 0)))[:, :-1]
    group = jnp.where(prefix, jnp.cumsum(starts, 1), -1)  # tokens of type 0 that stand together see each other
    r = run({**batch, "text": llama.read_text(inputs, **beside, group=group)})
    image = r.out.streams.get("image")
    return {**text_fields(r, inputs), "image_hidden_states": None if image is None else image.values}


def _at(size: int) -> dict[str, Any]:
    text = sized(18, 2048, 8, 16384, num_key_value_heads=1, vocab_size=257216)
    return {"vision_config": {"image_size": size}, "text_config": text, "image_token_index": 257152}


FAMILIES = (
    Family(
        "paligemma",
        PaliGemmaConfig,
        _build,
        _table,
        _forward,
        names={f"paligemma-3b-pt-{size}": _at(size) for size in (224, 448, 896)},
        heads={"captioning": "language_model."},
        texts=gemma.TEXTS,
        length=lambda c: c.text_config.max_position_embeddings,
        known=(r"position_ids$", r"rotary_emb\.inv_freq$", r"lm_head\.weight$"),
        older=OLDER,
        generation=Generation(beside={"token_type_ids": 1, "written": 1}),
        places=_places,
        check=lambda c, inputs: check_images(inputs, _places(c)),
    ),
)
