"""open_clip's configurations and names of tensors, under which models of CLIP, CoCa and SigLIP are published too.

    open_clip_config.json      `model_cfg` (the model) and `preprocess_cfg` (its images)
    open_clip_model.safetensors

A tower is open_clip's own, or, for the images of SigLIP, one of timm's.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mmx.errors import InputError
from mmx.zoo import timm
from mmx.zoo.config import activation, changed, only, parse
from mmx.zoo.family import Library, pair
from mmx.zoo.preprocess import ImageSteps
from mmx.zoo.weights import Table, attention_table, convolution, layers, reshaped

FILE = "open_clip_config.json"
TITLES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")
EPS = 1e-5
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # where a configuration tells none

BLOCK: Table = {  # a block and its MLP
    **attention_table("attn", "self"),
    "ln_1": "self_norm",
    "ls_1.gamma": "self_scale",
    "mlp.c_fc": "mlp/up",
    "mlp.c_proj": "mlp/down",
    "ln_2": "mlp_norm",
    "ls_2.gamma": "mlp_scale",
}


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The fields of open_clip's text tower."""

    context_length: int = 77
    vocab_size: int = 49408
    hf_tokenizer_name: str | None = None
    tokenizer_mode: str | None = None
    tokenizer_kwargs: Any = None
    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0
    ls_init_value: float | None = None
    embed_cls: bool = False
    pad_id: int = 0
    eos_id: int = 2
    no_causal_mask: bool = False
    final_ln_after_pool: bool = False
    pool_type: str = "argmax"
    proj_bias: bool = False
    proj_type: str | None = "linear"
    output_tokens: bool = False
    act_kwargs: Any = None
    norm_kwargs: Any = None
    block_type: str | None = None
    qk_norm: bool = False
    scaled_cosine_attn: bool = False
    scale_heads: bool = False
    scale_attn_inner: bool = False
    scale_attn: bool = False
    scale_fc: bool = False
    hf_model_name: str | None = None
    hf_model_pretrained: bool = True
    hf_proj_type: str = "mlp"
    hf_pooler_type: str = "mean_pooler"


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The fields of open_clip's image tower."""

    layers: int = 12
    width: int = 768
    head_width: int = 64
    mlp_ratio: float = 4.0
    patch_size: int = 16
    image_size: int | tuple = 224
    ls_init_value: float | None = None
    patch_dropout: float = 0.0
    attentional_pool: bool | str = False
    attn_pooler_queries: int = 256
    attn_pooler_heads: int = 8
    no_ln_pre: bool = False
    pos_embed_type: str = "learnable"
    final_ln_after_pool: bool = False
    pool_type: str = "tok"
    output_tokens: bool = False
    act_kwargs: Any = None
    norm_kwargs: Any = None
    block_type: str | None = None
    qk_norm: bool = False
    scaled_cosine_attn: bool = False
    scale_heads: bool = False
    scale_attn_inner: bool = False
    scale_attn: bool = False
    scale_fc: bool = False
    timm_model_name: str | None = None
    timm_model_pretrained: bool = False
    timm_pool: str = "avg"
    timm_proj: str | None = "linear"
    timm_proj_bias: bool = False
    timm_drop: float = 0.0
    timm_drop_path: float | None = None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The fields of open_clip's two towers."""

    embed_dim: int = 512
    vision_cfg: VisionConfig = VisionConfig()
    text_cfg: TextConfig = TextConfig()
    quick_gelu: bool = False
    init_logit_scale: float = math.log(1 / 0.07)
    init_logit_bias: float | None = None


PLAIN: dict[str, Any] = {  # of open_clip's variants of a block, the usual one
    "block_type": (None, "default"),
    **dict.fromkeys(("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"), False),
}


def image_table(width: int, patch: int) -> Table:
    """The weights of the image tower in the first stage, but for what stands behind its layers."""
    return {
        "visual.class_embedding": reshaped("modalities_image/special", width),
        "visual.conv1": convolution("modalities_image/patch", patch, patch),
        "visual.positional_embedding": "modalities_image/position",
        "visual.ln_pre": "modalities_image/norm",
        **layers("visual.transformer.resblocks.{}", "stages_0/image/layers/block", BLOCK),
    }


def text_table(prefix: str) -> Table:
    """The weights of the text tower in the first stage, but for what stands behind its layers."""
    return {
        f"{prefix}token_embedding": "modalities_text/token",
        f"{prefix}positional_embedding": "modalities_text/position",
        **layers(prefix + "transformer.resblocks.{}", "stages_0/text/layers/block", BLOCK),
    }


def _activation(tower: Any, quick: bool) -> str:
    """The published name of a tower's activation."""
    approximate = (tower.act_kwargs or {}).get("approximate", "none")
    if set(tower.act_kwargs or {}) - {"approximate"} or (quick and tower.act_kwargs) or approximate not in ("none", "tanh"):
        raise InputError(f"{type(tower).__name__}: act_kwargs={tower.act_kwargs!r} with quick_gelu={quick} is not supported")
    return "quick_gelu" if quick else "gelu_pytorch_tanh" if approximate == "tanh" else "gelu"


def _eps(tower: Any) -> float:
    if set(tower.norm_kwargs or {}) - {"eps"}:
        raise InputError(f"{type(tower).__name__}: norm_kwargs={tower.norm_kwargs!r}; only eps is supported")
    return (tower.norm_kwargs or {}).get("eps", EPS)


def _text(c: ModelConfig) -> dict[str, Any]:
    """The fields that the text towers of CLIP and of SigLIP have in common."""
    t = c.text_cfg
    only(t, embed_cls=False, proj_type="linear", hf_model_name=None, ls_init_value=None, **PLAIN)
    return {
        "vocab_size": t.vocab_size,
        "hidden_size": t.width,
        "intermediate_size": int(t.width * t.mlp_ratio),
        "num_hidden_layers": t.layers,
        "num_attention_heads": t.heads,
        "max_position_embeddings": t.context_length,
        "hidden_act": _activation(t, c.quick_gelu),
        "layer_norm_eps": _eps(t),
    }


def _as_text(c: Any) -> dict[str, Any]:
    """The way back of `_text`."""
    return {
        "vocab_size": c.vocab_size,
        "width": c.hidden_size,
        "mlp_ratio": timm.mlp_ratio(c),
        "layers": c.num_hidden_layers,
        "heads": c.num_attention_heads,
        "context_length": c.max_position_embeddings,
        **_as_kwargs(c),
    }


def _as_kwargs(c: Any) -> dict[str, Any]:
    """What open_clip gives the activations and norms of a tower."""
    act = {"gelu": None, "quick_gelu": None, "gelu_tanh": {"approximate": "tanh"}}
    name = activation(c.hidden_act)
    if name not in act:
        raise InputError(f"{type(c).__name__}: hidden_act={c.hidden_act!r} is none of open_clip's: {', '.join(act)}")
    return {"act_kwargs": act[name], "norm_kwargs": None if c.layer_norm_eps == EPS else {"eps": c.layer_norm_eps}}


def clip_fields(model: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of transformers' CLIP of one of open_clip's models."""
    c = parse(ModelConfig, model, FILE)
    image, text, common = c.vision_cfg, c.text_cfg, _text(c)
    usual = {"pos_embed_type": "learnable", "pool_type": "tok", "timm_model_name": None, "ls_init_value": None}
    only(image, attentional_pool=False, no_ln_pre=False, final_ln_after_pool=False, **usual, **PLAIN)
    # transformers reads the highest id where eos_token_id is 2, as OpenAI's first configurations meant it.
    only(text, no_causal_mask=False, proj_bias=False, pool_type="argmax" if text.eos_id == 2 else ("argmax", "eos"))
    only(c, init_logit_bias=None)
    end = 2 if text.pool_type == "argmax" else text.eos_id
    return {
        "projection_dim": c.embed_dim,
        "text_config": {**common, "projection_dim": c.embed_dim, "eos_token_id": end},
        "vision_config": {
            "hidden_size": image.width,
            "intermediate_size": int(image.width * image.mlp_ratio),
            "num_hidden_layers": image.layers,
            "num_attention_heads": image.width // image.head_width,
            "image_size": timm.square(image.image_size),
            "patch_size": image.patch_size,
            "hidden_act": _activation(image, c.quick_gelu),
            "layer_norm_eps": _eps(image),
            "projection_dim": c.embed_dim,
        },
    }


def _as_clip(c: Any) -> dict[str, Any]:
    """The way back of `clip_fields`."""
    image, text = c.vision_config, c.text_config
    quick = {activation(tower.hidden_act) == "quick_gelu" for tower in (image, text)}
    if len(quick) > 1:
        raise InputError("open_clip: both towers have quick_gelu, or none")
    only(image, num_channels=3)
    highest = text.eos_token_id in (2, text.vocab_size - 1)
    return {
        "embed_dim": c.projection_dim,
        "quick_gelu": quick.pop(),
        "custom_text": False,
        "text_cfg": {**_as_text(text), **({} if highest else {"pool_type": "eos", "eos_id": text.eos_token_id})},
        "vision_cfg": {
            "layers": image.num_hidden_layers,
            "width": image.hidden_size,
            "head_width": image.hidden_size // image.num_attention_heads,
            "mlp_ratio": timm.mlp_ratio(image),
            "patch_size": image.patch_size,
            "image_size": image.image_size,
            **_as_kwargs(image),
        },
    }


def _clip_table(c: Any) -> Table:
    return {
        "logit_scale": "logit_scale",
        **image_table(c.vision_config.hidden_size, c.vision_config.patch_size),
        "visual.ln_post": "poolers_image/norm",
        "visual.proj": "projections_image/projection/kernel",
        **text_table(""),
        "ln_final": "stages_0/text/norm",
        "text_projection": "projections_text/projection/kernel",
    }


def siglip_fields(model: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of transformers' SigLIP of one of open_clip's models."""
    c = parse(ModelConfig, model, FILE)
    image, text, common = c.vision_cfg, c.text_cfg, _text(c)
    only(image, timm_pool="map", timm_proj=("none", None, ""))
    only(text, no_causal_mask=True, proj_bias=True, pool_type="last")
    if c.init_logit_bias is None:
        raise InputError("ModelConfig: init_logit_bias=None is not supported for SigLIP, whose similarities have a bias")
    return {
        "text_config": {**common, "projection_size": c.embed_dim},
        "vision_config": timm.siglip_fields(image.timm_model_name or ""),
    }


def _as_siglip(c: Any) -> dict[str, Any]:
    """The way back of `siglip_fields`."""
    text = c.text_config
    return {
        "embed_dim": text.projection_size or text.hidden_size,
        "init_logit_bias": -10,
        "quick_gelu": activation(text.hidden_act) == "quick_gelu",
        "custom_text": True,
        "text_cfg": {**_as_text(text), "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
        "vision_cfg": {
            "image_size": c.vision_config.image_size,
            "timm_model_name": timm.siglip_name(c.vision_config),
            "timm_pool": "map",
            "timm_proj": "none",
        },
    }


def _siglip_table(c: Any) -> Table:
    return {
        "logit_scale": "logit_scale",
        "logit_bias": "logit_bias",
        **timm.siglip_table("visual.trunk.", c.vision_config),
        **text_table("text."),
        "text.ln_final": "stages_0/text/norm",
        "text.text_projection": "poolers_text/transform",
    }


def images(fields: Mapping[str, Any]) -> ImageSteps:
    """`preprocess_cfg`; the size is the model's, if it tells none."""
    p = fields.get("preprocess_cfg", {})
    size = pair(p.get("size") or fields["model_cfg"]["vision_cfg"].get("image_size", 224))
    mode, interpolation = p.get("resize_mode") or "shortest", p.get("interpolation") or "bicubic"
    return timm.image_steps(size, size, mode, interpolation, p.get("fill_color") or 0, p.get("mean") or MEAN, p.get("std") or STD)


def _as_images(steps: ImageSteps | None) -> dict[str, Any]:
    """The way back of `images`."""
    if steps is None or steps.size is None:
        return {}
    if pair(steps.size) != (steps.crop or pair(steps.size)):
        raise InputError(f"open_clip: images made {steps.size} and cut to {steps.crop} are not expressed by its preprocess_cfg")
    return {
        "size": steps.size,
        "mean": steps.mean,
        "std": steps.std,
        "interpolation": timm.INTERPOLATION[steps.resample],
        "resize_mode": timm.resize_mode(steps),
        "fill_color": steps.fill,
    }


def merged(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Nested fields, those of `now` where both have them."""
    both = [name for name in now if isinstance(now[name], dict) and isinstance(before.get(name), dict)]
    return {**before, **now, **{name: merged(before[name], now[name]) for name in both}}


def _library(holds: Any, read: Any, back: Any, **more: Any) -> Library:
    def write(c: Any, heads: Sequence[str], steps: ImageSteps | None, before: Mapping[str, Any]) -> dict[str, Any]:
        told = {} if before and steps == images(before) else _as_images(steps)
        return merged(before, {"model_cfg": back(c), "preprocess_cfg": told})

    return Library(
        "open_clip",
        FILE,
        TITLES,
        lambda fields: holds(fields.get("model_cfg", {})),
        lambda fields: read(fields["model_cfg"]),
        write,
        known=(r"attn_mask$",),
        images=images,
        **more,
    )


def _trunk(model: Mapping[str, Any]) -> bool:
    return bool(model.get("vision_cfg", {}).get("timm_model_name"))


_NAMES: Any = {
    "inputs": {"image": "pixel_values", "text": "input_ids"},
    "outputs": {
        "image_embeds": "image_features",
        "text_embeds": "text_features",
        "image_features": "image_features_raw",
        "text_features": "text_features_raw",
        "logits_per_image": "image_logits",
        "logits_per_text": "text_logits",
    },
}
CLIP = _library(
    lambda model: "multimodal_cfg" not in model and not _trunk(model),
    clip_fields,
    _as_clip,
    table=_clip_table,
    older={r"^(?=(token|positional)_embedding|transformer|ln_final|text_projection)": "text."},  # where `custom_text` is set
    **_NAMES,
)
SIGLIP = _library(
    lambda model: "multimodal_cfg" not in model and _trunk(model), siglip_fields, _as_siglip, table=_siglip_table, **_NAMES
)
COCA = _library(
    lambda model: "multimodal_cfg" in model,
    dict,
    lambda c: {**changed(c), "custom_text": True},
)

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
