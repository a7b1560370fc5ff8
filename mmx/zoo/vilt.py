"""ViLT (arXiv 2102.03334): words and patches of images of any size in one pre-norm stack; the smallest visual embedder."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mmx.heads import Pooler, TokenClassifier
from mmx.layers.positions import grid_coordinates
from mmx.modalities import PackedPatches
from mmx.modalities.patches import cut
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import Joint
from mmx.types import Masked
from mmx.zoo import bert, vit
from mmx.zoo.config import Words, only
from mmx.zoo.family import Chosen, Family, Runner, channels_last
from mmx.zoo.loss import token_loss
from mmx.zoo.weights import Layout, Table, layers


@dataclasses.dataclass(frozen=True)
class ViltConfig(Words):
    """The published fields of ViLT."""

    modality_type_vocab_size: int = 2
    max_position_embeddings: int = 40
    layer_norm_eps: float = 1e-12
    image_size: int = 384
    patch_size: int = 32
    num_channels: int = 3
    qkv_bias: bool = True
    max_image_length: int | None = -1
    num_images: int = -1
    tie_word_embeddings: bool = True


def _build(c: ViltConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    only(c, modality_type_vocab_size=2)
    side = c.image_size // c.patch_size
    act = bert.activation(c.hidden_act)
    tied = bert.masked_lm_head(c)
    head = tied if c.tie_word_embeddings else TokenClassifier(c.vocab_size, "text", activation=act, norm=c.layer_norm_eps)
    return build_model(
        {
            "text": dataclasses.replace(bert.text_embedder(c), type=True, type_outside=True),
            "image": PackedPatches(
                side**2,
                (c.patch_size, c.patch_size),
                (side, side),
                c.num_channels,
                sampling="align_corners",
                special=("class",),
                special_position=True,
                type=True,
            ),
        },
        (Joint(c.num_hidden_layers),),
        width=c.hidden_size,
        embed=0,
        poolers={"text": Pooler("first", size=c.hidden_size, activation="tanh")},
        outputs={"masked-lm": head} if heads else {},
        dtype=dtype,
        **vit.block(c),
    )


def _table(c: ViltConfig) -> Table:
    head = "heads_masked-lm"
    return {
        **bert.embeddings_table("vilt.embeddings.text_embeddings", "modalities_text"),
        "vilt.embeddings.token_type_embeddings.weight": Layout(
            ("modalities_text/type_bias", "modalities_image/type_bias"), shape=(1, c.hidden_size)
        ),
        **vit.embeddings_table("vilt.embeddings", c),
        **layers("vilt.encoder.layer.{}", "stages_0/stack/layers/block", vit.LAYER),
        "vilt.layernorm": "stages_0/stack/norm",
        "vilt.pooler.dense": "poolers_text/transform",
        "mlm_score.transform.dense": f"{head}/transform",
        "mlm_score.transform.LayerNorm": f"{head}/norm",
        **(
            {"mlm_score.decoder.bias": f"{head}/decoder_bias"}
            if c.tie_word_embeddings
            else {"mlm_score.decoder": f"{head}/classifier"}
        ),
    }


def _read_image(c: ViltConfig, inputs: Mapping[str, Any]) -> tuple[Masked, jax.Array, jax.Array]:
    """Every patch, which of them exist, and how many any image of the batch can have at most.

    An image lies in the upper left corner of `pixel_values`, as `pixel_mask (B, H, W)` says, and reads the positions at its
    own resolution.
    """
    patches = cut(channels_last(inputs["pixel_values"]), (c.patch_size, c.patch_size))
    rows, columns = (size // c.patch_size for size in inputs["pixel_values"].shape[-2:])
    here = jnp.ones((len(patches), rows, columns), bool)
    if "pixel_mask" in inputs:
        pixels = inputs["pixel_mask"]
        at = [jnp.arange(count) * size // count for count, size in zip((rows, columns), pixels.shape[1:], strict=True)]
        here = pixels[:, at[0]][:, :, at[1]] != 0
    extent = jnp.stack([here[:, :, 0].sum(1), here[:, 0].sum(1)], -1)  # (B, 2)
    most = extent.prod(-1).max()
    if c.max_image_length is not None and c.max_image_length >= 0:
        most = jnp.minimum(most, c.max_image_length)
    here = here.reshape(patches.shape[:2])
    here &= here.cumsum(1) <= most  # the original draws which ones it keeps
    place = jnp.broadcast_to(grid_coordinates((rows, columns)), (*patches.shape[:2], 2))
    return Masked({"patches": patches, "place": place, "extent": extent}, here, keep=True), here, most


def _forward(run: Runner, c: ViltConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    image, here, most = _read_image(c, inputs)
    r = run({"text": bert.read_text(inputs), "image": image})
    logits = r.out.logits.get("masked-lm")
    length, count = inputs["input_ids"].shape[1], here.shape[1]
    # Patches come as in the original, where those that exist stand in front and no image has more than `most`; but there
    # they are shuffled in every call.
    order = jnp.argsort(~here, axis=1, stable=True)
    stay = jnp.arange(count) < most

    def ordered(image: jax.Array) -> jax.Array:  # (B, 1 + L, D)
        return jnp.concatenate([image[:, :1], jnp.take_along_axis(image[:, 1:], order[..., None], 1)], 1)

    def published(joint: jax.Array) -> Chosen:
        joint = jnp.concatenate([joint[:, :length], ordered(joint[:, length:])], 1)
        return Chosen(joint, jnp.pad(stay, (length + 1, 0), constant_values=True), 1)

    text, image = (r.out.streams[name].values for name in ("text", "image"))
    states = r.states("stages_0", "text", "image")
    mask = jnp.take_along_axis(here, order, 1)
    return {
        "loss": token_loss(logits, inputs["labels"]) if logits is not None and "labels" in inputs else None,
        "logits": logits,
        "last_hidden_state": published(jnp.concatenate([text, image], 1)),
        "hidden_states": tuple(map(published, states)),
        "pooler_output": r.out.pooled["text"],
        "text_last_hidden_state": text,
        "text_hidden_states": tuple(state[:, :length] for state in states),
        "image_cls_last_hidden_state": image[:, 0],
        "image_last_hidden_state": Chosen(jnp.where(mask[..., None], ordered(image)[:, 1:], 0), stay, 1),
        "image_mask": Chosen(mask, stay, 1),
    }


FAMILIES = (
    Family(
        "vilt",
        ViltConfig,
        _build,
        _table,
        _forward,
        names={"vilt-b32": {}, "vilt-b32-mlm": {}},
        heads={"masked-lm": "mlm_score"},
        prefix="vilt",
        texts=bert.TEXTS,
        length=lambda c: c.max_position_embeddings,
        known=(r"position_ids$", r"^mlm_score\.bias$", r"^mlm_score\.decoder\.weight$"),
    ),
)
