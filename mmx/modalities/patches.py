"""Patches of an image through one linear map. Survey table 1: "RGB patch, linear projection" (ViT, arXiv 2010.11929)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx.errors import InputError
from mmx.modalities.masking import hide, token_mask, unmask
from mmx.types import Tokens


class Patches(nn.Module):
    """Images `(B, height, width, C)` -> Tokens `(B, L, D)`, L patches in row-major order, with a learned position.

    Args:
        size: (height, width) in pixels.
        patch: (height, width) of a patch; divides `size`.
        channels: C.
        width: size of a token, D; None: the model's.
        mean: of a uint8 image divided by 255; integer images are normalised here, floating-point ones are taken as they are.
        std: likewise.
    """

    size: tuple[int, int]
    patch: tuple[int, int]
    channels: int = 3
    width: int | None = None
    mean: float = 0.5
    std: float = 0.5
    dtype: Any = "float32"

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row."""
        if min(self.patch) < 1 or self.size[0] % self.patch[0] or self.size[1] % self.patch[1]:
            raise InputError(f"patches: size={tuple(self.size)} is not a multiple of patch={tuple(self.patch)}")
        return self.size[0] // self.patch[0], self.size[1] // self.patch[1]

    @nn.compact
    def __call__(self, raw: Any) -> Tokens:
        image, mask = unmask(raw)
        expected = (*self.size, self.channels)
        if image.ndim != 4 or image.shape[1:] != expected:
            raise InputError(f"{self.name}: expected images of shape (B, {', '.join(map(str, expected))}), got {image.shape}")
        if jnp.issubdtype(image.dtype, jnp.integer):
            image = (image.astype(self.dtype) / 255 - self.mean) / self.std
        (rows, columns), (height, width) = self.grid, self.patch
        x = image.astype(self.dtype).reshape(-1, rows, height, columns, width, self.channels)
        x = x.swapaxes(2, 3).reshape(image.shape[0], rows * columns, -1)  # (B, L, pixels)
        mask = token_mask(mask, x.shape[:2])
        x = nn.Dense(self.width or 0, dtype=self.dtype, name="patch")(hide(x, mask))  # (B, L, D)
        position = self.param("position", nn.initializers.normal(0.02), (rows * columns, self.width))
        return Tokens(hide(x + position.astype(self.dtype), mask), mask)

    def example(self, batch_size: int) -> jax.Array:
        """A batch of the right form, for building parameters and for tests."""
        return jnp.zeros((batch_size, *self.size, self.channels), jnp.uint8)
