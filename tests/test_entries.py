"""Further entries of a batch: texts in several parts, words, labels; ids and classes that are refused on the host."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import mmx
from mmx.data import DataConfig, DataError, DataSet, Label, Pipeline, train_tokenizer
from mmx.data.builders.emoji import ask, composition_keys, read_entries
from mmx.data.examples import Examples, read_label
from mmx.errors import InputError
from mmx.evaluate import Retrieval
from mmx.modalities import Features, Graph, Ids, Patches
from mmx.modalities.masking import drop_modalities, unmask
from mmx.objectives import view
from mmx.types import Masked

MODALITIES = {"image": Patches((32, 32), (16, 16)), "text": Ids(512, 24)}
TOKENIZER = train_tokenizer(["which group? one two three four five six seven", "skin tone", "a face"], 300)


def own(raws, fields, modalities, **told):
    """The examples of a data set that these dicts are."""
    source = type("Own", (list,), {"label": "data set own, split train"})({"key": f"k{i}"} | raw for i, raw in enumerate(raws))
    return Examples(source, fields, modalities, TOKENIZER, keep=False, **told)


def test_further_entries_are_read_by_their_modality():
    fields = {"image": "image", "text": "name", "text/question": "question", "text/answer": ("question", "answer")}
    data = Pipeline(DataConfig(fields=fields, split="train[:16]"), MODALITIES, 8)
    ((batch, _),) = data.evaluation("train[:16]", 16)
    stored = [data.source("train[:16]")[i] for i in range(16)]
    for row, example in enumerate(stored):
        ids, mask = data.tokenizer.encode(example["question"], 24)
        np.testing.assert_array_equal(batch["text/question"].array[row], ids)
        np.testing.assert_array_equal(batch["text/question"].mask[row], mask)
        assert data.tokenizer.decode(batch["text/answer"].array["ids"][row]) == f"{example['question']} {example['answer']}"
        assert data.tokenizer.decode(batch["text"].array[row]) == example["name"].lower()
    assert view("image", text="text/question").reads == (("image", "image"), ("text", "text/question"))
    plain = Pipeline(DataConfig(split="train[:16]"), MODALITIES, 8, tokenizer=data.tokenizer)
    here, there = next(data.train(2)), next(plain.train(2))  # further entries change neither order nor shifts
    jax.tree.map(np.testing.assert_array_equal, {name: here[name] for name in ("image", "text")}, there)


def test_a_tokenizer_is_learned_from_all_entries():
    learned = Pipeline(DataConfig(fields={"text": "name", "text/answer": ("question", "answer")}), {"text": Ids(1024, 24)}, 8)
    assert len(learned.tokenizer.encode("which skin tone? medium-light", 24)[0]) == 24
    pieces = [learned.tokenizer.encode(text, 24)[1].sum() for text in ("which skin tone?", "which group?")]
    assert pieces == [6, 5]  # every word is one token, which it is in no tokenizer that saw names alone
    names = Pipeline(DataConfig(), {"image": MODALITIES["image"], "text": Ids(1024, 24)}, 8)
    assert names.tokenizer.encode("which group?", 24)[1].sum() > 5


def test_parts_of_a_text_are_a_prompt_and_what_is_told():
    ids, mask, group, words = TOKENIZER.read(["which group?", "one two", "three"], 16)
    pieces = [TOKENIZER.encode(part, 16) for part in ("which group?", "one two", "three")]
    inner = [part[1 : there.sum() - 1] for part, there in pieces]
    front = 1 + len(inner[0]) + len(inner[1])
    expected = np.concatenate([[TOKENIZER.begin], *inner, [TOKENIZER.end]])
    np.testing.assert_array_equal(ids[mask], expected)
    np.testing.assert_array_equal(group, np.where(np.arange(16) < front, 0, -1))
    assert (ids.dtype, group.dtype, words.dtype, mask.dtype) == (np.int32, np.int32, np.int32, bool)
    told = TOKENIZER.read("which group?", 16)
    np.testing.assert_array_equal(told.ids, pieces[0][0])
    assert (told.group == -1).all() and (TOKENIZER.read(["which group?"], 16).group == -1).all()


def test_words_of_tokens():
    tokens = [TOKENIZER._tokenizer.encode(part).tokens for part in ("which group?", "zebra one")]
    text = TOKENIZER.read(["which group?", "zebra one"], 24)
    starts = [token.startswith("Ġ") or token == "?" for part in tokens for token in part]
    assert sum(starts) == 5 and len(starts) > 6  # some word is in pieces
    np.testing.assert_array_equal(text.words[1 : len(starts) + 1], np.cumsum(starts) - 1)
    assert (text.words[len(starts) + 1 :] == -1).all() and text.words[0] == -1


def test_a_prompt_is_cut_at_its_front_and_what_is_told_never():
    whole = TOKENIZER.read(["one two three four five", "six seven"], 24)
    count = whole.mask.sum()
    short = TOKENIZER.read(["one two three four five", "six seven"], int(count) - 2)
    np.testing.assert_array_equal(short.ids[1:], whole.ids[3:count])
    assert short.ids[0] == TOKENIZER.begin and short.mask.all() and (short.group == 0).sum() == (whole.group == 0).sum() - 2
    assert short.words[1] == 0 and short.words.max() < len(short.ids)
    answer = TOKENIZER.encode("six seven", 24)[1].sum()
    np.testing.assert_array_equal(
        TOKENIZER.read(["one two", "six seven"], answer).ids, TOKENIZER.encode("six seven", int(answer))[0]
    )
    examples = own([{"q": "one two", "a": "six seven"}], {"text": ("q", "a")}, {"text": Ids(300, int(answer) - 1)})
    with pytest.raises(DataError, match=r"example 0 \(key k0\), field \('q', 'a'\).* the last part has .* 'six seven'"):
        examples[0]
    examples = own([{"q": "one two", "a": " "}], {"text": ("q", "a")}, {"text": Ids(300, 9)})
    with pytest.raises(DataError, match="the text is empty"):
        examples[0]


def test_a_list_of_texts_is_one_text_in_parts():
    raws = [{"told": ["which group?", "one"]}, {"told": ["one"]}]
    examples = own(raws, {"text": "told"}, {"text": Ids(300, 12)}, words=True)
    assert [set(e) for e in (examples[0], examples[1])] == [{"text", "text/words"}] * 2
    np.testing.assert_array_equal(examples[0]["text"].array["group"], TOKENIZER.read(raws[0]["told"], 12).group)
    assert set(examples[1]["text"].array) == {"ids", "group"}
    with pytest.raises(DataError, match="each has to hold a text, but 'told' holds list"):
        own(raws, {"text": ("told", "key")}, {"text": Ids(300, 12)})[0]


def test_a_prompt_is_read_both_ways_and_what_is_told_forwards():
    model = mmx.build_model({"text": Ids(300, 12)}, "early_concatenation", width=16, depth=1, heads=2, embed=0)
    texts = [("which group?", "one two"), ("which group three", "one two"), ("which group?", "one six")]
    raws = [{"q": question, "a": answer} for question, answer in texts]
    examples = own(raws, {"text": ("q", "a")}, model.modalities)
    batch = {"text": jax.tree.map(lambda *x: np.stack(x), *[examples[i]["text"] for i in range(3)])}
    params = jax.jit(model.init)(jax.random.key(0), mmx.example_batch(model))["params"]
    out = jax.jit(lambda p, b: model.apply({"params": p}, b, ("text",)))(params, batch).streams["text"].values
    prompt = int((batch["text"].array["group"][0] == 0).sum())
    assert np.abs(out[0, 0] - out[1, 0]).max() > 1e-4  # [BOS] sees the end of the question
    np.testing.assert_allclose(out[0, :prompt], out[2, :prompt], atol=1e-6)  # and nothing of the answer
    told = np.abs(out[0] - out[2]).max(-1) > 1e-4
    assert not told[:prompt].any() and told[prompt + 1 :].any()


def test_words_come_if_they_are_wanted():
    fields = {"image": "image", "text": "name", "text/answer": ("question", "answer")}
    data = Pipeline(DataConfig(fields=fields, split="train[:8]", words=True), MODALITIES, 8)
    batch = next(data.train())
    assert {"text/words", "text/answer/words"} < set(batch) and batch["text/words"].dtype == np.int32
    for entry in ("text", "text/answer"):
        words, mask = batch[f"{entry}/words"], batch[entry].mask
        assert words.shape == mask.shape and (words[~mask] == -1).all() and (words[:, 0] == -1).all()
        assert (words.max(1) >= 0).all() and ((words >= 0).sum(1) == mask.sum(1) - 2).all()
    assert "text/words" not in next(Pipeline(dataclasses.replace(data.config, words=False), MODALITIES, 8).train())


@pytest.mark.parametrize(
    ("label", "value", "expected"),
    [
        (Label("f", ("cat", "dog")), "dog", 1),
        (Label("f", ("cat", "dog")), ["dog", "dog"], 1),
        (Label("f", ("cat", "dog")), [], -1),
        (Label("f", ("cat", "dog"), none=("",)), "", -1),
        (Label("f", (1, 2, 3)), [np.int32(3)], 2),
        (Label("f", (1, 2, 3), several="leave_out"), [np.int32(3), np.int32(1)], -1),
        (Label("f", 4), np.int64(3), 3),
        (Label("f", 4, none=(-1,)), -1, -1),
        (Label("f", 2), True, 1),
        (Label("f"), 2.5, 2.5),
        (Label("f"), [np.float32(1), np.float32(2)], [1, 2]),
        (Label("f", none=(-1,)), np.array([1, -1]), [1, np.nan]),
    ],
)
def test_labels(label, value, expected):
    found = read_label(label, value)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == (np.float32 if label.classes is None else np.int32) and found.shape == np.shape(expected)


@pytest.mark.parametrize(
    ("label", "value", "message"),
    [
        (Label("f", ("cat", "dog")), "dig", "unknown class 'dig'; did you mean 'dog'"),
        (Label("f", ("cat", "dog")), 1, "unknown class '1'"),
        (Label("f", (1, 2, 3)), 0, "unknown class '0'"),
        (Label("f", 4), 4, "class 4 is none of the 4 classes, 0 to 3"),
        (Label("f", 4), -1, "class -1 is none of the 4 classes"),
        (Label("f", 4), "dog", "expected the number of a class, got 'dog'; set the names"),
        (Label("f", 4), 1.0, "expected the number of a class, got 1.0"),
        (Label("f", 4), [1, 2], "expected one class, got several: 1, 2; set several"),
        (Label("f"), "dog", "expected finite numbers, got 'dog'; for names set the classes"),
        (Label("f"), np.inf, "expected finite numbers"),
    ],
)
def test_wrong_labels_are_refused(label, value, message):
    examples = own([{"f": value}], {}, {}, labels={"kind": label})
    with pytest.raises(DataError, match=rf"data set own, split train, example 0 \(key k0\), field 'f', label 'kind': {message}"):
        examples[0]


def test_numbers_of_another_shape_are_refused():
    examples = own([{"f": [1.0, 2.0]}, {"f": [1.0]}], {}, {}, labels={"sizes": Label("f")})
    assert examples[0]["label/sizes"].tolist() == [1, 2]
    with pytest.raises(DataError, match=r"example 1 .*label 'sizes': numbers of shape \(1,\), but \(2,\) in an example before"):
        examples[1]


@pytest.mark.parametrize(("classes", "message"), [("cat", "give a tuple"), (0, "at least one"), (("a", "a"), "once only")])
def test_labels_that_cannot_be(classes, message):
    with pytest.raises(InputError, match=message):
        Label("f", classes)


def test_labels_of_the_emoji():
    groups = tuple(sorted({e["group"] for e in read_entries()}))
    labels = {"group": Label("group", groups), "tone": Label("tones", (1, 2, 3, 4, 5), several="leave_out")}
    data = Pipeline(DataConfig(split="train[:64]", labels=labels), MODALITIES, 8)
    ((batch, _),) = data.evaluation("train[:64]", 64)
    stored = [data.source("train[:64]")[i] for i in range(64)]
    assert [groups[i] for i in batch["label/group"]] == [e["group"] for e in stored]
    tones = [e["tones"][0] - 1 if len(e["tones"]) == 1 else -1 for e in stored]
    np.testing.assert_array_equal(batch["label/tone"], tones)
    assert batch["label/tone"].dtype == np.int32 and -1 in tones and max(tones) > 0
    wrong = dataclasses.replace(data.config, labels={"group": Label("grup", groups)})
    with pytest.raises(DataError, match=r"unknown field .*data.labels.group\) 'grup'; did you mean 'group'"):
        Pipeline(wrong, MODALITIES, 8)


@pytest.mark.parametrize(
    ("embedder", "value", "message"),
    [
        (Ids(10, 4), [1, 10], r"ids: id 10, but the vocabulary has 10 ids, 0 to 9"),
        (Ids(10, 4), [-1], "id -1, but the vocabulary has 10 ids"),
        (Ids(10, 4), np.asarray([2**32 + 1]), "id 4294967297, but"),  # which would be 1 as int32
        (Ids(10, 4), [1.0], "ids: expected integer ids, got float64"),
        (Ids(10, 4, tables={"row": 3}), {"ids": [1, 2], "row": [0, 3]}, "row: id 3, but the table has 3 ids, 0 to 2"),
        (
            Features(2, 4, joined={"box": (("x", 9, 8), ("y", 5, 8))}),
            {"features": np.zeros((1, 2)), "box": [[8, 5]]},
            "box: id 5, but the table has 5 ids",
        ),
        (Graph(4, vocab=9), {"nodes": np.asarray([9]), "edges": np.ones((1, 1), bool)}, "nodes: id 9, but the vocabulary"),
    ],
)
def test_ids_outside_their_table_are_refused(embedder, value, message):
    examples = own([{"codes": value}], {"codes": "codes"}, {"codes": embedder})
    with pytest.raises(DataError, match=rf"example 0 \(key k0\), field 'codes', entry 'codes': .*{message}"):
        examples[0]


def test_ids_of_a_data_set():
    examples = own([{"codes": [3, 9]}, {"codes": []}], {"codes": "codes"}, {"codes": Ids(10, 4)}, words=True)
    assert examples[0]["codes"].array.tolist() == [3, 9, 0, 0] and examples[0]["codes"].array.dtype == np.int32
    assert not examples[1]["codes"].mask.any() and examples[1]["codes"].array.dtype == np.int32 and set(examples[0]) == {"codes"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"texd/question": "question"}, "unknown modality in data.fields 'texd'; did you mean 'text'"),
        ({"text/": "question"}, "'text/' cannot be the name of an entry"),
        ({"text/words": "question"}, "'text/words' cannot be the name of an entry"),
        ({"text/answer": ("question", "anser")}, r"data.fields.text/answer\) 'anser'; did you mean 'answer'"),
        ({"text/answer": ("question", "tones")}, "data.fields.text/answer: of several fields each has to hold a text"),
    ],
)
def test_wrong_entries_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Pipeline(DataConfig(fields=fields), MODALITIES, 8)


def test_an_entry_is_no_modality_to_an_evaluator():
    data = Pipeline(DataConfig(fields={"image": "image", "text/question": "question"}), MODALITIES, 8)
    with pytest.raises(InputError, match="unknown modality 'text'"):
        Retrieval().check(data)
    with pytest.raises(InputError, match="unknown modality 'text/question'"):
        Retrieval(modalities=("image", "text/question")).check(data)


def test_a_dropped_modality_is_dropped_in_all_its_entries():
    here = np.arange(64) % 4 > 0
    batch = {
        "image": np.ones((64, 2)),
        "text/question": Masked(np.ones((64, 3)), np.repeat(here[:, None], 3, 1)),
        "text/answer": Masked(np.ones((64, 3)), np.ones((64, 3), bool)),
        "text/words": np.ones((64, 3), np.int32),
        "label/kind": np.ones(64, np.int32),
    }
    dropped = drop_modalities(batch, ("image", "text", "audio"), 0.5, jax.random.key(0))
    image, question, answer = (np.asarray(unmask(dropped[n])[1]) for n in ("image", "text/question", "text/answer"))
    text = answer.any(1)
    assert not (text & image).all() and (text | image).all()  # some are dropped, never all that an example has
    np.testing.assert_array_equal(question.any(1), text & here)
    assert dropped["text/words"] is batch["text/words"] and dropped["label/kind"] is batch["label/kind"]


def test_configurations_with_entries_are_kept_and_flagged(tmp_path):
    from mmx.cli import parse_experiment
    from mmx.train.experiment import from_json, to_json

    (tmp_path / "mine.py").write_text(
        "import mmx\nfrom mmx.data import DataConfig, DataSet, Label\n\n\ndef config():\n"
        "    fields = {'text': 'name', 'text/answer': ('question', 'answer')}\n"
        "    data = DataConfig(fields=fields, labels={'tone': Label('tones', 6)}, also=(DataSet(split='composition', ratio=2),))\n"
        "    return mmx.Experiment(data=data)\n"
    )
    flags = ["--data.fields.text", "question", "--data.fields.text/answer", "name", "answer", "--data.words", "True"]
    data = parse_experiment([str(tmp_path / "mine.py"), *flags]).data
    assert data.fields == {"text": "question", "text/answer": ("name", "answer")} and data.words
    assert data.labels == {"tone": Label("tones", 6)} and data.also == (DataSet(split="composition", ratio=2),)
    assert from_json(json.loads(json.dumps(to_json(data)))) == data


def test_questions_need_the_picture():
    """The best answer to a question that is right without the picture, and the answers the held-out pictures give."""
    entries, held_out = read_entries(), composition_keys(read_entries())
    assert [ask(e) for e in entries] == [ask(e) for e in entries[::-1]][::-1]
    for held, most in ((False, 0.25), (True, 0.35)):
        asked = [ask(e) for e in entries if (e["key"] in held_out) == held]
        answers = {question: [a for q, a in asked if q == question] for question, _ in asked}
        best = sum(max(map(found.count, found)) for found in answers.values())
        assert best / len(asked) < most and len(answers) >= 3
        assert all(max(map(found.count, found)) < 0.6 * len(found) for found in answers.values())


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("kiss: woman, man, light skin tone, dark skin tone", {"which skin tone?": "light and dark", "how many people?": "two"}),
        ("family: man, woman, girl, boy", {"how many people?": "four", "which group?": "people and body"}),
        ("family", {"which group?": "people and body"}),
        ("man feeding baby", {"which group?": "people and body"}),
        ("woman golfing", {"man or woman?": "woman", "how many people?": "one", "which group?": "people and body"}),
        ("men wrestling", {"how many people?": "two", "which group?": "people and body"}),
        ("ear: dark skin tone", {"which skin tone?": "dark"}),
    ],
)
def test_only_what_is_sure_is_asked(name, answers):
    tones = [i + 1 for i, tone in enumerate(("light", "dark")) if f" {tone} skin" in name]
    tones = [1 if tone == 1 else 5 for tone in tones]
    entry = {"name": name, "group": "people-body", "tones": tones}
    assert dict(ask(entry | {"key": str(i)}) for i in range(64)) == answers


def test_the_prepared_set_holds_questions():
    from mmx.data import open_source

    source = open_source("emoji", "composition")
    by_key = {e["key"]: ask(e) for e in read_entries()}
    assert all((source[i]["question"], source[i]["answer"]) == by_key[source[i]["key"]] for i in range(0, len(source), 7))
