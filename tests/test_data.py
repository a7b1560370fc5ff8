"""The emoji set, the pipeline, and data that is not as it should be."""

import dataclasses
import itertools
import shutil
from pathlib import Path

import grain
import numpy as np
import pytest

import mmx
from mmx.data import DataConfig, DataError, Pipeline, PrefetchToDevice, Tokenizer, open_source, train_tokenizer
from mmx.data.builders.emoji import composition_keys, read_entries
from mmx.data.examples import Examples
from mmx.data.pipeline import stack
from mmx.data.sources import _prepare
from mmx.data.text import cached_tokenizer
from mmx.errors import InputError
from mmx.modalities import Ids, Patches

MODALITIES = {"image": Patches((32, 32), (8, 8)), "text": Ids(512, 24)}


def test_the_set_has_what_it_says():
    entries = read_entries()
    assert len(entries) == 3786 and len({e["key"] for e in entries}) == 3786
    assert len({e["name"] for e in entries}) == 3786 and len({e["group"] for e in entries}) == 10
    assets = Path(mmx.__file__).parent / "data/emoji"
    assert sum((assets / name).stat().st_size for name in ("sprite.png", "emoji.json")) < 1.5e6
    assert len(open_source("emoji", "train")) == 3430 and len(open_source("emoji", "composition")) == 356


def test_composition_is_held_out_and_its_parts_are_known():
    sources = [open_source("emoji", split) for split in ("train", "composition")]
    train, held_out = ([source[i] for i in range(len(source))] for source in sources)
    assert not {e["key"] for e in train} & {e["key"] for e in held_out}
    assert {e["key"] for e in held_out} == composition_keys(read_entries())
    words = {w for e in train for w in e["name"].lower().replace(",", " ").replace(":", " ").split()}
    toned_bases = {e["base"] for e in train if len(e["tones"])}
    for example in held_out:
        assert len(example["tones"]) and example["base"] in toned_bases
        assert set(example["name"].lower().replace(",", " ").replace(":", " ").split()) <= words


def test_pictures_are_the_emoji():
    """A heart is red, a green circle is green: the sprite is cut in the right places."""
    source = open_source("emoji", "train")
    by_name = {source[i]["name"]: source[i]["image"] for i in range(len(source))}
    assert by_name["red heart"][12:20, 12:20].mean((0, 1)).argmax() == 0
    assert by_name["green circle"][12:20, 12:20].mean((0, 1)).argmax() == 1
    assert by_name["blue circle"][12:20, 12:20].mean((0, 1)).argmax() == 2
    assert all(image.shape == (32, 32, 3) and image.dtype == np.uint8 for image in by_name.values())


def first(pipeline, count, start=0):
    return list(itertools.islice(pipeline.train(start), count))


def test_batches_are_a_function_of_seed_and_position():
    batches = first(Pipeline(DataConfig(), MODALITIES, 16), 6)
    again = first(Pipeline(DataConfig(), MODALITIES, 16), 2, start=4)
    for a, b in zip(batches[4:], again, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["text"].array, b["text"].array)
    other = first(Pipeline(DataConfig(), MODALITIES, 16, seed=1), 1)
    assert not np.array_equal(other[0]["image"], batches[0]["image"])
    assert batches[0]["text"].array.dtype == np.int32 and batches[0]["image"].dtype == np.uint8


def test_the_global_batch_does_not_depend_on_the_number_of_hosts(monkeypatch):
    import jax

    (whole,) = first(Pipeline(DataConfig(), MODALITIES, 16), 1, start=3)
    for processes in (2, 4):
        parts = []
        for process in range(processes):
            monkeypatch.setattr(jax, "process_count", lambda n=processes: n)
            monkeypatch.setattr(jax, "process_index", lambda p=process: p)
            parts += first(Pipeline(DataConfig(), MODALITIES, 16), 1, start=3)
        images = np.concatenate([p["image"] for p in parts])
        np.testing.assert_array_equal(images, whole["image"])


def test_an_epoch_shows_everything_once():
    pipeline = Pipeline(DataConfig(split="train[:64]", shift=0), MODALITIES, 16)
    epochs = first(pipeline, 8)
    seen = [np.concatenate([b["text"].array for b in part]) for part in (epochs[:4], epochs[4:])]
    assert all(len(np.unique(e, axis=0)) == 64 for e in seen)
    assert not np.array_equal(*seen)


def test_training_images_are_shifted_and_evaluated_ones_are_not():
    pipeline = Pipeline(DataConfig(split="train[:16]", shift=2), MODALITIES, 16)
    originals = {pipeline.source("train[:16]")[i]["image"].tobytes() for i in range(16)}
    (batch,) = first(pipeline, 1)
    assert sum(x.tobytes() not in originals for x in batch["image"]) > 0
    for x in batch["image"]:
        shifts = itertools.product(range(-2, 3), range(-2, 3))
        assert any(np.roll(x, s, (0, 1)).tobytes() in originals for s in shifts)
    ((evaluated, _),) = pipeline.evaluation("train[:16]", 16)
    assert {x.tobytes() for x in evaluated["image"]} == originals


def test_evaluation_covers_a_split_once():
    pipeline = Pipeline(DataConfig(), MODALITIES, 16)
    parts = list(pipeline.evaluation("composition", 100))
    assert [len(i) for _, i in parts] == [100, 100, 100, 56]
    assert all(len(b["image"]) == 100 for b, _ in parts)
    np.testing.assert_array_equal(np.concatenate([i for _, i in parts]), np.arange(356))


def test_prefetching_keeps_order_counts_waiting_and_passes_errors_on():
    def batches():
        yield from range(5)
        raise DataError("broken")

    prefetch = PrefetchToDevice(batches(), lambda x: x)
    assert [next(prefetch) for _ in range(5)] == list(range(5))
    with pytest.raises(DataError, match="broken"):
        next(prefetch)
    assert prefetch.waited > 0
    endless = PrefetchToDevice(itertools.count(), lambda x: x)
    next(endless)
    endless.close()
    assert not endless._thread.is_alive()


def test_tokenizer_round_trip_and_determinism(tmp_path):
    texts = [e["name"] for e in read_entries()]
    tokenizer = train_tokenizer(texts, 512)
    assert tokenizer.vocab == 512
    ids, mask = tokenizer.encode("Woman Surfing: medium-light skin tone", 24)
    assert ids[0] == tokenizer.begin and ids[mask.sum() - 1] == tokenizer.end and (ids[mask.sum() :] == tokenizer.pad).all()
    assert tokenizer.decode(ids) == "woman surfing: medium-light skin tone"
    assert tokenizer.decode(tokenizer.encode("naïve 日本 🙂", 64)[0]) == "naïve 日本 🙂"
    assert tokenizer.encode("a long text " * 9, 8)[0][-1] == tokenizer.end
    tokenizer.save(tmp_path / "tokenizer.json")
    again = cached_tokenizer(texts, 512, tmp_path)
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    for other in (again, loaded):
        np.testing.assert_array_equal(other.encode(texts[7], 24)[0], tokenizer.encode(texts[7], 24)[0])
    with pytest.raises(InputError, match="needs at least 261"):
        train_tokenizer(texts, 100)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(InputError, match=r"bad.json is not a usable tokenizer"):
        Tokenizer.load(tmp_path / "bad.json")


def own_source(**changes):
    """A source of three examples, of which the second is changed."""
    examples = [{"image": np.zeros((32, 32, 3), np.uint8), "name": "a face", "key": f"k{i}"} for i in range(3)]
    examples[1] |= changes

    class Own(list):
        label = "data set own, split train"

    return Examples(Own(examples), {"image": "image", "text": "name"}, MODALITIES, train_tokenizer(["a face"], 300), keep=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((32, 31, 3), np.uint8)}, r"\(32, 32, 3\), got \(32, 31, 3\)"),
        ({"image": np.zeros((32, 32, 4), np.uint8)}, r"got \(32, 32, 4\)"),
        ({"image": np.zeros((32, 32, 3), np.int64)}, "expected uint8"),
        ({"name": "  "}, "the text is empty"),
    ],
)
def test_a_wrong_example_is_named(change, message):
    examples = own_source(**change)
    assert stack([examples[0], examples[2]])["image"].shape == (2, 32, 32, 3)
    with pytest.raises(DataError, match=rf"data set own, split train, example 1 \(key k1\), field .*{message}"):
        examples[1]


@pytest.mark.parametrize(
    ("config", "batch_size", "message"),
    [
        (DataConfig(name="emojis"), 8, "did you mean 'emoji'"),
        (DataConfig(split="trian"), 8, "did you mean 'train'"),
        (DataConfig(split="train[:5"), 8, "the slice cannot be understood"),
        (DataConfig(split="train[:5]"), 8, "has 5 examples, fewer than a batch of 8"),
        (DataConfig(fields={"image": "picture"}), 8, "unknown field of data set emoji.* 'picture'"),
        (DataConfig(fields={"imag": "image"}), 8, "did you mean 'image'"),
    ],
)
def test_wrong_configurations_are_refused(config, batch_size, message):
    with pytest.raises(InputError, match=message):
        Pipeline(config, MODALITIES, batch_size)


def test_a_tokenizer_that_is_too_large_is_refused():
    big = train_tokenizer([e["name"] for e in read_entries()], 600)
    with pytest.raises(InputError, match=r"modalities.text: vocab=512, but the tokenizer has 600"):
        Pipeline(DataConfig(), MODALITIES, 8, tokenizer=big)


@pytest.fixture
def copied(tmp_path):
    """A copy of the prepared set, to be damaged."""
    folder = tmp_path / "emoji" / "1.1.0"
    shutil.copytree(_prepare("emoji").data_dir, folder)
    return folder


def read_all(folder):
    source = open_source(str(folder), "train")
    return [source[i] for i in range(len(source))]


def test_any_prepared_folder_can_be_read(copied):
    assert len(read_all(copied)) == 3430


@pytest.mark.parametrize("damage", ["flip", "cut", "half", "empty", "missing"])
def test_damaged_files_are_named(copied, damage):
    (file,) = copied.glob("*train*")
    content = file.read_bytes()
    if damage == "flip":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes(b ^ 255 for b in content[middle : middle + 64]) + content[middle + 64 :])
    elif damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[: {"cut": len(content) - 100, "half": len(content) // 2, "empty": 0}[damage]])
    with pytest.raises(DataError, match=rf"The files in {copied} are damaged or incomplete: delete this folder"):
        read_all(copied)


def test_the_source_plugs_into_grain():
    data = grain.MapDataset.source(open_source("emoji", "composition"))
    assert len(data) == 356 and isinstance(data[3]["name"], str)


def test_the_default_text_length_holds_every_name():
    experiment = mmx.Experiment()
    pipeline = Pipeline(dataclasses.replace(experiment.data), experiment.modalities, 8)
    assert pipeline.tokenizer is not None
    assert max(pipeline.tokenizer.encode(e["name"], 64)[1].sum() for e in read_entries()) <= experiment.modalities["text"].length


def test_raw_values_are_padded_to_what_an_embedder_reads(rng):
    from mmx.data.examples import fit_raw
    from mmx.errors import InputError
    from mmx.modalities import Features, Graph, PackedPatches, Waveform

    regions = Features(3, 5, vectors={"box": 4})
    raw = fit_raw(regions, {"features": rng.standard_normal((2, 3)), "box": rng.random((2, 4)), "more": 1})
    assert set(raw.array) == {"features", "box"} and raw.array["box"].shape == (5, 4)
    assert raw.mask.tolist() == [True, True, False, False, False]
    graph = fit_raw(Graph(4, vocab=9), {"nodes": np.asarray([1, 2, 3]), "edges": np.ones((3, 3), bool)})
    assert graph.array["edges"].shape == (4, 4) and not graph.array["edges"][3].any() and graph.mask.sum() == 3
    assert fit_raw(Waveform(800), np.zeros(500, "f")).mask.sum() == 500
    for value, message in [
        (np.zeros((2, 3)), "expected a dict of .*features.*, got ndarray"),
        ({"features": np.zeros((6, 3)), "box": np.zeros((6, 4))}, r"expected at most \(5, "),
        ({"features": [np.zeros(3), np.zeros(2)], "box": np.zeros((2, 4))}, "."),
    ]:
        with pytest.raises((InputError, ValueError), match=message):
            fit_raw(regions, value)
    packed = {"image": PackedPatches(9, (8, 8)), "text": MODALITIES["text"]}
    (batch,) = first(Pipeline(DataConfig(), packed, 4), 1)
    assert batch["image"].array["patches"].shape == (4, 9, 192) and batch["image"].mask.sum(1).tolist() == [9] * 4


def test_a_video_is_not_shifted_in_time():
    """`shift` is for images: patches of another rank, and spectrograms by their own choice, stay as they are."""
    from mmx.data.examples import is_image
    from mmx.modalities import Patches

    assert is_image(Patches((8, 8), (4, 4))) and not is_image(Patches((4, 8, 8), (2, 4, 4)))
