"""open_clip's configurations and names of tensors, under which models of CLIP, CoCa and SigLIP are published too.

    open_clip_config.json      `model_cfg` (the model) and `preprocess_cfg` (its images)
    open_clip_model.safetensors

A tower is open_clip's own, or, for the images of SigLIP, one of timm's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mmx.errors import InputError
from mmx.zoo import timm
from mmx.zoo.config import activation, changed, only, parse
from mmx.zoo.family import Library
from mmx.zoo.open_clip_config import ModelConfig
from mmx.zoo.preprocess import ImageSteps
from mmx.zoo.transforms import as_open_clip, open_clip_images
from mmx.zoo.weights import Table, attention_table, convolution, layers, reshaped

FILE = "open_clip_config.json"
TITLES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")
EPS = 1e-5

BLOCK: Table = {  # a block and its MLP
    **attention_table("attn", "self"),
    "ln_1": "self_norm",
    "ls_1.gamma": "self_scale",
    "mlp.c_fc": "mlp/up",
    "mlp.c_proj": "mlp/down",
    "ln_2": "mlp_norm",
    "ls_2.gamma": "mlp_scale",
}


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


def merged(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Nested fields, those of `now` where both have them."""
    both = [name for name in now if isinstance(now[name], dict) and isinstance(before.get(name), dict)]
    return {**before, **now, **{name: merged(before[name], now[name]) for name in both}}


def _library(holds: Any, read: Any, back: Any, **more: Any) -> Library:
    def write(c: Any, heads: Sequence[str], steps: ImageSteps | None, before: Mapping[str, Any]) -> dict[str, Any]:
        told = {} if before and steps == open_clip_images(before) else as_open_clip(steps)
        return merged(before, {"model_cfg": back(c), "preprocess_cfg": told})

    return Library(
        "open_clip",
        FILE,
        TITLES,
        lambda fields: holds(fields.get("model_cfg", {})),
        lambda fields: read(fields["model_cfg"]),
        write,
        known=(r"attn_mask$",),
        images=open_clip_images,
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
