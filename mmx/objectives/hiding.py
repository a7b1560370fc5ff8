"""Hiding: how a modality is hidden in part, and what is asked of what is hidden."""

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmx.errors import InputError
from mmx.heads import Reconstruction, TiedDecoder, TokenClassifier
from mmx.losses import region_labels
from mmx.modalities import Features, Ids
from mmx.modalities.embedder import HIDDEN, KEPT
from mmx.modalities.masking import WORDS, hide, modality_of
from mmx.model import MultimodalTransformer
from mmx.objectives import masks as units
from mmx.objectives.masks import Unit
from mmx.topologies import Sum
from mmx.types import Batch, Masked

Answer = Literal["nothing", "content", "normalised", "huber", "contrast", "classes", "likeliest", "distribution"]
LABELLED = ("classes", "likeliest", "distribution")  # what a label tells
EPS = 1e-12  # of the norm in a head (BERT)
CLOSE = 0.01  # how far the sum of a distribution may be from 1: detectors store theirs in half precision


@dataclasses.dataclass(frozen=True)
class Mask:
    """How a modality is hidden, and what is asked of what is hidden.

    Where tokens overlap (windows of a sound, convolutions over neighbours), those beside a hidden one tell a part of it.
    """

    rate: float = 0.15
    """The share of the tokens that exist (of unit modality: of the examples)."""
    unit: Unit = "token"
    """What is hidden at once: a token; a word (its tokens are told apart by the entry NAME/words); a span (three tokens on
    average); a region and those that overlap it; a block of patches; a tube (the same places in all frames); a frame; or all of
    an example's modality."""
    answer: Answer = "content"
    """What is asked: nothing (another objective asks of the same pass); content (the id; or the numbers, by their squared
    distance); normalised (numbers of mean 0 and variance 1 within a token: MAE); huber (LXMERT); contrast (which of the
    tokens it was: CPC, wav2vec 2.0); or what `target` tells: classes (visual codes), a distribution (what a detector saw), or the
    likeliest class of one but for 0, the background (UNITER's MRC)."""
    target: str = ""
    """The name among data.labels of the classes (B, L) or distributions (B, L, classes), which the batch holds as label/NAME. Of
    a token with the class -1, or with a row that is zero or not a number, nothing is asked."""
    classes: int = 0
    """How many classes there are."""
    mask_id: int | None = None
    """The id that stands for a hidden one ([MASK]); None: the learned mask token of the embedder."""
    replaced: tuple[float, float] | None = None
    """Of the tokens that are asked, the share that is masked and the share that is another id, drawn at random (where they are no
    ids, these are masked too); the rest stays as it is. None: (0.8, 0.1) for ids (BERT, arXiv 1810.04805, 3.1), and (1, 0) for
    all others and for whole modalities."""
    spare: tuple[int, ...] = ()
    """Ids that are never hidden, such as the begin and the end of a text."""
    drop: bool = False
    """Whether the model reads only what is left (MAE): nothing stands in the place of the others, and a decoder adds it."""
    depth: int = 2
    """Layers of that decoder."""
    temperature: float = 0.1
    """Of `contrast`."""
    head: str = ""
    """A head that the model has already; empty: one of its own, masked_NAME or, with drop, left_NAME, and behind it _TARGET or
    _contrast."""
    others: Literal["example", "batch"] = "example"
    """Of `contrast`: whose tokens it is told from, those of its own example, or of the whole batch (UniVL, HERO), of which the
    scores of all pairs are held at once."""
    confidence: str = ""
    """The name among data.labels of what each token's answer counts, (B, L), such as a detector's confidence (LXMERT); empty: all
    count alike."""

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1 or (self.drop and self.rate == 1):
            raise InputError(f"mask: rate={self.rate}; it is a share, more than 0 and at most 1 (less than 1 with drop)")
        if self.replaced is not None and (min(self.replaced) < 0 or sum(self.replaced) > 1 + 1e-9):
            raise InputError(f"mask: replaced={self.replaced}; these are shares with a sum of at most 1, such as (0.8, 0.1)")
        if (self.answer in LABELLED) != bool(self.target and self.classes):
            raise InputError(
                f"mask: answer={self.answer!r} with target={self.target!r}, classes={self.classes}; {', '.join(LABELLED)} need "
                f"both, and other answers neither"
            )
        if self.others == "batch" and self.answer != "contrast":
            raise InputError(f"mask: others='batch' with answer={self.answer!r}, which tells it from no others; leave others out")
        if self.drop and self.unit in ("word", "span", "region", "modality"):
            raise InputError(f"mask: unit={self.unit!r} hides now more tokens, now fewer; drop wants as many of each example")

    def head_of(self, name: str) -> str:
        """The head that answers."""
        kind = "" if self.answer in ("content", "normalised", "huber") else f"_{self.target or self.answer}"
        return self.head or f"{'left' if self.drop else 'masked'}_{modality_of(name)}{kind}"

    def entry(self, name: str) -> str:
        """The entry of the batch that holds what is left: one for all that hide alike, whatever they ask."""
        how = (self.rate, self.unit, self.mask_id, self.replaced, self.spare, self.drop)
        return f"{name}/masked-{zlib.crc32(repr(how).encode()):08x}"

    def form(self, embedder: Any) -> tuple[int, bool]:
        """How many numbers, ids or classes an answer has to do with, and whether it is one of them and not all."""
        if self.classes:
            return self.classes, True
        content = jax.eval_shape(lambda: embedder.content(embedder.example(1)))
        return (content.shape[-1], False) if content.ndim == 3 else (embedder.vocab, True)

    def make_head(self, name: str, embedder: Any) -> nn.Module:
        """The head that answers."""
        name, (size, one) = modality_of(name), self.form(embedder)
        if self.drop:
            return Reconstruction(name, size, self.depth)
        if one and not self.classes and isinstance(embedder, Ids):
            return TiedDecoder(name, activation="gelu", norm=EPS)
        return TokenClassifier(size, name, activation="gelu", norm=EPS)

    def check(self, name: str, model: MultimodalTransformer) -> None:
        """Raises an InputError for what cannot be hidden or asked."""
        embedder: Any = model.modalities[modality_of(name)]
        kind, grid = type(embedder).__name__, embedder.grid
        _, one = self.form(embedder)
        if one and self.answer in ("normalised", "huber", "contrast"):
            raise InputError(f"{name}: answer={self.answer!r} is asked of numbers, and {kind} has ids; take answer='content'")
        if self.unit in ("block", "tube") and len(grid) < 2:
            raise InputError(f"{name}: unit={self.unit!r} needs rows and columns, and tokens of {kind} lie in a row {grid}")
        if self.unit == "region" and "box" not in embedder.vectors:
            raise InputError(f"{name}: unit='region' needs the boxes of the regions; give {kind} vectors={{'box': 4}} or more")
        if self.drop and any(isinstance(stage, Sum) for stage in model.stages):
            raise InputError(f"{name}: drop leaves a shorter stream, and summation adds token by token; mask without drop")
        if self.drop and getattr(embedder, "last", False):
            raise InputError(f"{name}: drop leaves those that were kept, and last=True puts a token behind them; set last=False")
        if self.mask_id is not None and not isinstance(embedder, Ids):
            raise InputError(f"{name}: mask_id={self.mask_id} is an id, and {kind} has none; leave it out")
        if isinstance(embedder, Ids) and not 0 <= (self.mask_id or 0) < embedder.vocab:
            raise InputError(f"{name}: mask_id={self.mask_id} is no id of a vocabulary of {embedder.vocab}")
        if not (self.drop or self.mask_id is not None or embedder.mask_token or isinstance(embedder, Features)):
            raise InputError(
                f"{name}: {kind} has no mask token to stand for what is hidden; set --modalities.{modality_of(name)}.mask-token"
                + (", or give the id of one as mask_id" if isinstance(embedder, Ids) else "")
            )

    def apply(self, name: str, batch: Batch, embedder: Any, key: jax.Array) -> Batch:
        """Adds to the batch what is left of an entry, what is hidden `(B, L)` and what stood there; once for all that hide so."""
        entry, raw = self.entry(name), batch[name]
        if entry in batch:
            return batch
        draw_key, kind_key, id_key = jax.random.split(key, 3)
        fields, mask = embedder.read(raw)
        content = embedder.content(raw)
        there = embedder.there(raw)
        there = jnp.ones(content.shape[:2], bool) if there is None else there
        content = hide(content, there) if content.ndim == 3 else content  # what is absent may be no number
        spared = jnp.isin(content, jnp.asarray(self.spare)) if content.ndim == 2 and self.spare else False
        hidden = self._draw(draw_key, there & ~jnp.asarray(spared), name, batch, fields, embedder)
        if self.drop:
            left = self._left(there.shape[1], embedder.grid)
            changed = {**fields, KEPT: jnp.sort(jnp.argsort(hidden, 1, stable=True)[:, :left], 1)}
        else:
            changed = self._replace(fields, hidden, content, embedder, kind_key, id_key)
        keep = isinstance(raw, Masked) and raw.keep
        left_over = changed if mask is None else Masked(changed, mask, keep)
        return {**batch, entry: left_over, f"{entry}:hidden": hidden, f"{entry}:asked": content, f"{entry}:there": there}

    def asked(self, name: str, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """What is asked of each token, ids or classes `(B, L)` or numbers `(B, L, n)`, and what its answer counts, `(B, L)`, 0 of
        one of which nothing is asked. What cannot be right becomes no class or no number: see `classified`."""
        entry = self.entry(name)
        asked, counts = batch[f"{entry}:asked"], batch[f"{entry}:hidden"]
        if self.target:
            asked, counts = self._labelled(name, batch, counts)
        if self.confidence:
            sure = self._label(name, "confidence", batch, counts.shape)
            sure = jnp.where(sure < 0, jnp.nan, jnp.where(jnp.isnan(sure), 0, sure))
            counts = jnp.where(counts, sure, 0)
        return asked, counts

    def _labelled(self, name: str, batch: Batch, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the label says of each token, and which of those that are hidden it says something of, `(B, L)`."""
        if self.answer == "classes":  # however they are stored
            label = self._label(name, "target", batch, hidden.shape)
            one = jnp.where(label == jnp.round(label), jnp.clip(label, -1, self.classes), self.classes)
            return one.astype(jnp.int32), hidden & ~jnp.isnan(label) & (label != -1)
        label = self._label(name, "target", batch, (*hidden.shape, self.classes))
        told = hidden & ~jnp.isnan(label).any(-1) & (label != 0).any(-1)
        wrong = told & ((label < 0).any(-1) | (jnp.abs(label.sum(-1) - 1) > CLOSE))
        if self.answer == "likeliest":
            return jnp.where(wrong, self.classes, region_labels(label)), told
        label = jnp.where(told[..., None], label, 0)  # of what is not asked no number reaches the gradient
        return jnp.where(wrong[..., None], jnp.nan, label), told

    def _label(self, name: str, field: str, batch: Batch, shape: tuple[int, ...]) -> jax.Array:
        title = f"label/{getattr(self, field)}"
        if title not in batch:
            raise InputError(f"{name}: {field} is {title}, and the batch has no such entry; name its field in data.labels")
        label = jnp.asarray(batch[title], jnp.float32)
        if label.shape != shape:
            raise InputError(f"{name}: {title} has shape {label.shape}, and {field} of answer={self.answer!r} wants {shape}")
        return label

    def _draw(
        self, key: jax.Array, there: jax.Array, name: str, batch: Batch, fields: Mapping[str, Any], embedder: Any
    ) -> jax.Array:
        if self.unit == "word":
            if f"{name}/{WORDS}" not in batch:
                raise InputError(f"{name}: unit='word' needs the entry {name}/{WORDS}, each token's word; set data.words")
            words = batch[f"{name}/{WORDS}"]
            return units.groups(key, there & (words >= 0), jnp.maximum(words, 0), self.rate)
        if self.unit == "region":
            return units.regions(key, there, fields["box"], self.rate)
        if self.unit in ("block", "tube", "frame"):
            draw = {"block": units.blocks, "tube": units.tubes, "frame": units.frames}[self.unit]
            return draw(key, there, embedder.grid, self.rate)
        return {"token": units.tokens, "span": units.spans, "modality": units.whole}[self.unit](key, there, self.rate)

    def _left(self, length: int, grid: tuple[int, ...]) -> int:
        """How many tokens of each example are left."""
        at_once = {"tube": grid[0], "frame": math.prod(grid[1:]), "block": math.prod(grid[:-2])}.get(self.unit, 1)
        count = max(int(np.round(np.float32(self.rate) * np.float32(length))), 1)  # as `units.wanted` counts
        return length - -(-count // at_once) * at_once

    def _replace(
        self,
        fields: Mapping[str, Any],
        hidden: jax.Array,
        content: jax.Array,
        embedder: Any,
        kind_key: jax.Array,
        id_key: jax.Array,
    ) -> dict[str, Any]:
        usual = (0.8, 0.1) if isinstance(embedder, Ids) and self.unit != "modality" else (1.0, 0.0)
        kind, (masked, other) = jax.random.uniform(kind_key, hidden.shape), self.replaced or usual
        first = embedder.reads[0]
        if isinstance(embedder, Ids):
            drawn = jax.random.randint(id_key, content.shape, 0, embedder.vocab, content.dtype)
            swapped = hidden & (kind >= masked) & (kind < masked + other)
            gone = hidden & (kind < masked)
            ids = jnp.where(swapped, drawn, content)
            if self.mask_id is not None:
                return {**fields, first: jnp.where(gone, self.mask_id, ids)}
            return {**fields, first: ids, HIDDEN: gone}
        gone = hidden & (kind < masked + other)
        if embedder.mask_token:
            return {**fields, HIDDEN: gone}
        zero = {**fields, first: jnp.where(gone[..., None], 0, fields[first])}
        return {**zero, "marked": gone.astype(jnp.int32)} if embedder.marked else zero
