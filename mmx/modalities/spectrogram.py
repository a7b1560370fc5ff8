"""Sound as a sequence of spectra: log-mel, filterbanks, log power; `mmx.data.audio` makes them from waveforms.

Survey table 1: "log-Mel filterbank frame, linear projection" (AV-HuBERT), "log power spectrum frame, linear projection"
(VSET), "mel-spectrogram frame, linear projection and gated CNN" (Meta-StyleSpeech), "log-Mel filterbank frame, 2D-CNN
embedding" (FAT-MLM). Patches of a spectrogram are `Patches`.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmx.errors import InputError
from mmx.layers.products import Dense
from mmx.modalities.embedder import Embedder
from mmx.modalities.masking import hide, shorter_mask
from mmx.types import Masked, Tokens


class Spectrogram(Embedder):
    """Frames `(B, T, bins)` -> Tokens `(B, L, D)`.

    Args:
        frames: the longest sound, T; shorter ones are welcome.
        bins: of a frame.
        kind: linear: a token for each frame; gated: the same, then two gated 1D convolutions; cnn: two 2D convolutions
            over time and bins of stride 2 each, a token for four frames; strided: two 1D convolutions with GELUs, the second
            of stride 2, a token for two frames (Whisper, arXiv 2212.04356, 2.2).
    """

    frames: int
    bins: int
    kind: Literal["linear", "gated", "cnn", "strided"] = "linear"

    reads = ("frames",)

    @property
    def mixes(self) -> bool:
        return self.kind != "linear"

    @property
    def grid(self) -> tuple[int, ...]:
        return (self._tokens(self.frames),)

    def _tokens(self, frames: int) -> int:
        return -(-frames // self._step)

    @property
    def _step(self) -> int:
        return {"cnn": 4, "strided": 2}.get(self.kind, 1)

    @nn.compact
    def __call__(self, raw: Any) -> Tokens:
        fields, mask = self.read(raw)
        x, width = fields["frames"], self.width or 0
        if x.ndim != 3 or x.shape[2] != self.bins or x.shape[1] > self.frames:
            raise InputError(f"{self.name}: expected frames of shape (B, T <= {self.frames}, {self.bins}), got {x.shape}")
        length = self._tokens(x.shape[1])
        here, mask = shorter_mask(mask, x.shape[:2], np.arange(length) * self._step)
        x = hide(jnp.asarray(x, self.dtype), here)
        if self.kind == "cnn":
            x = x[..., None]
            for i in range(2):
                conv = nn.Conv(max(width // 4, 1), (3, 3), (2, 2), padding=((1, 1), (1, 1)), dtype=self.dtype, name=f"plane_{i}")
                here = None if here is None else here[:, ::2]
                x = jax.nn.relu(conv(x))  # (B, T / 2, bins / 2, C)
                x = x if here is None else jnp.where(here[..., None, None], x, 0)
            x = x.reshape(*x.shape[:2], -1)
        if self.kind == "strided":
            for i in range(2):
                conv = nn.Conv(width, (3,), (1 + i,), padding=((1, 1),), dtype=self.dtype, name=f"conv_{i}")
                x = jax.nn.gelu(conv(hide(x, here)), approximate=False)
        else:
            x = Dense(width, dtype=self.dtype, name="linear")(x)
        if self.kind == "gated":
            for i in range(2):
                y = nn.Conv(2 * width, (5,), dtype=self.dtype, name=f"conv_{i}")(hide(x, mask))
                x = x + nn.glu(y)
        return self.fuse(x, mask, fields, (length,))

    def content(self, raw: Any) -> jax.Array:
        frames = self.read(raw)[0]["frames"]
        length = self._tokens(frames.shape[1])
        padded = jnp.pad(frames, ((0, 0), (0, length * self._step - frames.shape[1]), (0, 0)))
        return padded.reshape(len(frames), length, -1)

    def there(self, raw: Any) -> jax.Array | None:
        fields, mask = self.read(raw)
        frames = fields["frames"].shape
        return shorter_mask(mask, frames[:2], np.arange(self._tokens(frames[1])) * self._step)[1]

    def example(self, batch_size: int) -> Masked:
        """A batch of the right form, for building parameters and for tests."""
        raw = self.with_tables(jnp.zeros((batch_size, self.frames, self.bins), jnp.float32), batch_size)
        return Masked(raw, jnp.ones((batch_size, self.frames), bool))
