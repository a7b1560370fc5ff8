"""Published weights as a model that one can call, by published names: a forward pass, and writing."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mmx.decoding import Decoding, check_prompts, decode
from mmx.errors import InputError, unknown
from mmx.model import MultimodalTransformer
from mmx.streaming import Listener, listening
from mmx.types import Batch, Masked, Params
from mmx.zoo import preprocess
from mmx.zoo.config import to_published
from mmx.zoo.family import Chosen, Family, Run, as_batch
from mmx.zoo.preprocess import WRITING, Preprocessing

INSIDE = ("hidden_states", "attentions")  # what the names of fields end with that tell of the inside


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model with its weights, called with published input names; it returns published output names.

    Attributes:
        model: the Linen module.
        params: its parameters, float32.
        config: the published configuration.
        family: what ties these to published names.
        heads: the published heads it has.
        preprocess: called as `preprocess(texts=[...], images=[...])`, returns the inputs of a call: what the weights were
            trained with, read from the tokenizer and the preprocessor_config.json beside them.
        extra: further published fields of config.json, kept for who saves it again.
        files: further published files, likewise: those of the tokenizer.
    """

    model: MultimodalTransformer
    params: Params
    config: Any
    family: Family
    heads: tuple[str, ...] = ()
    preprocess: Callable[..., dict[str, Any]] = Preprocessing()
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)

    @property
    def fields(self) -> dict[str, Any]:
        """What its config.json says."""
        return {**self.extra, **(to_published(self.config) if self.config is not None else {}), "model_type": self.family.name}

    def __call__(self, output_hidden_states: bool = False, output_attentions: bool = False, **inputs: Any) -> dict[str, Any]:
        """Published inputs (`pixel_values` as (B, C, H, W), `input_ids`, `attention_mask`, `labels`, ...) to published outputs.

        Args:
            output_hidden_states: whether `hidden_states` are among them, or several tuples whose names end so: the embeddings
                first, then what each layer left.
            output_attentions: whether `attentions`, the weights of attention, are among them: a tuple, one of each layer.
            **inputs: arrays, and flags and numbers such as `return_loss=True`; what is None is not there.

        Raises:
            InputError: an input this family does not have, or attentions or states where it returns none.
        """
        fields = self.apply(self.params, output_hidden_states, output_attentions, **inputs)
        return jax.tree.map(lambda x: x.take() if _chosen(x) else x, fields, is_leaf=_chosen)

    def apply(
        self, params: Params, output_hidden_states: bool = False, output_attentions: bool = False, **inputs: Any
    ) -> dict[str, Any]:
        """A call with other parameters, which may stand in `jax.grad` and `jax.jit`: `pretrained.apply(params, ...)["loss"]`.

        A field whose length hangs on the values of the inputs stays a `Chosen`.
        """
        flags, arrays = _split(inputs)
        self._check(arrays)
        asked = {"hidden_states": output_hidden_states, "attentions": output_attentions}
        wanted = tuple(name for name, wants in asked.items() if wants)
        return _forward(self.family, self.model, self.config, wanted, flags, params, as_batch(arrays))

    def _check(self, inputs: Mapping[str, Any]) -> None:
        if self.family.check is not None and not any(isinstance(x, Tracer) for x in jax.tree.leaves(inputs)):
            self.family.check(self.config, inputs)

    def under(self, library: str | None) -> "Pretrained":
        """The same weights under the names of another library, such as "open_clip" or "timm", to be called and saved by.

        None: under those of the family itself.
        """
        from mmx.zoo import FAMILIES

        if self.family.name not in FAMILIES:
            raise InputError(f"library {library!r}: the model is of no published family, so that it has no names but its own")
        family = FAMILIES[self.family.name]
        known = {other.name: other for other in family.libraries}
        if library is not None and library not in known:
            raise InputError(f"{family.name}: " + unknown("library", library, known))
        family = family if library is None else family.under(known[library])
        steps = dataclasses.replace(self.preprocess, names=family.prepared)  # type: ignore[type-var]
        files, images = dict(self.files), getattr(steps, "images", None)
        if family.library is None and images is not None and preprocess.IMAGES not in files:
            fields = preprocess.write_images(images)
            files |= {} if fields is None else {preprocess.IMAGES: json.dumps(fields, indent=2).encode()}
        return dataclasses.replace(self, family=family, preprocess=steps, extra={}, files=files)

    def generate(
        self,
        max_new_tokens: int,
        decoding: Decoding = Decoding(),
        key: jax.Array | None = None,
        stream: Listener | None = None,
        **inputs: Any,
    ) -> dict[str, jax.Array]:
        """Writes `max_new_tokens` ids behind a prompt, the likeliest ones unless `decoding` says otherwise.

        What ends a sentence, what it is padded with and what a decoder begins with are as published, unless `decoding` or the
        inputs say otherwise.

        Args:
            max_new_tokens: how many ids to write.
            decoding: how the next id is chosen.
            key: of what is drawn.
            stream: called with the new ids of every step while the program runs, as that of `mmx.generate`.
            **inputs: published inputs; a prompt `input_ids (B, P)` may be padded on the left where `attention_mask` is 0.

        Returns:
            `sequences (B * decoding.best, P + max_new_tokens)`, the prompt included, their `scores`, and, where there are no
            beams, `logits (B * decoding.best, max_new_tokens, V)` of each choice.
        """
        names = self.family.generation
        if names is None:
            raise InputError(f"{self.family.name}: it does not generate")
        if decoding.guidance != 1:
            raise InputError(
                f"{self.family.name}: guidance={decoding.guidance}, but published inputs do not tell what would be left out; "
                f"call mmx.generate with pretrained.model, pretrained.params and its modalities"
            )
        flags, given = _split(inputs)
        if names.start is not None:
            size, start = len(next(iter(given.values()))), self._told("decoder_start_token_id")
            given.setdefault(names.ids, np.full((size, 1), names.start(self.config) if start is None else start))
        if names.ids not in given:
            raise InputError(f"{self.family.name}: the input {names.ids} is missing; it is the prompt")
        given.setdefault(names.mask, np.ones_like(given[names.ids]))
        for name in names.beside:
            given.setdefault(name, np.zeros_like(given[names.ids]))
        self._check(given)
        check_prompts(f"{self.family.name}: {names.mask}", given[names.ids], given[names.mask], "before")
        if decoding.beams == 1:
            given = jax.tree.map(lambda x: np.repeat(x, decoding.best, 0), given)
        with listening(stream, given) as listener:
            rest = (flags, self.decoding(decoding), self.params, as_batch(given), key, listener)
            return _generate(self.family, self.model, self.config, max_new_tokens, *rest)

    def decoding(self, decoding: Decoding = Decoding()) -> Decoding:
        """With what was left open as published: which ids end a sentence, and which one pads it, or else the first of those."""
        told = None if self.family.generation is None else self._told(self.family.generation.end)
        ends = () if told is None else tuple(np.atleast_1d(told).tolist())
        end = ends if decoding.end is None else decoding.end
        told = self._told("pad_token_id")
        pad = next(iter(end), 0) if told is None else told
        return dataclasses.replace(decoding, end=end, pad=pad if decoding.pad is None else decoding.pad)

    def _told(self, name: str) -> Any:
        """What its folder says of writing: generation_config.json, else config.json, else the part of that on text."""
        fields = self.fields
        places = (json.loads(self.files.get(WRITING, b"{}")), fields, fields.get("text_config") or {})
        return next((place[name] for place in places if place.get(name) is not None), None)


Flags: TypeAlias = tuple[tuple[str, bool | int | float | str], ...]


def _split(inputs: Mapping[str, Any]) -> tuple[Flags, dict[str, Any]]:
    """Inputs as what the program is made for (flags, numbers, names) and what it runs on (arrays)."""
    given = {name: value for name, value in inputs.items() if value is not None}
    flags = {name: value for name, value in given.items() if isinstance(value, bool | int | float | str)}
    return tuple(flags.items()), {name: _arrays(value) for name, value in given.items() if name not in flags}


def _arrays(value: Any) -> Any:
    """An input as an array; a mapping of inputs, and of tuples of inputs (LXMERT's labels), as one of arrays."""
    if isinstance(value, Mapping):
        return {name: tuple(map(_array, v)) if isinstance(v, tuple) else _arrays(v) for name, v in value.items()}
    return jax.tree.map(_array, value) if isinstance(value, Masked) else _array(value)


def _array(value: Any) -> Any:
    """What is on a device, or stands for it in a program, stays there."""
    return value if isinstance(value, jax.Array) else np.asarray(value)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _generate(
    family: Family,
    model: MultimodalTransformer,
    config: Any,
    count: int,
    flags: Flags,
    decoding: Decoding,
    params: Params,
    inputs: Batch,
    key: jax.Array | None,
    listener: Any,
) -> dict[str, jax.Array]:
    names = family.generation
    assert names is not None
    size, prompt = inputs[names.ids].shape

    def longer(name: str, value: int) -> jax.Array:
        return jnp.pad(inputs[name], ((0, 0), (0, count)), constant_values=value)

    mask = longer(names.mask, 1)
    given = {**inputs, names.mask: mask, **{name: longer(name, value) for name, value in names.beside.items()}}
    if names.places:
        given["position_ids"] = jnp.maximum(jnp.cumsum(mask, 1) - 1, 0)

    def step(ids: jax.Array, cache: Any, at: jax.Array) -> tuple[jax.Array, Any]:
        rows = jax.tree.map(lambda x: jnp.repeat(x, len(ids) // size, 0), given)  # one for each beam
        rows = {**rows, names.ids: ids}
        fields, _, left = _call(family, model, config, (), flags, params, rows, cache, at if cache else None)
        logits = fields["logits"]
        if not cache:  # an image may stand before the ids
            logits = jnp.take_along_axis(logits, (at + logits.shape[1] - ids.shape[1])[..., None], 1)
        return logits, left

    return decode(step, longer(names.ids, decoding.padding), jnp.full(size, prompt), count, decoding, key, listener)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _forward(
    family: Family,
    model: MultimodalTransformer,
    config: Any,
    wanted: tuple[str, ...],
    flags: Flags,
    params: Params,
    inputs: Batch,
) -> dict[str, Any]:
    fields, taken, _ = _call(family, model, config, wanted, flags, params, inputs)
    if ignored := {*inputs, *dict(flags)} - taken:
        raise InputError(f"{family.name}: " + unknown("input", sorted(ignored)[0], taken))
    return fields


def _call(
    family: Family,
    model: MultimodalTransformer,
    config: Any,
    wanted: tuple[str, ...],
    flags: Flags,
    params: Params,
    inputs: Batch,
    cache: Mapping[str, Any] | None = None,
    at: jax.Array | None = None,
) -> tuple[dict[str, Any], set[str], dict[str, Any]]:
    """Published outputs, the inputs that were read, and, with a `cache`, the keys and values that the calls left.

    `at (B, n)`: only the tokens at these places of what is written go through the model (`MultimodalTransformer.__call__`).
    """
    left = ["intermediates", *({"attentions"} & {*wanted}), *(["cache"] if cache is not None else [])]
    caches: dict[str, Any] = {}

    def run(batch: Batch, causal: Sequence[str] = (), stages: int | None = None) -> Run:
        name = str(len(caches))
        known = {"cache": cache[name]} if cache else {}
        places = {family.generation.stream: at} if at is not None and family.generation is not None else None
        out, more = model.apply({"params": params, **known}, batch, tuple(causal), stages, places, mutable=left)
        caches[name] = more.get("cache", {})
        return Run(out, more.get("intermediates", {}), more.get("attentions", {}))  # type: ignore[arg-type]

    read = _Inputs({**inputs, **dict(flags)}, family.name)
    fields = family.forward(run, config, read)
    fields = _present(fields, tuple(name for name in INSIDE if name not in wanted))
    for name in wanted:
        if not _has(fields, name):
            raise InputError(f"{family.name}: it returns no {name}; call it without output_{name}=True")
    return fields, read.taken, caches


def _present(fields: Mapping[str, Any], unwanted: tuple[str, ...]) -> dict[str, Any]:
    """The fields that have a value, tuples of the inside only if they were asked for."""
    inner = {n: _present(v, unwanted) if isinstance(v, Mapping) else v for n, v in fields.items()}
    return {n: v for n, v in inner.items() if v is not None and not (isinstance(v, tuple) and (not v or n.endswith(unwanted)))}


def _has(fields: Mapping[str, Any], name: str) -> bool:
    """Whether fields, or those within one, tell of the inside by this name."""
    return any(_has(v, name) if isinstance(v, Mapping) else isinstance(v, tuple) and n.endswith(name) for n, v in fields.items())


def _chosen(x: Any) -> bool:
    return isinstance(x, Chosen)


class _Inputs(Mapping[str, Any]):
    """The inputs of a call, which remembers what was asked for, so that nothing is ignored in silence."""

    def __init__(self, inputs: Batch, family: str):
        self._inputs, self._family, self.taken = inputs, family, set[str]()

    def __getitem__(self, name: str) -> Any:
        self.taken.add(name)
        if name not in self._inputs:
            raise InputError(f"{self._family}: the input {name} is missing; given: {', '.join(self._inputs) or 'nothing'}")
        return self._inputs[name]

    def get(self, name: str, default: Any = None) -> Any:
        self.taken.add(name)
        return self._inputs.get(name, default)

    def __contains__(self, name: object) -> bool:
        self.taken.add(str(name))
        return name in self._inputs

    def __iter__(self) -> Any:
        return iter(self._inputs)

    def __len__(self) -> int:
        return len(self._inputs)
