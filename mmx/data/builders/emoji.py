"""The embedded emoji set as a TFDS builder: 3,786 Noto emoji with their English names."""

import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator
from importlib import resources
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

SIZE = 32
HELD_OUT = 20  # percent of the variants
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey")
NUMBERS = ("no", "one", "two", "three", "four")


class Emoji(tfds.core.GeneratorBasedBuilder):
    """Emoji pictures, 32 x 32, with name, group, skin tones, and a question whose answer only the picture tells.

    Splits:
        train: everything else.
        composition: one in five of the person x skin-tone variants, chosen by a hash of the code points among those whose
            base emoji `train` shows in other tones. Every word and every person is known, their combination is new.
    """

    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES = {
        "1.0.0": "emoji-datasource-google 16.0.0, emojibase-data 17.0.0",
        "1.1.0": "a question about each picture, and its answer",
    }

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="png"),
            "name": tfds.features.Text(),
            "key": tfds.features.Text(),
            "base": tfds.features.Text(),
            "group": tfds.features.Text(),
            "tones": tfds.features.Sequence(np.int32),
            "question": tfds.features.Text(),
            "answer": tfds.features.Text(),
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
        sprite = read_sprite()
        for entry in entries:
            picture = Image.fromarray(sprite[entry["index"]])
            question, answer = ask(entry)
            told = {"image": picture, "question": question, "answer": answer}
            yield entry["key"], {name: entry[name] for name in entry if name != "index"} | told


def read_entries() -> list[dict[str, Any]]:
    """Returns `key base name group tones index` of every emoji, in the order of the sprite."""
    columns = json.loads(_asset("emoji.json"))
    rows = zip(*columns.values(), strict=True)
    return [dict(zip(columns, row, strict=True)) | {"index": i} for i, row in enumerate(rows)]


def read_sprite() -> np.ndarray:
    """The pictures of `read_entries`, `(N, 32, 32, 3)` uint8."""
    sprite = np.asarray(Image.open(io.BytesIO(_asset("sprite.png"))).convert("RGB"))
    rows, columns = sprite.shape[0] // SIZE, sprite.shape[1] // SIZE
    return sprite.reshape(rows, SIZE, columns, SIZE, 3).swapaxes(1, 2).reshape(-1, SIZE, SIZE, 3)


def composition_keys(entries: list[dict[str, Any]]) -> set[str]:
    """The variants of the split `composition`."""
    toned = [e for e in entries if e["tones"]]
    chosen = {e["key"] for e in toned if zlib.crc32(e["key"].encode()) % 100 < HELD_OUT}
    seen = {e["base"] for e in toned if e["key"] not in chosen}
    return {e["key"] for e in toned if e["key"] in chosen and e["base"] in seen}


def ask(entry: dict[str, Any]) -> tuple[str, str]:
    """A question about an emoji, and its answer: one of those that its name, group and tones surely tell.

    It is chosen by a hash of the code points, and so often of each kind that no answer is right for most of them: who has not
    seen the picture cannot know. A question that is there twice is chosen twice as often.
    """
    words = re.findall(r"[a-z]+", entry["name"].lower())
    group = ("which group?", entry["group"].replace("-", " and "))
    colours = [colour for colour in COLOURS if colour in words]
    if entry["group"] != "people-body":
        of_colour = len(colours) == 1 and not {"dragon", "cane", "leafy"} & {*words}  # a tile, a thing not seen as white
        choices = [("what colour?", colours[0])] if of_colour else [group]
    else:
        people = _count_people(entry["name"])
        alone = people == 1 and words[0] in ("man", "woman")
        choices = [] if entry["tones"] else [group]  # who is known by tones is known to be a person
        choices += [("which skin tone?", " and ".join(TONES[tone - 1] for tone in entry["tones"]))] * 4 * bool(entry["tones"])
        choices += [("how many people?", NUMBERS[people])] * (1 if people == 1 else 4 if people else 0)
        choices += [("man or woman?", words[0])] * 2 * alone
    return choices[int(hashlib.sha256(entry["key"].encode()).hexdigest(), 16) % len(choices)]


def _count_people(name: str) -> int:
    """How many people a name surely tells of; 0: it does not tell."""
    what, _, who = name.partition(":")
    if what == "family":
        return len(who.split(",")) if who else 0
    if re.search(r"^(kiss|couple with heart)$|holding hands$|wrestling$|hugging$|with bunny ears$", what):
        return 2
    return int(bool(re.match(r"(man|woman|person)\b", what)) and not re.search("feeding|getting", what))


def _asset(name: str) -> bytes:
    return (resources.files("mmx.data") / "emoji" / name).read_bytes()
