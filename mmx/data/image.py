"""Images on the host: arrays (height, width, channels), uint8."""

import numpy as np
from PIL import Image

from mmx.errors import InputError


def check_image(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the image if it has the given shape and a type that images have.

    Raises:
        ValueError: says what was expected and what came.
    """
    if image.shape != shape:
        raise InputError(f"expected (height, width, channels) = {shape}, got {image.shape}; resize it, or set the size")
    if image.dtype != np.uint8 and not np.issubdtype(image.dtype, np.floating):
        raise InputError(f"expected uint8, or normalised floating point, got {image.dtype}")
    return image


def shift(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """Moves the image; what moves out on one side comes in on the other."""
    rows, columns = (np.arange(size) - by for size, by in zip(image.shape, (down, right), strict=False))
    return image.take(rows, 0, mode="wrap").take(columns, 1, mode="wrap")


def cut_patches(image: np.ndarray, patch: tuple[int, int], length: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Cuts an image of any size into at most `length` patches, for `mmx.modalities.PackedPatches`.

    The image is resized to the largest size that keeps its aspect ratio, is made of whole patches and has room, each side
    rounded to the nearest patch (NaFlex: SigLIP 2, arXiv 2502.14786, 2.4.2).

    Returns:
        `{"patches" (L, pixels) uint8, "place" (L, 2) int32, "extent" (2,) int32}` and which patches exist, `(L,)`.
    """
    if image.ndim != 3 or image.dtype != np.uint8:
        raise InputError(f"expected an image (height, width, channels) uint8, got {image.dtype} {image.shape}")
    rows, columns = patch_grid(image.shape[:2], patch, length)
    size = (columns * patch[1], rows * patch[0])
    planes = [np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BILINEAR)) for plane in image.transpose(2, 0, 1)]
    cut = np.stack(planes, -1).reshape(rows, patch[0], columns, patch[1], -1).swapaxes(1, 2)  # (rows, columns, h, w, C)
    count = rows * columns
    patches = np.zeros((length, patch[0] * patch[1] * image.shape[2]), np.uint8)
    patches[:count] = cut.reshape(count, -1)
    place = np.zeros((length, 2), np.int32)
    place[:count] = np.stack(np.divmod(np.arange(count), columns), -1)
    arrays = {"patches": patches, "place": place, "extent": np.asarray([rows, columns], np.int32)}
    return arrays, np.arange(length) < count


def patch_grid(size: tuple[int, ...], patch: tuple[int, int], length: int) -> tuple[int, int]:
    """Rows and columns of patches of an image (height, width) that is scaled to have as many as fit into `length`."""
    if length < 1 or min(size) < 1:
        raise InputError(f"an image of {tuple(size)} pixels cannot be cut into at most {length} patches")
    low, high = 0.0, float(length * max(patch))  # scales: what fits, what does not
    grid = (1, 1)
    for _ in range(50):
        scale = (low + high) / 2
        tried = tuple(max(round(side * scale / p), 1) for side, p in zip(size, patch, strict=True))
        if tried[0] * tried[1] <= length:
            low, grid = scale, tried
        else:
            high = scale
    return grid[0], grid[1]
