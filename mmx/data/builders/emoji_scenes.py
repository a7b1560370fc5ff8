"""Scenes of the embedded emoji as a TFDS builder: several in one picture, and one after another in a film."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from mmx.data.builders.emoji import SIZE, composition_keys, read_entries, read_sprite

SIDE = 2  # emoji along each side of a picture
FRAMES, SHOTS = 8, 3  # of a film
SCENES = {"train": 4000, "composition": 500}


class EmojiScenes(tfds.core.GeneratorBasedBuilder):
    """Where is it, and when? Four emoji in a picture and three in a film, each with the name of one of them.

    Features:
        image: 64 x 64, an emoji in each quarter.
        phrase: the name of one of them.
        patches: for each of the 16 patches of 16 x 16, row by row, 1 if it shows that one, else 0.
        film: 8 frames of 32 x 32, in which three emoji follow each other, each for a frame or more.
        subtitle: the name of one of them.
        first, last: the numbers of its frames.

    Splits:
        train: scenes of the emoji of that split of `emoji`.
        composition: scenes of those held out there.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "of emoji 1.1.0"}

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(SIDE * SIZE, SIDE * SIZE, 3), encoding_format="png"),
            "phrase": tfds.features.Text(),
            "patches": tfds.features.Tensor(shape=(4 * SIDE * SIDE,), dtype=np.float32),
            "film": tfds.features.Sequence(tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="png"), length=FRAMES),
            "subtitle": tfds.features.Text(),
            "first": np.int32,
            "last": np.int32,
            "key": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        entries = read_entries()
        held_out = composition_keys(entries)
        of = {
            "train": [e for e in entries if e["key"] not in held_out],
            "composition": [e for e in entries if e["key"] in held_out],
        }
        return {split: self._generate_examples(split, chosen) for split, chosen in of.items()}

    def _generate_examples(self, split: str, entries: Sequence[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
        rng, pictures = np.random.default_rng(0), read_sprite()
        for number in range(SCENES[split]):
            key = f"{split}-{number}"
            yield key, {"key": key, **_picture(rng, entries, pictures), **_film(rng, entries, pictures)}


def _picture(rng: np.random.Generator, entries: Sequence[dict[str, Any]], pictures: np.ndarray) -> dict[str, Any]:
    chosen = _draw(rng, entries, SIDE * SIDE)
    image = pictures[[e["index"] for e in chosen]].reshape(SIDE, SIDE, SIZE, SIZE, 3).swapaxes(1, 2)
    meant = int(rng.integers(len(chosen)))
    patches = np.zeros((SIDE, 2, SIDE, 2), np.float32)
    patches[meant // SIDE, :, meant % SIDE] = 1
    return {
        "image": Image.fromarray(image.reshape(SIDE * SIZE, SIDE * SIZE, 3)),
        "phrase": chosen[meant]["name"],
        "patches": patches.ravel(),
    }


def _film(rng: np.random.Generator, entries: Sequence[dict[str, Any]], pictures: np.ndarray) -> dict[str, Any]:
    chosen = _draw(rng, entries, SHOTS)
    starts = [0, *sorted(int(i) for i in rng.choice(np.arange(1, FRAMES), SHOTS - 1, replace=False)), FRAMES]
    shown = [chosen[shot] for shot in range(SHOTS) for _ in range(starts[shot], starts[shot + 1])]
    meant = int(rng.integers(SHOTS))
    return {
        "film": [Image.fromarray(pictures[e["index"]]) for e in shown],
        "subtitle": chosen[meant]["name"],
        "first": starts[meant],
        "last": starts[meant + 1] - 1,
    }


def _draw(rng: np.random.Generator, entries: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Emoji of different names."""
    while True:
        chosen = [entries[int(i)] for i in rng.integers(len(entries), size=count)]
        if len({e["name"] for e in chosen}) == count:
            return chosen
