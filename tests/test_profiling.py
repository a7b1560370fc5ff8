"""What models hold and cost, beside published tables: exact where they are exact, to the printed decimals where they are not."""

import pytest

import mmx
from mmx.modalities import Ids, Patches
from mmx.profiling import COLUMNS, owner_of, profile, table
from mmx.topologies import PerStream, Pool

OPEN_CLIP = {  # open_clip's docs/model_profile.csv: mparams, image, text; gflops, image, text
    "ViT-S-32": (63.09, 22.64, 40.44, 5.66, 2.29, 3.38),
    "ViT-S-16": (62.26, 21.81, 40.44, 12.58, 9.2, 3.38),
    "ViT-M-16": (102.02, 38.59, 63.43, 21.94, 15.98, 5.96),
    "ViT-B-32": (151.28, 87.85, 63.43, 14.78, 8.82, 5.96),
    "ViT-B-32-quickgelu": (151.28, 87.85, 63.43, 14.78, 8.82, 5.96),
    "clip-vit-base-patch32": (151.28, 87.85, 63.43, 14.78, 8.82, 5.96),
    "ViT-B-32-256": (151.29, 87.86, 63.43, 17.46, 11.5, 5.96),
    "ViT-B-16": (149.62, 86.19, 63.43, 41.09, 35.13, 5.96),
    "ViT-B-16-plus-240": (208.38, 117.21, 91.16, 64.03, 54.76, 9.27),
    "ViT-L-16": (427.74, 304.09, 123.65, 136.41, 123.11, 13.3),
    "ViT-L-14": (427.62, 303.97, 123.65, 175.33, 162.03, 13.3),
    "ViT-L-14-336": (427.94, 304.29, 123.65, 395.22, 381.92, 13.3),
    "ViT-H-14": (986.11, 632.08, 354.03, 381.68, 334.59, 47.09),
    "ViT-g-14": (1366.68, 1012.65, 354.03, 581.15, 534.06, 47.09),
    "ViT-bigG-14": (2539.57, 1844.91, 694.66, 1065.36, 967.5, 97.86),
    "coca_ViT-B-32": (253.56, 89.16, 63.43, 33.34, 9.19, 5.96),
    "coca_ViT-L-14": (638.45, 306.72, 123.65, 214.52, 163.64, 13.3),
    "coca_base": (440.34, 86.4, 134.66, 99.09, 46.47, 13.3),
    "ViT-e-14": (4581.09, 3807.72, 773.37, 2091.45, 1981.35, 110.1),
}

FLAVA = ("masked-image", "masked-lm", "joint-masked-image", "joint-masked-lm", "matching")
CODEBOOK = 53_786_240  # FlavaForPreTraining.image_codebook: DALL-E's frozen encoder, which makes labels and is not here
MASKED_SPEC_EMBED = 768  # Wav2Vec2Model.masked_spec_embed: in the place of what pretraining hides, which is not here

PARAMETERS = [  # exact counts of the published classes: name, heads, further fields, parameters
    ("bert-base-uncased", (), {}, 109_482_240),
    ("bert-base-uncased", ("masked-lm", "matching"), {}, 110_106_428),
    ("bert-base-uncased", ("masked-lm",), {}, 109_514_298),
    ("roberta-base", (), {"type_vocab_size": 2}, 124_646_400),
    ("vilt-b32", (), {}, 111_595_008),
    ("vilt-b32", ("masked-lm",), {}, 112_217_658),
    ("visualbert-vqa-coco-pre", (), {}, 111_450_624),
    ("visualbert-vqa-coco-pre", ("masked-lm", "matching"), {}, 112_074_812),
    ("visualbert-vcr-coco-pre", (), {}, 110_270_976),
    ("lxmert-base-uncased", (), {}, 207_936_768),
    ("lxmert-base-uncased", ("masked-lm", "matching", "regions", "answering"), {}, 228_051_752),
    ("flava-full", (), {}, 241_356_289),
    ("flava-full", FLAVA, {}, 357_645_303 - CODEBOOK),
    ("blip-image-captioning-base", ("captioning",), {}, 223_971_644),
    ("blip-itm-base-coco", ("matching",), {}, 223_744_258),
    ("siglip2-base-patch16-naflex", (), {"text_config": {"vocab_size": 32_000}}, 203_202_050),  # of the published default
    ("git-base", (), {}, 153_147_648),
    ("ast-finetuned-audioset-10-10-0.4593", (), {}, 86_187_264),
    ("videomae-base", (), {"use_mean_pooling": True}, 86_225_664),
    ("t5-small", ("captioning",), {}, 60_506_624),
    ("wav2vec2-base", (), {}, 94_371_712 - MASKED_SPEC_EMBED),
    ("gpt2", (), {}, 124_439_808),
    ("gpt2", ("captioning",), {}, 124_439_808),
    ("vit-base-patch16-224", (), {}, 86_389_248),
    ("vit-base-patch16-224", ("classification",), {}, 86_567_656),
    ("clip-vit-base-patch32", (), {}, 151_277_313),
    ("bridgetower-base", (), {}, 326_347_008),
    ("bridgetower-base-itm-mlm", ("masked-lm",), {}, 365_592_921),
    ("bridgetower-base-itm-mlm", ("matching",), {}, 326_350_082),
    ("mult-mosei", ("output",), {}, 1_073_731),
    ("ViT-S-16-alt", (), {}, 42_396_161),
    ("ViT-bigG-14", (), {}, 2_539_567_105),
    ("ViT-B-16-SigLIP", (), {}, 203_155_970),
    ("ViT-SO400M-14-SigLIP-384", (), {}, 877_960_498),
    ("ViT-gopt-16-SigLIP2-256", (), {}, 1_871_393_906),
    ("coca_ViT-B-32", ("captioning",), {}, 253_560_065),
    ("coca_ViT-L-14", ("captioning",), {}, 638_450_177),
    ("vit_tiny_patch16_224", ("classification",), {}, 5_717_416),
    ("vit_base_patch16_224", ("classification",), {}, 86_567_656),
    ("vit_gigantic_patch14_224", ("classification",), {}, 1_844_440_680),
    ("deit_base_distilled_patch16_224", ("teacher",), {}, 87_338_192),
    ("beit_base_patch16_224", ("classification",), {}, 86_530_984),
    ("beitv2_large_patch16_224", ("classification",), {}, 304_430_568),
    ("llama-7b", ("captioning",), {}, 6_738_415_616),
    ("gemma-2b", ("captioning",), {}, 2_506_172_416),
    ("gemma-7b", ("captioning",), {}, 8_537_680_896),
    ("llava-1.5-7b-hf", ("captioning",), {}, 7_063_427_072),
    ("paligemma-3b-pt-224", ("captioning",), {}, 2_923_466_480),
]


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_the_table_of_open_clip(name):
    p = profile(name, heads=("captioning",) if name.startswith("coca") else ())
    found = tuple(p.row[c] for c in ("mparams", "image_mparams", "text_mparams", "gflops", "image_gflops", "text_gflops"))
    assert found == OPEN_CLIP[name]


@pytest.mark.parametrize(("name", "heads", "fields", "count"), PARAMETERS)
def test_exact_counts_of_published_classes(name, heads, fields, count):
    assert profile(name, heads=heads, **fields).params == count


def test_towers_and_parts_add_up():
    p = profile("clip-vit-base-patch32")
    assert p.params == sum(p.parts.values()) == sum(t.params for t in p.towers.values()) + 1  # the temperature
    assert p.towers["image"].params - 768 * 512 == 87_456_000 and p.towers["text"].params - 512 * 512 == 63_165_952
    assert p.flops == sum(t.flops for t in p.towers.values())
    assert (p.image_size, p.image_width, p.text_width, p.embed_dim) == (224, 768, 512, 512)
    assert p.image_gflops == p.towers["image"].flops / 1e9 and p.mparams == p.params / 1e6 and tuple(p.row) == COLUMNS
    with pytest.raises(AttributeError, match="columns: image_size"):
        p.image_flops  # noqa: B018
    text = str(p)
    assert "poolers_image" in text and "FLOPs: 2 FLOPs for a multiply and an add" in text and "151,277,313" in text


def test_what_streams_share_is_in_no_tower():
    model = mmx.build_model(
        {"image": Patches((8, 8), (4, 4)), "text": Ids(20, 6)}, "early_concatenation", width=8, depth=2, heads=2
    )
    p = profile(model)
    own = p.params - p.parts["stages_0"] - 1
    assert p.towers["image"].params + p.towers["text"].params == own and p.name == ""
    tokens, width = 10, 8  # the formula of two layers over all tokens, the patches, and two projections
    layers = 2 * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)
    assert p.flops == layers + 2 * 4 * 48 * width + 2 * 2 * width**2
    assert table([p]).splitlines()[0].split() == ["model", *COLUMNS]


def test_owners():
    names = ["image", "image_2"]
    assert owner_of("stages_0/image_2/layers/block/self/out/kernel", names, (PerStream(1),)) == "image_2"
    assert owner_of("stages_0/image_project/kernel", names, (PerStream(1),)) == "image"
    assert owner_of("modalities_image_2/patch/kernel", names, (PerStream(1),)) == "image_2"
    assert owner_of("stages_0/stack/norm/scale", names, (PerStream(1),)) is None
    assert owner_of("stages_1/text_norm/scale", ["text"], (PerStream(1), PerStream(1))) == "text"
    assert owner_of("stages_2/text_norm/scale", ["text"], (PerStream(1), PerStream(1))) is None  # behind the poolers
    assert owner_of("stages_0/pool/cross/out/kernel", names, (Pool("image_2", 1, 1),)) == "image_2"
    assert owner_of("logit_scale", names, (PerStream(1),)) is None
