"""Generation: what is remembered gives the numbers of what is computed again, and costs what one token costs."""

import dataclasses
import functools
import itertools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import mmx
from mmx.errors import InputError
from mmx.layers import Buckets
from mmx.modalities import Ids, Patches
from mmx.topologies import BEYOND, TOPOLOGIES, Cross, Insert, Joint, PerStream

LENGTH = 7
NEVER = ("early_summation", "bottleneck", "latent")  # one stream of all, or tokens that are shared with what is written
STAGES = {
    "prefix": (PerStream({"image": 1}), Joint(2, places="continued")),
    "decoder": (PerStream({"image": 2}), Cross(2, None, "self cross mlp", {"text": ("image",)}, steps=("text",))),
    "inserted": (PerStream({"image": 1}), Insert(), PerStream({"text": 2}, causal=("text",))),
}
CASES = {name: (name, {}) for name in (*TOPOLOGIES, *BEYOND) if name not in NEVER} | {n: (s, {}) for n, s in STAGES.items()}
CASES["rotary"] = ("early_concatenation", {"rotary": 100.0})
CASES["relative"] = ("multi_to_one", {"relative": Buckets(8)})
CASES["unrolled"] = ("cross_attention", {"unroll": 8})
QUICK = ("multi_to_one", "cross_to_concatenation", "prefix", "decoder", "rotary")


def build(topology, **block):
    model = mmx.build_model(
        {"image": Patches((8, 8), (4, 4), special=("class",)), "text": Ids(11, LENGTH)},
        topology,
        width=16,
        depth=4,
        heads=2,
        outputs={"captioning": mmx.heads.TiedDecoder("text"), "matching": mmx.heads.Classifier(2)},
        **block,
    )
    params = jax.jit(model.init)(jax.random.key(0), mmx.example_batch(model))["params"]
    return model, jax.tree.map(lambda p, k: p + 0.3 * jax.random.normal(k, p.shape), params, keys(params))


def keys(tree):
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, list(jax.random.split(jax.random.key(1), len(leaves))))


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_what_is_remembered_is_what_is_computed_again(rng, case):
    """Rows are at different places at the same time; what stands further on in a row is no matter."""
    topology, block = CASES[case]
    model, params = build(topology, **block)
    assert model.caches
    image = mmx.Masked(rng.integers(0, 255, (3, 8, 8, 3), np.uint8), np.asarray([True, True, False]))
    ids, slots = rng.integers(0, 11, (3, LENGTH)), np.asarray([[0, -1, 3, -1, -1, -1, -1]] * 3)
    whole = {"image": image, "text": {"ids": ids, "slots": {"image": slots}} if case == "inserted" else ids}
    read = jax.jit(lambda batch: model.apply({"params": params}, batch, ("text",), mutable=["cache"]))
    expected = read(whole)[0].logits["captioning"]
    known = np.where(np.arange(LENGTH) < 3, ids, 0)
    prompt = {**whole, "text": {**whole["text"], "ids": known} if case == "inserted" else known}
    out, cache = read(prompt)
    np.testing.assert_allclose(out.logits["captioning"][:, :3], expected[:, :3], atol=2e-5)

    @jax.jit
    def step(cache, at):
        out, cache = model.apply({"params": params, **cache}, whole, ("text",), None, {"text": at}, mutable=["cache"])
        return out.logits["captioning"], cache

    for place in range(3, LENGTH):
        at = np.asarray([[place], [min(place, 5)], [place]])
        scores, cache = step(cache, at)
        np.testing.assert_allclose(scores[:, 0], np.take_along_axis(expected, at[..., None], 1)[:, 0], atol=2e-5)


@pytest.mark.parametrize("name", NEVER)
def test_where_nothing_can_be_remembered_all_is_computed_again(name):
    assert not mmx.build_model({"text": Ids(11, LENGTH)}, name, width=16, depth=2, heads=2).caches


def test_attention_that_streams_share_remembers_nothing():
    """It is called for one stream after the other, and would know the last one's keys."""
    assert not PerStream(1, share=True).caches and not Cross(1, share=("self",)).caches and not Cross(1, share=("cross",)).caches
    assert PerStream(1).caches and Cross(1, share=("mlp",)).caches


def test_a_token_costs_what_one_token_costs():
    """Beside attention, whose keys are all before it, the work of a step is that of one token, however long the text may be."""

    def work(length, at):
        text = Ids(11, length)
        model = mmx.build_model({"text": text}, (PerStream(2, causal=("text",)),), width=64, heads=2, embed=0)
        model = dataclasses.replace(model, heads={"captioning": mmx.heads.TiedDecoder("text")})
        batch = mmx.example_batch(model, 1)
        variables = jax.eval_shape(lambda: model.init(jax.random.key(0), batch))
        (_, cache) = jax.eval_shape(lambda v: model.apply(v, batch, mutable=["cache"]), variables)
        places = {"text": jnp.zeros((1, 1), jnp.int32)} if at else None
        given = {**variables, **cache} if at else variables
        return mmx.count_flops(lambda v: model.apply(v, batch, (), None, places, mutable=["cache"])[0].logits, given)

    attention = 2 * 2 * 2 * 64  # layers x (scores, values) x multiply and add x width, for every key
    assert work(128, True) - work(64, True) == 64 * attention
    assert work(128, True) < 1.02 * work(128, False) / 128


@pytest.mark.parametrize(
    "topology", ["multi_to_one", "cross_to_concatenation", STAGES["decoder"]], ids=["joint", "cross", "decoder"]
)
def test_a_loop_costs_one_reading_and_its_steps(topology):
    """What is given goes through the model once, and a step grows with the text only by the keys that attention sees."""

    def make(length):
        model = mmx.build_model(
            {"image": Patches((8, 8), (2, 2)), "text": Ids(11, length)}, topology, width=32, depth=4, heads=2,
            outputs={"captioning": mmx.heads.TiedDecoder("text")},
        )  # fmt: skip
        return model, jax.eval_shape(lambda: model.init(jax.random.key(0), mmx.example_batch(model, 1)))

    def step(length, image=True):
        model, variables = make(length)
        batch = mmx.example_batch(model, 1)
        (_, cache) = jax.eval_shape(lambda v: model.apply(v, batch, ("text",), mutable=["cache"]), variables)
        at = {"text": jnp.zeros((1, 1), jnp.int32)}
        return mmx.count_flops(
            lambda v: model.apply(v, batch, ("text",), None, at, mutable=["cache"])[0].logits["captioning"],
            {**variables, **cache},
        )

    def loop(length, text):
        model, variables = make(length)
        image = jnp.zeros((1, 8, 8, 3), jnp.uint8)
        return mmx.count_flops(lambda p: mmx.generate(model, p, {"image": image}, length=text, begin=1), variables["params"])

    keys = {"multi_to_one": 4, "cross_to_concatenation": 4}.get(topology if isinstance(topology, str) else "", 2)
    assert (
        step(24) - step(16) == step(32) - step(24) == 8 * keys * 2 * 2 * 32
    )  # layers x (scores, values) x multiply, add x width
    model, variables = make(32)
    batch = {"image": jnp.zeros((1, 8, 8, 3), jnp.uint8), "text": jnp.zeros((1, 32), jnp.int32)}
    reading = mmx.count_flops(lambda v: model.apply(v, batch, ("text",)).scored["captioning"].states, variables)
    first = 2 * 32 * 11  # multiply and add x width x ids: what follows the prompt, and no other place, is scored
    assert loop(32, 32) == reading + first + step(32)  # the body of the loop, which is counted once


def test_a_loop_is_traced_once_whatever_its_length_and_whoever_listens():
    model, params = build("multi_to_one")
    given = {"image": np.zeros((2, 8, 8, 3), np.uint8)}
    traces = []

    def allowed(ids, place):
        traces.append(ids.shape)
        return jnp.ones((len(ids), 11), bool)

    def count(length, **more):
        before = len(traces)
        mmx.generate(model, params, given, length=length, begin=1, decoding=mmx.Decoding(allowed=allowed), **more)
        return len(traces) - before

    first = count(3, stream=lambda ids: None)
    assert first and count(LENGTH, stream=lambda ids: None) == first and count(LENGTH, stream=lambda ids: None) == 0


def draw(topology, codes=13):
    """A model that writes four codes about a text."""
    model = mmx.build_model(
        {"text": Ids(9, 4), "codes": Ids(codes, 5)}, topology, width=16, depth=4, heads=2,
        outputs={"codes": mmx.heads.TiedDecoder("codes")},
    )  # fmt: skip
    params = jax.jit(model.init)(jax.random.key(0), mmx.example_batch(model))["params"]
    params = jax.tree.map(lambda p, k: p + 0.3 * jax.random.normal(k, p.shape), params, keys(params))
    return model, params, functools.partial(mmx.generate, model, params, text="codes", head="codes", length=5)


def led(model, params, text, codes, guidance):
    """Guided log probabilities of every next code, by two whole passes."""
    passes = [
        jax.nn.log_softmax(model.apply({"params": params}, batch, ("codes",)).logits["codes"])
        for batch in ({"text": text, "codes": codes}, {"codes": codes})
    ]
    return passes[1] + guidance * (passes[0] - passes[1])


@pytest.mark.parametrize("topology", ["multi_to_one", "early_summation"])
def test_guidance_leads_away_from_codes_about_nothing(rng, topology):
    """Step by step as two whole passes say, the second one without the text; with keys and values kept, and where none can be."""
    model, params, write = draw(topology)
    text = mmx.Masked(rng.integers(0, 9, (6, 4)), np.arange(4) < rng.integers(1, 5, (6, 1)))
    scores = jax.jit(functools.partial(led, model))

    def by_hand(guidance):
        codes = np.zeros((6, 5), int)
        for place in range(1, 5):
            codes[:, place] = scores(params, text, codes, guidance)[:, place - 1].argmax(-1)
        return codes

    assert (by_hand(3.0) != by_hand(1.0)).any()
    np.testing.assert_array_equal(write(given={"text": text}, begin=0, decoding=mmx.Decoding(guidance=3.0)), by_hand(3.0))
    nothing = mmx.Masked(np.zeros((6, 1), int), np.ones((6, 1), bool))
    np.testing.assert_array_equal(write(given={}, prompt=nothing), by_hand(0.0))


def test_a_search_follows_guided_codes(rng):
    """As many beams as there are beginnings find the sentence that is the likeliest of all."""
    model, params, write = draw("multi_to_one", codes=4)
    text = rng.integers(0, 9, (2, 4))
    decoding = mmx.Decoding(guidance=2.5, beams=16, length_penalty=0.0)
    found = write(given={"text": text}, prompt=mmx.Masked(np.full((2, 2), 1), np.ones((2, 2), bool)), decoding=decoding)
    every = np.asarray([(1, 1, *codes) for codes in itertools.product(range(4), repeat=3)])
    scores = jax.jit(functools.partial(led, model))
    for row in range(2):
        each = jax.nn.log_softmax(scores(params, np.repeat(text[row : row + 1], len(every), 0), every, 2.5))[:, 1:4]
        best = np.take_along_axis(np.asarray(each), every[:, 2:, None], 2).sum((1, 2)).argmax()
        np.testing.assert_array_equal(found[row], every[best])


def test_a_search_ends_where_there_is_no_room(rng):
    """Prompts of other lengths beside a text change nothing of what is found for it."""
    model, params = build("multi_to_one")
    sizes, ids = np.asarray([1, 5, 3]), rng.integers(0, 9, (3, 5))
    decoding = mmx.Decoding(beams=3, best=3, end=(4,), pad=10)

    def search(rows):
        prompt = mmx.Masked(ids[rows], np.arange(5) < sizes[rows, None])
        return np.asarray(mmx.generate(model, params, {}, prompt=prompt, length=LENGTH, decoding=decoding))

    together = search(np.arange(3)).reshape(3, 3, LENGTH)
    for row in range(3):
        np.testing.assert_array_equal(together[row], search(np.asarray([row])))
        assert len({tuple(found) for found in together[row].tolist()}) == 3


def test_guidance_wants_something_that_is_given():
    _, _, write = draw("multi_to_one")
    prompt = mmx.Masked(np.zeros((2, 1), int), np.ones((2, 1), bool))
    with pytest.raises(InputError, match="guidance=2.0 leads away .* nothing is given"):
        write(given={}, prompt=prompt, decoding=mmx.Decoding(guidance=2.0))
    with pytest.raises(InputError, match="how many texts"):
        write(given={}, begin=0)
    with pytest.raises(InputError, match="published inputs do not tell"):
        mmx.load_pretrained(T5).generate(2, mmx.Decoding(guidance=2.0), input_ids=np.ones((1, 3), int))


def test_a_listener_is_told_every_step(rng):
    """The ids that are returned, column by column, for prompts of one length; padding where a row has ended or has no room."""
    model, params = build("multi_to_one")
    given = {"image": rng.integers(0, 255, (3, 8, 8, 3), np.uint8)}
    write = functools.partial(mmx.generate, model, params, given, length=LENGTH)
    plain = np.asarray(write(begin=1))
    told: list[np.ndarray] = []
    found = np.asarray(write(begin=1, decoding=mmx.Decoding(end=(int(plain[0, 2]),), pad=10), stream=told.append))
    steps = len(told)
    np.testing.assert_array_equal(np.stack(told, 1), found[:, 1 : 1 + steps])
    assert (found[:, 1 + steps :] == 10).all()  # nobody writes any more
    ended = np.cumsum(plain[:, 1:] == plain[0, 2], 1) - (plain[:, 1:] == plain[0, 2]) > 0
    np.testing.assert_array_equal(found[:, 1:], np.where(ended, 10, plain[:, 1:]))
    assert ended[0, 2:].all()
    told.clear()
    found = write(begin=1, decoding=mmx.Decoding(end=tuple(range(11)), pad=10), stream=told.append)
    assert len(told) == 1 and (np.asarray(found)[:, 2:] == 10).all()  # all have ended: nothing more is computed
    told.clear()
    sizes = np.asarray([1, 4, 2])
    prompt = mmx.Masked(rng.integers(0, 9, (3, 4)), np.arange(4) < sizes[:, None])
    found = np.asarray(write(prompt=prompt, stream=told.append))
    for row, size in enumerate(sizes):
        np.testing.assert_array_equal(np.stack(told, 1)[row], [*found[row, size:], *[0] * (size - 1)])


def test_listeners_that_fail_and_programs_that_cannot_have_one():
    model, params = build("multi_to_one")
    given = {"image": np.zeros((2, 8, 8, 3), np.uint8)}
    write = functools.partial(mmx.generate, model, params, length=LENGTH, begin=1)
    told = []

    def fail(ids):
        told.append(ids)
        raise KeyError("the reader has gone")

    with pytest.raises(KeyError, match="the reader has gone"):
        write(given, stream=fail)
    assert len(told) == 1
    told.clear()
    write(given, stream=told.append)
    assert len(told) == LENGTH - 1
    with pytest.raises(InputError, match="stream with beams=1"):
        write(given, decoding=mmx.Decoding(beams=2), stream=told.append)
    with pytest.raises(InputError, match="outside jax.jit"):
        jax.jit(lambda given: write(given, stream=told.append))(given)


HERE = Path(__file__).parent
T5 = HERE / "published" / "T5ForConditionalGeneration"
SEARCHES = json.loads((HERE / "generation.json").read_text())  # of transformers 5.23: 4 beams, the best 2, 8 new ids


SOME, MORE = ((0, 1.0), (0, 0.0), (1, 2.0)), ((1, 1.0), (1, 0.0), (0, 2.0))  # which end, length penalty


@pytest.mark.parametrize("cases", [SOME, pytest.param(MORE, marks=pytest.mark.slow)], ids=["some", "more"])
@pytest.mark.parametrize(("name", "ends"), [("GPT2LMHeadModel", (5, 17)), ("T5ForConditionalGeneration", (1, 9))])
def test_searches_are_those_of_the_reference(name, ends, cases):
    """Sentences and their scores by end and length penalty; and greedily with a repetition penalty and a least length."""
    pretrained = mmx.load_pretrained(HERE / "published" / name)
    given = safetensors.numpy.load_file(HERE / "published" / name / "inputs.safetensors")
    ids = given.get("generate.input_ids", given["input_ids"])
    prompt = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for end, penalty in ((ends[which], penalty) for which, penalty in cases):
        decoding = mmx.Decoding(beams=4, best=2, length_penalty=penalty, end=(end,))
        found, expected = pretrained.generate(8, decoding, **prompt), SEARCHES[name]
        _same(found["sequences"], np.asarray(expected[f"{end}.{penalty}.ids"]), (end,))
        np.testing.assert_allclose(found["scores"], expected[f"{end}.{penalty}.scores"], atol=1e-4)
    found = pretrained.generate(8, mmx.Decoding(repetition_penalty=1.7, minimum=3, end=ends), **prompt)
    _same(found["sequences"], np.asarray(SEARCHES[name]["greedy.ids"]), ends)


def _same(found, expected, ends):
    """Behind an end, the reference pads with what it likes."""
    found, begin = np.asarray(found)[:, : expected.shape[1]], 1
    ended = np.cumsum(np.isin(expected, ends) & (np.arange(expected.shape[1]) >= begin), 1) - np.isin(expected, ends)
    np.testing.assert_array_equal(np.where(ended > 0, -1, found), np.where(ended > 0, -1, expected))


def test_draws_come_from_the_likeliest(rng):
    """As often as they are likely, and nothing beyond k or p."""
    scores = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1]]))
    many = jax.random.split(jax.random.key(0), 4000)
    for decoding, shares in (
        (mmx.Decoding(temperature=1.0), [0.4, 0.3, 0.2, 0.1]),
        (mmx.Decoding(temperature=0.5), np.square([0.4, 0.3, 0.2, 0.1]) / 0.3),
        (mmx.Decoding(temperature=1.0, top_k=2), [4 / 7, 3 / 7, 0, 0]),
        (mmx.Decoding(temperature=1.0, top_p=0.65), [4 / 7, 3 / 7, 0, 0]),
        (mmx.Decoding(temperature=1.0, top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0]),
    ):
        found = np.bincount(jax.vmap(lambda key, d=decoding: d.choose(scores, key)[0])(many), minlength=4) / 4000
        np.testing.assert_allclose(found, shares, atol=0.03)
        assert not found[np.asarray(shares) == 0].any()


def test_prompts_of_different_lengths_and_what_is_allowed(rng):
    """Each row goes on behind its own prompt as if it were alone; a rule may forbid ids."""
    model, params = build("early_concatenation")
    given = {"image": rng.integers(0, 255, (3, 8, 8, 3), np.uint8)}
    ids, sizes = rng.integers(0, 11, (3, 4)), np.asarray([1, 4, 2])
    prompt = mmx.Masked(ids, np.arange(4) < sizes[:, None])
    found = mmx.generate(model, params, given, length=LENGTH, prompt=prompt)
    for row, size in ((0, 1), (2, 2)):
        alone = mmx.Masked(ids[row : row + 1, :size], np.ones((1, size), bool))
        expected = mmx.generate(model, params, {"image": given["image"][row : row + 1]}, length=LENGTH, prompt=alone)
        np.testing.assert_array_equal(found[row], expected[0])
    for mask in ([1, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]):
        with pytest.raises(InputError, match=r"prompt: the mask of prompt 1 is .* padded behind their ids"):
            mmx.generate(model, params, given, length=LENGTH, prompt=mmx.Masked(ids, np.asarray([[1] * 4, mask, [1] * 4], bool)))
    even = mmx.Decoding(allowed=lambda ids, place: jnp.broadcast_to(jnp.arange(11) % 2 == 0, (len(ids), 11)))
    assert not np.any(mmx.generate(model, params, given, length=LENGTH, begin=1, decoding=even)[:, 1:] % 2)


def test_a_search_under_a_rule_finds_the_best_of_all_sentences(rng):
    """Behind prompts of different lengths: even ids only, none twice in a row, a prefix that is given; so many beams miss nothing."""
    model, params = build("early_concatenation")
    given = {"image": rng.integers(0, 255, (2, 8, 8, 3), np.uint8)}
    ids, sizes = np.asarray([[3, 0, 0], [5, 8, 7]]), np.asarray([1, 3])

    def allowed(ids, place):
        before = jnp.take_along_axis(ids, place[:, None] - 1, 1)
        rule = (jnp.arange(11) % 2 == 0) & (jnp.arange(11) != before)
        return jnp.where((place == 3)[:, None], jnp.arange(11) == 4, rule)  # the fourth id is 4, whatever was likelier

    decoding = mmx.Decoding(beams=30, allowed=allowed, repetition_penalty=1.3)
    prompt = mmx.Masked(ids, np.arange(3) < sizes[:, None])
    found = np.asarray(mmx.generate(model, params, given, length=5, prompt=prompt, decoding=decoding))
    logits = jax.jit(lambda batch: model.apply({"params": params}, batch, ("text",)).logits["captioning"])
    for row, size in enumerate(sizes):
        rest = list(itertools.product(range(0, 11, 2), repeat=5 - size))
        every = np.concatenate([np.repeat(ids[row : row + 1, :size], len(rest), 0), rest], 1)
        twice = [every[:, place] == every[:, place - 1] for place in range(size, 5) if place != 3]
        every = every[(every[:, 3] == 4) & ~np.any(twice, 0)]
        image = np.repeat(given["image"][row : row + 1], len(every), 0)
        text = np.pad(every, ((0, 0), (0, LENGTH - 5)))
        scores, total = np.asarray(logits({"image": image, "text": text})), 0
        for place in range(size, 5):
            log = jax.nn.log_softmax(scores[:, place - 1])
            log = np.where((np.arange(11)[:, None] == every[:, None, :place]).any(-1), log * 1.3, log)
            total += log[np.arange(len(every)), every[:, place]]
        np.testing.assert_array_equal(found[row], every[np.argmax(total)])
        assert np.ptp(total) > 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"beams": 2, "best": 3}, "at most its beams"),
        ({"repetition_penalty": 0}, "is a factor"),
        ({"guidance": -1.0}, "guidance=-1.0"),
    ],
)
def test_wrong_decodings_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        mmx.Decoding(**fields)


def test_drawing_wants_a_key(rng):
    model, params = build("early_concatenation")
    given = {"image": np.zeros((2, 8, 8, 3), np.uint8)}
    with pytest.raises(InputError, match="give a key"):
        mmx.generate(model, params, given, length=4, begin=1, decoding=mmx.Decoding(temperature=1.0))
    several = mmx.Decoding(temperature=1.0, best=3)
    assert mmx.generate(model, params, given, length=4, begin=1, decoding=several, key=jax.random.key(0)).shape == (6, 4)


def test_published_ends_are_those_of_a_sentence(tmp_path):
    """Of config.json; of generation_config.json where there is one; of whoever calls, before both."""
    inputs = safetensors.numpy.load_file(T5 / "inputs.safetensors")
    endless = safetensors.numpy.load_file(T5 / "outputs.safetensors")["generate.sequences"]
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert (endless[2] == [0, 44, 79, 0, 1, 79, 0, 79, 0]).all()
    told: list[np.ndarray] = []
    found = mmx.load_pretrained(T5).generate(8, stream=told.append, **given)["sequences"]
    np.testing.assert_array_equal(found, np.where(np.arange(9) < [[9], [9], [5]], endless, 0))
    np.testing.assert_array_equal(np.stack(told, 1), np.asarray(found)[:, 1:])
    for file in ("config.json", "model.safetensors"):
        shutil.copy(T5 / file, tmp_path)
    fields = {"eos_token_id": [60, 44], "pad_token_id": 7, "decoder_start_token_id": 9}
    (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    pretrained = mmx.load_pretrained(tmp_path)
    found = np.asarray(pretrained.generate(8, **given)["sequences"])
    assert (found[:, 0] == 9).all()
    same = pretrained.generate(8, mmx.Decoding(end=(60, 44), pad=7), decoder_input_ids=np.full((3, 1), 9), **given)
    np.testing.assert_array_equal(found, same["sequences"])
    mmx.save_pretrained(tmp_path / "again", pretrained)
    assert mmx.load_pretrained(tmp_path / "again").decoding() == mmx.Decoding(end=(60, 44), pad=7)
    assert pretrained.decoding(mmx.Decoding(end=(5,), pad=1, beams=3)) == mmx.Decoding(end=(5,), pad=1, beams=3)


@pytest.mark.parametrize(
    ("name", "end", "pad"),
    [
        ("BlipForConditionalGeneration", 3, 0),  # its sep_token_id, in the part on text
        ("LlavaForConditionalGeneration", 2, 0),
        ("PaliGemmaForConditionalGeneration", 1, 0),
        ("MarianMTModel", 0, 95),
        ("GPT2LMHeadModel", 2, 0),
    ],
)
def test_ends_are_read_from_the_part_on_text(name, end, pad, tmp_path):
    pretrained = mmx.load_pretrained(HERE / "published" / name)
    mmx.save_pretrained(tmp_path, pretrained)
    for one in (pretrained, mmx.load_pretrained(tmp_path)):
        assert one.decoding() == mmx.Decoding(end=(end,), pad=pad) and one.decoding(mmx.Decoding(end=())).end == ()
