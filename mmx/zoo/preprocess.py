"""What a published model was trained with: size, mean and std of images, tokenizer and length of texts, features of sounds."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmx.errors import InputError
from mmx.zoo.sounds import SoundSteps
from mmx.zoo.tokenizer import FILES as TEXT_FILES
from mmx.zoo.tokenizer import Texts, TextSteps, WordSteps, read_texts

IMAGES = "preprocessor_config.json"
SETTINGS = (IMAGES, "video_preprocessor_config.json")
WHOLE = "processor_config.json"  # where newer folders have the same, a part for each kind of raw value
FILES = (*TEXT_FILES, *SETTINGS, WHOLE, "generation_config.json")


@dataclasses.dataclass(frozen=True)
class ImageSteps:
    """Images to `pixel_values (B, C, H, W)` float32: resized, cut, scaled, normalised.

    Args:
        size: (height, width), or one number: the shorter edge.
        fit: how an image gets a (height, width): "squash": it is stretched; "cover" or "inside": its ratio is kept, and it
            covers that size or fits into it.
        crop: (height, width) of the middle that is kept; None: all.
        fill: colour 0..255 of what is around an image that is smaller than `crop`, one number or one by channel.
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

    def __call__(self, images: Sequence[Any]) -> dict[str, np.ndarray]:
        """Images are Pillow's, or arrays (height, width, channels) uint8."""
        if isinstance(images, (str, bytes)) or not len(images):
            raise InputError(f"images={images!r}; expected a list of images")
        return {"pixel_values": np.stack([self.one(image) for image in images])}

    def one(self, image: Any) -> np.ndarray:
        """One image: (C, H, W)."""
        if not isinstance(image, Image.Image):
            array = np.asarray(image)
            if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.dtype != np.uint8:
                raise InputError(f"expected (height, width, channels) uint8 or Pillow's image, got {array.dtype} {array.shape}")
            image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
        image = image.convert("RGB")
        if self.size is not None:
            image = image.resize(self._size(image.size), self.resample)
        pixels = np.asarray(image, np.float32)
        if self.crop is not None:
            pixels = self._middle(pixels, self.crop)
        pixels = pixels * self.scale - self.offset
        return ((pixels - np.asarray(self.mean, "f")) / np.asarray(self.std, "f")).transpose(2, 0, 1)

    def _size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) to resize to."""
        width, height = size
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
    """The steps that the files of a published folder tell of; None if there are none for images, or if they make images of
    any size (ViLT, NaFlex), which these steps cannot."""
    fields = _settings(folder, "image_processor") or _settings(folder, "video_processor")
    if "image_mean" not in fields or {"size_divisor", "max_num_patches"} & set(fields):
        return None
    size, crop = fields.get("size", 224), fields.get("crop_size")
    if isinstance(size, dict):
        size = size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"])
    elif not fields.get("do_center_crop"):
        size = _pair(size)
    return ImageSteps(
        size=size if fields.get("do_resize", True) else None,
        crop=_pair(crop if crop is not None else size) if fields.get("do_center_crop") else None,
        resample=fields.get("resample", 2),
        scale=fields.get("rescale_factor", 1 / 255) if fields.get("do_rescale", True) else 1.0,
        offset=1.0 if fields.get("offset", fields.get("video_processor_type") == "VivitVideoProcessor") else 0.0,
        mean=tuple(fields["image_mean"]) if fields.get("do_normalize", True) else (0.0,) * 3,
        std=tuple(fields["image_std"]) if fields.get("do_normalize", True) else (1.0,) * 3,
    )


def write_images(steps: ImageSteps) -> dict[str, Any] | None:
    """The way back of `read_images`; None where the published fields do not tell so much."""
    if (steps.fit != "squash" and isinstance(steps.size, tuple)) or steps.fill:
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
        return size["height"], size["width"]
    return (size, size) if isinstance(size, int) else tuple(size)


def read_sounds(folder: Path, kind: type[SoundSteps]) -> SoundSteps | None:
    """The steps of a kind, as the files of a published folder tell them; None if they tell nothing of sounds."""
    fields = _settings(folder, "feature_extractor")
    if "sampling_rate" not in fields:
        return None
    return kind(**{f.name: fields[f.name] for f in dataclasses.fields(kind) if f.name in fields})


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """The steps of one model; each is None where its folder tells nothing of it.

    `names` are those of the inputs that are returned, each with the published one it stands for; None: all, as they are.
    """

    texts: TextSteps | None = None
    words: WordSteps | None = None
    images: ImageSteps | None = None
    videos: VideoSteps | None = None
    audio: SoundSteps | None = None
    names: Mapping[str, str] | None = None

    def __call__(self, **raw: Any) -> dict[str, np.ndarray]:
        """Published inputs of raw values by kind: `texts=[...]`, `images=[...]`, `videos=[...]`, `audio=[...]`.

        Of the words of pages and the boxes they stand in: `words=[[...]], boxes=[[...]]`.
        """
        known = {f.name for f in dataclasses.fields(self)} - {"names"}
        beside = (raw.pop("boxes"),) if "boxes" in raw and "words" in raw else ()
        inputs: dict[str, np.ndarray] = {}
        for kind, values in raw.items():
            steps = getattr(self, kind) if kind in known else None
            if steps is None:
                told = [name for name in sorted(known) if getattr(self, name) is not None]
                raise InputError(
                    f"preprocess: the folder tells nothing of {kind}; it tells of {', '.join(told) or 'nothing'}. "
                    f"Its tokenizer and preprocessor_config.json lie beside config.json"
                )
            inputs |= steps(values, *beside) if kind == "words" else steps(values)
        return inputs if self.names is None else {n: inputs[own] for n, own in self.names.items() if own in inputs}


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
    return Preprocessing(
        texts=texts,
        words=WordSteps(texts) if texts is not None and texts.boxes else None,
        images=None if video else images,
        videos=VideoSteps(images) if video and images is not None else None,
        audio=read_sounds(folder, sound) if sound is not None else None,
    )
