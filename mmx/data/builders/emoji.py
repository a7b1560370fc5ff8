"""The embedded emoji set as a TFDS builder: 3,786 Noto emoji with their English names."""

import io
import json
import zlib
from collections.abc import Iterator
from importlib import resources
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

SIZE = 32
HELD_OUT = 20  # percent of the variants


class Emoji(tfds.core.GeneratorBasedBuilder):
    """Emoji pictures, 32 x 32, with name, group and skin tones.

    Splits:
        train: everything else.
        composition: one in five of the person x skin-tone variants, chosen by a hash of the code points among those whose
            base emoji `train` shows in other tones. Every word and every person is known, their combination is new.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "emoji-datasource-google 16.0.0, emojibase-data 17.0.0"}

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="png"),
            "name": tfds.features.Text(),
            "key": tfds.features.Text(),
            "base": tfds.features.Text(),
            "group": tfds.features.Text(),
            "tones": tfds.features.Sequence(np.int32),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        entries = read_entries()
        held_out = composition_keys(entries)
        return {
            "train": self._generate_examples(e for e in entries if e["key"] not in held_out),
            "composition": self._generate_examples(e for e in entries if e["key"] in held_out),
        }

    def _generate_examples(self, entries: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        sprite = Image.open(io.BytesIO(_asset("sprite.png"))).convert("RGB")
        columns = sprite.width // SIZE
        for entry in entries:
            top, left = entry["index"] // columns * SIZE, entry["index"] % columns * SIZE
            picture = sprite.crop((left, top, left + SIZE, top + SIZE))
            yield entry["key"], {name: entry[name] for name in entry if name != "index"} | {"image": picture}


def read_entries() -> list[dict[str, Any]]:
    """Returns `key base name group tones index` of every emoji, in the order of the sprite."""
    columns = json.loads(_asset("emoji.json"))
    rows = zip(*columns.values(), strict=True)
    return [dict(zip(columns, row, strict=True)) | {"index": i} for i, row in enumerate(rows)]


def composition_keys(entries: list[dict[str, Any]]) -> set[str]:
    """The variants of the split `composition`."""
    toned = [e for e in entries if e["tones"]]
    chosen = {e["key"] for e in toned if zlib.crc32(e["key"].encode()) % 100 < HELD_OUT}
    seen = {e["base"] for e in toned if e["key"] not in chosen}
    return {e["key"] for e in toned if e["key"] in chosen and e["base"] in seen}


def _asset(name: str) -> bytes:
    return (resources.files("mmx.data") / "emoji" / name).read_bytes()
