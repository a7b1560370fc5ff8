"""Sound as it is: samples of a waveform.

Survey table 1: "audio waveform segment, linear projection" (VATT), "speech waveform segment, 1D-CNN embedding" (FaceFormer).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmx.errors import InputError
from mmx.modalities.embedder import Embedder
from mmx.modalities.masking import hide, shorter_mask
from mmx.types import Masked, Tokens

SEGMENTS = ((400, 400),)
WAV2VEC2 = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))


class Waveform(Embedder):
    """Samples `(B, S)` -> Tokens `(B, L, D)`, one for each segment, or for each step of a stack of 1D convolutions.

    Args:
        samples: the longest waveform, S; at 16 kHz, 16000 samples are a second. Shorter ones are welcome.
        layers: (kernel, stride) of each convolution. The default cuts segments of 25 ms at 16 kHz and maps them linearly
            (VATT); `mmx.modalities.waveform.WAV2VEC2` has seven layers with GELUs between them and 20 ms a token
            (arXiv 2006.11477).
        channels: of the convolutions before the last; None: the width of a token.
    """

    samples: int
    layers: tuple[tuple[int, int], ...] = SEGMENTS
    channels: int | None = None

    reads = ("samples",)

    @property
    def grid(self) -> tuple[int, ...]:
        return (self._tokens(self.samples),)

    def _tokens(self, samples: int) -> int:
        given = samples
        for kernel, stride in self.layers:
            samples = (samples - kernel) // stride + 1
        if samples < 1:
            raise InputError(f"waveform: {given} samples are shorter than one token of layers={self.layers}")
        return samples

    @nn.compact
    def __call__(self, raw: Any) -> Tokens:
        fields, mask = self.read(raw)
        x = fields["samples"]
        if x.ndim != 2 or x.shape[1] > self.samples or not jnp.issubdtype(x.dtype, jnp.floating):
            raise InputError(f"{self.name}: expected floating-point samples (B, S <= {self.samples}), got {x.dtype} {x.shape}")
        length = self._tokens(x.shape[1])
        stride, field = 1, 1  # of the whole stack; a token exists where its last sample does
        for kernel, step in self.layers:
            field, stride = field + (kernel - 1) * stride, stride * step
        here, mask = shorter_mask(mask, x.shape[:2], np.arange(length) * stride + field - 1)
        x = hide(jnp.asarray(x, self.dtype)[..., None], here)
        for i, (kernel, stride) in enumerate(self.layers):
            last = i == len(self.layers) - 1
            channels = (self.width if last else self.channels or self.width) or 0
            x = nn.Conv(channels, (kernel,), (stride,), padding="VALID", dtype=self.dtype, name=f"conv_{i}")(x)
            if not last:
                x = jax.nn.gelu(nn.LayerNorm(dtype=self.dtype, name=f"conv_norm_{i}")(x))
        return self.fuse(x, mask, fields, (length,))

    def example(self, batch_size: int) -> Masked:
        """A batch of the right form, for building parameters and for tests."""
        shape = (batch_size, self.samples)
        return Masked(self.with_tables(jnp.zeros(shape, jnp.float32), batch_size), jnp.ones(shape, bool))
