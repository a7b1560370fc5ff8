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
    "frames": Spectrogram(9, 6),
    "gated": Spectrogram(9, 6, "gated"),
    "planes": Spectrogram(9, 6, "cnn"),
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
    params = jax.tree.map(lambda p: rng.standard_normal(p.shape).astype("f"), module.init(jax.random.key(0), raw)["params"])
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


def test_patches_of_any_rank_are_cut_in_order(rng):
    """Against loops, with the identity as the linear map."""
    video = rng.standard_normal((2, 4, 6, 9, 2)).astype("f")
    module = Patches((4, 6, 9), (2, 3, 3), 2, position="none", width=36)
    params = {"patch": {"kernel": np.eye(36, dtype="f"), "bias": np.zeros(36, "f")}}
    tokens = np.asarray(module.apply({"params": params}, video).values)
    expected = [video[:, t : t + 2, y : y + 3, x : x + 3].reshape(2, -1) for t in (0, 2) for y in (0, 3) for x in (0, 3, 6)]
    np.testing.assert_allclose(tokens, np.stack(expected, 1))


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
    params = jax.tree.map(lambda p: rng.standard_normal(p.shape).astype("f"), module.init(jax.random.key(0), raw)["params"])
    adjacency = np.maximum(edges[0], np.eye(4))
    root = np.diag(adjacency.sum(1) ** -0.5)
    adjacency = root @ adjacency @ root
    x = nodes[0] @ params["linear"]["kernel"] + params["linear"]["bias"]
    x = np.maximum(adjacency @ (x @ params["project_0"]["kernel"] + params["project_0"]["bias"]), 0)
    x = adjacency @ (x @ params["project_1"]["kernel"] + params["project_1"]["bias"])
    np.testing.assert_allclose(module.apply({"params": params}, raw).values[0], x, atol=1e-4)


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
    tokens, _ = module.init_with_output(jax.random.key(0), Masked(jnp.zeros((1, 16_000)), mask))
    assert int(tokens.mask.sum()) == 24  # (8000 - 400) // 320 + 1


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
    out, _ = model.init_with_output(jax.random.key(0), batch, (name for name in ["text"]))
    assert out.streams["text"].causal and not out.streams["audio"].causal
