"""timm's configurations and names of tensors, under which models of ViT, DeiT, BEiT and SigLIP's image tower are published too.

config.json           `architecture`, whose name tells the size; `model_args`, what differs from it; `pretrained_cfg`: its images
model.safetensors
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from mmx.errors import InputError
from mmx.zoo.config import activation, only, parse
from mmx.zoo.family import Library, grid, pair
from mmx.zoo.preprocess import ImageSteps
from mmx.zoo.tensors import TITLE
from mmx.zoo.transforms import as_timm, timm_images
from mmx.zoo.weights import Layout, Table, convolution, fused, layers, reshaped, row

EPS = 1e-6
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "num_heads": 3},
    "small": {"embed_dim": 384, "num_heads": 6},
    "base": {},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
    "giant": {"embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 48 / 11},
    "gigantic": {"embed_dim": 1664, "depth": 48, "num_heads": 16, "mlp_ratio": 64 / 13},
    "so400m": {"embed_dim": 1152, "depth": 27, "num_heads": 16, "mlp_ratio": 3.7362},
    "giantopt": {"embed_dim": 1536, "depth": 40, "num_heads": 16},
}
NAME = re.compile(r"(vit|deit|beit|beitv2)_([a-z0-9]+?)(_distilled)?_patch(\d+)(_siglip)?_(\d+)")
SIGLIP_TANH = re.compile(r"_patch32_|_so400m_patch16_|_giantopt_|_large_patch16_siglip_512")  # which have the approximate GELU

BLOCK: Table = {
    "norm1": "self_norm",
    "attn.qkv": fused("self/query", "self/key", "self/value"),
    "attn.proj": "self/out",
    "ls1.gamma": "self_scale",
    "norm2": "mlp_norm",
    "mlp.fc1": "mlp/up",
    "mlp.fc2": "mlp/down",
    "ls2.gamma": "mlp_scale",
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The arguments of timm's VisionTransformer and Beit that differ between the models of these families."""

    img_size: int | tuple = 224
    patch_size: int | tuple = 16
    in_chans: int = 3
    num_classes: int = 1000
    global_pool: str = "token"
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    act_layer: str | None = None
    init_values: float | None = None
    use_abs_pos_emb: bool = True
    use_rel_pos_bias: bool = False
    use_shared_rel_pos_bias: bool = False
    drop_path_rate: float = 0.0

    without_effect: ClassVar[tuple[str, ...]] = (
        *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"),
        *("weight_init", "fix_init", "head_init_scale", "dynamic_img_size"),
    )


def named(name: str) -> Arguments:
    """The arguments that the name of an architecture stands for."""
    match = NAME.fullmatch(name)
    if match is None or match[2] not in SIZES:
        raise InputError(
            f"architecture={name!r} is not supported; it has to be such as vit_base_patch16_224, "
            f"deit_small_distilled_patch16_224 or beit_large_patch16_512, of a size among {', '.join(SIZES)}"
        )
    more: dict[str, Any] = {}
    if match[1] in ("beit", "beitv2"):
        scale = 0.1 if match.group(1, 2) == ("beit", "base") else 1e-5
        more = {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "global_pool": "avg", "init_values": scale}
    elif match[5]:
        more = {"global_pool": "map", "num_classes": 0, "act_layer": "gelu_tanh" if SIGLIP_TANH.search(name) else None}
    return Arguments(patch_size=int(match[4]), img_size=int(match[6]), **SIZES[match[2]], **more)


def _arguments(fields: Mapping[str, Any]) -> Arguments:
    told = {name: fields[name] for name in ("num_classes", "global_pool") if name in fields}
    size = fields.get("pretrained_cfg", {}).get("input_size")
    told |= {"in_chans": size[0], "img_size": square(size[1:])} if size else {}
    more = parse(Arguments, {**told, **fields.get("model_args", {})}, "config.json: model_args")
    own = {f.name for f in dataclasses.fields(Arguments)} & {*told, *fields.get("model_args", {})}
    return dataclasses.replace(named(fields["architecture"]), **{name: getattr(more, name) for name in own})


def square(size: Any) -> Any:
    """One number for a square, else (height, width)."""
    height, width = pair(size)
    return height if height == width else (height, width)


def _vit(a: Arguments) -> dict[str, Any]:
    """The fields that ViT, DeiT and BEiT have in common."""
    return {
        "hidden_size": a.embed_dim,
        "num_hidden_layers": a.depth,
        "num_attention_heads": a.num_heads,
        "intermediate_size": int(a.embed_dim * a.mlp_ratio),
        "hidden_act": ACTIVATIONS[a.act_layer or "gelu"],
        "layer_norm_eps": EPS,
        "image_size": square(a.img_size),
        "patch_size": square(a.patch_size),
        "num_channels": a.in_chans,
        "num_labels": a.num_classes,
    }


ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "relu": "relu", "silu": "silu"}


def vit_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of transformers' ViT and DeiT of one of timm's."""
    a = _arguments(fields)
    only(a, global_pool="token", init_values=None)
    return {**_vit(a), "qkv_bias": a.qkv_bias, "add_pooling_layer": False}


def beit_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of transformers' BEiT of one of timm's."""
    a = _arguments(fields)
    only(a, qkv_bias=True, act_layer=None, global_pool=("avg", "token"))
    if pair(a.img_size)[0] * pair(a.patch_size)[1] != pair(a.img_size)[1] * pair(a.patch_size)[0]:
        # transformers reads the table of relative positions of such a grid in another way.
        raise InputError(
            f"BEiT: img_size={a.img_size} with patch_size={a.patch_size} is not supported; the grid has to be a square"
        )
    return {
        **_vit(a),
        "use_absolute_position_embeddings": a.use_abs_pos_emb,
        "use_relative_position_bias": a.use_rel_pos_bias,
        "use_shared_relative_position_bias": a.use_shared_rel_pos_bias,
        "layer_scale_init_value": a.init_values or 0.0,
        "use_mean_pooling": a.global_pool == "avg",
        "drop_path_rate": a.drop_path_rate,
    }


def siglip_fields(name: str) -> dict[str, Any]:
    """The fields of SigLIP's image tower of one of timm's."""
    fields = _vit(named(name))
    if "_siglip_" not in name:
        raise InputError(f"timm_model_name={name!r} is not supported; it has to be such as vit_base_patch16_siglip_224")
    return {name: value for name, value in fields.items() if name != "num_labels"}


def siglip_name(c: Any) -> str:
    """The way back of `siglip_fields`."""
    for size in SIZES:
        name = f"vit_{size}_patch{c.patch_size}_siglip_{c.image_size}"
        if siglip_fields(name).items() <= vars(c).items():
            return name
    raise InputError(f"timm has no image tower of the sizes of {c}")


def _back(c: Any, heads: Sequence[str], **more: Any) -> Arguments:
    """The way back of `_vit`."""
    only(c, layer_norm_eps=EPS)
    ours = {activation(published): theirs for theirs, published in ACTIVATIONS.items()}
    act = ours.get(activation(c.hidden_act), "")
    if not act:
        raise InputError(f"{type(c).__name__}: hidden_act={c.hidden_act!r} is not among {', '.join(ACTIVATIONS)}")
    return Arguments(
        img_size=c.image_size,
        patch_size=c.patch_size,
        in_chans=c.num_channels,
        num_classes=c.num_labels if heads else 0,
        embed_dim=c.hidden_size,
        depth=c.num_hidden_layers,
        num_heads=c.num_attention_heads,
        mlp_ratio=mlp_ratio(c),
        act_layer=None if act == "gelu" else act,
        **more,
    )


def _as_vit(c: Any, heads: Sequence[str]) -> Arguments:
    return _back(c, heads, qkv_bias=c.qkv_bias)


def _as_beit(c: Any, heads: Sequence[str]) -> Arguments:
    only(c, use_mask_token=False, hidden_act="gelu")
    return _back(
        c,
        heads,
        global_pool="avg" if c.use_mean_pooling else "token",
        init_values=c.layer_scale_init_value or None,
        use_abs_pos_emb=c.use_absolute_position_embeddings,
        use_rel_pos_bias=c.use_relative_position_bias,
        use_shared_rel_pos_bias=c.use_shared_relative_position_bias,
        drop_path_rate=c.drop_path_rate,
    )


def mlp_ratio(c: Any) -> float:
    """The hidden size of an MLP in parts of the width, such that the whole part of their product is that size again."""
    ratio = c.intermediate_size / c.hidden_size
    return ratio if int(c.hidden_size * ratio) == c.intermediate_size else math.nextafter(ratio, math.inf)


def trunk_table(prefix: str, c: Any, special: int, block: Table = BLOCK) -> Table:
    """The weights of an image tower in the first stage, but for its special tokens and what stands behind its layers."""
    places = math.prod(grid(c)) + special
    return {
        f"{prefix}pos_embed": reshaped("modalities_image/position", 1, places, c.hidden_size),
        f"{prefix}patch_embed.proj": convolution("modalities_image/patch", *pair(c.patch_size)),
        **layers(prefix + "blocks.{}", "stages_0/image/layers/block", block),
        f"{prefix}norm": "stages_0/image/norm",
    }


def _vit_table(c: Any) -> Table:
    return {
        "cls_token": reshaped("modalities_image/special", 1, 1, c.hidden_size),
        **trunk_table("", c, 1),
        "head": "heads_classification/classifier",
    }


def _distilled_table(c: Any) -> Table:
    tokens = {name: row("modalities_image/special", i, 1, 1, c.hidden_size) for i, name in enumerate(("cls_token", "dist_token"))}
    heads = {"head": "heads_teacher/classifier_cls", "head_dist": "heads_teacher/classifier_distillation"}
    return {**tokens, **trunk_table("", c, 2), **heads}


def _beit_table(c: Any) -> Table:
    bias = (math.prod(2 * side - 1 for side in grid(c)) + 3, c.num_attention_heads)
    block: Table = {
        **{name: path for name, path in BLOCK.items() if name not in ("attn.qkv", "ls1.gamma", "ls2.gamma")},
        "attn.qkv.weight": Layout(tuple(f"self/{name}/kernel" for name in ("query", "key", "value"))),
        "attn.q_bias": "self/query/bias",
        "attn.v_bias": "self/value/bias",
        "gamma_1": "self_scale",
        "gamma_2": "mlp_scale",
    }
    return {
        "cls_token": reshaped("modalities_image/special", 1, 1, c.hidden_size),
        **trunk_table("", c, 1, block),
        "blocks.{}.attn.relative_position_bias_table": reshaped("stages_0/image/layers/relative/bias", *bias),
        "rel_pos_bias.relative_position_bias_table": reshaped("stages_0/image/relative/bias", *bias),
        "fc_norm": "poolers_image/norm",
        "head": "heads_classification/classifier",
    }


def siglip_table(prefix: str, c: Any) -> Table:
    """The weights of SigLIP's image tower."""
    pool = f"{prefix}attn_pool"
    return {
        **trunk_table(prefix, c, 0),
        f"{pool}.latent": reshaped("poolers_image/token", 1, 1, c.hidden_size),
        f"{pool}.q": "poolers_image/cross/query",
        f"{pool}.kv": fused("poolers_image/cross/key", "poolers_image/cross/value"),
        f"{pool}.proj": "poolers_image/cross/out",
        f"{pool}.norm": "poolers_image/mlp_norm",
        f"{pool}.mlp.fc1": "poolers_image/mlp/up",
        f"{pool}.mlp.fc2": "poolers_image/mlp/down",
    }


def _library(begins: Sequence[str], read: Any, back: Any, table: Any, heads: Mapping[str, str], usual: str) -> Library:
    """timm's architectures whose names begin so; what has no name of its own is written as a variant of the `usual` one."""

    def holds(fields: Mapping[str, Any]) -> bool:
        match = NAME.fullmatch(fields.get("architecture", ""))
        return match is not None and f"{match[1]}{match[3] or ''}" in begins

    def write(c: Any, heads: Sequence[str], steps: ImageSteps | None, before: Mapping[str, Any]) -> dict[str, Any]:
        a = back(c, heads)
        a = dataclasses.replace(a, img_size=square(a.img_size), patch_size=square(a.patch_size))
        name = before.get("architecture", usual)
        known = named(name)
        fixed = {"first_conv": "patch_embed.proj", "classifier": classifier, "fixed_input_size": True}
        own = {"input_size": [a.in_chans, *pair(a.img_size)], "num_classes": a.num_classes}
        own |= {} if steps == timm_images(before) else as_timm(steps)
        return {
            **before,
            "architecture": name,
            "num_classes": a.num_classes,
            "num_features": a.embed_dim,
            "global_pool": a.global_pool,
            "model_args": {n: value for n, value in dataclasses.asdict(a).items() if value != getattr(known, n)},
            "pretrained_cfg": {**fixed, **before.get("pretrained_cfg", {}), **own},
        }

    classifier = ("head", "head_dist") if "deit_distilled" in begins else "head"
    known = (r"^head_dist\.", r"relative_position_index$")
    return Library("timm", "config.json", (TITLE,), holds, read, write, table, heads, known, images=timm_images)


VIT = _library(("vit", "deit"), vit_fields, _as_vit, _vit_table, {"classification": "head."}, "vit_base_patch16_224")
DEIT = _library(
    ("deit_distilled",), vit_fields, _as_vit, _distilled_table, {"teacher": "head."}, "deit_base_distilled_patch16_224"
)
BEIT = _library(("beit", "beitv2"), beit_fields, _as_beit, _beit_table, {"classification": "head."}, "beit_base_patch16_224")


def names(read: Any, begin: str, sizes: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Names of architectures -> the fields they stand for: those of each size with its "16_224 16_384", patches and images."""
    every = [f"{begin.format(size)}_patch{end}" for size, ends in sizes.items() for end in ends.split()]
    return {name: read({"architecture": name}) for name in every}
