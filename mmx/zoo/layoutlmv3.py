"""LayoutLMv3 (arXiv 2204.08387): words, the boxes they stand in, and patches of the page in one post-norm stack.

Attention hears how far tokens are from each other in the text and on the page, whose sides are 1000 long.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmx.heads import Pooler
from mmx.layers import Axes
from mmx.modalities import Patches
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import FUSED, Gather, PerStream
from mmx.types import Masked
from mmx.zoo import bert, roberta
from mmx.zoo.config import Words, only, sized
from mmx.zoo.family import Family, Runner, channels_last, padded
from mmx.zoo.texts import Texts
from mmx.zoo.weights import Table, convolution, layers, reshaped

PAGE = 1000  # length of a side
LONGEST = 1023  # of a box


@dataclasses.dataclass(frozen=True)
class LayoutLMv3Config(Words):
    """The published fields of LayoutLMv3."""

    vocab_size: int = 50265
    layer_norm_eps: float = 1e-5
    pad_token_id: int = 1
    max_2d_position_embeddings: int = 1024
    coordinate_size: int = 128
    shape_size: int = 128
    has_relative_attention_bias: bool = True
    rel_pos_bins: int = 32
    max_rel_pos: int = 128
    has_spatial_attention_bias: bool = True
    rel_2d_pos_bins: int = 64
    max_rel_2d_pos: int = 256
    text_embed: bool = True
    visual_embed: bool = True
    input_size: int = 224
    num_channels: int = 3
    patch_size: int = 16

    @property
    def spatial(self) -> bool:
        """Whether the biases of boxes are read; published ones are never without those of places."""
        return self.has_relative_attention_bias and self.has_spatial_attention_bias


def _build(c: LayoutLMv3Config, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    only(c, text_embed=True, visual_embed=True)
    corner = tuple((axis, c.max_2d_position_embeddings, c.coordinate_size) for axis in ("x", "y"))
    size = tuple((side, c.max_2d_position_embeddings, c.shape_size) for side in ("box_height", "box_width"))
    axes = ((c.rel_pos_bins, c.max_rel_pos),) if c.has_relative_attention_bias else ()
    axes += ((c.rel_2d_pos_bins, c.max_rel_2d_pos),) * 2 if c.spatial else ()
    return build_model(
        {
            "text": dataclasses.replace(bert.text_embedder(c), joined={"box": (*corner, *corner, *size)}),
            "image": Patches(
                (c.input_size,) * 2,
                (c.patch_size, c.patch_size),
                c.num_channels,
                special=("class",),
                special_position=True,
                norm=1e-6,
                crop=True,
            ),
        },
        (Gather(norm=c.layer_norm_eps, norm_beside="image"), PerStream({FUSED: c.num_hidden_layers})),
        width=c.hidden_size,
        embed=0,
        poolers={FUSED: Pooler("first")},
        dtype=dtype,
        relative=Axes(axes) if axes else None,
        **bert.block(c),
    )


def _table(c: LayoutLMv3Config) -> Table:
    places = (c.input_size // c.patch_size) ** 2 + 1
    sides = {"x": "x", "y": "y", "h": "box_height", "w": "box_width"}
    biases = {"rel_pos_bias": c.has_relative_attention_bias}
    biases |= dict.fromkeys(("rel_pos_x_bias", "rel_pos_y_bias"), c.spatial)
    stack = f"stages_1/{FUSED}"
    return {
        **bert.embeddings_table("layoutlmv3.embeddings", "modalities_text"),
        **{f"layoutlmv3.embeddings.{name}_position_embeddings": f"modalities_text/{ours}" for name, ours in sides.items()},
        "layoutlmv3.cls_token": reshaped("modalities_image/special", 1, 1, c.hidden_size),
        "layoutlmv3.pos_embed": reshaped("modalities_image/position", 1, places, c.hidden_size),
        "layoutlmv3.patch_embed.proj": convolution("modalities_image/patch", c.patch_size, c.patch_size),
        "layoutlmv3.norm": "modalities_image/norm",
        "layoutlmv3.LayerNorm": "stages_0/norm",
        **{
            f"layoutlmv3.encoder.{name}.weight": f"{stack}/relative/bias_{axis}"
            for axis, (name, there) in enumerate(biases.items())
            if there
        },
        **layers("layoutlmv3.encoder.layer.{}", f"{stack}/layers/block", bert.LAYER),
    }


def _read_text(c: LayoutLMv3Config, inputs: Mapping[str, Any]) -> Masked:
    ids = inputs["input_ids"]
    box = inputs.get("bbox", jnp.zeros((*ids.shape, 4), jnp.int32))
    sides = jnp.stack([box[..., 3] - box[..., 1], box[..., 2] - box[..., 0]], -1)
    words = (ids != c.pad_token_id).astype(jnp.int32)
    place = jnp.broadcast_to(inputs.get("position_ids", jnp.cumsum(words, 1) * words + c.pad_token_id), ids.shape)
    return padded(
        ids,
        inputs.get("attention_mask"),
        segment=inputs.get("token_type_ids", jnp.zeros_like(ids)),
        box=jnp.concatenate([box, jnp.clip(sides, 0, LONGEST)], -1),
        place=place,
        coordinates=_coordinates(box),
    )


def _coordinates(box: jax.Array) -> jax.Array:
    """What attention tells tokens apart by: place in the text or the image, left and lower side of the box; `(B, L, 3)`."""
    place = jnp.broadcast_to(jnp.arange(box.shape[1]), box.shape[:2])
    return jnp.stack([place, box[..., 0], box[..., 3]], -1)


def _read_image(c: LayoutLMv3Config, pixels: Any) -> dict[str, Any]:
    """The page: its class token stands in a box of all of it, a patch in a box of its own."""
    side = c.input_size // c.patch_size
    ends = np.arange(side + 1) * PAGE // side
    row, column = (x.reshape(-1) for x in np.indices((side, side)))
    box = np.stack([ends[column], ends[row], ends[column + 1], ends[row + 1]], -1)
    box = np.concatenate([[[1, 1, PAGE - 1, PAGE - 1]], box])
    box = jnp.broadcast_to(jnp.asarray(box), (len(pixels), *box.shape))
    return {"image": channels_last(pixels), "coordinates": _coordinates(box)}


def _forward(run: Runner, c: LayoutLMv3Config, inputs: Mapping[str, Any]) -> dict[str, Any]:
    batch: dict[str, Any] = {}
    if "input_ids" in inputs:
        batch["text"] = _read_text(c, inputs)
    if "pixel_values" in inputs:
        batch["image"] = _read_image(c, inputs["pixel_values"])
    r = run(batch)
    return {"last_hidden_state": r.out.streams[FUSED].values, "hidden_states": tuple(r.gathered("stages_0", "stages_1"))}


_PUBLISHED = {"max_position_embeddings": 514}
FAMILIES = (
    Family(
        "layoutlmv3",
        LayoutLMv3Config,
        _build,
        _table,
        _forward,
        names={
            "layoutlmv3-base": _PUBLISHED,
            "layoutlmv3-large": {**sized(24, 1024, 16), **_PUBLISHED, "coordinate_size": 171, "shape_size": 170},
        },
        prefix="layoutlmv3",
        known=(r"position_ids$", r"visual_bbox$", r"encoder\.rel_pos_[xy]_bias\.weight$"),
        texts=Texts("<s>", "</s>", "<pad>", "<unk>", space=True, page=0),
        length=roberta.length,
    ),
)
