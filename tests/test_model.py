"""Models: any subset of modalities, any topology, clear errors."""

import jax
import numpy as np
import pytest

import mmx
from mmx.errors import InputError
from mmx.heads import Classifier, TiedDecoder
from mmx.modalities import Ids, Patches
from mmx.topologies import TOPOLOGIES, cross_attention, early_concatenation


def modalities():
    return {"image": Patches((16, 16), (8, 8)), "text": Ids(50, 6), "audio": Ids(20, 5)}


def build(topology="multi_to_one", **options):
    outputs = {"matching": Classifier(2), "captioning": TiedDecoder("text")}
    return mmx.build_model(modalities(), topology, width=16, depth=2, heads=2, outputs=outputs, **options)


def init(model):
    return jax.jit(lambda key: model.init(key, mmx.example_batch(model)))(jax.random.key(0))


@pytest.fixture
def inputs(rng):
    mask = np.arange(6) < rng.integers(2, 7, (4, 1))
    return {
        "image": rng.integers(0, 256, (4, 16, 16, 3), np.uint8),
        "text": mmx.Masked(rng.integers(0, 50, (4, 6)), mask),
        "audio": rng.integers(0, 20, (4, 5)),
    }


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_any_subset_embeds(topology, inputs):
    """Every subset of modalities works, and equals the whole batch with the others masked in every example."""
    model = build(topology)
    variables, apply = init(model), jax.jit(model.apply)
    for present in (["image"], ["text"], ["image", "audio"], ["image", "text", "audio"]):
        subset = {name: inputs[name] for name in present}
        out = apply(variables, subset)
        assert set(out.embeddings) == set(present)
        masked = {name: _mask(value, name in present) for name, value in inputs.items()}
        everything = apply(variables, masked)
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
    variables, apply = init(model), jax.jit(model.apply)
    normalised = (image.astype(np.float32) / 255 - 0.5) / 0.5
    a, b = (apply(variables, {"image": x}).embeddings["image"] for x in (image, normalised))
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_topology_is_a_tuple_of_stages(inputs):
    model = build(cross_attention(1) + early_concatenation(1))
    assert init(model)["params"].keys() >= {"stages_0", "stages_1"}


def test_embeddings_can_be_left_out(inputs):
    model = build(embed=0)
    out = model.apply(init(model), inputs)
    assert out.embeddings == {} and out.logit_scale is None
    model = build(logit_scale=None)
    params = init(model)
    out = model.apply(params, inputs)
    assert out.embeddings and out.logit_scale is None and "logit_scale" not in params["params"]


def test_streams_may_be_pooled_before_the_last_stage(inputs):
    """Two towers meet in the shared space, and then in the stages behind; heads read the end."""
    towers, both = mmx.topologies.PerStream(1), mmx.topologies.Joint(1)
    heads = {"all": mmx.heads.TokenScores(5), "some": mmx.heads.TokenScores(5, ("text",), bias=False)}
    model = mmx.build_model(modalities(), (towers, both), width=16, heads=2, pool_after=1, outputs=heads)
    variables = init(model)
    out = model.apply(variables, inputs)
    params = {n: p for n, p in variables["params"].items() if not n.startswith(("stages_1", "heads"))}
    alone = mmx.build_model(modalities(), (towers,), width=16, heads=2).apply({"params": params}, inputs)
    for name in out.embeddings:
        np.testing.assert_array_equal(out.pooled[name], alone.pooled[name])
        np.testing.assert_array_equal(out.embeddings[name], alone.embeddings[name])
    x = np.concatenate([tokens.values for tokens in out.streams.values()], 1)
    p = variables["params"]["heads_all"]["classifier"]
    np.testing.assert_allclose(out.logits["all"], x @ p["kernel"] + p["bias"], atol=1e-5)
    kernel = variables["params"]["heads_some"]["classifier"]["kernel"]
    np.testing.assert_allclose(out.logits["some"], out.streams["text"].values @ kernel, atol=1e-5)


def test_dtype_reaches_every_part(inputs):
    model = build(dtype="bfloat16")
    shapes = jax.eval_shape(lambda b: model.init_with_output(jax.random.key(0), b)[0], inputs)
    assert {t.values.dtype for t in shapes.streams.values()} == {jax.numpy.dtype("bfloat16")}
    assert {x.dtype for x in (*shapes.embeddings.values(), *shapes.logits.values())} == {np.dtype("float32")}


def test_full_size_model_has_the_parameters_of_its_formula():
    """A 12-layer joint encoder of width 768: 12 d^2 + 13 d per layer, embeddings, one norm."""
    model = mmx.build_model({"text": Ids(30522, 512)}, "early_concatenation", width=768, depth=12, heads=12, embed=0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), mmx.example_batch(model)))
    width = 768
    assert mmx.count_parameters(shapes) == 12 * (12 * width**2 + 13 * width) + (30522 + 512) * width + 2 * width


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
    model = build()
    with pytest.raises(InputError, match=message):
        model.apply(init(model), batch)


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
        model = build()
        model.apply(init(model), {"text": np.zeros((1, 6), int)}, ("speech",))
