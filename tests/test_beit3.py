"""BEiT-3 against NumPy, by the published names of its weights: one example at a time, image and text as two lists of tokens."""

import json
import math

import numpy as np
import pytest
import safetensors.numpy

import mmx

D, HEADS, F, LAYERS, PATCH, SIDE, CHANNELS, VOCAB, PLACES = 8, 2, 12, 2, 4, 9, 2, 20, 12
CONFIG = {
    "vocab_size": VOCAB,
    "encoder_embed_dim": D,
    "encoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "encoder_ffn_embed_dim": F,
    "layernorm_eps": 1e-3,
    "max_source_positions": PLACES,
    "img_size": SIDE,
    "patch_size": PATCH,
    "in_chans": CHANNELS,
    "num_classes": 5,
}
WAYS = ("A", "B")


def shapes(head="", **fields):
    """Every tensor of the published class with this head."""
    patches = (SIDE // PATCH) ** 2
    named = {
        "beit3.text_embed.weight": (VOCAB, D),
        "beit3.vision_embed.cls_token": (1, 1, D),
        "beit3.vision_embed.mask_token": (1, 1, D),
        "beit3.vision_embed.proj.weight": (D, CHANNELS, PATCH, PATCH),
        "beit3.vision_embed.proj.bias": (D,),
        "beit3.encoder.embed_positions.A.weight": (patches + 1 + 2, D),
        "beit3.encoder.embed_positions.B.weight": (PLACES, D),
    }
    norms, dense = {}, {}
    for way in WAYS:
        if fields.get("normalize_output", True):
            norms[f"beit3.encoder.layer_norm.{way}"] = D
        if fields.get("layernorm_embedding"):
            norms[f"beit3.encoder.layernorm_embedding.{way}"] = D
        for layer in (f"beit3.encoder.layers.{i}" for i in range(LAYERS)):
            dense |= {f"{layer}.self_attn.{n}_proj.{way}": (D, D) for n in ("q", "k", "v", "out")}
            dense |= {f"{layer}.ffn.{way}.fc1": (F, D), f"{layer}.ffn.{way}.fc2": (D, F)}
            norms |= {f"{layer}.self_attn_layer_norm.{way}": D, f"{layer}.final_layer_norm.{way}": D}
            if fields.get("subln", True):
                norms |= {f"{layer}.self_attn.inner_attn_ln.{way}": D, f"{layer}.ffn.{way}.ffn_layernorm": F}
    if head == "classification":
        norms["fc_norm"], dense["head"] = D, (5, D)
    elif head == "answering":
        norms |= {"pooler.norm": D, "head.1": 2 * D}
        dense |= {"pooler.dense": (D, D), "head.0": (2 * D, D), "head.3": (5, 2 * D)}
    elif head == "captioning":
        dense["mlm_head"] = (VOCAB, D)
    elif head == "retrieval":
        named |= {"language_head.weight": (D, D), "vision_head.weight": (D, D), "logit_scale": ()}
    for name, size in norms.items():
        named |= {f"{name}.weight": (size,), f"{name}.bias": (size,)}
    for name, shape in dense.items():
        named |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return named


def load(folder, rng, head="", **fields):
    tensors = {name: np.asarray(0.5 * rng.standard_normal(shape), "f") for name, shape in shapes(head, **fields).items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **fields}))
    return mmx.load_pretrained(folder, family="beit3"), {n: x.astype(np.float64) for n, x in tensors.items()}


def norm(x, w, name, eps=CONFIG["layernorm_eps"]):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def dense(x, w, name):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def encoder(w, pixels=None, ids=None, padding=None, hidden=None, causal=False, **fields):
    """All tokens, the image's first: `(L, D)`."""
    x, real = {}, []
    if pixels is not None:
        rows = range(0, SIDE - PATCH + 1, PATCH)
        cut = np.stack([pixels[:, r : r + PATCH, c : c + PATCH] for r in rows for c in rows])
        tokens = np.einsum("lcij,dcij->ld", cut, w["beit3.vision_embed.proj.weight"]) + w["beit3.vision_embed.proj.bias"]
        if hidden is not None:
            tokens[hidden] = w["beit3.vision_embed.mask_token"][0, 0]
        tokens = np.concatenate([w["beit3.vision_embed.cls_token"][0], tokens])
        x["A"] = tokens + w["beit3.encoder.embed_positions.A.weight"][2:]
        real += [True] * len(tokens)
    if ids is not None:
        x["B"] = w["beit3.text_embed.weight"][ids] + w["beit3.encoder.embed_positions.B.weight"][2 : 2 + len(ids)]
        real += [True] * len(ids) if padding is None else [not p for p in padding]
    real, image = np.asarray(real), len(x.get("A", ()))

    def each(x, apply):
        return {way: apply(tokens, way) for way, tokens in x.items()}

    def joint(x):
        return np.concatenate(list(x.values()))

    def apart(y):
        return {way: y[:image] if way == "A" else y[image:] for way in x}

    if fields.get("layernorm_embedding"):
        x = each(x, lambda t, way: norm(t, w, f"beit3.encoder.layernorm_embedding.{way}"))
    x = apart(joint(x) * real[:, None])
    sees = np.broadcast_to(real, (len(real), len(real))).copy()
    if causal:
        sees[:image, image:] = False
        sees[image:, image:] &= np.tril(np.ones((len(real) - image,) * 2, bool))
    inside = fields.get("subln", True)
    before = fields.get("encoder_normalize_before", True) or inside
    for layer in (f"beit3.encoder.layers.{i}" for i in range(LAYERS)):

        def attention(x, layer=layer):
            q, k, v = (joint(each(x, lambda t, way, n=n: dense(t, w, f"{layer}.self_attn.{n}_proj.{way}"))) for n in "qkv")
            q, k, v = (y.reshape(len(y), HEADS, -1).swapaxes(0, 1) for y in (q, k, v))
            weights = np.exp(q @ k.swapaxes(1, 2) / math.sqrt(D // HEADS)) * sees
            y = apart((weights / weights.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(-1, D))
            if inside:
                y = each(y, lambda t, way: norm(t, w, f"{layer}.self_attn.inner_attn_ln.{way}"))
            return each(y, lambda t, way: dense(t, w, f"{layer}.self_attn.out_proj.{way}"))

        def mlp(x, layer=layer):
            y = each(x, lambda t, way: gelu(dense(t, w, f"{layer}.ffn.{way}.fc1")))
            if inside:
                y = each(y, lambda t, way: norm(t, w, f"{layer}.ffn.{way}.ffn_layernorm"))
            return each(y, lambda t, way: dense(t, w, f"{layer}.ffn.{way}.fc2"))

        for sublayer, name in ((attention, "self_attn_layer_norm"), (mlp, "final_layer_norm")):

            def normed(x, name=f"{layer}.{name}"):
                return each(x, lambda t, way: norm(t, w, f"{name}.{way}"))

            y = sublayer(normed(x) if before else x)
            x = each(x, lambda t, way, y=y: t + y[way])
            x = x if before else normed(x)
    if before and fields.get("normalize_output", True):
        x = each(x, lambda t, way: norm(t, w, f"beit3.encoder.layer_norm.{way}"))
    return joint(x)


def given(rng):
    pixels, ids = rng.standard_normal((2, CHANNELS, SIDE, SIDE)).astype("f"), rng.integers(0, VOCAB, (2, 4))
    return pixels, ids, np.asarray([[0, 0, 0, 0], [0, 0, 1, 1]])


@pytest.mark.parametrize(
    "fields",
    [{}, {"subln": False, "layernorm_embedding": True}, {"subln": False, "encoder_normalize_before": False}],
    ids=["inner norms", "embedding norm", "post-norm"],
)
def test_the_encoder_is_its_formula(tmp_path, rng, fields):
    if not fields.get("encoder_normalize_before", True):
        fields = {**fields, "normalize_output": False}
    pretrained, w = load(tmp_path, rng, **fields)
    pixels, ids, padding = given(rng)
    hidden = rng.random((2, 4)) < 0.5
    found = pretrained(visual_tokens=pixels, textual_tokens=ids, text_padding_position=padding, vision_masked_position=hidden)
    for b in range(2):
        expected = encoder(w, pixels[b], ids[b], padding[b], hidden[b], **fields)
        np.testing.assert_allclose(found["encoder_out"][b], expected, atol=1e-4)
    alone = pretrained(textual_tokens=ids, text_padding_position=padding)["encoder_out"]
    np.testing.assert_allclose(alone[1], encoder(w, None, ids[1], padding[1], **fields), atol=1e-4)
    alone = pretrained(visual_tokens=pixels)["encoder_out"]
    np.testing.assert_allclose(alone[1], encoder(w, pixels[1], **fields), atol=1e-4)
    mmx.save_pretrained(tmp_path / "again", pretrained)
    saved = safetensors.numpy.load_file(tmp_path / "again" / "model.safetensors")
    assert {name: x.shape for name, x in saved.items()} == shapes(**fields)
    for name, x in saved.items():
        np.testing.assert_array_equal(x, w[name].astype("f"))


def test_classes_and_answers(tmp_path, rng):
    pixels, ids, padding = given(rng)
    pretrained, w = load(tmp_path, rng, "classification", normalize_output=False)
    logits = pretrained(image=pixels)["logits"]
    mean = encoder(w, pixels[0], normalize_output=False)[1:].mean(0)
    np.testing.assert_allclose(logits[0], dense(norm(mean, w, "fc_norm", 1e-5), w, "head"), atol=1e-4)
    pretrained, w = load(tmp_path, rng, "answering", normalize_output=False)
    logits = pretrained(image=pixels, question=ids, padding_mask=padding)["logits"]
    first = encoder(w, pixels[1], ids[1], padding[1], normalize_output=False)[0]
    x = np.tanh(dense(norm(first, w, "pooler.norm", 1e-5), w, "pooler.dense"))
    x = gelu(norm(dense(x, w, "head.0"), w, "head.1", 1e-5))
    np.testing.assert_allclose(logits[1], dense(x, w, "head.3"), atol=1e-4)


def test_captions_see_the_image_and_their_past(tmp_path, rng):
    pixels, ids, padding = given(rng)
    pretrained, w = load(tmp_path, rng, "captioning")
    words = np.asarray([[0, 1, 0, 1], [1, 0, 0, 0]])
    logits = pretrained(image=pixels, text_ids=ids, padding_mask=padding, language_masked_pos=words)["logits"]
    expected = [dense(encoder(w, pixels[b], ids[b], padding[b], causal=True)[5:], w, "mlm_head")[words[b] == 1] for b in (0, 1)]
    np.testing.assert_allclose(logits, np.concatenate(expected), atol=1e-4)


def test_retrieval_reads_each_alone(tmp_path, rng):
    pixels, ids, padding = given(rng)
    pretrained, w = load(tmp_path, rng, "retrieval")
    found = pretrained(image=pixels, text_description=ids, padding_mask=padding)
    image = np.stack([encoder(w, x)[0] @ w["vision_head.weight"].T for x in pixels])
    text = np.stack([encoder(w, None, x, p)[0] @ w["language_head.weight"].T for x, p in zip(ids, padding, strict=True)])
    image, text = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (image, text))
    np.testing.assert_allclose(found["vision_cls"], image, atol=1e-4)
    np.testing.assert_allclose(found["language_cls"], text, atol=1e-4)
    scores = np.exp(w["logit_scale"]) * image @ text.T
    losses = [np.log(np.exp(s).sum(1)) - np.diag(s) for s in (scores, scores.T)]
    np.testing.assert_allclose(found["loss"], np.mean(losses), atol=1e-4)
    assert "encoder_out" not in found
