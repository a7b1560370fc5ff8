"""What turns streams into answers: poolers, projections into the shared space, classifiers, tied decoders.

A head is called as `head(streams, pooled, modalities)`; it returns None where what it reads is absent from the batch. One that
is `per_token` reads no vector of a stream, and acts while a stream is written token by token, too.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmx.errors import InputError, unknown
from mmx.layers import ACTIVATIONS, MLP, AttentionPool, BlockConfig, Stack, make_norm
from mmx.layers.products import INITIAL, Dense, product
from mmx.layers.stack import sow_states
from mmx.losses import unit_vectors
from mmx.modalities.masking import unmask
from mmx.topologies import FUSED
from mmx.types import Scored, Streams, Tokens

FUSES = ("mean", "sum", "product")


def mean_pool(tokens: Tokens) -> jax.Array:
    """The mean over the tokens that exist, `(B, L, D) -> (B, D)`; zeros where none does."""
    if tokens.mask is None:
        return tokens.values.mean(1)
    mask = tokens.mask[..., None].astype(tokens.values.dtype)
    return (tokens.values * mask).sum(1) / jnp.maximum(mask.sum(1), 1)


def stream_of(streams: Streams, modality: str) -> str | None:
    """The stream that carries a modality: its own, or the one it was summed into; None where it is absent."""
    return next((name for name in (modality, FUSED) if name in streams), None)


def transform(
    x: jax.Array, size: int | None, activation: str | None, norm: float | None, dtype: Any, norm_first: bool = False
) -> jax.Array:
    """What stands before the last matrix of a head, called in its compact method: dense layer, activation, LayerNorm."""
    act = (lambda x: x) if size is None or activation is None else ACTIVATIONS[activation]
    x = x if size is None else Dense(size, dtype=dtype, name="transform")(x)
    normed = (lambda x: x) if norm is None else make_norm("layer", norm, dtype, "norm")
    return act(normed(x)) if norm_first else normed(act(x))


class Projection(nn.Module):
    """Into the shared space: `(B, D) -> (B, E)`, unit length, float32. Zeros stay zeros, if there is no bias.

    Without a size the vector is taken as it is (SigLIP).
    """

    size: int | None
    bias: bool = False
    dtype: Any = "float32"

    @nn.compact
    def __call__(self, pooled: jax.Array) -> jax.Array:
        x = pooled
        if self.size is not None:
            x = Dense(self.size, use_bias=self.bias, dtype=self.dtype, name="projection")(x)
        x = x.astype(jnp.float32)
        sow_states(self, x, "features")
        return unit_vectors(x)


class Pooler(nn.Module):
    """One vector of a stream: `(B, L, D) -> (B, D')`.

    Args:
        token: which token it is: "first" (a class token), "last", or "end" (the first one with the id `end`, or, if that is
            None, with the highest id, as in OpenAI's CLIP); or "mean", of the tokens that exist; or "special", the mean of the
            learned ones in front (AST); or "content", the mean of the others (BEiT).
        end: the id of the end of a text.
        norm: eps of a LayerNorm on it; None: no norm.
        size: of a dense layer behind it; None: no dense layer.
        activation: behind the dense layer; None: none.
    """

    token: str = "first"
    end: int | None = None
    norm: float | None = None
    size: int | None = None
    activation: str | None = None
    dtype: Any = "float32"

    @nn.compact
    def __call__(self, tokens: Tokens, raw: Any) -> jax.Array:
        x = self._choose(tokens, raw)
        if self.norm is not None:
            x = make_norm("layer", self.norm, self.dtype, "norm")(x)
        if self.size is not None:
            x = Dense(self.size, dtype=self.dtype, name="transform")(x)
        return x if self.activation is None else ACTIVATIONS[self.activation](x)

    def _choose(self, tokens: Tokens, raw: Any) -> jax.Array:
        if self.token == "mean":
            return mean_pool(tokens)
        count = len(tokens.special)
        if self.token == "special":
            return tokens.values[:, :count].mean(1)
        if self.token == "content":
            return mean_pool(Tokens(tokens.values[:, count:], None if tokens.mask is None else tokens.mask[:, count:]))
        if self.token in ("first", "last"):
            return tokens.values[:, 0 if self.token == "first" else -1]
        if self.token != "end":
            known = ("first", "last", "end", "mean", "special", "content")
            raise InputError("pooler: " + unknown("token", self.token, known))
        raw, _ = unmask(raw)
        ids = raw["ids"] if isinstance(raw, Mapping) else raw
        at = (ids if self.end is None else ids == self.end).argmax(-1)  # the first of the highest
        return jnp.take_along_axis(tokens.values, at[:, None, None], 1)[:, 0]


class AttentionPooler(AttentionPool):
    """One vector of a stream that a learned token reads from it: `(B, L, D) -> (B, W)`; arguments of `AttentionPool`."""

    def __call__(self, tokens: Tokens, raw: Any) -> jax.Array:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().__call__(tokens.values, tokens.mask)[:, 0]


class Classifier(nn.Module):
    """A class for the whole example: `(B, classes)` float32.

    Args:
        classes: how many.
        stream: whose vector is read; several: theirs side by side, zeros for one that is absent (MulT); None: those of all that
            are there, as `fuse` says.
        residual: activation of an MLP, as wide as what is read, that is first added to it (MulT: relu); None: no such MLP.
        transform: whether a dense layer stands before the last one.
        size: of that dense layer; None: as many as it reads.
        activation: behind it.
        norm: eps of a LayerNorm behind that (LXMERT); None: no norm.
        fuse: what becomes of several streams: their mean, sum or product (ViLBERT).
        by_tokens: whether in their mean a stream counts by its tokens, and not as one.
        pooler: what makes the vector of the one stream for this head alone; None: the model's pooler.
        norm_first: whether the norm stands before the activation.
    """

    classes: int
    stream: str | tuple[str, ...] | None = None
    transform: bool = True
    size: int | None = None
    activation: str | None = "tanh"
    norm: float | None = None
    fuse: str = "mean"
    by_tokens: bool = False
    pooler: Pooler | None = None
    norm_first: bool = False
    residual: str | None = None
    dtype: Any = "float32"

    @nn.compact
    def __call__(
        self, streams: Streams, pooled: Mapping[str, jax.Array], modalities: Mapping[str, nn.Module]
    ) -> jax.Array | None:
        if self.pooler is not None:
            pooled = {n: self.pooler(streams[n], None) for n in (self.stream,) if n in streams}
        x = self._fused(streams, pooled) if self.stream is None else side_by_side(pooled, self.stream)
        if x is None:
            return None
        if self.residual is not None:
            x = x + MLP(x.shape[-1], self.residual, False, True, self.dtype, name="residual")(x[:, None])[:, 0]
        size = (self.size or x.shape[-1]) if self.transform else None
        x = transform(x, size, self.activation, self.norm, self.dtype, self.norm_first)
        return Dense(self.classes, dtype=self.dtype, name="classifier")(x).astype(jnp.float32)

    def _fused(self, streams: Streams, pooled: Mapping[str, jax.Array]) -> jax.Array:
        if self.fuse not in FUSES:
            raise InputError("classifier: " + unknown("fuse", self.fuse, FUSES))
        count = [tokens.dense_mask.sum(-1) if self.by_tokens else tokens.present for tokens in streams.values()]
        present = jnp.stack(count, 1)[..., None]  # (B, M, 1)
        each = jnp.stack([pooled[name] for name in streams], 1)  # (B, M, D)
        if self.fuse == "product":
            return jnp.where(present, each, 1).prod(1)
        total = (each * present.astype(each.dtype)).sum(1)
        return total if self.fuse == "sum" else total / jnp.maximum(present.sum(1), 1).astype(each.dtype)


def side_by_side(pooled: Mapping[str, jax.Array], streams: str | tuple[str, ...]) -> jax.Array | None:
    """The vector of a stream, or those of several along the width, `(B, D)`, zeros for an absent one; None where all are."""
    names = (streams,) if isinstance(streams, str) else streams
    there = [pooled[name] for name in names if name in pooled]
    return jnp.concatenate([pooled.get(name, jnp.zeros_like(there[0])) for name in names], -1) if there else None


class Similarity(nn.Module):
    """Unit vectors in a shared space of what stands for itself, for another modality, or for both: `{name: (B, E)}` float32.

    Beside the model's own shared space, which has one vector for each modality; `scale` is its inverse temperature.

    Args:
        size: of the space, E.
        streams: for each name the stream whose vector is mapped, or several, whose vectors stand side by side.
        logit_scale: first value of the inverse temperature.
    """

    size: int
    streams: Mapping[str, str | tuple[str, ...]]
    logit_scale: float = 1 / 0.07
    dtype: Any = "float32"

    @nn.compact
    def __call__(
        self, streams: Streams, pooled: Mapping[str, jax.Array], modalities: Mapping[str, nn.Module]
    ) -> dict[str, jax.Array]:
        there = {name: x for name, of in self.streams.items() if (x := side_by_side(pooled, of)) is not None}
        units = {name: Projection(self.size, True, self.dtype, name=name)(x) for name, x in there.items()}
        scale = self.param("logit_scale", nn.initializers.constant(math.log(self.logit_scale)), ())
        return {**units, "scale": jnp.exp(scale)}


class TokenClassifier(nn.Module):
    """A class, or other numbers, for every token of one or several streams: `(B, L, classes)` float32.

    Args:
        classes: how many; or several answers behind one transform, by name (LXMERT's objects, attributes and features).
        stream: whose tokens, or those of the stream it was summed into; several stand one behind the other; None: of all.
        transform: whether a dense layer stands before the last one.
        size: of that dense layer; None: as many as it reads.
        activation: behind that dense layer; None: none.
        norm: eps of a LayerNorm behind that; None: no norm.
        bias: whether every class has a number of its own added to its scores.
        tied: a modality of ids whose embedding is the matrix (GIT); None: a matrix of its own.
        special: whether only the learned tokens in front have one (DeiT), and not every token.
    """

    per_token = True
    classes: int | Mapping[str, int]
    stream: str | tuple[str, ...] | None
    transform: bool = True
    size: int | None = None
    activation: str | None = None
    norm: float | None = None
    bias: bool = True
    tied: str | None = None
    special: bool = False
    dtype: Any = "float32"

    @nn.compact
    def __call__(self, streams: Streams, pooled: Mapping[str, jax.Array], modalities: Mapping[str, nn.Module]) -> Any:
        wanted = (self.stream,) if isinstance(self.stream, str) else self.stream
        wanted = wanted if wanted is None else [stream_of(streams, name) for name in wanted]
        chosen = [tokens for name, tokens in streams.items() if wanted is None or name in wanted]
        if not chosen:
            return None
        x = jnp.concatenate([t.values[:, : len(t.special)] if self.special else t.values for t in chosen], 1)
        x = transform(x, (self.size or x.shape[-1]) if self.transform else None, self.activation, self.norm, self.dtype)
        if self.tied is not None:
            ids: Any = modalities[self.tied]
            scores = ids.decode(x)
            return scores + self.param("bias", nn.initializers.zeros, scores.shape[-1:]) if self.bias else scores

        def answer(classes: int, end: str = "") -> jax.Array:
            dense = Dense(classes, use_bias=self.bias, dtype=self.dtype, name="classifier" + end)
            return dense(x).astype(jnp.float32)

        several = self.classes
        return {n: answer(c, f"_{n}") for n, c in several.items()} if isinstance(several, Mapping) else answer(several)


class Reconstruction(nn.Module):
    """What every token of a modality was, from those that were kept: `(B, L, size)` float32 (MAE, arXiv 2111.06377).

    A stack of its own reads the stream's tokens and a learned one wherever none was kept, each with a learned position.

    Args:
        modality: whose tokens.
        size: numbers of an answer, such as the pixels of a patch.
        depth: layers.
        block: of these layers; None: the model's.
    """

    modality: str
    size: int
    depth: int
    block: BlockConfig | None = None
    dtype: Any = "float32"

    @nn.compact
    def __call__(
        self, streams: Streams, pooled: Mapping[str, jax.Array], modalities: Mapping[str, nn.Module]
    ) -> jax.Array | None:
        if self.modality not in streams:
            return None
        if self.block is None:
            raise InputError(f"{self.name}: Reconstruction has no block; give one, or build the model with mmx.build_model")
        tokens, grid = streams[self.modality], modalities[self.modality].grid  # type: ignore[attr-defined]
        block, count, length = dataclasses.replace(self.block, dtype=self.dtype), len(tokens.special), math.prod(grid)
        x = Dense(block.width, dtype=self.dtype, name="project")(tokens.values)
        x, special = x[:, count:], x[:, :count]
        strides = np.append(np.cumprod(grid[:0:-1])[::-1], 1)
        where = np.arange(x.shape[1]) if tokens.coordinates is None else tokens.coordinates[..., count:, :] @ strides
        where = jnp.broadcast_to(jnp.asarray(where, jnp.int32), x.shape[:2])
        token = self.param("token", INITIAL, (1, block.width)).astype(x.dtype)
        full = jnp.broadcast_to(token, (len(x), length, block.width)).at[jnp.arange(len(x))[:, None], where].set(x)
        position = self.param("position", INITIAL, (count + length, block.width)).astype(x.dtype)
        x = Stack(self.depth, block, name="stack")(jnp.concatenate([special, full], 1) + position)[:, count:]
        return Dense(self.size, dtype=self.dtype, name="projection")(x).astype(jnp.float32)


class TiedDecoder(nn.Module):
    """Scores of ids at every token of a modality of ids, with its embedding as the matrix or one of its own: `(B, L, V)` float32.

    Of a modality of features it is their regression, with the linear map that embeds them as the matrix (UNITER).

    Args:
        modality: whose ids.
        own: whether the matrix is one of its own (Llama, T5 1.1) and not the embedding.
        scale: factor of the states before the matrix (T5: 1 / sqrt(D)).
        transform: whether a dense layer stands before the matrix.
        activation: behind that dense layer; None: none.
        norm: eps of a LayerNorm behind it (BERT); None: no norm.
        bias: whether every id has a number of its own added to its scores.
        streams: whose tokens are scored, one stream behind the other (VisualBERT); (): those of the modality.
    """

    per_token = True
    modality: str
    transform: bool = True
    activation: str | None = None
    norm: float | None = None
    bias: bool = True
    streams: tuple[str, ...] = ()
    dtype: Any = "float32"
    own: bool = False
    scale: float = 1.0

    @nn.compact
    def __call__(self, streams: Streams, pooled: Mapping[str, jax.Array], modalities: Mapping[str, nn.Module]) -> Scored | None:
        ids: Any = modalities[self.modality]
        read = []
        for modality in self.streams or (self.modality,):
            if (name := stream_of(streams, modality)) is not None:
                first = len(streams[name].special) if streams[name].at is None else 0
                last = first + ids.length if name == FUSED else None  # a fused stream may be longer than the text in it
                read.append(streams[name].values[:, first:last])
        if not read:
            return None
        x = jnp.concatenate(read, 1)
        x = transform(x, ids.width if self.transform else None, self.activation, self.norm, self.dtype)
        x = x if self.scale == 1 else x * self.scale
        if self.own:
            dense = Dense(ids.vocab, use_bias=False, dtype=self.dtype, name="decoder")
            logits = dense(x).astype(jnp.float32)
            matrix = dense.variables["params"]["kernel"].T
        else:
            logits, matrix = ids.decode(x), ids.matrix
        if not self.bias:
            return Scored(logits, x, matrix)
        bias = self.param("decoder_bias", nn.initializers.zeros, logits.shape[-1:])
        return Scored(logits + bias, x, matrix, bias)


def scores_of(scored: Scored, states: jax.Array) -> jax.Array:
    """Scores of ids of some of what a head scores: `(B, l, D) -> (B, l, V)` float32."""
    return product("bld,vd->blv", states, scored.matrix) + (0 if scored.bias is None else scored.bias)
