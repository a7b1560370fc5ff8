"""A Transformer block: a short word of sublayers, each with a residual.

"self mlp"            encoder                      "cross self mlp"        LXMERT
"self cross mlp"      decoder, ALBEF               "cross mlp self mlp"    ViLBERT
"cross mlp"           MulT                     "both mlp"              MBT without a bottleneck

"time space mlp"      TimeSformer

On a grid (time, row, column), "time" is attention of each place along time with a linear map behind, and "space" attention
within each time, where special tokens read every frame and keep the mean.
"both" is one attention to the context and to oneself, by one norm and one softmax.
"""

import dataclasses
from types import NoneType

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx.errors import InputError, at_least, unknown
from mmx.layers.attention import PROJECTIONS, Attention, Line, Sight, each_part
from mmx.layers.mlp import ACTIVATIONS, MLP
from mmx.layers.norms import NORMS, make_norm
from mmx.layers.products import Dense
from mmx.layers.relative import Relative
from mmx.parallel import constrain

DTYPES = ("float32", "bfloat16")
MULTIWAY = ("attention", "mlp", "norm")
SUBLAYERS = ("self", "time", "space", "cross", "both", "mlp")
REMAT = ("none", "full", "dots")


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """What varies between the blocks of published models. No other place holds it."""

    width: int = 256
    """Size of a token, D."""
    heads: int = 4
    """Attention heads, H."""
    head_size: int | None = None
    """Size of a head, K. None: width / heads."""
    value_size: int | None = None
    """Size of a head's values (Perceiver). None: that of its queries and keys."""
    kv_heads: int | None = None
    """Heads of keys and values; fewer than heads means that queries share them (GQA). None: heads."""
    mlp: int | None = None
    """Hidden size of the MLP, F. None: 4 x width."""
    activation: str = "gelu_tanh"
    """One of gelu (erf), gelu_tanh, quick_gelu, relu, silu, tanh."""
    gated: bool = False
    """Whether the MLP's activation is multiplied by a second projection (arXiv 2002.05202: T5 1.1, Llama, Gemma)."""
    norm: str = "pre"
    """Where the norm stands: pre (before a sublayer, one more after the stack) or post (after the residual)."""
    norm_kind: str = "layer"
    """layer, rms, or rms_offset (rms whose scale is 1 + parameter: Gemma)."""
    eps: float = 1e-6
    """The norms' epsilon."""
    context_norm: str | None = None
    """What of norms a cross-attention has for what it reads: own (Perceiver), shared with what queries (MulT), or None."""
    cross_residual: bool = True
    """Whether a cross-attention is added to what queries. False: it takes its place (the decoder of Perceiver IO)."""
    final_norm: bool | None = None
    """Whether a norm stands behind the stack. None: if norm is pre."""
    bias: bool = True
    """Whether dense layers have biases."""
    attention_bias: tuple[str, ...] | None = None
    """Which projections of attention have biases, of query, key, value and out. None: all or none, as `bias` says."""
    scale: float | None = None
    """Factor of the attention scores. None: 1 / sqrt(head size); T5: 1."""
    scale_by_layer: bool = False
    """Whether the scores of self-attention in a stack are divided by the number of the layer too, counted from 1 (GPT-2 has that
    as an option)."""
    blind: bool = False
    """What a token reads of itself and others that may see none of them: nothing, or the mean of all, padding and future too
    (what published decoders leave of padding in front of a text; nobody sees it)."""
    rotary: float | None = None
    """Base of rotary positions in self-attention (10000 in RoFormer), by the coordinates of tokens; None: none."""
    relative: Relative | None = None
    """Relative positions: `Buckets` (T5), `Grid` (BEiT), `Axes` (LayoutLMv3), or None."""
    qk_norm: bool = False
    """Whether queries and keys are normalised (ViT-22B)."""
    inner_norm: bool = False
    """Whether norms stand inside self-attention and the MLP, too, before their last matrix (Magneto, arXiv 2210.06423)."""
    layer_scale: float | None = None
    """Initial value of a learned scale on every residual branch (CaiT); None: no scale."""
    skip: bool = False
    """Whether a cross-attention that has nothing to read is left out, norm and all (BLIP); else a post-norm stays."""
    dropout: float = 0.0
    """Dropout rate on every residual branch; acts where a `dropout` key is given."""
    drop_path: float = 0.0
    """Stochastic depth: the rate at the last layer, growing linearly from 0 at the first (arXiv 1603.09382)."""
    dtype: str = "float32"
    """Type of the computation. Parameters are float32; norms' statistics and softmax too."""
    remat: str = "none"
    """What the backward pass computes again: none, full (everything), dots (all but matrix products)."""
    unroll: int = 1
    """Layers per iteration of the scan over layers; as many as there are, or more: no scan, which is faster on a CPU and slower
    to compile. The layout of parameters does not depend on it."""

    def __post_init__(self) -> None:
        choices = {"activation": ACTIVATIONS, "norm_kind": NORMS, "remat": REMAT, "norm": ("pre", "post"), "dtype": DTYPES}
        for field, known in choices.items():
            if getattr(self, field) not in known:
                raise InputError(unknown(field, getattr(self, field), known))
        if self.context_norm not in (None, "own", "shared") or (self.context_norm == "shared" and self.norm != "pre"):
            raise InputError(f"block: context_norm={self.context_norm!r}; it is None, 'own', or, before sublayers, 'shared'")
        at_least(self, width=1, heads=1, unroll=1, dropout=0, drop_path=0)
        if max(self.dropout, self.drop_path) >= 1:
            raise InputError(f"block: dropout={self.dropout}, drop_path={self.drop_path}; rates are less than 1")
        if self.head_size is None and self.width % self.heads:
            raise InputError(f"block: width={self.width} is not a multiple of heads={self.heads}; set head_size, or change one")
        if not isinstance(self.relative, (Relative, NoneType)):
            raise InputError(f"block: relative={self.relative!r}; expected mmx.layers.Buckets, Grid, Axes or None")
        if self.rotary is not None and self.rotary <= 0:
            raise InputError(f"block: rotary={self.rotary}; the base is positive, None is for no rotary positions")
        if self.heads % (self.kv_heads or self.heads):
            raise InputError(f"block: heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        for name in self.attention_bias or ():
            if name not in PROJECTIONS:
                raise InputError("block.attention_bias: " + unknown("projection", name, PROJECTIONS))

    @property
    def ends_with_norm(self) -> bool:
        """Whether a norm stands behind a stack of these blocks."""
        return self.norm == "pre" if self.final_norm is None else self.final_norm


def sublayer_names(word: str) -> list[tuple[str, str]]:
    """Splits a word into `(name, kind)` of each sublayer: `"cross mlp self mlp"` has `mlp` and `mlp_1`."""
    kinds = word.split()
    for kind in kinds:
        if kind not in SUBLAYERS:
            raise InputError(unknown("sublayer", kind, SUBLAYERS))
    return [(kind if kind not in kinds[:i] else f"{kind}_{kinds[:i].count(kind)}", kind) for i, kind in enumerate(kinds)]


def _both(sight: Sight, own: tuple[int, ...], context_mask: jax.Array | None, both: tuple[int, ...]) -> Sight:
    """The sight of a stream in front of its context."""
    length, other = own[1], both[1] - own[1]
    masks = [(sight.mask, own), (context_mask, (own[0], other))]
    whole = all(mask is None for mask, _ in masks)
    mask = None if whole else jnp.concatenate([jnp.ones(s, bool) if m is None else m for m, s in masks], 1)
    if sight.visible is None and sight.reads is None:
        return Sight(mask)
    visible = jnp.ones((length, length), bool) if sight.visible is None else jnp.asarray(sight.visible)
    reads = jnp.ones((length, other), bool) if sight.reads is None else sight.reads
    return Sight(mask, jnp.concatenate([visible, jnp.broadcast_to(reads, (*visible.shape[:-1], other))], -1))


class Block(nn.Module):
    """One block: `x (B, L, D) -> (B, L, D)`; `cross` reads `context (B, M, D)` and adds zero where there is none.

    Args:
        config: what varies between published blocks.
        sublayers: the word.
        parts: `(name, length)` of each stream that `x` is a concatenation of.
        multiway: what each of those streams has for itself, of "attention" (its projections), "mlp" and "norm" (BEiT-3,
            arXiv 2208.10442).
    """

    config: BlockConfig
    sublayers: str = "self mlp"
    parts: tuple[tuple[str, int], ...] = ()
    multiway: tuple[str, ...] = ()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        sight: Sight = Sight(),
        context: jax.Array | None = None,
        context_mask: jax.Array | None = None,
        drop_path: jax.Array | float = 0.0,
        only: str | None = None,
    ) -> jax.Array:
        """`only` runs one sublayer, by its name."""
        c = self.config
        inner = c.norm_kind if c.inner_norm else None
        attentions, mlps, norms = (self.parts if what in self.multiway else () for what in MULTIWAY)
        for name, kind in sublayer_names(self.sublayers):
            if only not in (None, name) or (c.skip and kind == "cross" and context is None):
                continue

            def norm(x: jax.Array, name: str = name) -> jax.Array:
                return each_part(x, norms, lambda end: make_norm(c.norm_kind, c.eps, c.dtype, f"{name}_norm{end}"))

            source = context if kind in ("cross", "both") else None
            if source is not None and (kind == "both" or c.context_norm == "shared"):
                source = jnp.concatenate([x, source], 1)
                source = norm(source) if c.norm == "pre" else source
                y, source = source[:, : x.shape[1]], source if kind == "both" else source[:, x.shape[1] :]
            else:
                y = norm(x) if c.norm == "pre" else x
            if source is not None and c.context_norm == "own" and kind == "cross":
                source = make_norm(c.norm_kind, c.eps, c.dtype, f"{name}_context_norm")(source)
            if kind == "mlp":
                y = each_part(
                    y,
                    mlps,
                    lambda end, name=name: MLP(
                        c.mlp or 4 * c.width, c.activation, c.gated, c.bias, c.dtype, inner, c.eps, name=name + end
                    ),
                )
            else:
                attention = Attention(
                    heads=c.heads,
                    head_size=c.head_size or c.width // c.heads,
                    value_size=c.value_size,
                    kv_heads=c.kv_heads or c.heads,
                    bias=(PROJECTIONS if c.bias else ()) if c.attention_bias is None else c.attention_bias,
                    scale=c.scale,
                    blind=c.blind,
                    qk_norm=c.qk_norm,
                    eps=c.eps,
                    rotary=c.rotary,
                    dtype=c.dtype,
                    parts=attentions,
                    inner_norm=None if kind == "cross" else inner,
                    name=name,
                )
                if kind in ("time", "space"):
                    y = self._along(kind, name, attention, y, sight)
                elif source is None:
                    y = jnp.zeros_like(x) if kind == "cross" else attention(y, sight)
                elif kind == "both":
                    y = attention(y, _both(sight, x.shape[:2], context_mask, source.shape[:2]), source)
                else:
                    y = attention(y, Sight(context_mask, sight.reads, at=sight.at), source)
                    if context_mask is not None:  # nothing to read: not even the bias of the output
                        y = jnp.where(context_mask.any(-1)[:, None, None], y, 0.0)
            if c.layer_scale is not None:
                y = y * self.param(f"{name}_scale", nn.initializers.constant(c.layer_scale), (c.width,)).astype(y.dtype)
            y = self.drop(y, drop_path, name)
            y = y if kind == "cross" and not c.cross_residual else x + y
            y = y if c.norm == "pre" else norm(y)
            if c.skip and kind == "cross" and context_mask is not None:
                y = jnp.where(context_mask.any(-1)[:, None, None], y, x)
            x = constrain(y, "batch", "length", "stream")
        return x

    def _along(self, kind: str, name: str, attention: Attention, x: jax.Array, sight: Sight) -> jax.Array:
        """Attention along one part of the grid of the only stream, `(B, special + T S, D)`; the other one counts as batch."""
        line = sight.lines[0] if len(sight.lines) == 1 else Line(x.shape[1])
        if line.grid is None or len(line.grid) != 3 or sight.visible is not None:
            raise InputError(
                f"block: the sublayer {kind!r} is of a stream that lies on a grid (time, row, column) and is not causal"
            )
        size, width, frames = len(x), x.shape[-1], line.grid[0]
        mask = jnp.ones(x.shape[:2], bool) if sight.mask is None else sight.mask
        special, own = x[:, : line.special], x[:, line.special :].reshape(size, frames, -1, width)
        here = mask[:, line.special :].reshape(own.shape[:3])
        if kind == "time":
            own, here = own.swapaxes(1, 2), here.swapaxes(1, 2)
            y = attention(own.reshape(-1, frames, width), Sight(None if sight.mask is None else here.reshape(-1, frames)))
            y = Dense(width, use_bias=self.config.bias, dtype=self.config.dtype, name=f"{name}_project")(y)
            y = y.reshape(size, -1, frames, width).swapaxes(1, 2).reshape(size, -1, width)
            return jnp.concatenate([jnp.zeros_like(special), y], 1)
        there = here.any(-1)  # (B, T)
        special = jnp.broadcast_to(special[:, None], (size, frames, *special.shape[1:]))
        here = jnp.concatenate([jnp.broadcast_to(mask[:, None, : line.special], special.shape[:3]), here], 2)
        y = jnp.concatenate([special, own], 2)  # (B, T, special + S, D)
        y = attention(y.reshape(-1, *y.shape[2:]), Sight(None if sight.mask is None else here.reshape(-1, here.shape[2])))
        y = y.reshape(size, frames, -1, width)
        part = there[:, :, None, None].astype(y.dtype) / jnp.maximum(there.sum(1), 1)[:, None, None, None]
        special, own = (y[:, :, : line.special] * part).sum(1), y[:, :, line.special :]
        return jnp.concatenate([special.astype(y.dtype), own.reshape(size, -1, width)], 1)

    def drop(self, y: jax.Array, drop_path: jax.Array | float, name: str) -> jax.Array:
        """Dropout, then stochastic depth per example. Without a `dropout` key the branch passes unchanged."""
        if not self.has_rng("dropout"):
            return y
        y = nn.Dropout(self.config.dropout, deterministic=False, name=f"{name}_dropout")(y)
        if self.config.drop_path:
            keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - drop_path, (y.shape[0], 1, 1))
            y = y * (keep / (1 - drop_path)).astype(y.dtype)
        return y
