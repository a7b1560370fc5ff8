"""Every kind of token: every row of the survey's table runs at its real size, and what is masked changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmx
from mmx.data.image import cut_patches, patch_grid
from mmx.errors import InputError
from mmx.modalities import Features, Graph, Ids, PackedPatches, Patches, Points, Spectrogram, Strokes, Waveform
from mmx.modalities.catalogue import FURTHER, SURVEY
from mmx.modalities.masking import unmask
from mmx.modalities.waveform import WAV2VEC2
from mmx.parallel import MeshConfig, make_mesh, shardings
from mmx.types import Masked

SMALL = {
    "ids": Ids(50, 7, tables={"segment": 2}, vectors={"time": 1}),
    "image": Patches((8, 12), (4, 4), special=("class", "distillation")),
    "video": Patches((4, 8, 8), (2, 4, 4), position="sincos", type=True),
    "volume": Patches((4, 4, 4), (2, 2, 2), 1, position="fourier"),
    "any size": PackedPatches(9, (4, 4), (3, 3), special=("class",)),
    "regions": Features(10, 5, vectors={"box": 5}, norm=1e-12),
    "segments": Waveform(60, ((10, 10),)),
    "convolved": Waveform(70, ((10, 5), (3, 2)), 8),
    "speech": Waveform(70, ((10, 5), (3, 2)), (6, 10), feature_norm=1e-5, position_window=(4, 2), position="none", norm=1e-5),
    "frames": Spectrogram(9, 6),
    "gated": Spectrogram(9, 6, "gated"),
    "planes": Spectrogram(9, 6, "cnn"),
    "halved": Spectrogram(9, 6, "strided"),
    "points": Points(6, special=("class",)),
    "nodes": Graph(6, channels=4),
    "codes": Graph(6, vocab=20, layers=1, tables={"kind": 2}),
    "strokes": Strokes(6),
}
LIMITS = {"ids": 20, "nodes": 20, "pen": 3, "segment": 2, "kind": 2, "place": 3}


def example(module, rng, batch_size=2):
    """An example with random content."""
    raw, mask = unmask(module.example(batch_size))

    def fill(name, x):
        if name == "extent":
            return np.full(x.shape, 3, np.int32)
        if name == "edges":
            return rng.random(x.shape) < 0.4
        if np.issubdtype(x.dtype, np.integer):
            return rng.integers(0, 255 if x.dtype == np.uint8 else LIMITS.get(name, 2), x.shape).astype(x.dtype)
        return rng.standard_normal(x.shape).astype(x.dtype)

    fields = raw if isinstance(raw, dict) else {module.reads[0]: raw}
    raw = {name: fill(name, x) for name, x in fields.items()}
    raw = raw if len(raw) > 1 else next(iter(raw.values()))
    return raw if mask is None else Masked(raw, np.asarray(mask))


def at_mask(tokens):
    return np.where(tokens.dense_mask[..., None], tokens.values, 0)


def drawn(rng, module, *inputs):
    """Random parameters; their shapes alone are asked for, so that nothing is compiled to draw others."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))
    return jax.tree.map(lambda p: rng.standard_normal(p.shape).astype("f"), shapes)


def test_the_table_has_every_row_of_the_survey():
    table = mmx.modalities.list()
    assert len(SURVEY) == 30 and len(table.splitlines()) == 2 + 30 + len(FURTHER)
    assert "| text | word | learned embedding | Transformer, BERT | Ids | ids (512), segment (512) |" in table
    kinds = {type(row.make()).__name__ for row in (*SURVEY, *FURTHER)}
    assert kinds == {"Ids", "Patches", "PackedPatches", "Features", "Waveform", "Spectrogram", "Points", "Graph", "Strokes"}


@pytest.mark.parametrize("row", (*SURVEY, *FURTHER), ids=lambda row: f"{row.modality}-{row.token}-{row.embedding}")
def test_every_row_runs_at_its_real_size(row, rng):
    module = row.make().clone(width=8)
    raw = example(module, rng, 1)
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), raw))["params"]
    params = jax.tree.map(lambda p: (0.1 * rng.standard_normal(p.shape)).astype(p.dtype), params)

    def loss(params):
        tokens = module.apply({"params": params}, raw)
        assert tokens.values.shape == (1, len(module.special) + int(np.prod(module.grid)), 8)
        return jnp.square(tokens.values).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value) and value > 0
    for path, g in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(g).all() and np.abs(g).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("kind", SMALL)
def test_what_is_masked_changes_nothing(kind, rng):
    """Neither in another example, nor at another token, nor as a NaN."""
    module = SMALL[kind].clone(width=8)
    raw, mask = unmask(example(module, rng, 3))
    length = len(mask[0]) if mask is not None else int(np.prod(module.grid))
    mask = np.ones((3, length), bool)
    mask[0] = False
    mask[1, length // 2 :] = False
    fields = raw if isinstance(raw, dict) else {module.reads[0]: raw}
    params = module.init(jax.random.key(0), Masked(raw, mask))["params"]

    def poisoned(name, x):
        if name == "extent":
            return x
        x = np.array(x)
        if kind in ("image", "video", "volume"):  # their mask is over patches
            x[0] = 255 - x[0]
            return x
        bad = np.nan if np.issubdtype(x.dtype, np.floating) else (1 if x.dtype == bool else x.dtype.type(1))
        if name == "edges":
            x[:, :, :][~mask] = True
            x.swapaxes(1, 2)[~mask] = True
            return x
        x[~mask] = bad
        return x

    other = {name: poisoned(name, x) for name, x in fields.items()}
    other = other if isinstance(raw, dict) else other[module.reads[0]]
    clean, dirty = (module.apply({"params": params}, Masked(r, mask)) for r in (raw, other))
    np.testing.assert_array_equal(clean.dense_mask, dirty.dense_mask)
    assert not clean.dense_mask[0].any() and clean.dense_mask[1].any() and clean.dense_mask[2].all()
    np.testing.assert_allclose(clean.values, dirty.values, atol=1e-6)
    assert not np.asarray(clean.values)[~np.asarray(clean.dense_mask)].any()


@pytest.mark.parametrize("kind", SMALL)
def test_no_example_changes_another(kind, rng):
    module = SMALL[kind].clone(width=8)
    raw = example(module, rng, 3)
    params = module.init(jax.random.key(0), raw)["params"]
    whole = module.apply({"params": params}, raw)
    one = module.apply({"params": params}, jax.tree.map(lambda x: x[1:2], raw))
    np.testing.assert_allclose(whole.values[1:2], one.values, atol=2e-5)


def test_a_token_is_a_sum(rng):
    module = Ids(50, 7, tables={"segment": 2, "row": 5}, vectors={"time": 3}, type=True, width=8)
    raw = {
        "ids": rng.integers(0, 50, (2, 7)),
        "segment": rng.integers(0, 2, (2, 7)),
        "row": rng.integers(0, 5, (2, 7)),
        "time": rng.standard_normal((2, 7, 3)).astype("f"),
    }
    params = drawn(rng, module, raw)["params"]
    expected = (
        params["token"]["embedding"][raw["ids"]]
        + params["position"]
        + params["segment"]["embedding"][raw["segment"]]
        + params["row"]["embedding"][raw["row"]]
        + raw["time"] @ params["time_linear"]["kernel"]
        + params["time_linear"]["bias"]
        + params["type_bias"]
    )
    np.testing.assert_allclose(module.apply({"params": params}, raw).values, expected, atol=1e-5)
    normed = module.clone(norm=1e-12)
    params = {**params, "norm": {"scale": np.full(8, 2.0, "f"), "bias": np.full(8, 1.0, "f")}}
    expected = (expected - expected.mean(-1, keepdims=True)) / expected.std(-1, keepdims=True) * 2 + 1
    np.testing.assert_allclose(normed.apply({"params": params}, raw).values, expected, atol=1e-4)


def normed(x, p, eps=1e-12):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def test_summands_with_norms_of_their_own_and_their_mean(rng):
    """LXMERT: each has a norm, and they are averaged; a hidden feature gets a learned one before that (UNITER)."""
    module = Features(6, 5, vectors={"box": 4}, each_norm=1e-12, average=True, marked=True, width=8)
    raw = {
        "features": rng.standard_normal((2, 5, 6)).astype("f"),
        "box": rng.random((2, 5, 4)).astype("f"),
        "marked": rng.integers(0, 2, (2, 5)),
    }
    params = drawn(rng, module, raw)["params"]

    def dense(x, p):
        return x @ p["kernel"] + p["bias"]

    boxes = normed(dense(raw["box"], params["box_linear"]), params["box_norm"])
    for here in (raw["marked"], 0 * raw["marked"]):
        features = raw["features"] + here[..., None] * params["marked"]["embedding"][1]
        expected = (normed(dense(features, params["linear"]), params["value_norm"]) + boxes) / 2
        found = module.apply({"params": params}, {**raw, "marked": here}).values
        np.testing.assert_allclose(found, expected, atol=1e-5)
    unmarked = {n: x for n, x in raw.items() if n != "marked"}
    np.testing.assert_allclose(module.apply({"params": params}, unmarked).values, expected, atol=1e-5)


def test_a_modality_reads_the_table_and_the_norm_of_another(rng):
    text = Ids(20, 4, tables={"segment": 3}, norm=1e-12)
    image = Features(6, 5, tables={"segment": "text"}, norm="text", aligned="text")
    model = mmx.build_model({"text": text, "image": image}, (mmx.topologies.PerStream(0),), width=8, embed=0)
    batch = {
        "text": {"ids": rng.integers(0, 20, (2, 4)), "segment": rng.integers(0, 3, (2, 4))},
        "image": {"features": rng.standard_normal((2, 5, 6)).astype("f"), "segment": rng.integers(0, 3, (2, 5))},
    }
    params = drawn(rng, model, batch)["params"]
    assert set(params["modalities_image"]) == {"linear"}
    words = params["modalities_text"]
    expected = batch["image"]["features"] @ params["modalities_image"]["linear"]["kernel"]
    expected += params["modalities_image"]["linear"]["bias"] + words["segment"]["embedding"][batch["image"]["segment"]]
    for given in (batch, {"image": batch["image"]}):  # the text itself need not be there
        found = model.apply({"params": params}, given).streams["image"].values
        np.testing.assert_allclose(found, normed(expected, words["norm"]), atol=1e-4)
    places = np.broadcast_to([[2, -1], [-1, -1], [0, 3], [-1, 1], [1, 1]], (2, 5, 2))
    table = words["position"]
    expected += np.stack([table[2], 0 * table[0], (table[0] + table[3]) / 2, table[1], table[1]])
    found = model.apply({"params": params}, {"image": {**batch["image"], "aligned": places}}).streams["image"].values
    np.testing.assert_allclose(found, normed(expected, words["norm"]), atol=1e-4)
    wrong = mmx.build_model({"image": image, "text": text}, (mmx.topologies.PerStream(0),), width=8, embed=0)
    with pytest.raises(InputError, match="modality 'text' has no 'segment' to lend; it has to come first"):
        wrong.init(jax.random.key(0), batch)


def test_embeddings_are_scaled_where_they_are_read(rng):
    module = Ids(9, 4, width=8, position="none", scale=3.0)
    ids = np.asarray([[1, 2, 5]])
    params = module.init(jax.random.key(0), ids)["params"]
    table = np.asarray(params["token"]["embedding"])
    np.testing.assert_allclose(module.apply({"params": params}, ids).values, 3 * table[ids], atol=1e-6)
    x = rng.standard_normal((1, 3, 8)).astype("f")
    np.testing.assert_allclose(module.apply({"params": params}, x, method="decode"), x @ table.T, atol=1e-5)


def test_positions_may_begin_behind_rows_that_nobody_reads(rng):
    words, image = Ids(9, 4, width=8, position_from=2), Patches((4, 4), (2, 2), 1, width=8, special=("class",),
                                                                special_position=True, position_from=2)  # fmt: skip
    raw = {"words": np.asarray([[1, 2, 5]]), "image": rng.standard_normal((1, 4, 4, 1)).astype("f")}
    for module, x, count in ((words, raw["words"], 4), (image, raw["image"], 5)):
        params = module.init(jax.random.key(0), x)["params"]
        assert params["position"].shape == (2 + count, 8)
        plain = module.clone(position_from=0).apply({"params": {**params, "position": params["position"][2:]}}, x)
        np.testing.assert_array_equal(module.apply({"params": params}, x).values, plain.values)
    told = words.apply({"params": (p := words.init(jax.random.key(0), raw["words"])["params"])},
                       {"ids": raw["words"], "place": np.asarray([[0, 1, 2]])})  # fmt: skip
    np.testing.assert_array_equal(told.values, words.apply({"params": p}, raw["words"]).values)


def test_a_raw_value_tells_places_groups_and_slots():
    module = Ids(9, 4, width=8, special=("class",))
    ids, place = np.asarray([[1, 2, 5]]), np.asarray([[2, 0, 1]])
    raw = {"ids": ids, "place": place, "group": np.asarray([[3, 3, -1]]), "slots": {"image": np.asarray([[-1, 0, 1]])}}
    params = module.init(jax.random.key(0), ids)["params"]
    tokens = module.apply({"params": params}, raw)
    np.testing.assert_array_equal(np.ravel(tokens.coordinates), [0, 2, 0, 1])
    np.testing.assert_array_equal(tokens.groups, [[-1, 3, 3, -1]])
    np.testing.assert_array_equal(tokens.slots["image"], [[-1, -1, 0, 1]])
    np.testing.assert_allclose(
        tokens.values[0, 1:], params["token"]["embedding"][ids[0]] + params["position"][place[0]], atol=1e-6
    )
    bare = tokens.without_special
    assert bare.special == () and bare.values.shape == (1, 3, 8)
    np.testing.assert_array_equal(bare.slots["image"], raw["slots"]["image"])
    pairs = np.asarray([[[-1, -1], [3, 0], [3, 1]]])  # of a stream with other rows: (row, place)
    told = module.apply({"params": params}, {**raw, "slots": {"image": pairs}})
    np.testing.assert_array_equal(told.slots["image"], np.pad(pairs, ((0, 0), (1, 0), (0, 0)), constant_values=-1))
    for wrong in ({"group": np.zeros((1, 2), int)}, {"slots": {"image": np.zeros((1, 3))}}):
        with pytest.raises(InputError, match="has to hold integers of shape"):
            module.apply({"params": params}, {**raw, **wrong})


def test_patches_of_any_rank_are_cut_in_order(rng):
    """Against loops, with the identity as the linear map."""
    video = rng.standard_normal((2, 4, 6, 9, 2)).astype("f")
    module = Patches((4, 6, 9), (2, 3, 3), 2, position="none", width=36)
    params = {"patch": {"kernel": np.eye(36, dtype="f"), "bias": np.zeros(36, "f")}}
    tokens = np.asarray(module.apply({"params": params}, video).values)
    expected = [video[:, t : t + 2, y : y + 3, x : x + 3].reshape(2, -1) for t in (0, 2) for y in (0, 3) for x in (0, 3, 6)]
    np.testing.assert_allclose(tokens, np.stack(expected, 1))


def test_patches_may_overlap(rng):
    """Against loops; what is left over at the end is cut off."""
    sound = rng.standard_normal((2, 7, 9, 1)).astype("f")
    module = Patches((7, 9), (4, 4), 1, stride=(2, 3), position="none", width=16)
    params = {"patch": {"kernel": np.eye(16, dtype="f"), "bias": np.zeros(16, "f")}}
    tokens = module.apply({"params": params}, sound)
    expected = [sound[:, y : y + 4, x : x + 4].reshape(2, -1) for y in (0, 2) for x in (0, 3)]
    np.testing.assert_array_equal(tokens.values, np.stack(expected, 1))
    assert module.grid == (2, 2) and tokens.coordinates.shape == (4, 2)
    with pytest.raises(InputError, match="does not fit size"):
        _ = Patches((3, 9), (4, 4), 1, stride=(2, 3)).grid


def test_special_tokens_stand_in_front(rng):
    module = Patches((8, 8), (4, 4), special=("class", "distillation"), width=8)
    image, mask = rng.integers(0, 255, (2, 8, 8, 3)).astype(np.uint8), np.asarray([True, False])
    tokens, variables = module.init_with_output(jax.random.key(0), Masked(image, mask))
    assert tokens.special == ("class", "distillation") and tokens.values.shape == (2, 6, 8)
    np.testing.assert_allclose(tokens.values[0, :2], variables["params"]["special"])
    np.testing.assert_array_equal(tokens.mask, np.repeat([[True], [False]], 6, 1))
    assert tokens.coordinates.shape == (6, 2)


def test_what_is_hidden_and_what_is_kept(rng):
    """A mask token takes the place of an embedding before its position is added; kept tokens stand where they stood."""
    module = Patches((8, 12), (4, 4), special=("class",), mask_token=True, width=8)
    image, hidden = rng.standard_normal((2, 8, 12, 3)).astype("f"), rng.integers(0, 2, (2, 6))
    params = module.init(jax.random.key(0), image)["params"]
    params = {**params, "mask_token": rng.standard_normal(8).astype("f")}
    whole = module.apply({"params": params}, image)
    some = module.apply({"params": params}, {"image": image, "hidden": hidden})
    expected = np.where(hidden[..., None], params["mask_token"] + params["position"], whole.values[:, 1:])
    np.testing.assert_allclose(some.values[:, 1:], expected, atol=1e-6)
    kept = np.asarray([[4, 0, 1], [5, 2, 3]])
    few = module.apply({"params": params}, Masked({"image": image, "kept": kept}, np.asarray([True, False])))
    np.testing.assert_array_equal(few.values[0], np.asarray(whole.values)[0, [0, 5, 1, 2]])
    assert not few.values[1].any() and few.mask.tolist() == [[True] * 4, [False] * 4]
    np.testing.assert_array_equal(few.coordinates[:, 1:], np.stack(np.divmod(kept, 3), -1))
    row = Ids(9, 5, width=8)
    tokens, _ = row.init_with_output(jax.random.key(0), {"ids": np.ones((2, 5), int), "kept": kept[:, ::-1] % 5})
    np.testing.assert_array_equal(tokens.coordinates[..., 0], kept[:, ::-1] % 5)
    with pytest.raises(InputError, match="set mask_token=True"):
        row.init(jax.random.key(0), {"ids": np.ones((2, 5), int), "hidden": np.ones((2, 5))})


def test_positions_of_a_video_may_be_divided(rng):
    module = Patches((4, 8, 8), (2, 4, 4), special=("class",), special_position=True, position="divided", width=8)
    video = rng.standard_normal((1, 4, 8, 8, 3)).astype("f")
    params = module.init(jax.random.key(0), video)["params"]
    assert params["position"].shape == (5, 8) and params["time_position"].shape == (2, 8)
    bare = module.clone(position="none", special_position=False)
    bare = bare.apply({"params": {n: params[n] for n in ("patch", "special")}}, video).values
    added = np.concatenate([params["position"][:1], (params["time_position"][:, None] + params["position"][1:]).reshape(-1, 8)])
    np.testing.assert_allclose(module.apply({"params": params}, video).values, bare + added, atol=1e-6)


def test_features_may_be_tokens_already(rng):
    x = rng.standard_normal((2, 3, 8)).astype("f")
    tokens = Features(8, 4, linear=False, width=8).apply({}, Masked(x, np.asarray([[1, 1, 0], [1, 1, 1]], bool)))
    np.testing.assert_array_equal(tokens.values, x * np.asarray([[1, 1, 0], [1, 1, 1]])[..., None])
    with pytest.raises(InputError, match="set linear=True"):
        Features(8, 4, linear=False, width=9).apply({}, x)


def test_the_linear_map_of_features_may_have_no_bias(rng):
    x, module = rng.standard_normal((2, 3, 5)).astype("f"), Features(5, 4, width=8, bias=False)
    params = module.init(jax.random.key(0), x)["params"]
    assert params["linear"].keys() == {"kernel"}
    np.testing.assert_allclose(module.apply({"params": params}, x).values, x @ params["linear"]["kernel"], atol=1e-5)


def test_features_are_normalised_before_the_linear_map_and_activated_behind_it(rng):
    x, module = rng.standard_normal((2, 3, 5)).astype("f"), Features(5, 4, width=8, input_norm=1e-5, activation="relu")
    params = module.init(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda p: rng.standard_normal(p.shape).astype("f"), params)
    norm, linear = params["input_norm"], params["linear"]
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * norm["scale"] + norm["bias"]
    expected = np.maximum(y @ linear["kernel"] + linear["bias"], 0)
    np.testing.assert_allclose(module.apply({"params": params}, x).values, expected, atol=1e-4)


def test_positions_follow_another_resolution(rng):
    small, large = (rng.integers(0, 255, (1, n, n, 3)).astype(np.uint8) for n in (8, 16))
    module = Patches((8, 8), (4, 4), resize=True, width=8)
    params = module.init(jax.random.key(0), small)["params"]
    assert module.apply({"params": params}, large).values.shape == (1, 16, 8)
    with pytest.raises(InputError, match="expected images of shape"):
        module.clone(resize=False).apply({"params": params}, large)
    with pytest.raises(InputError, match="not a multiple of patch"):
        module.apply({"params": params}, large[:, :10])


def test_images_of_any_size_share_one_program(rng):
    module, traces = PackedPatches(16, (4, 4), (4, 4), width=8), []

    @jax.jit
    def run(params, raw):
        traces.append(1)
        return module.apply({"params": params}, raw).values

    params = module.init(jax.random.key(0), module.example(1))["params"]
    for size in ((16, 16), (40, 10), (9, 70), (300, 200)):
        arrays, mask = cut_patches(rng.integers(0, 255, (*size, 3)).astype(np.uint8), (4, 4), 16)
        rows, columns = arrays["extent"]
        assert mask.sum() == rows * columns <= 16
        assert max(rows / columns * size[1] / size[0], columns / rows * size[0] / size[1]) < 2  # the aspect ratio, in patches
        run(params, jax.tree.map(lambda x: x[None], Masked(arrays, mask)))
    assert len(traces) == 1


def test_packed_patches_equal_patches_at_the_same_size(rng):
    image = rng.integers(0, 255, (16, 16, 3)).astype(np.uint8)
    arrays, mask = cut_patches(image, (4, 4), 16)
    fixed, packed = Patches((16, 16), (4, 4), width=8), PackedPatches(16, (4, 4), (4, 4), width=8)
    params = fixed.init(jax.random.key(0), image[None])["params"]
    a = fixed.apply({"params": params}, image[None])
    b = packed.apply({"params": params}, jax.tree.map(lambda x: x[None], Masked(arrays, mask)))
    np.testing.assert_allclose(a.values, b.values, atol=1e-5)


def test_packed_patches_read_their_positions_behind_those_of_special_tokens(rng):
    module = PackedPatches(4, (2, 2), (2, 2), width=8, special=("class",), special_position=True, sampling="align_corners")
    params = drawn(rng, module, module.example(1))
    patches, place = rng.random((1, 4, 12)).astype("f"), np.asarray([[[0, 0], [0, 1], [1, 0], [1, 1]]])
    tokens = module.apply(params, {"patches": patches, "place": place, "extent": np.asarray([[2, 2]])})
    p = params["params"]
    expected = np.concatenate([p["special"], patches[0] @ p["patch"]["kernel"] + p["patch"]["bias"]]) + p["position"]
    np.testing.assert_allclose(tokens.values[0], expected, atol=1e-5)


def test_several_rows_of_one_table_are_added_up(rng):
    module = Ids(5, 2, width=8, tables={"x": 7})
    raw = {"ids": np.asarray([[1, 3]]), "x": np.asarray([[[0, 6], [2, 2]]])}
    params = drawn(rng, module, raw)
    p, (a, b) = params["params"], np.moveaxis(raw["x"], -1, 0)
    expected = p["token"]["embedding"][raw["ids"]] + p["position"] + p["x"]["embedding"][a] + p["x"]["embedding"][b]
    np.testing.assert_allclose(module.apply(params, raw).values, expected, atol=1e-5)
    with pytest.raises(InputError, match="x has to hold integers of shape"):
        module.apply(params, {**raw, "x": raw["x"][:, :1]})
    longer = {"ids": np.asarray([[1, 3, 4]]), "x": np.zeros((1, 3), int), "place": np.asarray([[0, 1, 1]])}
    assert module.apply(params, longer).values.shape == (1, 3, 8)


def test_rows_of_several_tables_side_by_side(rng):
    module = Ids(5, 2, width=8, position="none", joined={"box": (("x", 7, 3), ("y", 7, 2), ("x", 7, 3))})
    raw = {"ids": np.asarray([[1, 3]]), "box": np.asarray([[[0, 6, 4], [2, 2, 1]]])}
    params = drawn(rng, module, raw)
    p, box = params["params"], raw["box"]
    sides = [p[table]["embedding"][box[..., i]] for i, table in enumerate("xyx")]
    expected = p["token"]["embedding"][raw["ids"]] + np.concatenate(sides, -1)
    np.testing.assert_allclose(module.apply(params, raw).values, expected, atol=1e-5)
    assert module.example(2).array["box"].shape == (2, 2, 3)


def test_a_raw_value_may_say_where_its_tokens_stand():
    module, where = Patches((4, 4), (2, 2), width=8, special=("class",)), np.arange(10).reshape(1, 5, 2)
    for given, expected in ((where, where), (where[:, 1:], np.pad(where[:, 1:], ((0, 0), (1, 0), (0, 0))))):
        tokens, _ = module.init_with_output(jax.random.key(0), {"image": np.zeros((1, 4, 4, 3), "f"), "coordinates": given})
        np.testing.assert_array_equal(tokens.coordinates, expected)


def test_a_text_may_have_the_embeddings_of_another():
    texts, head = (
        {"text": Ids(9, 4), "caption": Ids(9, 4, lender="text")},
        mmx.heads.TiedDecoder("caption", transform=False, bias=False),
    )
    model = mmx.build_model(texts, (mmx.topologies.PerStream(0),), width=8, outputs={"captioning": head}, embed=0)
    ids = np.asarray([[1, 5, 2]])
    params = model.init(jax.random.key(0), {"text": ids, "caption": ids})
    assert list(params["params"]) == ["modalities_text"]
    out = model.apply(params, {"text": ids, "caption": ids})
    np.testing.assert_array_equal(out.streams["caption"].values, out.streams["text"].values)
    alone = model.apply(params, {"caption": ids})
    table = params["params"]["modalities_text"]["token"]["embedding"]
    np.testing.assert_allclose(alone.logits["captioning"], out.streams["text"].values @ table.T, atol=1e-5)
    with pytest.raises(InputError, match="modality 'nobody' has no 'token' to lend"):
        Ids(9, 4, lender="nobody", width=8).init(jax.random.key(0), ids)


def test_the_type_stands_before_the_norm_or_behind_it(rng):
    ids = np.asarray([[1, 3]])
    for outside in (False, True):
        module = Ids(5, 2, width=8, position="none", type=True, norm=1e-6, type_outside=outside)
        params = drawn(rng, module, ids)
        p = params["params"]
        x = p["token"]["embedding"][ids] + (0 if outside else p["type_bias"])
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["norm"]["scale"] + p["norm"]["bias"]
        np.testing.assert_allclose(module.apply(params, ids).values, x + (p["type_bias"] if outside else 0), atol=1e-5)


def test_patch_grids():
    assert patch_grid((224, 224), (16, 16), 196) == (14, 14)
    assert patch_grid((1, 1), (16, 16), 9) == (3, 3)
    rows, columns = patch_grid((100, 1000), (16, 16), 64)
    assert rows * columns <= 64 and columns / rows > 5
    with pytest.raises(InputError, match="cannot be cut"):
        patch_grid((10, 10), (4, 4), 0)


def test_graph_convolution_is_the_formula(rng):
    module = Graph(4, channels=3, layers=2, width=5)
    nodes, edges = rng.standard_normal((1, 4, 3)).astype("f"), (rng.random((1, 4, 4)) < 0.5).astype("f")
    raw = {"nodes": nodes, "edges": edges}
    params = drawn(rng, module, raw)["params"]
    adjacency = np.maximum(edges[0], np.eye(4))
    root = np.diag(adjacency.sum(1) ** -0.5)
    adjacency = root @ adjacency @ root
    x = nodes[0] @ params["linear"]["kernel"] + params["linear"]["bias"]
    x = np.maximum(adjacency @ (x @ params["project_0"]["kernel"] + params["project_0"]["bias"]), 0)
    x = adjacency @ (x @ params["project_1"]["kernel"] + params["project_1"]["bias"])
    np.testing.assert_allclose(module.apply({"params": params}, raw).values[0], x, atol=1e-4)


def test_speech_is_the_formula(rng):
    """wav2vec 2.0's front end in NumPy: group norm, features, positions by a convolution in groups, kept padding."""
    window, groups = 4, 2
    module = Waveform(
        70, ((10, 5), (3, 2)), (6, 10), width=8, position="none", activation="relu", conv_norm="group", conv_bias=False, eps=1e-5,
        feature_norm=1e-5, position_window=(window, groups), norm=1e-5,
    )  # fmt: skip
    samples, here = rng.standard_normal((2, 60)).astype("f"), np.arange(60) < np.asarray([[40], [60]])
    raw = Masked(samples, here, keep=True)
    params = drawn(rng, module, raw)["params"]
    p = params["conv_position"]

    def norm(x, p, axis=-1):
        x = (x - x.mean(axis, keepdims=True)) / np.sqrt(x.var(axis, keepdims=True) + 1e-5)
        return x * p["scale"] + p["bias"]

    def conv(x, kernel, step):
        at = range(0, x.shape[1] - len(kernel) + 1, step)
        return np.stack([np.einsum("bki,kio->bo", x[:, t : t + len(kernel)], kernel) for t in at], 1)

    x = np.maximum(norm(conv(samples[..., None], params["conv_0"]["kernel"], 5), params["conv_norm_0"], 1), 0)
    x = np.maximum(conv(x, params["conv_1"]["kernel"], 2), 0)
    x = norm(x, params["feature_norm"]) @ params["linear"]["kernel"] + params["linear"]["bias"]
    mask = np.arange(x.shape[1]) < np.asarray([[3], [5]])  # a token takes 20 samples, and one begins every 10
    x = np.where(mask[..., None], x, 0)
    kernel = p["kernel"] / np.sqrt((p["kernel"] ** 2).sum((1, 2), keepdims=True)) * p["scale"][:, None, None]
    wide = np.pad(x, ((0, 0), (2, 2), (0, 0)))
    parts = zip(np.split(wide, groups, 2), np.split(kernel, groups, 2), strict=True)
    around = np.concatenate([conv(part, k, 1) for part, k in parts], 2)[:, : x.shape[1]] + p["bias"]
    found = module.apply({"params": params}, raw)
    np.testing.assert_array_equal(found.mask, mask)
    np.testing.assert_allclose(found.values, norm(x + np.maximum(around, 0), params["norm"]), atol=2e-4)


def test_halved_frames_are_two_convolutions(rng):
    """Whisper's front end against loops: every second place of the second convolution."""
    module, frames = Spectrogram(9, 6, "strided", width=4, position="none"), rng.standard_normal((2, 9, 6)).astype("f")
    params = drawn(rng, module, frames)["params"]

    def conv(x, p, step):
        x = np.pad(x, ((0, 0), (1, 1), (0, 0)))
        at = range(0, x.shape[1] - 2, step)
        return jax.nn.gelu(np.stack([np.einsum("bki,kio->bo", x[:, t : t + 3], p["kernel"]) + p["bias"] for t in at], 1), False)

    expected = conv(conv(frames, params["conv_0"], 1), params["conv_1"], 2)
    found = module.apply({"params": params}, frames).values
    assert found.shape == (2, 5, 4)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_embedding_of_ids_may_be_scaled_and_has_no_end_without_a_table(rng):
    table, ids = {"token": {"embedding": rng.standard_normal((9, 8)).astype("f")}}, rng.integers(0, 9, (2, 6))
    plain, scaled = (Ids(9, 4, width=8, position="none", scale=s).apply({"params": table}, ids).values for s in (1.0, 3.0))
    np.testing.assert_array_equal(plain, table["token"]["embedding"][ids])
    np.testing.assert_allclose(scaled, 3 * plain, rtol=1e-6)


def test_points_and_nodes_have_no_order(rng):
    order = rng.permutation(6)
    points = Points(6, width=8)
    raw = rng.standard_normal((1, 6, 3)).astype("f")
    params = points.init(jax.random.key(0), raw)
    np.testing.assert_allclose(points.apply(params, raw[:, order]).values, points.apply(params, raw).values[:, order], atol=1e-6)
    graph = Graph(6, channels=3, width=8)
    edges = rng.random((1, 6, 6)) < 0.5
    params = graph.init(jax.random.key(0), {"nodes": raw, "edges": edges})
    a = graph.apply(params, {"nodes": raw, "edges": edges}).values[:, order]
    b = graph.apply(params, {"nodes": raw[:, order], "edges": edges[:, order][:, :, order]}).values
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_wav2vec_has_a_token_for_20_ms():
    module = Waveform(16_000, WAV2VEC2, 8, width=8)
    assert module.grid == (49,)
    mask = jnp.arange(16_000)[None] < 8_000
    tokens = jax.jit(lambda x: module.init_with_output(jax.random.key(0), Masked(x, mask))[0].mask)(jnp.zeros((1, 16_000)))
    assert int(tokens.sum()) == 24  # (8000 - 400) // 320 + 1


@pytest.mark.parametrize(
    ("module", "raw", "message"),
    [
        (Ids(9, 4), np.zeros((2, 5), int), "5 tokens, but length=4"),
        (Ids(9, 4), np.zeros((2, 4)), "expected integer ids"),
        (Ids(9, 4, tables={"row": 3}), np.zeros((2, 4), int), "the raw value lacks row; give a dict of ids, row"),
        (Ids(9, 4), {"idz": np.zeros((2, 4), int)}, "did you mean 'ids'"),
        (
            Ids(9, 4, tables={"row": 3}),
            {"ids": np.zeros((2, 4), int), "row": np.zeros((2, 3), int)},
            r"integers of shape \(2, 4\)",
        ),
        (Ids(9, 4, position="learnt"), np.zeros((2, 4), int), "did you mean 'learned'"),
        (Features(5, 4), np.zeros((2, 4, 6)), r"shape \(B, L <= 4, 5\), got \(2, 4, 6\)"),
        (Features(5, 4), np.zeros((2, 5, 5)), "L <= 4"),
        (Features(5, 4, linear=False), np.zeros((2, 4, 5)), "features of size 5 are not tokens of width 8"),
        (Waveform(100, ((10, 10),)), np.zeros((2, 101)), "S <= 100"),
        (Waveform(100, ((10, 10),)), np.zeros((2, 100), int), "floating-point"),
        (Waveform(5, ((10, 10),)), np.zeros((2, 5)), "shorter than one token"),
        (Spectrogram(9, 6), np.zeros((2, 9, 5)), r"\(B, T <= 9, 6\)"),
        (Points(6), np.zeros((2, 6, 4)), r"\(B, P <= 6, 3\)"),
        (Graph(6), {"nodes": np.zeros((2, 6)), "edges": np.zeros((2, 6, 6))}, "set channels .* or vocab"),
        (Graph(6, vocab=3), {"nodes": np.zeros((2, 6), int), "edges": np.zeros((2, 5, 5))}, "edges"),
        (Strokes(6), {"points": np.zeros((2, 6, 3)), "pen": np.zeros((2, 6), int)}, r"points \(B, L <= 6, 2\)"),
        (PackedPatches(6, (4, 4), position="none"), PackedPatches(6, (4, 4)).example(1), "learned positions only"),
        (Ids(9, 4, tables={"position": 3}), np.zeros((2, 4), int), "cannot be the name of a table"),
        (PackedPatches(6, (4, 4)), np.zeros((2, 6, 48)), "the raw value lacks place, extent"),
    ],
)
def test_wrong_raw_arrays_are_refused(module, raw, message):
    with pytest.raises(InputError, match=message):
        module.clone(width=8).init(jax.random.key(0), raw)


@pytest.mark.slow
def test_every_kind_meets_every_other_in_one_model(rng):
    """All kinds at once, through a topology, forward and backward, and any one of them alone."""
    model = mmx.build_model({name.replace(" ", "_"): m for name, m in SMALL.items()}, "multi_to_one", width=16, depth=2, heads=2)
    batch = {name: example(m, rng) for name, m in model.modalities.items()}
    params = jax.jit(model.init)(jax.random.key(0), batch)["params"]

    def loss(params):
        return sum(e.sum() for e in model.apply({"params": params}, batch).embeddings.values())

    gradient = jax.jit(jax.grad(loss))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    alone = model.apply({"params": params}, {"convolved": batch["convolved"]})
    assert list(alone.embeddings) == ["convolved"]


def test_every_row_has_its_place_on_a_mesh():
    """No large leaf of any embedder at full width lacks a pattern, and every dimension that is split divides."""
    mesh = make_mesh(MeshConfig(2, 4, 1))
    for row in (*SURVEY, *FURTHER):
        module = row.make().clone(width=768)
        params = jax.eval_shape(lambda module=module: module.init(jax.random.key(0), module.example(1)))["params"]
        split = [s.spec for s in jax.tree.leaves(shardings(mesh, params)) if "fsdp" in str(s.spec)]
        assert split, row


@pytest.mark.parametrize("kind", ["ids", "regions", "frames", "planes", "nodes", "strokes"])
def test_padding_changes_nothing(kind, rng):
    """The tokens of a short example are the same with little and with much behind them."""
    module = SMALL[kind].clone(width=8)
    raw, mask = unmask(example(module, rng, 1))
    params = module.init(jax.random.key(0), Masked(raw, mask))["params"]
    here = mask.shape[1] - 3

    def cut(x, length):
        return x[:, :length, :length] if x.dtype == bool else x[:, :length]  # edges have two such axes

    out = []
    for length in (here, here + 1, here + 3):
        part = Masked(jax.tree.map(lambda x, n=length: cut(x, n), raw), np.arange(length)[None] < here)
        tokens = module.apply({"params": params}, part)
        out.append(np.asarray(tokens.values)[0][np.asarray(tokens.dense_mask)[0]])
    for other in out[1:]:
        np.testing.assert_allclose(other, out[0], atol=1e-5)


def test_an_id_out_of_range_behind_a_mask_has_no_gradient(rng):
    module = Ids(9, 4, norm=1e-12, width=8)
    raw = Masked(np.asarray([[1, 2, 9, 9]]), np.asarray([[True, True, False, False]]))
    params = module.init(jax.random.key(0), raw)["params"]
    gradient = jax.grad(lambda p: jnp.square(module.apply({"params": p}, raw).values - 1).sum())(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_what_hears_of_later_tokens_is_not_read_causally():
    model = mmx.build_model({"audio": SMALL["gated"], "text": Ids(9, 4)}, width=8, depth=2, heads=2)
    batch = mmx.example_batch(model)
    with pytest.raises(InputError, match="'audio' cannot be read causally: a token of Spectrogram hears of later ones"):
        model.init(jax.random.key(0), batch, ["audio"])
    out, _ = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), batch, (name for name in ["text"])))
    assert out.streams["text"].causal and not out.streams["audio"].causal


def test_a_learned_token_may_stand_behind_the_ids(rng):
    module = Ids(9, 5, last=True, width=8)
    ids, mask = rng.integers(0, 9, (2, 3)), np.asarray([[1, 1, 0], [0, 0, 0]], bool)
    params = module.init(jax.random.key(0), module.example(2))["params"]
    assert params["position"].shape == (6, 8) and params["last"].shape == (1, 8)
    tokens = module.apply({"params": params}, ids)
    np.testing.assert_allclose(tokens.values[:, :3], params["token"]["embedding"][ids] + params["position"][:3], atol=1e-6)
    np.testing.assert_allclose(tokens.values[1, 3], params["last"][0] + params["position"][3], atol=1e-6)
    tokens = module.apply({"params": params}, Masked(ids, mask))
    np.testing.assert_array_equal(tokens.mask, [[1, 1, 0, 1], [0, 0, 0, 0]])
