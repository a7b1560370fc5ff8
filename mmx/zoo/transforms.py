"""How open_clip and timm write down the preparation of images: their settings as `ImageSteps`, and back."""

import math
from collections.abc import Mapping
from typing import Any

from mmx.errors import InputError, unknown
from mmx.zoo.family import pair
from mmx.zoo.preprocess import ImageSteps

# Mean and std where a configuration tells none: those of timm, and those of open_clip, which are OpenAI's.
TIMM = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
INTERPOLATION = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
MODES = {"shortest": "cover", "longest": "inside", "squash": "squash"}  # open_clip's `resize_mode` -> `ImageSteps.fit`
_CROPS = {"center": "shortest", "border": "longest", "squash": "squash"}  # timm's `crop_mode` -> open_clip's


def image_steps(
    size: tuple[int, int], scaled: tuple[int, int], mode: str, interpolation: str, fill: Any, mean: Any, std: Any
) -> ImageSteps:
    """Images made `scaled` in one of `MODES`, of which the middle of `size` is kept."""
    resample = {name: number for number, name in INTERPOLATION.items()}
    for kind, value, known in (("resize mode", mode, MODES), ("interpolation", interpolation, resample)):
        if value not in known:
            raise InputError("preprocessing: " + unknown(kind, value, known))
    edge = scaled[0] if mode == "shortest" and scaled[0] == scaled[1] else scaled
    return ImageSteps(
        edge, size, resample[interpolation], mean=tuple(mean), std=tuple(std), fit=MODES[mode], fill=fill, torchvision=True
    )


def resize_mode(steps: ImageSteps) -> str:
    """Which of `MODES` the steps are."""
    fits = {fit: mode for mode, fit in MODES.items()}
    return "shortest" if isinstance(steps.size, int) else fits[steps.fit]


def timm_images(fields: Mapping[str, Any]) -> ImageSteps | None:
    """timm's `pretrained_cfg`."""
    p = fields.get("pretrained_cfg", {})
    height, width = (p.get("input_size") or (3, 224, 224))[1:]
    scaled = tuple(math.floor(s / (p.get("crop_pct") or 0.875)) for s in (height, width))
    mode, mean, std = p.get("crop_mode") or "center", p.get("mean") or TIMM[0], p.get("std") or TIMM[1]
    fill = tuple(round(255 * m) for m in mean) if mode == "border" else 0
    return image_steps((height, width), scaled, _CROPS.get(mode, mode), p.get("interpolation") or "bicubic", fill, mean, std)  # type: ignore[arg-type]


def as_timm(steps: ImageSteps | None) -> dict[str, Any]:
    """The way back of `timm_images`."""
    if steps is None or steps.size is None:
        return {}
    scaled = pair(steps.size)
    size = steps.crop or scaled
    share = size[0] / scaled[0]
    return {
        "mean": steps.mean,
        "std": steps.std,
        "interpolation": INTERPOLATION[steps.resample],
        "crop_pct": share if math.floor(size[0] / share) == scaled[0] else math.nextafter(share, 0),
        "crop_mode": {mode: crop for crop, mode in _CROPS.items()}[resize_mode(steps)],
    }


def open_clip_images(fields: Mapping[str, Any]) -> ImageSteps:
    """open_clip's `preprocess_cfg`; the size is the model's, if it tells none."""
    p = fields.get("preprocess_cfg", {})
    size = pair(p.get("size") or fields["model_cfg"]["vision_cfg"].get("image_size", 224))
    mode, interpolation = p.get("resize_mode") or "shortest", p.get("interpolation") or "bicubic"
    return image_steps(
        size, size, mode, interpolation, p.get("fill_color") or 0, p.get("mean") or OPENAI[0], p.get("std") or OPENAI[1]
    )


def as_open_clip(steps: ImageSteps | None) -> dict[str, Any]:
    """The way back of `open_clip_images`."""
    if steps is None or steps.size is None:
        return {}
    if pair(steps.size) != (steps.crop or pair(steps.size)):
        raise InputError(f"open_clip: images made {steps.size} and cut to {steps.crop} are not expressed by its preprocess_cfg")
    return {
        "size": steps.size,
        "mean": steps.mean,
        "std": steps.std,
        "interpolation": INTERPOLATION[steps.resample],
        "resize_mode": resize_mode(steps),
        "fill_color": steps.fill,
    }
