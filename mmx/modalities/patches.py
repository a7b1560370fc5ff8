"""Patches through one linear map: of images, of videos (tubelets), of spectrograms, of volumes (voxels).

Survey table 1: "RGB patch", "video voxel", "audio spectrogram patch", "sketch picture patch", all "linear projection"
(ViT, arXiv 2010.11929; VATT, arXiv 2104.11178; MBT, arXiv 2107.00135).
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmx.errors import InputError
from mmx.layers.positions import sample
from mmx.layers.products import INITIAL, Dense
from mmx.modalities.embedder import Embedder
from mmx.modalities.masking import hide, token_mask
from mmx.types import Masked, Tokens


class Patches(Embedder):
    """Arrays `(B, *size, C)` -> Tokens `(B, L, D)`, L patches in row-major order.

    Args:
        size: (height, width) in pixels; (frames, height, width) of a video; (mel bins, frames) of a spectrogram;
            (depth, height, width) of a volume. A last axis of channels follows.
        patch: the same for a patch; divides `size`, unless `crop`.
        stride: from one patch to the next, where they overlap (AST, arXiv 2104.01778); what is left over at the end is cut
            off. None: side by side.
        channels: C.
        mean: of an integer image divided by 255; integer images are normalised here, floating-point ones are taken as they are.
        std: likewise.
        resize: whether other sizes that are multiples of `patch` are welcome; positions are then resampled to them.
        bias: whether the linear map of a patch has one (CLIP's has none).
        crop: whether sizes that `patch` does not divide are welcome; what is left over at the end is cut off.
    """

    size: tuple[int, ...]
    patch: tuple[int, ...]
    channels: int = 3
    mean: float = 0.5
    std: float = 0.5
    resize: bool = False
    bias: bool = True
    stride: tuple[int, ...] | None = None
    crop: bool = False

    reads = ("image",)

    @property
    def grid(self) -> tuple[int, ...]:
        return self._grid_of(self.size)

    def _grid_of(self, size: tuple[int, ...]) -> tuple[int, ...]:
        if self.stride is not None or self.crop:
            return overlapping_grid(size, self.patch, self.stride or self.patch)
        fits = (
            len(self.patch) == len(size)
            and min(self.patch) >= 1
            and not any(s % p for s, p in zip(size, self.patch, strict=True))
        )
        if not fits:
            raise InputError(f"patches: size={tuple(size)} is not a multiple of patch={tuple(self.patch)}")
        return tuple(s // p for s, p in zip(size, self.patch, strict=True))

    @nn.compact
    def __call__(self, raw: Any) -> Tokens:
        fields, mask = self.read(raw)
        image = fields["image"]
        size, expected = image.shape[1:-1], (*self.size, self.channels)
        if len(size) != len(self.size) or image.shape[-1] != self.channels or (size != tuple(self.size) and not self.resize):
            raise InputError(f"{self.name}: expected images of shape (B, {', '.join(map(str, expected))}), got {image.shape}")
        x = self._cut(normalise(image, self.mean, self.std, self.dtype))  # (B, L, pixels)
        mask = token_mask(mask, x.shape[:2])
        x = Dense(self.width or 0, use_bias=self.bias, dtype=self.dtype, name="patch")(hide(x, mask))  # (B, L, D)
        return self.fuse(x, mask, fields, self._grid_of(size))

    def _cut(self, x: jax.Array) -> jax.Array:
        if self.stride is None:
            return cut(x, self.patch)
        return overlapping(x, self._grid_of(x.shape[1:-1]), self.patch, self.stride)

    def content(self, raw: Any) -> jax.Array:
        return self._cut(normalise(self.read(raw)[0]["image"], self.mean, self.std, jnp.float32))

    def example(self, batch_size: int) -> Any:
        """A batch of the right form, for building parameters and for tests."""
        return self.with_tables(jnp.zeros((batch_size, *self.size, self.channels), jnp.uint8), batch_size)


class PackedPatches(Embedder):
    """Patches cut from images of any size and shape, as many as there is room for: `{"patches", "place", "extent"}`.

    Variable resolution and aspect ratio without a program for every size (NaViT, arXiv 2307.06304; NaFlex of SigLIP 2,
    arXiv 2502.14786): `mmx.data.image.cut_patches` makes on the host what this embedder reads, in a `Masked`:

        patches (B, L, pixels)   place (B, L, 2) row and column   extent (B, 2) rows and columns of the image

    Args:
        length: most patches of an image, L.
        patch: (height, width) in pixels.
        grid_size: (rows, columns) of the learned positions, which every image reads at its own resolution.
        channels: C.
        sampling: how they read it: linear, align_corners (ViLT) or antialias (SigLIP 2); see `mmx.layers.positions.sample`.
    """

    length: int
    patch: tuple[int, int]
    grid_size: tuple[int, int] = (16, 16)
    channels: int = 3
    mean: float = 0.5
    std: float = 0.5
    sampling: str = "linear"

    reads = ("patches", "place", "extent")

    @property
    def grid(self) -> tuple[int, ...]:
        return (self.length,)

    @nn.compact
    def __call__(self, raw: Any) -> Tokens:
        fields, mask = self.read(raw)
        if self.position not in (None, "learned"):
            raise InputError(f"{self.name}: position={self.position!r}, but patches of any size have learned positions only")
        x, pixels = fields["patches"], math.prod(self.patch) * self.channels
        if x.ndim != 3 or x.shape[2] != pixels:
            raise InputError(f"{self.name}: expected patches of shape (B, L, {pixels}), got {x.shape}")
        mask = token_mask(mask, x.shape[:2])
        x = hide(normalise(x, self.mean, self.std, self.dtype), mask)
        x = Dense(self.width or 0, dtype=self.dtype, name="patch")(x)
        front = len(self.special) if self.special_position else 0
        table = self.param("position", INITIAL, (front + math.prod(self.grid_size), self.width))
        place = fields["place"].astype(jnp.float32)
        positions = sample(table[front:], self.grid_size, place, fields["extent"], self.sampling)
        return self.fuse(x, mask, fields, (x.shape[1],), positions, place)

    def content(self, raw: Any) -> jax.Array:
        return normalise(self.read(raw)[0]["patches"], self.mean, self.std, jnp.float32)

    def example(self, batch_size: int) -> Masked:
        """A batch of the right form, for building parameters and for tests."""
        shape = (batch_size, self.length)
        patches = jnp.zeros((*shape, math.prod(self.patch) * self.channels), jnp.uint8)
        arrays = {"patches": patches, "place": jnp.zeros((*shape, 2), jnp.int32), "extent": jnp.ones((batch_size, 2), jnp.int32)}
        return Masked(self.with_tables(arrays, batch_size), jnp.ones(shape, bool))


def overlapping_grid(size: tuple[int, ...], patch: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """How many patches fit along each axis of a size, one every `stride`."""
    if not len(size) == len(patch) == len(stride) or min(*patch, *stride) < 1 or any(np.subtract(patch, size) > 0):
        raise InputError(f"patches: patch={tuple(patch)} with stride={tuple(stride)} does not fit size={tuple(size)}")
    return tuple((s - p) // step + 1 for s, p, step in zip(size, patch, stride, strict=True))


def cut(images: jax.Array, patch: tuple[int, ...]) -> jax.Array:
    """Images `(B, *size, C)` -> their whole patches, row by row: `(B, L, pixels)`."""
    grid = [size // side for size, side in zip(images.shape[1:-1], patch, strict=True)]
    images = images[:, *(slice(count * side) for count, side in zip(grid, patch, strict=True))]
    return _rows(images.reshape(len(images), *[n for pair in zip(grid, patch, strict=True) for n in pair], images.shape[-1]))


def overlapping(x: jax.Array, grid: tuple[int, ...], patch: tuple[int, ...], stride: tuple[int, ...]) -> jax.Array:
    """Images `(B, *size, C)` -> a patch every `stride`, row by row: `(B, L, pixels)`."""
    for axis, (count, length, step) in enumerate(zip(grid, patch, stride, strict=True)):
        x = jnp.take(x, np.arange(count)[:, None] * step + np.arange(length), axis=1 + 2 * axis)
    return _rows(x)


def _rows(x: jax.Array) -> jax.Array:
    """`(B, grid[0], patch[0], grid[1], patch[1], ..., C)` -> `(B, L, pixels)`."""
    axes, count = range(1, x.ndim - 1, 2), math.prod(x.shape[1:-1:2])
    return x.transpose(0, *axes, *(a + 1 for a in axes), x.ndim - 1).reshape(len(x), count, -1)


def normalise(image: jax.Array, mean: float, std: float, dtype: Any) -> jax.Array:
    """Integer pixels 0..255 -> (pixels / 255 - mean) / std; floating-point ones are taken as they are."""
    if jnp.issubdtype(image.dtype, jnp.integer):
        image = (image.astype(dtype) / 255 - mean) / std
    return image.astype(dtype)
