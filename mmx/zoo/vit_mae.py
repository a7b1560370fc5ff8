"""ViTMAE (arXiv 2111.06377): a ViT that sees a few patches of an image, and a smaller one that paints the others."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

from mmx.heads import Pooler, Reconstruction
from mmx.layers import BlockConfig
from mmx.losses import reconstruction_loss
from mmx.modalities.patches import cut
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import PerStream
from mmx.zoo.config import Pixels, sized
from mmx.zoo.family import Family, Runner, channels_last, grid, pair
from mmx.zoo.vit import LAYER, RENAMED, block, embeddings_table, image_embedder
from mmx.zoo.weights import Table, layers, reshaped


@dataclasses.dataclass(frozen=True)
class ViTMAEConfig(Pixels):
    """The published fields of ViTMAE."""

    layer_norm_eps: float = 1e-12
    qkv_bias: bool = True
    decoder_num_attention_heads: int = 16
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_intermediate_size: int = 2048
    mask_ratio: float = 0.75
    norm_pix_loss: bool = False


def _build(c: ViTMAEConfig, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    height, width = pair(c.patch_size)
    decoder = {name: getattr(c, f"decoder_{name}") for name in ("num_attention_heads", "intermediate_size")}
    decoder = SimpleNamespace(**{**dataclasses.asdict(c), **decoder})
    reconstruction = Reconstruction(
        "image",
        height * width * c.num_channels,
        c.decoder_num_hidden_layers,
        BlockConfig(width=c.decoder_hidden_size, **block(decoder)),
    )
    return build_model(
        {"image": image_embedder(c, ("class",))},
        (PerStream(c.num_hidden_layers),),
        width=c.hidden_size,
        embed=0,
        poolers={"image": Pooler("first")},
        outputs={"reconstruction": reconstruction} if "reconstruction" in heads else {},
        dtype=dtype,
        **block(c),
    )


def _table(c: ViTMAEConfig) -> Table:
    places, inner = math.prod(grid(c)) + 1, c.decoder_hidden_size
    return {
        **embeddings_table("vit.embeddings", c),
        **layers("vit.encoder.layer.{}", "stages_0/image/layers/block", LAYER),
        "vit.layernorm": "stages_0/image/norm",
        "decoder.decoder_embed": "heads_reconstruction/project",
        "decoder.mask_token": reshaped("heads_reconstruction/token", 1, 1, inner),
        "decoder.decoder_pos_embed": reshaped("heads_reconstruction/position", 1, places, inner),
        **layers("decoder.decoder_encoder.layer.{}", "heads_reconstruction/stack/layers/block", LAYER),
        "decoder.decoder_norm": "heads_reconstruction/stack/norm",
        "decoder.decoder_pred": "heads_reconstruction/projection",
    }


def _forward(run: Runner, c: ViTMAEConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Patches with the least `noise (B, L)` stay; where none is given it is drawn, the same in every call."""
    image = channels_last(inputs["pixel_values"])
    patches = cut(image, pair(c.patch_size))
    noise = inputs.get("noise")
    if noise is None:
        noise = jax.random.uniform(jax.random.key(0), patches.shape[:2])
    order = jnp.argsort(noise, 1)
    rank = jnp.argsort(order, 1)
    count = int(patches.shape[1] * (1 - c.mask_ratio))
    removed = rank >= count
    r = run({"image": {"image": image, "kept": order[:, :count]}})
    logits = r.out.logits.get("reconstruction")
    return {
        "loss": None if logits is None else reconstruction_loss(logits, patches, removed, c.norm_pix_loss),
        "logits": logits,
        "mask": removed.astype(jnp.float32),
        "ids_restore": rank,
        "last_hidden_state": r.out.streams["image"].values,
        "hidden_states": tuple(r.states("stages_0", "image")),
    }


FAMILIES = (
    Family(
        "vit_mae",
        ViTMAEConfig,
        _build,
        _table,
        _forward,
        names={
            "vit-mae-base": {},
            "vit-mae-large": sized(24, 1024, 16),
            "vit-mae-huge": sized(32, 1280, 16, patch_size=14),
        },
        heads={"reconstruction": "decoder."},
        prefix="vit",
        older={**RENAMED, r"^decoder\.decoder_encoder\.layer\.": "decoder.decoder_layers."},
    ),
)
