"""Videos on the host: arrays `(T, height, width, C)`."""

import numpy as np

from mmx.errors import InputError


def sample_frames(video: np.ndarray, count: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """`count` frames, one of each of as many equal stretches: the middle one, or with `rng` any (TSN, arXiv 1608.00859).

    A video shorter than `count` repeats frames.
    """
    if video.ndim != 4 or not len(video):
        raise InputError(f"video: expected frames (T, height, width, channels) with T >= 1, got {video.shape}")
    within = np.full(count, 0.5) if rng is None else rng.random(count)
    return video[((np.arange(count) + within) * len(video) / count).astype(int)]
