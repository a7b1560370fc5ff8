"""Models: any subset of modalities, any topology, clear errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mmx
from mmx.errors import InputError
from mmx.heads import Classifier, Pooler, Reconstruction, TiedDecoder, TokenClassifier
from mmx.layers import BlockConfig
from mmx.modalities import Ids, Patches
from mmx.model import abstract_params
from mmx.objectives import Objective
from mmx.objectives.objective import reading
from mmx.parallel import MeshConfig, make_mesh
from mmx.topologies import TOPOLOGIES, cross_attention, early_concatenation
from mmx.train import Task, make_state, train_step
from mmx.types import Tokens

QUICK = ("early_summation", "multi_to_one")  # the others in CI


def modalities():
    return {"image": Patches((16, 16), (8, 8)), "text": Ids(50, 6), "audio": Ids(20, 5)}


def build(topology="multi_to_one", **options):
    outputs = {"matching": Classifier(2), "captioning": TiedDecoder("text")}
    return mmx.build_model(modalities(), topology, width=16, depth=2, heads=2, outputs=outputs, **options)


def init(model):
    return jax.jit(lambda key: model.init(key, mmx.example_batch(model)))(jax.random.key(0))


def apply(module, variables, *inputs):
    """A call in one program: one by one, every operation would be compiled by itself."""
    return jax.jit(lambda variables: module.apply(variables, *inputs))(variables)


def shapes(model, *inputs):
    """What a call would give, by shapes alone."""
    return jax.eval_shape(lambda params: model.apply({"params": params}, *inputs), abstract_params(model))


@pytest.fixture
def inputs(rng):
    mask = np.arange(6) < rng.integers(2, 7, (4, 1))
    return {
        "image": rng.integers(0, 256, (4, 16, 16, 3), np.uint8),
        "text": mmx.Masked(rng.integers(0, 50, (4, 6)), mask),
        "audio": rng.integers(0, 20, (4, 5)),
    }


@pytest.mark.parametrize("topology", [t if t in QUICK else pytest.param(t, marks=pytest.mark.slow) for t in TOPOLOGIES])
def test_any_subset_embeds(topology, inputs):
    """Every subset of modalities works, and equals the whole batch with the others masked in every example."""
    model = build(topology)
    variables, call = init(model), jax.jit(model.apply)
    for present in (["text"], ["image", "audio"], ["image", "text", "audio"]):
        subset = {name: inputs[name] for name in present}
        out = call(variables, subset)
        assert set(out.embeddings) == set(present)
        masked = {name: _mask(value, name in present) for name, value in inputs.items()}
        everything = call(variables, masked)
        for name in present:
            assert out.embeddings[name].shape == (4, 16) and out.embeddings[name].dtype == np.float32
            np.testing.assert_allclose(np.linalg.norm(out.embeddings[name], axis=-1), 1, atol=1e-5)
            np.testing.assert_allclose(everything.embeddings[name], out.embeddings[name], atol=2e-5)
        np.testing.assert_allclose(everything.logits["matching"], out.logits["matching"], atol=2e-5)
        assert ("captioning" in out.logits) == ("text" in present or topology == "early_summation")


def _mask(value, present):
    array, mask = (value.array, value.mask) if isinstance(value, mmx.Masked) else (value, np.ones(len(value), bool))
    return mmx.Masked(array, mask & present)


def test_nan_in_an_absent_modality_goes_no_further(inputs):
    model = build("early_concatenation")
    variables = init(model)
    image = np.full((4, 16, 16, 3), np.nan, np.float32)
    batch = {"image": mmx.Masked(image, np.array([False] * 4)), "text": inputs["text"]}

    def loss(variables):
        out = model.apply(variables, batch)
        return out.embeddings["text"].sum() + out.logits["matching"].sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(variables)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_integer_images_are_normalised_and_floats_are_taken_as_they_are(inputs):
    model, image = build(), inputs["image"]
    variables = init(model)
    normalised = (image.astype(np.float32) / 255 - 0.5) / 0.5
    a, b = (apply(model, variables, {"image": x}).embeddings["image"] for x in (image, normalised))
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_topology_is_a_tuple_of_stages():
    model = build(cross_attention(1) + early_concatenation(1))
    assert abstract_params(model).keys() >= {"stages_0", "stages_1"}


def test_streams_may_leave_after_some_of_the_stages(inputs):
    model = build(cross_attention(1) + early_concatenation(1))
    variables = init(model)
    begun = model.clone(stages=model.stages[:-1])
    some = jax.jit(lambda v: model.apply(v, inputs, stages=len(begun.stages)))(variables)
    expected = jax.jit(begun.apply)(variables, inputs)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), some.streams, expected.streams)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), some.logits, expected.logits)


def test_scores_of_ids_by_a_matrix_of_its_own(inputs):
    head = TiedDecoder("text", transform=False, bias=False, own=True)
    model = mmx.build_model({"text": Ids(20, 6)}, width=8, depth=2, heads=2, outputs={"words": head}, embed=0)
    ids = np.arange(12).reshape(2, 6)
    out, variables = jax.jit(model.init_with_output)(jax.random.key(0), {"text": ids})
    own = variables["params"]["heads_words"]["decoder"]["kernel"]
    assert own.shape == (8, 20)
    np.testing.assert_allclose(out.logits["words"], out.streams["text"].values @ own, atol=1e-5)


def test_embeddings_can_be_left_out(inputs):
    out = shapes(build(embed=0), inputs)
    assert out.embeddings == {} and out.logit_scale is None
    model = build(logit_scale=None)
    out = shapes(model, inputs)
    assert out.embeddings and out.logit_scale is None and "logit_scale" not in abstract_params(model)


@dataclasses.dataclass(frozen=True)
class Pull(Objective):
    """Pushes the inverse temperature up or down, as the batch's text says."""

    def views(self):
        return (reading("text"),)

    def select(self, outputs, batch):
        return {"scale": jnp.broadcast_to(outputs[0].logit_scale, len(batch["text"])), "up": batch["text"][:, 0] > 0}

    def loss(self, values, memory=None):
        scale = values["scale"].mean()
        return jnp.where(values["up"].all(), -scale, scale), {"pull/scale": scale}


@pytest.mark.parametrize("parts", [1, 2])
def test_the_temperature_comes_back_from_its_limit(one_device, parts):
    """One that starts above is used as the limit and falls at once; one that is pushed up stays there, and falls at once too."""
    model = mmx.build_model({"text": Ids(20, 6)}, width=8, depth=2, heads=2)
    params = jax.jit(model.init)(jax.random.key(0), mmx.example_batch(model))["params"]
    mesh, optimizer = make_mesh(MeshConfig(), one_device), optax.sgd(1e-4)
    state, _ = make_state(model, optimizer, True, 0, mesh, {**params, "logit_scale": jnp.log(120.0)})
    task = Task(model, {"pull": Pull()})
    one = functools.partial(train_step, task=task, optimizer=optimizer, schedule=lambda _: 1e-4, ema=0.5, parts=parts)
    step = jax.jit(one)
    used, kept, averages = [], [], []
    for up in (0, 0, 1, 1, 1, 1, 1, 0, 0):
        state, metrics = step(state, {"text": jnp.full((2, 6), up)})
        used.append(float(metrics["pull/scale"]))
        kept.append(float(jnp.exp(state.params["logit_scale"])))
        averages.append(float(jnp.exp(state.ema["logit_scale"])))
    np.testing.assert_allclose([*used[:2], kept[0], *kept[3:7], used[7]], 100, rtol=1e-6)
    assert kept[1] < 99.5 and kept[8] < kept[7] < 99.5
    assert 100 < averages[0] < 119 and averages[6] < 101
    free = model.clone(max_logit_scale=None)
    high = {"params": {**params, "logit_scale": jnp.log(120.0)}}
    np.testing.assert_allclose(free.apply(high, {"text": jnp.ones((2, 6), int)}).logit_scale, 120, rtol=1e-5)
    assert free.within_limits(high["params"]) == high["params"]


def test_streams_may_be_pooled_before_the_last_stage(inputs):
    """Two towers meet in the shared space, and then in the stages behind; heads read the end."""
    towers, both = mmx.topologies.PerStream(1), mmx.topologies.Joint(1)
    heads = {"all": TokenClassifier(5, None, transform=False), "some": TokenClassifier(5, "text", transform=False, bias=False)}
    heads["tied"] = TokenClassifier(5, None, transform=False, tied="text")
    model = mmx.build_model(modalities(), (towers, both), width=16, heads=2, pool_after=1, outputs=heads)
    variables = init(model)
    out = apply(model, variables, inputs)
    params = {n: p for n, p in variables["params"].items() if not n.startswith(("stages_1", "heads"))}
    alone = apply(mmx.build_model(modalities(), (towers,), width=16, heads=2), {"params": params}, inputs)
    for name in out.embeddings:
        np.testing.assert_allclose(out.pooled[name], alone.pooled[name], atol=1e-6)
        np.testing.assert_allclose(out.embeddings[name], alone.embeddings[name], atol=1e-6)
    x = np.concatenate([out.streams[name].values for name in modalities()], 1)  # a program sorts the keys of a dict
    p = variables["params"]["heads_all"]["classifier"]
    np.testing.assert_allclose(out.logits["all"], x @ p["kernel"] + p["bias"], atol=1e-5)
    kernel = variables["params"]["heads_some"]["classifier"]["kernel"]
    np.testing.assert_allclose(out.logits["some"], out.streams["text"].values @ kernel, atol=1e-5)
    words = variables["params"]["modalities_text"]["token"]["embedding"]
    np.testing.assert_allclose(out.logits["tied"], x @ words.T, atol=1e-5)


def test_dtype_reaches_every_part(inputs):
    model = build(dtype="bfloat16")
    out = shapes(model, inputs)
    assert {t.values.dtype for t in out.streams.values()} == {jax.numpy.dtype("bfloat16")}
    assert {x.dtype for x in (*out.embeddings.values(), *out.logits.values())} == {np.dtype("float32")}


def test_full_size_model_has_the_parameters_of_its_formula():
    """A 12-layer joint encoder of width 768: 12 d^2 + 13 d per layer, embeddings, one norm."""
    model = mmx.build_model({"text": Ids(30522, 512)}, "early_concatenation", width=768, depth=12, heads=12, embed=0)
    width = 768
    assert mmx.count_parameters(abstract_params(model)) == 12 * (12 * width**2 + 13 * width) + (30522 + 512) * width + 2 * width


def test_shapes_alone_are_those_of_parameters():
    """Layers are traced once for them; what parameters are made of afterwards is what it was before."""
    model = build("cross_to_concatenation")
    before = init(model)["params"]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(model)) == jax.tree.map(
        lambda x: (x.shape, x.dtype), before
    )
    jax.tree.map(np.testing.assert_array_equal, init(model)["params"], before)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"imge": np.zeros((1, 16, 16, 3))}, "did you mean 'image'"),
        ({}, "the batch is empty"),
        ({"image": np.zeros((1, 15, 16, 3))}, r"expected images of shape \(B, 16, 16, 3\), got \(1, 15, 16, 3\)"),
        ({"image": np.zeros((1, 16, 16, 4))}, r"got \(1, 16, 16, 4\)"),
        ({"text": np.zeros((1, 6))}, "expected integer ids"),
        ({"text": np.zeros((1, 7), int)}, "7 tokens, but length=6"),
        ({"text": mmx.Masked(np.zeros((2, 6), int), np.ones((2, 5), bool))}, r"mask has shape \(2, 5\)"),
    ],
)
def test_wrong_batches_are_refused(batch, message):
    with pytest.raises(InputError, match=message):
        shapes(build(), batch)


def test_wrong_models_are_refused():
    with pytest.raises(InputError, match="did you mean 'cross_attention'"):
        build("cross_atention")
    with pytest.raises(InputError, match="did you mean 'activation'"):
        build(activations="relu")
    with pytest.raises(InputError, match="not a multiple of patch"):
        mmx.build_model({"image": Patches((10, 10), (4, 4))}, width=16, heads=2).init(
            jax.random.key(0), {"image": np.zeros((1, 10, 10, 3))}
        )
    with pytest.raises(InputError, match="unknown modality 'speech'"):
        shapes(build(), {"text": np.zeros((1, 6), int)}, ("speech",))


def test_special_tokens_are_pooled_and_normalised_before_the_classes(rng):
    """The mean of the learned tokens in front; a LayerNorm before the last dense layer (AST)."""
    values = rng.standard_normal((2, 5, 8)).astype("f")
    tokens = Tokens(values, special=("class", "distillation"))
    np.testing.assert_allclose(Pooler("special").apply({}, tokens, None), values[:, :2].mean(1), atol=1e-6)
    head, x = Classifier(3, "audio", transform=False, norm=1e-5), values[:, 0]
    params = {
        "norm": {"scale": rng.standard_normal(8), "bias": rng.standard_normal(8)},
        "classifier": {"kernel": rng.standard_normal((8, 3)), "bias": rng.standard_normal(3)},
    }
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * params["norm"]["scale"]
    expected = (normed + params["norm"]["bias"]) @ params["classifier"]["kernel"] + params["classifier"]["bias"]
    found = apply(head, {"params": jax.tree.map(np.float32, params)}, {"audio": tokens}, {"audio": x}, {})
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_decoders_of_ids_may_be_scaled_or_have_a_matrix_of_their_own(rng):
    """T5's: the states are scaled; Flan-T5's: another matrix than the embedding."""
    ids = rng.integers(0, 9, (2, 4))
    heads = {
        "tied": TiedDecoder("text", transform=False, bias=False),
        "scaled": TiedDecoder("text", transform=False, bias=False, scale=0.25),
        "own": TiedDecoder("text", transform=False, bias=False, own=True),
    }
    model = mmx.build_model({"text": Ids(9, 4)}, "early_concatenation", width=8, depth=1, heads=2, outputs=heads, embed=0)
    params = init(model)["params"]
    out = apply(model, {"params": params}, {"text": ids})
    np.testing.assert_allclose(out.logits["scaled"], out.logits["tied"] / 4, atol=1e-6)
    own = out.streams["text"].values @ params["heads_own"]["decoder"]["kernel"]
    np.testing.assert_allclose(out.logits["own"], own, atol=1e-5)


def test_one_embedder_under_two_names_shares_its_weights(rng):
    ids = rng.integers(0, 9, (2, 4))
    words = Ids(9, 4)
    model = mmx.build_model({"text": words, "target": words}, (), width=8, heads=2, embed=0)
    variables = init(model)
    assert {name for name in variables["params"] if name.startswith("modalities")} == {"modalities_target"}
    out = apply(model, variables, {"text": ids, "target": ids})
    np.testing.assert_array_equal(out.streams["text"].values, out.streams["target"].values)


def test_a_classifier_of_tokens_is_its_formula(rng):
    x = rng.standard_normal((2, 3, 4)).astype("f")
    head, streams = TokenClassifier(5, "image", activation="relu", norm=1e-6), {"image": Tokens(jnp.asarray(x))}
    params = jax.eval_shape(lambda: head.init(jax.random.key(0), streams, {}, {}))
    params = jax.tree.map(lambda p: rng.standard_normal(p.shape).astype("f"), params)
    p = params["params"]
    h = np.maximum(x @ p["transform"]["kernel"] + p["transform"]["bias"], 0)
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6) * p["norm"]["scale"] + p["norm"]["bias"]
    expected = h @ p["classifier"]["kernel"] + p["classifier"]["bias"]
    np.testing.assert_allclose(apply(head, params, streams, {}, {}), expected, atol=1e-4)
    assert head.apply(params, {}, {}, {}) is None


def test_reconstruction_puts_tokens_where_they_stood(rng):
    """Without layers: the projected token and its position where it was kept, the learned token elsewhere."""
    grid, kept = (2, 3), np.asarray([[4, 0], [5, 2]])
    where = np.concatenate([np.zeros((2, 1, 2)), np.stack(np.divmod(kept, 3), -1)], 1)
    values = rng.standard_normal((2, 3, 8)).astype("f")
    streams = {"image": Tokens(values, coordinates=jnp.asarray(where), special=("class",))}
    head = Reconstruction("image", 5, 0, BlockConfig(width=4, heads=2))
    modalities = {"image": Patches((8, 12), (4, 4))}
    params = jax.eval_shape(lambda: head.init(jax.random.key(0), streams, {}, modalities)["params"])
    params = jax.tree.map(lambda p: rng.standard_normal(p.shape).astype("f"), params)
    answer = apply(head, {"params": params}, streams, {}, modalities)
    full = np.broadcast_to(params["token"], (2, 6, 4)).copy()
    projected = values @ params["project"]["kernel"] + params["project"]["bias"]
    full[np.arange(2)[:, None], kept] = projected[:, 1:]
    full = full + params["position"][1:]
    expected = full @ params["projection"]["kernel"] + params["projection"]["bias"]
    np.testing.assert_allclose(answer, expected, atol=1e-5)
    assert grid == modalities["image"].grid and head.apply({"params": params}, {}, {}, modalities) is None


def test_a_class_for_every_token_and_the_mean_of_the_content(rng):
    tokens = Tokens(rng.standard_normal((2, 3, 8)).astype("f"), np.asarray([[1, 1, 0], [1, 1, 1]], bool), special=("class",))
    head = TokenClassifier(5, "image", activation="tanh", norm=1e-6)
    logits, variables = jax.jit(lambda key: head.init_with_output(key, {"image": tokens}, {}, {}))(jax.random.key(0))
    params = variables["params"]
    x = np.tanh(tokens.values @ params["transform"]["kernel"])
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(logits, x @ params["classifier"]["kernel"], atol=1e-5)
    pooled = Pooler("content").apply({}, tokens, None)
    np.testing.assert_allclose(pooled, [tokens.values[0, 1], tokens.values[1, 1:].mean(0)], atol=1e-6)


def test_a_mean_of_streams_may_count_their_tokens(rng):
    mask = np.asarray([[1, 1, 1, 0], [0, 0, 0, 0]], bool)
    streams = {"image": Tokens(rng.standard_normal((2, 4, 8)).astype("f"), mask), "text": Tokens(np.ones((2, 2, 8), "f"))}
    pooled = {name: Pooler("mean").apply({}, tokens, None) for name, tokens in streams.items()}
    head = Classifier(3, transform=False, by_tokens=True)
    logits, variables = jax.jit(lambda key: head.init_with_output(key, streams, pooled, {}))(jax.random.key(0))
    means = [np.concatenate([streams["image"].values[0, :3], np.ones((2, 8))]).mean(0), np.ones(8)]
    np.testing.assert_allclose(logits, np.stack(means) @ variables["params"]["classifier"]["kernel"], atol=1e-5)


def test_what_is_absent_has_no_vector_whatever_pools_it(rng):
    """Poolers, dense layers with biases and projections with biases: an example without an image has zeros, and no gradient."""
    image = rng.integers(0, 255, (3, 8, 8, 3), np.uint8)
    model = mmx.build_model(
        {"image": Patches((8, 8), (4, 4)), "text": Ids(9, 4)},
        "multi_to_one",
        width=8,
        depth=2,
        heads=2,
        poolers={"image": Pooler("first", norm=1e-6, size=8, activation="tanh")},
        projections={"image": mmx.heads.Projection(5, bias=True)},
    )
    batch = {"image": mmx.Masked(image, np.asarray([True, False, True])), "text": rng.integers(0, 9, (3, 4))}
    params = jax.tree.map(lambda p: p + 0.5, init(model)["params"])
    out = apply(model, {"params": params}, batch)
    for vectors in (out.pooled["image"], out.embeddings["image"]):
        assert not np.asarray(vectors[1]).any() and np.abs(vectors[jnp.asarray([0, 2])]).min(0).max() > 0
    alone = jax.tree.map(lambda x: x[1:2], batch)
    gradient = jax.jit(jax.grad(lambda p: model.apply({"params": p}, alone).embeddings["image"].sum()))(params)
    assert all(not np.asarray(g).any() for g in jax.tree.leaves(gradient))
