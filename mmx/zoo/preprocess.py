"""What a published model was trained with: size, mean and std of images, tokenizer and length of texts, features of sounds."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmx.errors import InputError
from mmx.zoo.sounds import SoundSteps
from mmx.zoo.texts import ImagePlaces, Texts, TextSteps, WordSteps
from mmx.zoo.tokenizer import FILES as TEXT_FILES
from mmx.zoo.tokenizer import read_texts

IMAGES = "preprocessor_config.json"
SETTINGS = (IMAGES, "video_preprocessor_config.json")
WHOLE = "processor_config.json"  # where newer folders have the same, a part for each kind of raw value
WRITING = "generation_config.json"
FILES = (*TEXT_FILES, *SETTINGS, WHOLE, WRITING)


@dataclasses.dataclass(frozen=True)
class ImageSteps:
    """Images to `pixel_values (B, C, H, W)` float32: resized, cut, scaled, normalised.

    Of several sizes: with `pixel_mask (B, H, W)`. Of `packed`: `pixel_values (B, L, P)` of patches, `pixel_attention_mask (B, L)`
    and `spatial_shapes (B, 2)`, how many rows and columns of them an image has.

    Args:
        size: (height, width), or one number: the shorter edge.
        fit: how an image gets a (height, width): "squash": it is stretched; "cover" or "inside": its ratio is kept, and it
            covers that size or fits into it.
        crop: (height, width) of the middle that is kept; None: all.
        fill: colour 0..255 of what is around an image that is smaller than `crop`, one number or one by channel.
        multiple: what both edges are multiples of; the longer is then at most 1333 / 800 of `size` (ViLT, BridgeTower).
        sizes: whether images keep sizes of their own, and are filled up on the right and below to the largest (ViLT).
        packed: (edge of a patch, the most patches) of images that keep their ratio and are cut to patches (NaFlex).
        torchvision: whether the middle is found as torchvision does, and not as transformers, where halves of pixels differ.
        resample: the filter, as Pillow numbers them: 2 bilinear, 3 bicubic.
        scale: factor of pixels 0..255.
        offset: what is taken off scaled pixels.
        mean: by channel, of scaled pixels.
        std: likewise.
    """

    size: int | tuple[int, int] | None = 224
    crop: tuple[int, int] | None = None
    resample: int = 3
    scale: float = 1 / 255
    offset: float = 0.0
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    fit: str = "squash"
    fill: float | tuple[float, ...] = 0
    torchvision: bool = False
    multiple: int = 0
    sizes: bool = False
    packed: tuple[int, int] | None = None

    def __call__(self, images: Sequence[Any]) -> dict[str, np.ndarray]:
        """Images are Pillow's, or arrays (height, width, channels) uint8."""
        if isinstance(images, (str, bytes)) or not len(images):
            raise InputError(f"images={images!r}; expected a list of images")
        made = [self.one(image) for image in images]
        if self.packed is not None:
            return self._patches(made, *self.packed)
        if not self.sizes:
            return {"pixel_values": np.stack(made)}
        height, width = (max(image.shape[axis] for image in made) for axis in (1, 2))
        lacking = [((0, height - image.shape[1]), (0, width - image.shape[2])) for image in made]
        return {
            "pixel_values": np.stack([np.pad(image, ((0, 0), *around)) for image, around in zip(made, lacking, strict=True)]),
            "pixel_mask": np.stack([np.pad(np.ones(i.shape[1:], np.int32), a) for i, a in zip(made, lacking, strict=True)]),
        }

    def _patches(self, images: Sequence[np.ndarray], edge: int, most: int) -> dict[str, np.ndarray]:
        """Images (C, H, W) as rows of patches, the numbers of one patch by row, column and channel."""
        grids = [(image.shape[1] // edge, image.shape[2] // edge) for image in images]
        cut = [
            image.reshape(-1, rows, edge, columns, edge).transpose(1, 3, 2, 4, 0).reshape(rows * columns, -1)
            for image, (rows, columns) in zip(images, grids, strict=True)
        ]
        return {
            "pixel_values": np.stack([np.pad(patches, ((0, most - len(patches)), (0, 0))) for patches in cut]),
            "pixel_attention_mask": np.stack([np.arange(most) < len(patches) for patches in cut]).astype(np.int32),
            "spatial_shapes": np.asarray(grids, np.int32),
        }

    def one(self, image: Any) -> np.ndarray:
        """One image: (C, H, W)."""
        if not isinstance(image, Image.Image):
            array = np.asarray(image)
            if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.dtype != np.uint8:
                raise InputError(f"expected (height, width, channels) uint8 or Pillow's image, got {array.dtype} {array.shape}")
            image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
        image = image.convert("RGB")
        if self.size is not None or self.packed is not None:
            image = image.resize(self._size(image.size), self.resample)
        pixels = np.asarray(image, np.float32)
        if self.crop is not None:
            pixels = self._middle(pixels, self.crop)
        pixels = pixels * self.scale - self.offset
        return ((pixels - np.asarray(self.mean, "f")) / np.asarray(self.std, "f")).transpose(2, 0, 1)

    def _size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) to resize to."""
        width, height = size
        if self.packed is not None:
            return _fitting(width, height, *self.packed)
        if self.multiple:
            assert isinstance(self.size, int)
            scale = self.size / min(width, height)
            longest = int(1333 / 800 * self.size)
            edges = [self.size if edge == min(width, height) else scale * edge for edge in (width, height)]
            shrink = longest / max(edges) if max(edges) > longest else 1.0
            edges = [max(int(shrink * edge + 0.5) // self.multiple, 1) * self.multiple for edge in edges]
            return edges[0], edges[1]
        if isinstance(self.size, tuple):
            if self.fit == "squash":
                return self.size[1], self.size[0]
            ratios = height / self.size[0], width / self.size[1]
            ratio = min(ratios) if self.fit == "cover" else max(ratios)
            return round(width / ratio), round(height / ratio)
        edge: Any = self.size
        return (edge, int(edge * height / width)) if width <= height else (int(edge * width / height), edge)

    def _middle(self, pixels: np.ndarray, crop: tuple[int, int]) -> np.ndarray:
        """The middle of an image (H, W, C); filled up where it is smaller."""
        lacking = [max(want - have, 0) for want, have in zip(crop, pixels.shape, strict=False)]
        around = [(n // 2, (n + 1) // 2) if self.torchvision else ((n + 1) // 2, n // 2) for n in lacking]
        if any(lacking):
            fill = np.asarray(self.fill, pixels.dtype)
            pixels = np.pad(pixels - fill, [*around, (0, 0)]) + fill
        spare = [have - want for want, have in zip(crop, pixels.shape, strict=False)]
        top, left = (round(n / 2) if self.torchvision else n // 2 for n in spare)
        return pixels[top : top + crop[0], left : left + crop[1]]


def _fitting(width: int, height: int, edge: int, most: int) -> tuple[int, int]:
    """(width, height) of the largest image of a ratio that is cut to no more than `most` patches, as NaFlex searches it."""

    def scaled(scale: float) -> list[int]:
        return [max(math.ceil(size * scale / edge), 1) * edge for size in (width, height)]

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        low, high = (middle, high) if math.prod(scaled(middle)) <= most * edge * edge else (low, middle)
    found = scaled(low)
    return found[0], found[1]


@dataclasses.dataclass(frozen=True)
class VideoSteps:
    """Videos to `pixel_values (B, T, C, H, W)` float32: every frame as an image."""

    frames: ImageSteps

    def __call__(self, videos: Sequence[Any]) -> dict[str, np.ndarray]:
        """A video is an array (T, height, width, channels) uint8, or a list of its frames; all of one length."""
        if isinstance(videos, (str, bytes)) or len({len(video) for video in videos}) != 1:
            raise InputError("videos: expected a list of videos with the same number of frames")
        return {"pixel_values": np.stack([self.frames(video)["pixel_values"] for video in videos])}


def _settings(folder: Path, part: str) -> dict[str, Any]:
    """The published fields of one kind of raw value; empty if the folder has none."""
    for file in (folder / name for name in SETTINGS):
        if file.exists():
            return json.loads(file.read_text())
    whole = json.loads((folder / WHOLE).read_text()) if (folder / WHOLE).exists() else {}
    return whole.get(part, {})


def read_images(folder: Path) -> ImageSteps | None:
    """The steps that the files of a published folder tell of; None if there are none for images."""
    fields = _settings(folder, "image_processor") or _settings(folder, "video_processor")
    if "image_mean" not in fields:
        return None
    multiple, packed = fields.get("size_divisor") or 0, fields.get("max_num_patches")
    size, crop = fields.get("size", 384 if multiple else 224), fields.get("crop_size")
    if isinstance(size, dict):
        size = size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"])
    elif not fields.get("do_center_crop") and not multiple:
        size = _pair(size)
    return ImageSteps(
        size=size if fields.get("do_resize", True) and not packed else None,
        crop=_pair(crop if crop is not None else size) if fields.get("do_center_crop") else None,
        resample=fields.get("resample", 3 if multiple else 2),
        scale=fields.get("rescale_factor", 1 / 255) if fields.get("do_rescale", True) else 1.0,
        offset=1.0 if fields.get("offset", fields.get("video_processor_type") == "VivitVideoProcessor") else 0.0,
        mean=tuple(fields["image_mean"]) if fields.get("do_normalize", True) else (0.0,) * 3,
        std=tuple(fields["image_std"]) if fields.get("do_normalize", True) else (1.0,) * 3,
        multiple=multiple,
        sizes=bool(multiple) and fields.get("do_pad", True),
        packed=(fields.get("patch_size", 16), packed) if packed else None,
    )


def write_images(steps: ImageSteps) -> dict[str, Any] | None:
    """The way back of `read_images`; None where the published fields do not tell so much."""
    if (steps.fit != "squash" and isinstance(steps.size, tuple)) or steps.fill or steps.multiple or steps.packed:
        return None
    size, crop = (None if s is None else dict(zip(("height", "width"), _pair(s), strict=True)) for s in (steps.size, steps.crop))
    return {
        "do_resize": steps.size is not None,
        "size": {"shortest_edge": steps.size} if isinstance(steps.size, int) else size,
        "do_center_crop": steps.crop is not None,
        "crop_size": crop,
        "resample": steps.resample,
        "do_rescale": True,
        "rescale_factor": steps.scale,
        "do_normalize": True,
        "image_mean": steps.mean,
        "image_std": steps.std,
    }


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        return (size["shortest_edge"],) * 2 if "shortest_edge" in size else (size["height"], size["width"])
    return (size, size) if isinstance(size, int) else tuple(size)


def read_sounds(folder: Path, kind: type[SoundSteps]) -> SoundSteps | None:
    """The steps of a kind, as the files of a published folder tell them; None if they tell nothing of sounds."""
    fields = _settings(folder, "feature_extractor")
    if "sampling_rate" not in fields:
        return None
    return kind(**{f.name: fields[f.name] for f in dataclasses.fields(kind) if f.name in fields})


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """The steps of one model; each is None where its folder tells nothing of it, or mmx has no rules for it.

    `names` are those of the inputs that are returned, each with the prepared one it stands for, "not NAME" for the opposite of a
    mask; None: all, as they are. `without` are the kinds for which mmx has no rules in this family. `places` are those of images
    in texts.
    """

    texts: TextSteps | None = None
    words: WordSteps | None = None
    images: ImageSteps | None = None
    videos: VideoSteps | None = None
    audio: SoundSteps | None = None
    names: Mapping[str, str] | None = None
    without: tuple[str, ...] = ()
    places: ImagePlaces | None = None

    def __call__(self, **raw: Any) -> dict[str, np.ndarray]:
        """Published inputs of raw values by kind: `texts=[...]`, `images=[...]`, `videos=[...]`, `audio=[...]`.

        Of the words of pages and the boxes they stand in: `words=[[...]], boxes=[[...]]`. Where images stand in texts (LLaVA,
        PaliGemma), an image for each `<image>`, text after text.
        """
        known = {f.name for f in dataclasses.fields(self)} - {"names", "without", "places"}
        beside = (raw.pop("boxes"),) if "boxes" in raw and "words" in raw else ()
        inputs: dict[str, np.ndarray] = {}
        for kind, values in sorted(raw.items(), key=lambda item: item[0] == "texts"):  # which may have to know of images
            steps = getattr(self, kind) if kind in known else None
            if steps is None:
                told = [name for name in sorted(known) if getattr(self, name) is not None]
                told_of = ", ".join(told) or "nothing"
                if kind in self.without or kind not in known:
                    raise InputError(
                        f"preprocess: mmx has no rules for {kind} in this family; it prepares {told_of} of this folder"
                    )
                raise InputError(
                    f"preprocess: the folder tells nothing of {kind}; it tells of {told_of}. "
                    f"Its tokenizer and preprocessor_config.json lie beside config.json"
                )
            if kind == "texts" and "images" in raw and self.places is not None:
                made = self.places(steps, values, inputs["pixel_values"])
            else:
                made = self._named(steps(values, *beside) if kind == "words" else steps(values))
            if not made:
                raise InputError(f"preprocess: this model takes nothing of {kind}; it takes {', '.join(self.names or ())}")
            inputs |= made
        return inputs

    def _named(self, made: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What was prepared, by the names of the inputs."""
        if self.names is None:
            return dict(made)
        opposites = {f"not {name}": 1 - array for name, array in made.items() if name.endswith("mask")}
        return {name: {**made, **opposites}[own] for name, own in self.names.items() if own in made or own in opposites}


def read(folder: Path, length: int | None, rules: Texts | None, video: bool, sound: type[SoundSteps] | None) -> Preprocessing:
    """All steps a published folder tells of.

    Args:
        folder: where its files lie.
        length: the longest text the model takes; None: it reads none.
        rules: of texts.
        video: whether it reads videos, and not images.
        sound: the kind of steps of its sounds; None: it reads none.
    """
    texts = read_texts(folder, length, rules) if length is not None and rules is not None else None
    images = read_images(folder)
    has = {
        "texts": length is not None and rules is not None,
        "words": rules is not None and rules.page is not None,
        "images": not video,
        "videos": video,
        "audio": sound is not None,
    }
    return Preprocessing(
        texts=texts,
        words=WordSteps(texts) if texts is not None and texts.boxes else None,
        images=None if video else images,
        videos=VideoSteps(images) if video and images is not None else None,
        audio=read_sounds(folder, sound) if sound is not None else None,
        without=tuple(kind for kind, rules_are_there in has.items() if not rules_are_there),
    )
