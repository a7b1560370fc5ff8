"""Heads by value, against their formulas in NumPy."""

import jax
import numpy as np
import pytest

import mmx
from mmx.errors import InputError
from mmx.heads import Classifier, Pooler, Similarity, TiedDecoder, TokenClassifier
from mmx.modalities import Features, Ids
from mmx.model import abstract_params
from mmx.topologies import PerStream
from mmx.types import Tokens


@pytest.fixture(scope="module")
def setting():
    """A model without layers, whose streams are its embeddings, with random parameters, and what it answers."""
    rng = np.random.default_rng(0)
    outputs = {
        "product": Classifier(3, fuse="product", transform=False),
        "sum": Classifier(3, fuse="sum", transform=False),
        "beside": Classifier(3, ("text", "image"), transform=False),
        "space": Similarity(5, {"text": "text", "pair": ("image", "text")}),
        "own": Classifier(3, "text", activation="relu", norm=1e-12, norm_first=True, pooler=Pooler("last")),
        "residual": Classifier(3, "text", residual="relu", transform=False),
        "wide": Classifier(3, "text", size=10, activation="relu", norm=1e-12),
        "tokens": TokenClassifier(4, "image", size=10, activation="relu", norm=1e-12),
        "several": TokenClassifier({"a": 2, "b": 3}, "image", transform=False),
        "both": TiedDecoder("text", transform=False, streams=("text", "image")),
        "regression": TiedDecoder("image", transform=False),
    }
    modalities = {"text": Ids(20, 4), "image": Features(6, 5)}
    model = mmx.build_model(modalities, (PerStream(0),), width=8, embed=0, outputs=outputs)
    batch = {"text": rng.integers(0, 20, (2, 4)), "image": rng.standard_normal((2, 5, 6)).astype("f")}
    params = jax.tree.map(lambda p: rng.standard_normal(p.shape).astype("f"), abstract_params(model))
    call = jax.jit(lambda batch: model.apply({"params": params}, batch))
    return call, params, batch, call(batch)


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def transformed(x, p):
    x = np.maximum(dense(x, p["transform"]), 0)
    x = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    return x * p["norm"]["scale"] + p["norm"]["bias"]


def test_streams_that_are_fused(setting):
    call, params, batch, out = setting
    text, image = (out.streams[n].values.mean(1) for n in ("text", "image"))
    for name, fused in (("product", text * image), ("sum", text + image)):
        np.testing.assert_allclose(out.logits[name], dense(fused, params[f"heads_{name}"]["classifier"]), atol=1e-4)
    alone = call({"text": batch["text"]})
    for name in ("product", "sum"):
        np.testing.assert_allclose(alone.logits[name], dense(text, params[f"heads_{name}"]["classifier"]), atol=1e-4)
    p = params["heads_beside"]["classifier"]
    np.testing.assert_allclose(out.logits["beside"], dense(np.concatenate([text, image], -1), p), atol=1e-4)
    np.testing.assert_allclose(alone.logits["beside"], dense(np.concatenate([text, 0 * text], -1), p), atol=1e-4)
    with pytest.raises(InputError, match="unknown fuse 'prodct'; did you mean 'product'"):
        Classifier(3, fuse="prodct").init(jax.random.key(0), out.streams, out.pooled, {})


def test_streams_side_by_side(setting):
    call, params, batch, out = setting
    text, image = (out.streams[n].values.mean(1) for n in ("text", "image"))
    found = dense(np.concatenate([text, image], -1), params["heads_beside"]["classifier"])
    np.testing.assert_allclose(out.logits["beside"], found, atol=1e-4)
    for name, x in (("text", text), ("pair", np.concatenate([image, text], -1))):
        x = dense(x, params["heads_space"][name]["projection"])
        x = x / np.linalg.norm(x, axis=-1, keepdims=True)
        np.testing.assert_allclose(out.logits["space"][name], x, atol=1e-5)
    np.testing.assert_allclose(out.logits["space"]["scale"], np.exp(params["heads_space"]["logit_scale"]), rtol=1e-6)
    alone = call({"text": batch["text"]}).logits["beside"]  # zeros for what is absent
    found = dense(np.concatenate([text, np.zeros_like(image)], -1), params["heads_beside"]["classifier"])
    np.testing.assert_allclose(alone, found, atol=1e-4)


def test_what_stands_before_the_last_matrix(setting):
    _, params, _, out = setting
    text, image = out.streams["text"].values, out.streams["image"].values
    p = params["heads_own"]
    x = dense(text[:, -1], p["transform"])
    x = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) * p["norm"]["scale"] + p["norm"]["bias"]
    np.testing.assert_allclose(out.logits["own"], dense(np.maximum(x, 0), p["classifier"]), atol=1e-4)
    p = params["heads_wide"]
    np.testing.assert_allclose(out.logits["wide"], dense(transformed(text.mean(1), p), p["classifier"]), atol=1e-4)
    p = params["heads_residual"]
    added = dense(np.maximum(dense(text.mean(1), p["residual"]["up"]), 0), p["residual"]["down"])
    np.testing.assert_allclose(out.logits["residual"], dense(text.mean(1) + added, p["classifier"]), atol=1e-4)
    p = params["heads_tokens"]
    np.testing.assert_allclose(out.logits["tokens"], dense(transformed(image, p), p["classifier"]), atol=1e-4)
    for name in ("a", "b"):
        expected = dense(image, params["heads_several"][f"classifier_{name}"])
        np.testing.assert_allclose(out.logits["several"][name], expected, atol=1e-4)


def test_classes_of_learned_tokens():
    x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype("f")
    streams = {"image": Tokens(x, special=("class", "distillation"))}
    out, found = TokenClassifier(3, "image", transform=False, special=True).init_with_output(jax.random.key(0), streams, {}, {})
    np.testing.assert_allclose(out, dense(x[:, :2], found["params"]["classifier"]), atol=1e-5)


def test_tied_matrices(setting):
    call, params, batch, out = setting
    both = np.concatenate([out.streams[n].values for n in ("text", "image")], 1)
    expected = both @ params["modalities_text"]["token"]["embedding"].T + params["heads_both"]["decoder_bias"]
    np.testing.assert_allclose(out.logits["both"], expected, atol=1e-4)
    features = out.streams["image"].values @ params["modalities_image"]["linear"]["kernel"].T
    np.testing.assert_allclose(out.logits["regression"], features + params["heads_regression"]["decoder_bias"], atol=1e-4)
    alone = call({"text": batch["text"]}).logits
    assert alone["both"].shape == (2, 4, 20) and "regression" not in alone and "tokens" not in alone
