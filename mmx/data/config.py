"""What is read: the data sets, which of their fields become entries of a batch, and which become labels."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

import tyro

from mmx.errors import InputError, at_least


@dataclasses.dataclass(frozen=True)
class Label:
    """What an example is told to be: `batch["label/NAME"]`, a class `(B,)` int32 or numbers `(B, ...)` float32.

    An example that has no such label has the class -1, or NaN for numbers; objectives leave it out. A class that is not one of
    `classes` is refused, with the example's name, before it gets to a device.
    """

    field: str
    """The field of the data set."""
    classes: tuple[str, ...] | tuple[int, ...] | int | None = None
    """What the field holds for class 0, 1, ... (texts or integers); or how many classes there are, where it holds their numbers;
    None: the label is a number or several, as the field holds them."""
    none: tuple[str | int, ...] = ()
    """What the field holds where there is no label, such as "" or -1. An empty list never is one."""
    several: Literal["refuse", "leave_out"] = "refuse"
    """What happens where a list names several classes: it is refused, or the example is left out as one without a label."""

    def __post_init__(self) -> None:
        if isinstance(self.classes, str):
            raise InputError(f"classes={self.classes!r}; give a tuple of names, or a number")
        if self.classes is not None and not self.size:
            raise InputError(f"classes={self.classes!r}; there has to be at least one")
        if isinstance(self.classes, tuple) and len(set(self.classes)) < len(self.classes):
            raise InputError(f"classes={self.classes!r}; each may be there once only")

    @property
    def size(self) -> int | None:
        """How many classes there are; None: the label is no class."""
        return len(self.classes) if isinstance(self.classes, tuple) else self.classes


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set, and how its fields become entries of a batch."""

    name: str = "emoji"
    """A built-in data set, or the folder of one that TFDS prepared in ArrayRecord format."""
    split: str = "train"
    """The split to train on; TFDS's slices (train[:80%]) are understood."""
    fields: Mapping[str, str | tuple[str, ...]] = dataclasses.field(default_factory=lambda: {"image": "image", "text": "name"})
    """For each entry of a batch the field of the data set that holds it. An entry is a modality, or MODALITY/ENTRY (such as
    text/question): another one that this modality reads. A text in several parts (a list, or several fields) is told by its
    last part; those before it are its prompt."""
    labels: Annotated[Mapping[str, Label], tyro.conf.Suppress] = dataclasses.field(default_factory=dict)
    """The labels by name, `mmx.data.Label`; from a configuration file."""
    ratio: float = 1.0
    """How many examples of a batch are of this set, beside those of the other sets in data.also."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio < float("inf"):
            raise InputError(f"ratio={self.ratio}; it has to be more than 0")


@dataclasses.dataclass(frozen=True)
class DataConfig(DataSet):
    """What is read, and how it becomes batches."""

    also: Annotated[tuple[DataSet, ...], tyro.conf.Suppress] = ()
    """Further data sets, from a configuration file, whose examples are mixed into each batch by their ratios. What one of the
    sets lacks is absent in its examples. Evaluators read the first set alone."""
    shift: int = 1
    """Training images are moved by up to this many pixels, at random."""
    words: bool = False
    """Whether each ENTRY of text comes with ENTRY/words, the number of the word that each token belongs to."""
    keep: bool = True
    """Keep decoded examples in memory, for sets that fit there."""
    threads: int = 1
    """Threads that read and decode."""
    buffer: int = 8
    """Batches that are prepared ahead on the host."""
    tokenizer: str = ""
    """A tokenizer.json. Empty: one is learned from the texts of the split, and kept with the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, shift=0, threads=1, buffer=1)

    @property
    def sets(self) -> tuple[DataSet, ...]:
        """All data sets, this one first."""
        return (self, *self.also)
