"""The few values that travel through mmx, and the letters their shapes are written in.

    raw arrays --modality--> Tokens --stages--> Streams --heads--> Outputs

Shape letters, the same in every file:

    B batch   L length   D width   H heads   K head size   F mlp width   V vocabulary   E embedding size   N examples
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Masked:
    """A raw array of which only a part is there.

    `mask` is over examples `(B,)` (False: this example has no such modality) or over tokens `(B, L)`.

    What is masked is zeros to its embedder and seen by nobody. With `keep` it is embedded as it stands, and still seen by
    nobody: published models compute numbers for padded tokens too, and mmx can be asked for the same ones.
    """

    array: Any
    mask: Any
    keep: bool = flax.struct.field(pytree_node=False, default=False)


@flax.struct.dataclass
class Tokens:
    """One stream: `values (B, L, D)` and which of them exist, `mask (B, L)`; None means that all do.

    `causal` is static: a causal stream's tokens see their own past and every stream that is not causal, and no other
    stream sees them. It is what turns an encoder into a decoder without changing a weight.

    `coordinates (L, A)` or `(B, L, A)` say where tokens stand, for rotary positions: on a line, in (row, column), in
    (time, row, column); None: in their order. `special` names the learned tokens in front, such as ("class",).

    `groups (B, L)`: tokens of a causal stream with the same number, if it is not -1, see each other in both directions (the
    prefix of a prefix-LM). `slots` says for another stream which of its tokens stand in the places of these, -1: none;
    `{stream: (B, L)}` counts through an example's, `{stream: (B, L, 2)}` tells row and place; `mmx.topologies.Insert` puts
    them there; or the row and place of the token that each of these is added to, by `mmx.topologies.Scatter`.

    `at (B, n)`: where a stream is written token by token, `values (B, n, D)` hold only those of these places, and all else that
    is told of it tells of all its `whole` places. None: they hold all.
    """

    values: jax.Array
    mask: jax.Array | None = None
    coordinates: Any = None
    groups: Any = None
    slots: Any = None
    at: Any = None
    causal: bool = flax.struct.field(pytree_node=False, default=False)
    special: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())
    whole: int | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def length(self) -> int:
        """How many places it has, L."""
        return self.values.shape[1] if self.whole is None else self.whole

    def only(self, at: jax.Array) -> "Tokens":
        """The tokens of the places `at (B, n)`."""
        values = jnp.take_along_axis(self.values, at[..., None], 1)
        return dataclasses.replace(self, values=values, at=at, whole=self.length)

    @property
    def dense_mask(self) -> jax.Array:
        """The mask as an array `(B, L)`, also where it is None."""
        return jnp.ones((len(self.values), self.length), bool) if self.mask is None else self.mask

    @property
    def without_special(self) -> "Tokens":
        """The tokens behind the special ones."""
        return self.behind(len(self.special), special=())

    def behind(self, n: int, **change: Any) -> "Tokens":
        """The tokens behind the first n; of a negative n, those before the last ones."""
        stay, front = slice(n, None) if n >= 0 else slice(None, n), max(n, 0)
        cut = {name: jax.tree.map(lambda x: x[:, stay], getattr(self, name)) for name in ("mask", "groups", "slots")}
        if self.coordinates is not None:
            cut["coordinates"] = self.coordinates[..., stay, :]
        if self.at is None:
            cut["values"] = self.values[:, stay]
        else:
            cut |= {"at": self.at - front, "whole": self.length - abs(n)}
        return dataclasses.replace(self, **cut, **change)

    @property
    def present(self) -> jax.Array:
        """Which examples have at least one token of this stream: `(B,)`."""
        return self.dense_mask.any(-1)


Streams: TypeAlias = dict[str, Tokens]
Batch: TypeAlias = Mapping[str, Any]  # modality name -> raw array, or Masked
Params: TypeAlias = Any  # nested dicts of arrays, as Linen makes them
Metrics: TypeAlias = dict[str, jax.Array]


@flax.struct.dataclass
class Scored:
    """Scores of ids `logits (B, L, V)` and what they are made of: `states (B, L, D)`, `matrix (V, D)` and `bias (V,)` or None.

    So a loss may make the scores of a few tokens at a time, and need not hold those of all; under jit these are then never made.
    """

    logits: jax.Array
    states: jax.Array
    matrix: jax.Array
    bias: jax.Array | None = None


@flax.struct.dataclass
class Outputs:
    """What a model returns. Under jit, what is not read is not computed.

    Attributes:
        streams: the last state of every stream, `{name: Tokens}`; early summation leaves the one stream `fused`.
        pooled: `{stream: (B, D)}`, the mean over the tokens that exist; zeros for an example that has none.
        embeddings: `{modality: (B, E)}`, unit length, float32, in the space shared by all modalities.
        logits: `{head: array}`.
        scored: `{head: Scored}`, of heads that score every id at every token.
        logit_scale: the inverse temperature of the shared space, a positive scalar (CLIP, arXiv 2103.00020, 2.5).
        logit_bias: what a sigmoid loss adds to every similarity (SigLIP, arXiv 2303.15343, 3.2); None: nothing.
    """

    streams: Streams
    pooled: dict[str, jax.Array]
    embeddings: dict[str, jax.Array]
    logits: dict[str, jax.Array]
    logit_scale: jax.Array | None = None
    logit_bias: jax.Array | None = None
    scored: dict[str, Scored] = dataclasses.field(default_factory=dict)
