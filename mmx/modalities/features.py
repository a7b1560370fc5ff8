"""Features that another network made: regions of an image, 2D- or 3D-CNN features of frames and clips, music features.

Survey table 1: "RGB RoI, CNN embedding" (ViLBERT, LXMERT), "video clip, 3D-CNN embedding" (VideoBERT), "slide patch, CNN
embedding" (MCAT), "music frame, linear projection" (AI Choreographer).
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx.errors import InputError
from mmx.layers import ACTIVATIONS, make_norm
from mmx.layers.products import INITIAL, Dense
from mmx.modalities.embedder import BESIDE, Embedder
from mmx.modalities.masking import hide, token_mask
from mmx.types import Masked, Tokens


class Features(Embedder):
    """Features `(B, L, size)` -> Tokens `(B, L, D)` through one linear map, or as they are.

    Where a region stands is one of its `vectors`: `vectors={"box": 5}`, made by `mmx.layers.positions.box_geometry`.

    Args:
        size: numbers of a feature.
        length: most features of an example, L; shorter ones are welcome.
        input_norm: eps of a LayerNorm on the features themselves (HERO); None: no norm.
        linear: whether there is a linear map; False: features are tokens already, of the model's width.
        bias: whether the linear map has a bias.
        activation: behind the linear map; None: none.
        position: usually none, since regions have no order; "learned" for clips and frames.
        marked: whether there may be `marked (B, L)` in the dict, 0 or 1: a learned feature is added where it is 1, on what an
            objective has hidden (UNITER, HERO).
        aligned: the modality of which there may be `aligned (B, L, n)` in the dict, places that a feature belongs to, -1 for
            none: the mean of that modality's positions there is added (VisualBERT).
    """

    size: int
    length: int
    input_norm: float | None = None
    linear: bool = True
    bias: bool = True
    activation: str | None = None
    marked: bool = False
    aligned: str | None = None

    usual_position = "none"
    reads = ("features",)
    may_read: ClassVar[tuple[str, ...]] = (*BESIDE, "marked", "aligned")

    @property
    def grid(self) -> tuple[int, ...]:
        return (self.length,)

    @nn.compact
    def __call__(self, raw: Any) -> Tokens:
        fields, mask = self.read(raw)
        x = fields["features"]
        if x.ndim != 3 or x.shape[2] != self.size or x.shape[1] > self.length:
            raise InputError(f"{self.name}: expected features of shape (B, L <= {self.length}, {self.size}), got {x.shape}")
        mask = token_mask(mask, x.shape[:2])
        x = jnp.asarray(x, self.dtype)
        if self.marked:
            table = nn.Embed(2, self.size, embedding_init=INITIAL, name="marked")
            here = fields.get("marked", jnp.zeros(x.shape[:2], jnp.int32)).astype(jnp.int32)
            x = x + jnp.where(here[..., None] == 1, table(here), 0)  # row 0, which is published too, is not read
        x = hide(x, mask)
        if self.input_norm is not None:
            x = make_norm("layer", self.input_norm, self.dtype, "input_norm")(x)
        if self.linear:
            x = Dense(self.width or 0, use_bias=self.bias, dtype=self.dtype, name="linear")(x)
            x = x if self.activation is None else ACTIVATIONS[self.activation](x)
        elif self.size != self.width:
            raise InputError(f"{self.name}: features of size {self.size} are not tokens of width {self.width}; set linear=True")
        if self.aligned is not None and "aligned" in fields:
            there = fields["aligned"][..., None] >= 0  # (B, L, n, 1)
            places = self._lent(self.aligned, "position")[jnp.maximum(fields["aligned"], 0)]  # (B, L, n, D)
            x = x + (jnp.where(there, places, 0).sum(2) / jnp.maximum(there.sum(2), 1)).astype(x.dtype)
        return self.fuse(x, mask, fields, (x.shape[1],))

    def content(self, raw: Any) -> jax.Array:
        return self.read(raw)[0]["features"]

    def decode(self, x: jax.Array) -> jax.Array:
        """Features by the linear map that embeds them, read the other way round (tied weights): `(B, L, D) -> (B, L, size)`."""
        return jnp.einsum("bld,sd->bls", x, self.matrix.astype(x.dtype), preferred_element_type=jnp.float32)

    @property
    def matrix(self) -> jax.Array:
        """The linear map, `(size, D)`."""
        return self.get_variable("params", "linear")["kernel"]

    def example(self, batch_size: int) -> Masked:
        """A batch of the right form, for building parameters and for tests."""
        raw = self.with_tables(jnp.zeros((batch_size, self.length, self.size), jnp.float32), batch_size)
        return Masked(raw, jnp.ones((batch_size, self.length), bool))
