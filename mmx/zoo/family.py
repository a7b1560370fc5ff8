"""What a family of published models is: its configuration, how it is assembled, its weight table, its published names."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mmx.errors import InputError, unknown
from mmx.model import MultimodalTransformer, change_blocks
from mmx.topologies import FUSED
from mmx.types import Batch, Masked, Outputs
from mmx.zoo.preprocess import ImageSteps
from mmx.zoo.sounds import SoundSteps
from mmx.zoo.texts import ImagePlaces, Texts
from mmx.zoo.weights import Table

REGIONS = 512  # the most an image may have, of models that read regions; published ones know no limit


@dataclasses.dataclass(frozen=True)
class Run:
    """A forward pass: what the model returned, and what every layer left."""

    out: Outputs
    intermediates: Mapping[str, Any]
    weights: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of attention, where a call asks for them

    def states(self, stage: str, *streams: str) -> list[jax.Array]:
        """The states of a stream before the first layer of the first stage it goes through, and after each: `(B, L, D)`.

        Of all streams behind each other where the stage is a `Joint`.
        """
        entered = jnp.concatenate([self.intermediates["states"][name] for name in streams], 1)
        return [entered, *self.after(stage, streams[0])]

    def after(self, stage: str, stream: str) -> list[jax.Array]:
        """What each layer of a stage left of a stream, or, where streams are joint, of all of them: `(B, L, D)`."""
        inner = self.intermediates.get(stage, {})
        inner = inner.get(stream, inner.get("stack", inner))
        states = inner.get("layers", {}).get("states", ())
        return list(states[stream] if isinstance(states, Mapping) else states)

    def attentions(self, stage: str, stream: str, sublayer: str = "self") -> list[jax.Array]:
        """The weights of each layer's attention in a stage, `(B, H, L, L)`; none where a call does not ask for them."""
        inner = self.weights.get(stage, {})
        block = inner.get(stream, {}).get("layers", {}).get("block") or inner.get("layers", {}).get(stream, {})
        return list(block[sublayer]["weights"]) if block else []

    def gathered(self, gather: str, stage: str) -> list[jax.Array]:
        """The states of the stream that the stage `gather` made, before the first layer of the stage behind it and after each."""
        return [self.intermediates[gather]["states"][FUSED], *self.intermediates[stage][FUSED]["layers"]["states"]]


@flax.struct.dataclass
class Chosen:
    """A field whose length hangs on the values of the inputs: what `keep (n,)` says of `array`, along `axis`.

    A program has no such shapes, so that the choice is made behind it.
    """

    array: jax.Array
    keep: jax.Array
    axis: int = flax.struct.field(pytree_node=False, default=0)

    def take(self) -> np.ndarray:
        """Those that are kept."""
        return np.compress(np.asarray(self.keep), np.asarray(self.array), self.axis)


Runner = Callable[..., Run]


@dataclasses.dataclass(frozen=True)
class Generation:
    """The names a family goes by when it writes.

    Args:
        stream: what is written, as the model names it.
        ids: of what is written.
        mask: which of it exists.
        places: whether the places of tokens are told, counted over those that exist: prompts may be padded on the left.
        beside: further inputs `(B, P)` of the prompt's tokens, 0 where they are not given, and what they are of those written.
        start: `config -> id` that is written first, where the prompt is something else (encoder-decoders) and nothing else is
            published; None: the prompt stands in `ids`.
        end: the published field that says which ids end a sentence.
    """

    stream: str = "text"
    ids: str = "input_ids"
    mask: str = "attention_mask"
    places: bool = False
    beside: Mapping[str, int] = dataclasses.field(default_factory=dict)
    start: Callable[[Any], int] | None = None
    end: str = "eos_token_id"


@dataclasses.dataclass(frozen=True, eq=False)
class Library:
    """How another library publishes models of a family: in which files, and under which names.

    Args:
        name: of the library.
        file: of its configuration.
        titles: of the file of weights; the first one is what is written.
        holds: `fields -> bool`: whether what that configuration says is of this family.
        read: `fields -> fields`: what it says, in the family's own fields.
        write: `(config, heads, images, before) -> fields`: the way back; `before` is what the file said that the model came from.
        table: `config -> Table`; None: the family's own.
        heads: as those of a `Family`; None: the family's own.
        known: likewise.
        older: likewise.
        inputs: its inputs -> the family's; (): the family's own.
        outputs: the family's outputs -> its own, where they differ.
        images: `fields -> ImageSteps` of its configuration.
    """

    name: str
    file: str
    titles: tuple[str, ...]
    holds: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[Any, Sequence[str], ImageSteps | None, Mapping[str, Any]], dict[str, Any]]
    table: Callable[[Any], Table] | None = None
    heads: Mapping[str, str] | None = None
    known: Sequence[str] = ()
    older: Mapping[str, str] = dataclasses.field(default_factory=dict)
    inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    outputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    images: Callable[[Mapping[str, Any]], ImageSteps | None] = lambda fields: None


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """A family of published models.

    Args:
        name: the published `model_type`.
        config: the dataclass of its configuration.
        build: `(config, heads, dtype) -> model`.
        table: `config -> Table`, of all its heads.
        forward: `(run, config, inputs) -> fields`: published inputs to published outputs; `run(batch, causal=(), stages=None)`
            applies the model.
        names: published names of its sizes -> the fields in which they differ from the defaults.
        heads: published heads by our name -> the beginning of their tensors' names.
        prefix: what stands before the tensors' names of a model with a head, and not before those of the bare one.
        known: patterns of tensors that are stored and not read: buffers and tied copies.
        generation: how it writes; None: it does not.
        texts: how it reads texts, where its files do not tell, or `config -> how`; None: it reads none.
        length: `config -> longest text`; None: it reads none.
        places: `config -> how texts keep places for images`; None: they keep none.
        inputs: its inputs -> what they are called that are prepared of raw values, where they differ; "not NAME": the opposite
            of a mask.
        video: whether it reads videos, and not images.
        sound: the kind of steps that prepare its sounds; None: it reads none.
        check: `(config, inputs)`: raises an InputError for inputs whose values do not go together, asked where they are known.
        infer: `(config, shapes) -> config`: what the configuration leaves to the shapes of the stored tensors; None: nothing.
        older: patterns in the tensors' names -> what files of another age have in their place, each of them or not.
        libraries: others that publish the same models.
        library: the one under whose names this is the family; None: its own ones.
    """

    name: str
    config: type
    build: Callable[[Any, Sequence[str], str], MultimodalTransformer]
    table: Callable[[Any], Table]
    forward: Callable[[Runner, Any, Mapping[str, Any]], dict[str, Any]]
    names: Mapping[str, Mapping[str, Any]]
    heads: Mapping[str, str] = dataclasses.field(default_factory=dict)
    prefix: str = ""
    known: Sequence[str] = ()
    generation: Generation | None = None
    texts: Texts | Callable[[Any], Texts | None] | None = None
    length: Callable[[Any], int | None] | None = None
    places: Callable[[Any], ImagePlaces] | None = None
    inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    video: bool = False
    sound: type[SoundSteps] | None = None
    check: Callable[[Any, Mapping[str, Any]], None] | None = None
    infer: Callable[[Any, Mapping[str, tuple[int, ...]]], Any] | None = None
    older: Mapping[str, str] = dataclasses.field(default_factory=dict)
    libraries: Sequence[Library] = ()
    library: Library | None = None

    @property
    def prepared(self) -> Mapping[str, str] | None:
        """Its inputs -> what they are called that are prepared of raw values; None: they are called the same."""
        return (self.library.inputs if self.library else {}) or self.inputs or None

    def under(self, library: Library) -> "Family":
        """The same family under the names of another library."""

        def forward(run: Runner, config: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
            given = {ours: inputs[theirs] for theirs, ours in library.inputs.items() if theirs in inputs}
            fields = self.forward(run, config, given if library.inputs else inputs)
            return {library.outputs.get(name, name): value for name, value in fields.items()}

        return dataclasses.replace(
            self,
            table=library.table or self.table,
            heads=self.heads if library.heads is None else library.heads,
            prefix="",
            known=library.known,
            older=library.older,
            infer=None,
            forward=forward,
            library=library,
        )


def build(family: Family, config: Any, heads: Sequence[str], dtype: str, **run: Any) -> MultimodalTransformer:
    """The model of a configuration, with the published heads that are named; `run` are fields of its blocks, if not None.

    What was published as the temperature is the temperature: no limit is put on it.
    """
    for head in heads:
        if head not in family.heads:
            raise InputError(f"{family.name}: " + unknown("head", head, family.heads))
    return change_blocks(family.build(config, tuple(heads), dtype).clone(max_logit_scale=None), **run)


def told_by_pooler(config: Any, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """Whether the model has a pooler, which only the weights tell: bare classes are made with and without it.

    For the `infer` of a family whose configuration has `add_pooling_layer`, an argument of the published class.
    """
    return dataclasses.replace(config, add_pooling_layer=any(re.search(r"(^|\.)pooler\.", name) for name in shapes))


def padded(ids: Any, mask: Any = None, **beside: Any) -> Masked:
    """Published ids `(B, L)` and their attention mask as a raw value; padded ones are embedded too, as published models do."""
    raw = {"ids": ids, **beside} if beside else ids
    mask = jnp.ones(ids.shape, bool) if mask is None else mask != 0
    return Masked(raw, mask, keep=True)


def padded_features(features: Any, mask: Any = None, **beside: Any) -> Masked:
    """Published features `(B, L, size)`, of regions or such as other networks embedded, and their mask, like `padded`."""
    raw = {"features": features, **beside} if beside else features
    mask = jnp.ones(features.shape[:2], bool) if mask is None else mask != 0
    return Masked(raw, mask, keep=True)


def channels_last(pixels: Any) -> Any:
    """Published images `(B, C, H, W)` as `(B, H, W, C)`, videos `(B, T, C, H, W)` as `(B, T, H, W, C)`."""
    if pixels.ndim not in (4, 5):
        raise InputError(f"pixel_values: expected images (B, C, H, W) or videos (B, T, C, H, W), got {pixels.shape}")
    return jnp.moveaxis(pixels, -3, -1)


def pair(size: int | tuple) -> tuple[int, int]:
    """(height, width) of a published size, which is a number for a square."""
    return (size, size) if isinstance(size, int) else tuple(size)  # type: ignore[return-value]


def grid(c: Any) -> tuple[int, int]:
    """(rows, columns) of the patches that an image of a configuration is cut to."""
    (height, width), (rows, columns) = pair(c.image_size), pair(c.patch_size)
    return height // rows, width // columns


def as_batch(batch: Batch) -> dict[str, Any]:
    """Integers as int32, what else as it is."""

    def one(x: Any) -> Any:
        return x.astype(np.int32) if np.issubdtype(x.dtype, np.integer) and x.dtype != np.uint8 else x

    return jax.tree.map(one, batch)
