"""open_clip's names of CLIP's and SigLIP's sizes, and the fields they stand for."""

from typing import Any

from mmx.zoo import timm
from mmx.zoo.open_clip import clip_fields, siglip_fields

_IMAGE: dict[str, dict[str, Any]] = {
    "S": {"width": 384},
    "M": {"width": 512},
    "B": {},
    "B-plus": {"width": 896},
    "L": {"width": 1024, "layers": 24},
    "H": {"width": 1280, "layers": 32, "head_width": 80},
    "g": {"width": 1408, "layers": 40, "head_width": 88, "mlp_ratio": 4.3637},
    "bigG": {"width": 1664, "layers": 48, "head_width": 104, "mlp_ratio": 4.9231},
    "e": {"width": 1792, "layers": 56, "head_width": 112, "mlp_ratio": 8.5715},
}
_TEXT: dict[str, dict[str, Any]] = {
    "S-alt": {"width": 256, "heads": 4, "layers": 10},
    "S": {"width": 384, "heads": 6},
    "B": {},
    "B-plus": {"width": 640, "heads": 10},
    "L": {"width": 768, "heads": 12},
    "H": {"width": 1024, "heads": 16, "layers": 24},
    "bigG": {"width": 1280, "heads": 20, "layers": 32},
    "e": {"width": 1280, "heads": 20, "layers": 36},
}
_CLIP = {  # name -> image tower, text tower, patch, image
    "S-32": ("S", "S", 32, 224),
    "S-32-alt": ("S", "S-alt", 32, 224),
    "S-16": ("S", "S", 16, 224),
    "S-16-alt": ("S", "S-alt", 16, 224),
    "M-32": ("M", "B", 32, 224),
    "M-32-alt": ("M", "S", 32, 224),
    "M-16": ("M", "B", 16, 224),
    "B-32": ("B", "B", 32, 224),
    "B-32-256": ("B", "B", 32, 256),
    "B-32-plus-256": ("B-plus", "B-plus", 32, 256),
    "B-16": ("B", "B", 16, 224),
    "B-16-plus": ("B-plus", "B-plus", 16, 224),
    "B-16-plus-240": ("B-plus", "B-plus", 16, 240),
    "L-16": ("L", "L", 16, 224),
    "L-16-320": ("L", "L", 16, 320),
    "L-14": ("L", "L", 14, 224),
    "L-14-280": ("L", "L", 14, 280),
    "L-14-336": ("L", "L", 14, 336),
    "H-16": ("H", "H", 16, 224),
    "H-14": ("H", "H", 14, 224),
    "H-14-378": ("H", "H", 14, 378),
    "g-14": ("g", "H", 14, 224),
    "bigG-14": ("bigG", "bigG", 14, 224),
    "e-14": ("e", "e", 14, 224),
}
_QUICK = ("B-32", "B-16", "L-14", "L-14-336", "H-14", "H-14-378", "bigG-14")
_SIGLIP_TEXT: dict[str, dict[str, Any]] = {
    "B": {"width": 768, "heads": 12},
    "L": {"width": 1024, "heads": 16, "layers": 24},
    "SO400M": {"width": 1152, "heads": 16, "layers": 27, "mlp_ratio": 3.7362},
}
_SIGLIP_TEXT["gopt"] = _SIGLIP_TEXT["SO400M"]
_SIGLIP_IMAGE = {"B": "base", "L": "large", "SO400M": "so400m", "gopt": "giantopt"}
_SIGLIP = {  # size and patch -> images of the first and of the second version; the smallest is not in the name, if it is 224
    "B-32": ("", "256"),
    "B-16": ("224 256 384 512 i18n-256", "224 256 384 512"),
    "L-16": ("256 384", "256 384 512"),
    "SO400M-14": ("224 378 384", "224 378"),
    "SO400M-16": ("i18n-256", "256 384 512"),
    "gopt-16": ("", "256 384"),
}


def clip_names() -> dict[str, dict[str, Any]]:
    """open_clip's names of CLIP's sizes."""
    found = {}
    for name, (image, text, patch, size) in _CLIP.items():
        for quick in (False, True) if name in _QUICK else (False,):
            towers = {"vision_cfg": {**_IMAGE[image], "patch_size": patch, "image_size": size}, "text_cfg": _TEXT[text]}
            model = {"embed_dim": _TEXT[text].get("width", 512), "quick_gelu": quick, **towers}
            found[f"ViT-{name}{'-quickgelu' if quick else ''}"] = clip_fields(model)
    return found


def siglip_names() -> dict[str, dict[str, Any]]:
    """open_clip's names of SigLIP's sizes."""
    found = {}
    for name, versions in _SIGLIP.items():
        size, patch = name.split("-")
        for second, every in enumerate(versions):
            for image in every.split():
                pixels = image.removeprefix("i18n-")
                trunk = f"vit_{_SIGLIP_IMAGE[size]}_patch{patch}_siglip_{pixels}"
                short = (size, second, image) == ("SO400M", 0, "224")
                text = {
                    **_SIGLIP_TEXT[size],
                    "context_length": 16 if short else 64,
                    "vocab_size": 256000 if second else 250000 if image != pixels else 32000,
                    "act_kwargs": {"approximate": "tanh"} if second else None,
                    "norm_kwargs": {"eps": 1e-6},
                    "no_causal_mask": True,
                    "proj_bias": True,
                    "pool_type": "last",
                }
                vision = {"timm_model_name": trunk, "timm_pool": "map", "timm_proj": "none"}
                width = timm.named(trunk).embed_dim
                model = {"embed_dim": width, "init_logit_bias": -10, "text_cfg": text, "vision_cfg": vision}
                end = "" if image == "224" else f"-{image}"
                found[f"ViT-{name}-SigLIP{'2' if second else ''}{end}"] = siglip_fields(model)
    return found
