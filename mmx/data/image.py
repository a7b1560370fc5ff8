"""Images on the host: arrays (height, width, channels), uint8."""

import numpy as np

from mmx.errors import InputError


def check_image(image: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
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
