"""Sound as it is: samples of a waveform.

Survey table 1: "audio waveform segment, linear projection" (VATT), "speech waveform segment, 1D-CNN embedding" (FaceFormer).
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmx.errors import InputError
from mmx.layers import ACTIVATIONS
from mmx.layers.products import INITIAL, Dense
from mmx.modalities.embedder import Embedder
from mmx.modalities.masking import hide, shorter_mask
from mmx.types import Masked, Tokens

SEGMENTS = ((400, 400),)
WAV2VEC2 = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))


class Waveform(Embedder):
    """Samples `(B, S)` -> Tokens `(B, L, D)`, one for each segment, or for each step of a stack of 1D convolutions.

    Args:
        samples: the longest waveform, S; at 16 kHz, 16000 samples are a second. Shorter ones are welcome, and longer ones
            where positions are not learned.
        layers: (kernel, stride) of each convolution. The default cuts segments of 25 ms at 16 kHz and maps them linearly
            (VATT); `mmx.modalities.waveform.WAV2VEC2` has seven layers with GELUs between them and 20 ms a token
            (arXiv 2006.11477).
        channels: of the convolutions before the last; None: the width of a token; a tuple: of each.
        conv_bias: whether the convolutions have biases.
        conv_norm: layer (a LayerNorm before each activation), or group (each channel over time, what is masked included, and
            behind the first convolution only: wav2vec 2.0 base).
        activation: behind a convolution; behind the last one too if a linear map follows it.
        eps: of these norms.
        feature_norm: eps of a LayerNorm behind the convolutions, which a linear map to the width follows (wav2vec 2.0); None:
            the last convolution makes the tokens.
        position_window: (window, groups) of a convolution over the tokens that makes their positions (wav2vec 2.0); None: none.
    """

    samples: int
    layers: tuple[tuple[int, int], ...] = SEGMENTS
    channels: int | tuple[int, ...] | None = None
    conv_bias: bool = True
    conv_norm: Literal["layer", "group"] = "layer"
    activation: str = "gelu_tanh"
    eps: float = 1e-6
    feature_norm: float | None = None
    position_window: tuple[int, int] | None = None

    keeps = True
    reads = ("samples",)

    @property
    def mixes(self) -> bool:
        return self.position_window is not None or self.conv_norm == "group"

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

    @property
    def _field(self) -> tuple[int, int]:
        """Samples that a token hears, and from one to the next; a token exists where its last sample does."""
        stride, field = 1, 1
        for kernel, step in self.layers:
            field, stride = field + (kernel - 1) * stride, stride * step
        return field, stride

    @nn.compact
    def __call__(self, raw: Any) -> Tokens:
        fields, mask = self.read(raw)
        keep = isinstance(raw, Masked) and raw.keep
        x = fields["samples"]
        long = x.shape[-1] > self.samples and self.position in (None, "learned")
        if x.ndim != 2 or long or not jnp.issubdtype(x.dtype, jnp.floating):
            raise InputError(f"{self.name}: expected floating-point samples (B, S <= {self.samples}), got {x.dtype} {x.shape}")
        length = self._tokens(x.shape[1])
        field, stride = self._field
        here, mask = shorter_mask(mask, x.shape[:2], np.arange(length) * stride + field - 1)
        x = hide(jnp.asarray(x, self.dtype)[..., None], None if keep else here)
        for i, (kernel, stride) in enumerate(self.layers):
            last = i == len(self.layers) - 1 and self.feature_norm is None
            conv = {"padding": "VALID", "use_bias": self.conv_bias, "dtype": self.dtype, "name": f"conv_{i}"}
            x = nn.Conv(self._channels(i, last), (kernel,), (stride,), **conv)(x)
            if not last:
                x = ACTIVATIONS[self.activation](self._norm(x, i))
        if self.feature_norm is not None:
            features: Any = nn.LayerNorm(self.feature_norm, self.dtype, name="feature_norm")(x)
            self.sow("intermediates", "features", features, reduce_fn=lambda _, new: new, init_fn=lambda: None)
            x = Dense(self.width or 0, dtype=self.dtype, name="linear")(features)
        positions = None
        if self.position_window is not None:
            x = hide(x, mask)  # a token hears nothing of neighbours that do not exist
            window, groups = self.position_window
            positions = PositionConvolution(window, groups, self.activation, self.dtype, name="conv_position")(x)
        tokens = self.fuse(x, None if keep else mask, fields, (length,), positions)
        if not keep or mask is None:
            return tokens
        front = jnp.repeat(mask.any(-1, keepdims=True), len(self.special), 1)
        return dataclasses.replace(tokens, mask=jnp.concatenate([front, mask], 1))

    def _channels(self, i: int, last: bool) -> int:
        if isinstance(self.channels, tuple):
            return self.channels[i]
        return (self.width if last else self.channels or self.width) or 0

    def _norm(self, x: jax.Array, i: int) -> jax.Array:
        if self.conv_norm == "layer":
            return nn.LayerNorm(self.eps, self.dtype, name=f"conv_norm_{i}")(x)
        if i:
            return x
        return nn.GroupNorm(x.shape[-1], epsilon=self.eps, dtype=self.dtype, use_fast_variance=False, name="conv_norm_0")(x)

    def content(self, raw: Any) -> jax.Array:
        samples = self.read(raw)[0]["samples"]
        field, stride = self._field
        return samples[:, np.arange(self._tokens(samples.shape[1]))[:, None] * stride + np.arange(field)]

    def there(self, raw: Any) -> jax.Array | None:
        fields, mask = self.read(raw)
        field, stride = self._field
        samples = fields["samples"].shape
        return shorter_mask(mask, samples, np.arange(self._tokens(samples[1])) * stride + field - 1)[1]

    def example(self, batch_size: int) -> Masked:
        """A batch of the right form, for building parameters and for tests."""
        shape = (batch_size, self.samples)
        return Masked(self.with_tables(jnp.zeros(shape, jnp.float32), batch_size), jnp.ones(shape, bool))


class PositionConvolution(nn.Module):
    """Positions by what stands around a token: a convolution in groups and an activation, `(B, L, D) -> (B, L, D)`.

    Weights are normalised (arXiv 1602.07868): for each place of the window a direction and a length (wav2vec 2.0, 2006.11477,
    2). A window of an even size reaches one place further back than ahead.
    """

    window: int
    groups: int
    activation: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, length = x.shape[-1], x.shape[1]
        direction = self.param("kernel", INITIAL, (self.window, width // self.groups, width))
        scale = self.param("scale", nn.initializers.ones, (self.window,))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        kernel = direction * (scale * jax.lax.rsqrt(jnp.square(direction).sum((1, 2))))[:, None, None]
        y = jax.lax.conv_general_dilated(
            x,
            kernel.astype(self.dtype),
            window_strides=(1,),
            padding=[(self.window // 2, self.window // 2)],
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=self.groups,
        )
        return ACTIVATIONS[self.activation](y[:, :length] + bias.astype(self.dtype))
