"""A model is modalities, a topology, and heads. Every model accepts any subset of its modalities."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx.errors import InputError, unknown
from mmx.heads import Projection, mean_pool, stream_of
from mmx.layers import BlockConfig
from mmx.layers.stack import shapes_only, sow_states
from mmx.modalities.masking import token_mask
from mmx.topologies import Stage, make_topology
from mmx.topologies.stage import change_block, check_names, fill_block
from mmx.types import Batch, Masked, Outputs, Params, Scored, Streams, Tokens

MAX_LOGIT_SCALE = 100.0  # CLIP, arXiv 2103.00020, 2.5


class MultimodalTransformer(nn.Module):
    """Any topology over any modalities; built by `mmx.build_model`, which fills in width and type everywhere.

    Args:
        modalities: name -> embedder, in the order in which streams are concatenated.
        stages: the topology.
        heads: name -> head; its output is `Outputs.logits[name]`.
        embed: size of the space shared by all modalities, E; None: no embeddings.
        poolers: stream -> what makes one vector of it; a stream that is not named is pooled by its mean.
        pool_after: how many stages stand before the poolers: two towers that meet in the shared space before they meet in
            the stages behind (CoCa, ALBEF); None: all.
        projections: modality -> what leads its vector into the shared space; if not named, a `Projection` without bias.
        logit_scale: first value of the shared space's inverse temperature; None: there is none.
        logit_bias: first value of what a sigmoid loss adds to similarities; None: there is none.
        max_logit_scale: the most that inverse temperature may be, in the forward pass and after an update; None: no limit, as in
            the forward pass of published models.
    """

    modalities: Mapping[str, nn.Module]
    stages: tuple[Stage, ...]
    heads: Mapping[str, nn.Module] = dataclasses.field(default_factory=dict)
    embed: int | None = None
    dtype: Any = "float32"
    poolers: Mapping[str, nn.Module] = dataclasses.field(default_factory=dict)
    projections: Mapping[str, nn.Module] = dataclasses.field(default_factory=dict)
    logit_scale: float | None = 1 / 0.07
    logit_bias: float | None = None
    pool_after: int | None = None
    max_logit_scale: float | None = MAX_LOGIT_SCALE

    @nn.compact
    def __call__(
        self, batch: Batch, causal: Iterable[str] = (), stages: int | None = None, at: Mapping[str, jax.Array] | None = None
    ) -> Outputs:
        """Runs the model on the modalities that are in the batch; deterministic unless a `dropout` key is given.

        Args:
            batch: `{modality: raw array or Masked}`, any non-empty subset of the model's modalities.
            causal: modalities to read as a decoder does: each token sees its past and the other modalities.
            stages: how many of the stages the streams go through, for who wants the answers of a layer in between; None: all.
            at: `{modality: (B, n)}`: only the tokens of these places go through the model, and nothing of what is not named.
                They read the keys and values that earlier calls left in the collection "cache", and leave theirs
                (`mutable=["cache"]`). Only `streams` and `logits` are returned.
        """
        causal = tuple(causal)
        self._check(batch, causal)
        streams: Streams = {
            name: dataclasses.replace(embed(embedder, batch[name]), causal=name in causal)
            for name, embedder in self.modalities.items()
            if name in batch
        }
        if at is not None:
            nowhere = jnp.zeros((len(next(iter(streams.values())).values), 0), jnp.int32)
            streams = {n: t.only(at[n] + len(t.special) if n in at else nowhere) for n, t in streams.items()}
        sow_states(self, {name: tokens.values for name, tokens in streams.items()})
        chosen = self.stages[:stages]
        for stage in chosen[: self.pool_after]:
            streams = stage(streams)  # type: ignore[operator]
        whole = streams
        for stage in () if self.pool_after is None else chosen[self.pool_after :]:
            streams = stage(streams)  # type: ignore[operator]
        pooled = {} if at is not None else {name: self._pool(name, tokens, batch) for name, tokens in whole.items()}
        heads = {name: head for name, head in self.heads.items() if at is None or getattr(head, "per_token", False)}
        answers = {name: head(streams, pooled, self.modalities) for name, head in heads.items()}  # type: ignore[operator]
        scored = {name: value for name, value in answers.items() if isinstance(value, Scored)}
        logits = {name: value for name, value in answers.items() if value is not None} | {n: s.logits for n, s in scored.items()}
        if self.embed is None or at is not None:
            return Outputs(streams, pooled, {}, logits, scored=scored)
        embeddings = {}
        for name in self.modalities:
            if name in batch:
                projection: Any = self.projections.get(name) or Projection(self.embed, dtype=self.dtype, name=f"embed_{name}")
                stream = stream_of(whole, name) or name
                embeddings[name] = _of_present(projection(pooled[stream]), whole[stream])
        scale = None
        if self.logit_scale is not None:
            scale = self.param("logit_scale", nn.initializers.constant(math.log(self.logit_scale)), ())
            scale = jnp.exp(scale + jax.lax.stop_gradient(self._limited(scale) - scale))  # the gradient passes the limit
        bias = None if self.logit_bias is None else self.param("logit_bias", nn.initializers.constant(self.logit_bias), ())
        return Outputs(streams, pooled, embeddings, logits, scale, bias, scored)

    def within_limits(self, params: Params) -> Params:
        """Parameters after an update, the inverse temperature's at most at its limit: from there it comes back with the next
        gradient. open_clip does so too; a limit in the forward pass alone would let the parameter run away above it."""
        return {name: self._limited(x) if name == "logit_scale" else x for name, x in params.items()}

    def _limited(self, log_scale: jax.Array) -> jax.Array:
        return log_scale if self.max_logit_scale is None else jnp.minimum(log_scale, math.log(self.max_logit_scale))

    def _pool(self, name: str, tokens: Tokens, batch: Batch) -> jax.Array:
        if name not in self.poolers:
            return mean_pool(tokens)
        return _of_present(self.poolers[name](tokens, batch.get(name)), tokens)  # type: ignore[operator]

    @property
    def caches(self) -> bool:
        """Whether its streams can be written token by token, with keys and values kept in the collection "cache"."""
        return all(stage.caches for stage in self.stages)

    def __hash__(self) -> int:
        """By identity, so that a model can be a static argument of jit; its fields hold dicts."""
        return id(self)

    def _check(self, batch: Batch, causal: Iterable[str]) -> None:
        for name in (*batch, *causal):
            if name not in self.modalities:
                raise InputError(unknown("modality", name, self.modalities))
        for name in causal:
            if getattr(self.modalities[name], "mixes", False):
                kind = type(self.modalities[name]).__name__
                raise InputError(f"modality {name!r} cannot be read causally: a token of {kind} hears of later ones")
        if not batch:
            raise InputError(f"the batch is empty; it needs at least one of {', '.join(self.modalities)}")


def _of_present(vectors: jax.Array, tokens: Tokens) -> jax.Array:
    """Vectors `(B, D)` of the examples that have any of these tokens, zeros for the others: no bias speaks for what is absent."""
    return vectors if tokens.mask is None else jnp.where(tokens.present[:, None], vectors, 0)


def embed(embedder: Any, raw: Any) -> Tokens:
    """The tokens of a raw value; of one that keeps what is masked (`Masked.keep`), all of them."""
    if not (isinstance(raw, Masked) and raw.keep) or embedder.keeps:
        return embedder(raw)
    tokens = embedder(raw.array)
    count = len(tokens.special)
    mask: Any = token_mask(raw.mask, (tokens.values.shape[0], tokens.values.shape[1] - count))
    front = jnp.repeat(mask.any(-1, keepdims=True), count, 1)
    return dataclasses.replace(tokens, mask=jnp.concatenate([front, mask], 1))


def build_model(
    modalities: Mapping[str, nn.Module],
    topology: str | tuple[Stage, ...] = "multi_to_one",
    *,
    width: int = 256,
    depth: int = 6,
    heads: int = 4,
    embed: int | None = None,
    outputs: Mapping[str, nn.Module] | None = None,
    poolers: Mapping[str, nn.Module] | None = None,
    projections: Mapping[str, nn.Module] | None = None,
    logit_scale: float | None = 1 / 0.07,
    logit_bias: float | None = None,
    max_logit_scale: float | None = MAX_LOGIT_SCALE,
    pool_after: int | None = None,
    dtype: str = "float32",
    **block: Any,
) -> MultimodalTransformer:
    """Builds any topology over any modalities.

    Args:
        modalities: name -> embedder, such as `mmx.modalities.Patches(size=(32, 32), patch=(4, 4))`; the order is that of
            the concatenation. An embedder without a width takes the model's. One embedder under two names shares its
            weights, which go by the first of these names in the alphabet.
        topology: one of the six names, or a tuple of stages; a stage without a block takes the model's.
        width: size of a token, D.
        depth: layers on the way of a token, for a topology given by name.
        heads: attention heads.
        embed: size of the space shared by all modalities; None: width; 0: no embeddings.
        outputs: further heads by name, such as `{"matching": mmx.heads.Classifier(2)}`.
        poolers: what makes one vector of a stream, such as `{"text": mmx.heads.Pooler("first")}`; not named: the mean.
        pool_after: how many stages stand before the poolers; None: all.
        projections: what leads a modality's vector into the shared space; not named: a `Projection` without bias.
        logit_scale: first value of the shared space's inverse temperature; None: there is none.
        logit_bias: first value of what a sigmoid loss adds to similarities; None: there is none.
        max_logit_scale: the most that inverse temperature may be; None: no limit.
        dtype: type of the computation, float32 or bfloat16; parameters are float32.
        **block: further fields of `mmx.layers.BlockConfig`.

    Raises:
        ValueError: an unknown topology or field, with the nearest known name.
    """
    fields = [field.name for field in dataclasses.fields(BlockConfig)]
    for name in block:
        if name not in fields:
            raise InputError(unknown("field of BlockConfig", name, fields))
    config = BlockConfig(width=width, heads=heads, dtype=dtype, **block)
    stages = make_topology(topology, depth, config) if isinstance(topology, str) else topology
    stages = tuple(fill_block(stage, config) for stage in stages)
    check_names(stages, modalities)
    embedders = {id(m): _fill(m, width=width, dtype=dtype) for m in modalities.values()}
    return MultimodalTransformer(
        modalities={name: embedders[id(m)] for name, m in modalities.items()},
        stages=stages,
        heads={name: _fill(head, block=config, dtype=dtype) for name, head in (outputs or {}).items()},
        embed=None if embed == 0 else embed or width,
        dtype=dtype,
        poolers={name: _fill(pooler, dtype=dtype) for name, pooler in (poolers or {}).items()},
        projections={name: _fill(projection, dtype=dtype) for name, projection in (projections or {}).items()},
        logit_scale=logit_scale,
        logit_bias=logit_bias,
        pool_after=pool_after,
        max_logit_scale=max_logit_scale,
    )


def example_batch(model: MultimodalTransformer, batch_size: int = 2) -> dict[str, Any]:
    """Returns a batch of the right form with every modality: zeros, all there. For building parameters and for tests."""
    return {name: m.example(batch_size) for name, m in model.modalities.items()}  # type: ignore[attr-defined]


def abstract_params(model: MultimodalTransformer) -> Any:
    """The shapes of a model's parameters; nothing is computed."""
    with shapes_only():
        return jax.eval_shape(lambda: model.init(jax.random.key(0), example_batch(model)))["params"]


def count_parameters(params: Any) -> int:
    """The number of parameters, of arrays or of their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def change_blocks(model: MultimodalTransformer, **run: Any) -> MultimodalTransformer:
    """The model with fields of its blocks changed; those that are None stay."""
    fields = {name: value for name, value in run.items() if value is not None}
    return model.clone(stages=tuple(change_block(stage, **fields) for stage in model.stages)) if fields else model


def _fill(module: nn.Module, **values: Any) -> nn.Module:
    """Returns the module with `dtype` set, and the other fields where it left them open."""
    current = {name: getattr(module, name) for name in values if hasattr(module, name)}
    return module.clone(**{name: values[name] for name, value in current.items() if value is None or name == "dtype"})
