"""Properties every topology has, for any number of streams, lengths, masks and absences."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax.traverse_util import unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

import mmx
from mmx.errors import InputError
from mmx.layers import AttentionPool, Axes, Block, BlockConfig, Buckets, Grid, Line, Sight
from mmx.layers.positions import distance_buckets
from mmx.topologies import (
    BEYOND,
    TOPOLOGIES,
    Adapt,
    Bottleneck,
    Bridge,
    Cross,
    Gather,
    Insert,
    Joint,
    Latent,
    PerStream,
    Pool,
    Scatter,
    Sum,
    catalogue,
    cross_attention,
    early_concatenation,
    make_topology,
    multi_to_one,
)
from mmx.topologies.stage import fill_block
from mmx.topologies.stages import FUSED
from mmx.types import Tokens
from mmx.zoo.weights import flat

BLOCK = BlockConfig(width=8, heads=2, mlp=16)
EVERY = (*TOPOLOGIES, *BEYOND)
QUICK = ("early_summation", "cross_to_concatenation")  # the others in CI
NAMES = ("image", "text", "audio", "video", "pose")


def make_streams(rng, lengths, masked=True):
    streams = {}
    for name, length in zip(NAMES, lengths, strict=False):
        values = rng.standard_normal((3, length, 8)).astype(np.float32)
        mask = rng.random((3, length)) < 0.7 if masked else np.ones((3, length), bool)
        streams[name] = Tokens(values, mask)
    return streams


class Same(tuple):
    """Stages, equal where each is the very same object: their fields cannot be hashed."""

    def __hash__(self):
        return hash(tuple(map(id, self)))

    def __eq__(self, other):
        return [*map(id, self)] == [*map(id, other)]


@functools.lru_cache(maxsize=16)
def program(run, stages, names):
    """`run(stages, streams, params)`, compiled once for the same stages and streams."""
    # In their own order: jit sorts the keys of a dict.
    return jax.jit(lambda params, leaves: run(stages, dict(zip(names, leaves, strict=True)), params))


def _apply(stages, streams, params):
    for stage, variables in zip(stages, params, strict=True):
        streams = stage.apply({"params": variables}, streams)
    return streams


def _gradient(stages, streams, params):
    def loss(params):
        here = {n: jnp.where(t.dense_mask[..., None], t.values, 0) for n, t in _apply(stages, streams, params).items()}
        return sum(jnp.square(x).sum() for x in here.values()), here

    (_, here), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return here, gradient


def apply_stages(stages, params, streams):
    return program(_apply, Same(stages), tuple(streams))(params, list(streams.values()))


def outputs_and_gradient(stages, params, streams):
    """The tokens that exist, and the gradient of the sum of their squares."""
    return program(_gradient, Same(stages), tuple(streams))(params, list(streams.values()))


def init_stages(stages, streams, rng):
    params = []
    for stage in stages:
        streams, variables = jax.eval_shape(lambda s, stage=stage: stage.init_with_output(jax.random.key(0), s), streams)
        shapes = variables.get("params", {})
        params.append(jax.tree.map(lambda p: 0.4 * rng.standard_normal(p.shape).astype(np.float32), shapes))
    return params


def at_mask(streams):
    """The values of the tokens that exist; zeros elsewhere."""
    return {name: np.where(t.dense_mask[..., None], t.values, 0) for name, t in streams.items()}


def same(a, b, atol=2e-5):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=atol)


@pytest.mark.parametrize("topology", [t if t in QUICK else pytest.param(t, marks=pytest.mark.slow) for t in EVERY])
@settings(max_examples=2, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    norm=st.sampled_from(["pre", "post"]),
    seed=st.integers(0, 99),
)
def test_masked_tokens_change_nothing(topology, lengths, norm, seed):
    """Neither an output nor a gradient, before and after the norm was moved."""
    rng = np.random.default_rng(seed)
    stages, streams = make_topology(topology, 2, dataclasses.replace(BLOCK, norm=norm)), make_streams(rng, lengths)
    params = init_stages(stages, streams, rng)
    noisy = {
        name: dataclasses.replace(
            t, values=np.where(t.mask[..., None], t.values, 50 * rng.standard_normal(t.values.shape)).astype("f")
        )
        for name, t in streams.items()
    }
    (clean, gradient), (dirty, other) = (outputs_and_gradient(stages, params, s) for s in (streams, noisy))
    same(dirty, clean)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4), gradient, other)


@pytest.mark.parametrize("change", [{"unroll": 2, "remat": "full"}], ids=["both"])
@pytest.mark.parametrize("stage", [Cross(2), Bottleneck(2), Latent(2, 3)], ids=lambda s: type(s).__name__)
def test_unrolling_and_remat_change_nothing(rng, stage, change):
    """The same parameters, outputs and gradients; `test_layers.py` has the other stages."""
    streams = make_streams(rng, (4, 3))
    plain, other = (dataclasses.replace(stage, block=dataclasses.replace(BLOCK, **c)) for c in ({}, change))
    (params,) = init_stages([plain], streams, rng)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4),
        outputs_and_gradient([plain], [params], streams),
        outputs_and_gradient([other], [params], streams),
    )


@pytest.mark.parametrize("topology", EVERY)
def test_the_program_does_not_grow_with_depth(rng, topology):
    """Layers are scanned: what is compiled is one of them."""
    streams = make_streams(rng, (4, 3))

    def size(depth):
        def run(streams):
            for i, stage in enumerate(make_topology(topology, depth, BLOCK)):
                streams = stage.init_with_output(jax.random.key(i), streams)[0]
            return {name: t.values for name, t in streams.items()}

        return len(jax.jit(run).lower(streams).as_text())

    assert size(24) < 1.02 * size(4)


@pytest.mark.parametrize("topology", EVERY)
def test_absent_modality_equals_a_batch_without_it(rng, topology):
    stages, streams = make_topology(topology, 2, BLOCK), make_streams(rng, (4, 3, 5))
    params = init_stages(stages, streams, rng)
    masked = streams | {"text": dataclasses.replace(streams["text"], mask=np.zeros((3, 3), bool))}
    without = {name: streams[name] for name in ("image", "audio")}
    with_mask, with_less = (at_mask(apply_stages(stages, params, s)) for s in (masked, without))
    with_mask.pop("text", None)
    same({n: v[:, : with_less[n].shape[1]] for n, v in with_mask.items()}, with_less)


@pytest.mark.parametrize("topology", EVERY)
def test_gradients_are_finite_when_everything_is_masked(rng, topology):
    stages, streams = make_topology(topology, 2, BLOCK), make_streams(rng, (3, 2))
    params = init_stages(stages, streams, rng)
    absent = {name: dataclasses.replace(t, mask=np.zeros_like(t.mask)) for name, t in streams.items()}

    def loss(params):
        out = apply_stages(stages, params, absent)
        return sum(jnp.where(t.dense_mask[..., None], t.values, 0).sum() for t in out.values())

    assert all(np.isfinite(g).all() for g in jax.tree.leaves(jax.jit(jax.grad(loss))(params)))


@pytest.mark.parametrize("topology", EVERY)
def test_a_causal_stream_leaks_neither_forward_nor_sideways(rng, topology):
    """What comes later in a causal text changes no earlier token of it and no token of another stream."""
    stages, streams = make_topology(topology, 2, BLOCK), make_streams(rng, (4, 6), masked=False)
    streams["text"] = dataclasses.replace(streams["text"], causal=True)
    params = init_stages(stages, streams, rng)
    changed = np.array(streams["text"].values)
    changed[:, 3:] *= -1
    before = apply_stages(stages, params, streams)
    after = apply_stages(stages, params, streams | {"text": dataclasses.replace(streams["text"], values=changed)})
    stream = FUSED if FUSED in before else "text"
    np.testing.assert_allclose(after[stream].values[:, :3], before[stream].values[:, :3], atol=1e-5)
    assert np.abs(after[stream].values[:, 3:] - before[stream].values[:, 3:]).max() > 1e-3
    if FUSED not in before:
        np.testing.assert_allclose(after["image"].values, before["image"].values, atol=1e-5)
        image = dataclasses.replace(streams["image"], values=streams["image"].values + rng.standard_normal((3, 4, 8)))
        other = apply_stages(stages, params, streams | {"image": image})
        if topology != "one_to_multi":
            assert np.abs(other["text"].values - before["text"].values).max() > 1e-3


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_with_one_modality_a_topology_is_a_plain_encoder(rng, topology):
    """Alone, a stream goes through self-attention and MLP and nothing else."""
    stages, streams = make_topology(topology, 2, BLOCK), make_streams(rng, (4, 3))
    params = init_stages(stages, streams, rng)
    alone = apply_stages(stages, params, {"image": streams["image"]})
    depth = sum(s.depth if isinstance(s.depth, int) else sum(s.depth.values()) for s in stages if not isinstance(s, Sum))
    assert depth == 2
    (out,) = alone.values()
    expected = streams["image"]
    for stage, variables in zip(stages, params, strict=True):
        if isinstance(stage, Sum):
            continue
        if isinstance(stage, Cross):
            inner = {k: v for k, v in variables["layers"]["image"].items() if not k.startswith("cross")}
            variables = {"stack": {"layers": {"block": inner}, "norm": variables["image_norm"]}}
        elif isinstance(stage, PerStream):
            variables = {"stack": next(v for k, v in variables.items() if k in ("image", FUSED))}
        encoder = Joint(stage.depth if isinstance(stage.depth, int) else stage.depth[FUSED], BLOCK)
        expected = apply_stages([encoder], [variables], {"image": expected})["image"]
    same(at_mask({"x": out}), at_mask({"x": expected}))


@pytest.mark.parametrize("topology", EVERY)
def test_values_are_those_of_the_formula(rng, topology):
    """Against NumPy, three streams with random masks, one of them absent from an example."""
    stages, streams = make_topology(topology, 2, BLOCK), make_streams(rng, (4, 3, 5))
    streams["text"].mask[1] = False
    for tokens in streams.values():
        tokens.mask[0, 0] = True
    params = init_stages(stages, streams, rng)
    found = at_mask(apply_stages(stages, params, streams))
    for example in range(3):
        places = {name: np.flatnonzero(t.mask[example]) for name, t in streams.items()}
        z = {name: t.values[example][places[name]].astype(np.float64) for name, t in streams.items()}
        expected = reference.apply(topology, z, places, params)
        if topology == "early_summation":
            places = {FUSED: sorted(set(np.concatenate(list(places.values()))))}
        for name, values in expected.items():
            np.testing.assert_allclose(found[name][example][places[name]], values, atol=2e-4)


LENGTHS = {"image": 7, "text": 3, "audio": 5}
PAIRS = {  # per layer and squared unit of length: (own encoders, interaction) as the docstrings say
    "early_summation": lambda n: 2 * max(n) ** 2,
    "early_concatenation": lambda n: 2 * sum(n) ** 2,
    "multi_to_one": lambda n: sum(x * x for x in n) + sum(n) ** 2,
    "one_to_multi": lambda n: sum(x * x for x in n) + sum(n) ** 2,
    "cross_attention": lambda n: 2 * sum(x * (sum(n) - x) + x * x for x in n),
    "cross_to_concatenation": lambda n: sum(x * (sum(n) - x) + x * x for x in n) + sum(n) ** 2,
    "bottleneck": lambda n: 2 * sum(x * x for x in n),
    "latent": lambda n: 0,
}


@pytest.mark.parametrize("topology", EVERY)
def test_cost_grows_as_the_formula_says(rng, topology):
    """The part of the counted FLOPs that is quadratic in length is that of the scores and the weighted values."""
    stages = make_topology(topology, 2, BLOCK)

    def flops(scale):
        streams = make_streams(rng, [scale * length for length in LENGTHS.values()])
        shapes = []
        for stage in stages:
            variables = jax.eval_shape(stage.init, jax.random.key(0), streams)
            shapes.append(variables.get("params", {}))
            streams = jax.eval_shape(stage.apply, variables, streams)
        streams = make_streams(rng, [scale * length for length in LENGTHS.values()])
        return mmx.count_flops(lambda p, s: apply_stages(stages, p, s), shapes, streams)

    second_difference = flops(3) - 2 * flops(2) + flops(1)
    examples, width = 3, BLOCK.width
    assert second_difference == 2 * (2 * 2 * examples * width) * PAIRS[topology](LENGTHS.values())


def test_multi_to_one_without_stream_layers_is_early_concatenation(rng):
    streams = make_streams(rng, (4, 3))
    late, early = multi_to_one(0, 2, BLOCK), early_concatenation(2, BLOCK)
    params = init_stages(early, streams, rng)
    same(at_mask(apply_stages(late, [{}, *params], streams)), at_mask(apply_stages(early, params, streams)))


def test_joint_that_sees_only_itself_is_per_stream_with_shared_weights(rng):
    streams = make_streams(rng, (4, 3, 2))
    joint, separate = Joint(2, BLOCK, sees=dict.fromkeys(streams, ())), PerStream(2, BLOCK, share=True)
    (params,) = init_stages([joint], streams, rng)
    same(
        at_mask(apply_stages([joint], [params], streams)),
        at_mask(apply_stages([separate], [{"shared": params["stack"]}], streams)),
    )


def test_what_shared_layers_leave_is_told_stream_by_stream(rng):
    streams, stage = make_streams(rng, (4, 3)), PerStream(2, BLOCK, share=True)
    (params,) = init_stages([stage], streams, rng)
    inside = jax.jit(lambda s: stage.apply({"params": params}, s, mutable=["intermediates"])[1]["intermediates"])
    left = inside(streams)
    for name in streams:
        expected = inside({name: streams[name]})["shared"]["layers"]["states"]
        np.testing.assert_allclose(left[name]["layers"]["states"], expected, atol=1e-6)


def test_visibility_says_who_is_seen(rng):
    """A text that sees the image, an image that sees only itself, and an audio that sees the text."""
    stage = Joint(2, BLOCK, sees={"image": (), "text": ("image",), "audio": ("text",)})
    streams = make_streams(rng, (4, 3, 2), masked=False)
    (params,) = init_stages([stage], streams, rng)
    before = apply_stages([stage], [params], streams)
    for changed, moved in {"image": {"image", "text", "audio"}, "text": {"text", "audio"}, "audio": {"audio"}}.items():
        other = streams | {changed: dataclasses.replace(streams[changed], values=-streams[changed].values)}
        after = apply_stages([stage], [params], other)
        assert {n for n in streams if np.abs(after[n].values - before[n].values).max() > 1e-4} == moved


def test_multiway_gives_each_stream_its_own(rng):
    """Equal to the shared stack where the streams' own weights are equal; each learns from its own tokens only."""
    streams = make_streams(rng, (4, 3))
    plain, multiway = Joint(2, BLOCK), Joint(2, BLOCK, multiway=("mlp", "norm"))
    (params,) = init_stages([plain], streams, rng)
    stack = params["stack"]
    block = {k: v for k, v in stack["layers"]["block"].items() if k == "self"}
    for kind in ("mlp", "self_norm", "mlp_norm"):
        block |= {f"{kind}_{name}": stack["layers"]["block"][kind] for name in streams}
    own = {"stack": {"layers": {"block": block}, **{f"norm_{name}": stack["norm"] for name in streams}}}
    same(at_mask(apply_stages([plain], [params], streams)), at_mask(apply_stages([multiway], [own], streams)))
    gradient = jax.grad(lambda p: apply_stages([multiway], [p], streams)["image"].values.sum())(own)
    last = jax.tree.map(lambda g: np.abs(g[-1]).max(), gradient["stack"]["layers"]["block"])
    assert last["mlp_image"]["up"]["kernel"] > 0 and last["mlp_text"]["up"]["kernel"] == 0
    with pytest.raises(InputError, match="did you mean 'mlp'"):
        Joint(1, BLOCK, multiway=("mpl",)).init(jax.random.key(0), streams)


def test_cross_may_read_the_original_tokens(rng):
    streams = make_streams(rng, (4, 3), masked=False)
    stages = {original: Cross(2, BLOCK, "cross mlp", original=original) for original in (False, True)}
    (params,) = init_stages([stages[True]], streams, rng)
    outs = {o: apply_stages([stage], [params], streams) for o, stage in stages.items()}
    assert np.abs(outs[True]["image"].values - outs[False]["image"].values).max() > 1e-3
    image = streams["image"].values.astype(np.float64)
    for example in range(3):
        x = image[example]
        for i in range(2):
            p = reference.layer(params["layers"]["image"], i)
            x = reference.block(x, p, np.asarray(streams["text"].values[example]), "cross mlp")
        np.testing.assert_allclose(outs[True]["image"].values[example], reference.norm(x, params["image_norm"]), atol=2e-4)


@pytest.mark.parametrize("each", [False, True])
def test_layers_take_in_the_states_of_towers(rng, each):
    streams = make_streams(rng, (4, 3), masked=False)  # 8 wide: two states of 4
    stage = Bridge(2, BLOCK, "cross mlp", norms={"image": 1e-6}, each=each, towers={"image": True, "text": False})
    (params,) = init_stages([stage], streams, rng)
    out = apply_stages([stage], [params], streams)
    assert params["text_project"]["kernel"].shape == ((2, 4, 8) if each else (4, 8))
    for example in range(3):
        states = {n: np.split(np.asarray(t.values[example], np.float64), 2, -1) for n, t in streams.items()}
        np.testing.assert_array_equal(out["text_tower"].values[example], states["text"][1].astype("f"))
        states["image"] = [reference.norm(x, params["image_tower_norm"]) for x in states["image"]]
        z = {"image": 0.0, "text": 0.0}
        for i in range(2):
            for n in z:
                p = reference.layer(params[f"{n}_project"], i) if each else params[f"{n}_project"]
                z[n] = z[n] + (mapped := states[n][i] @ p["kernel"] + p["bias"] + params[f"{n}_type_bias"])
                z[n] = reference.norm(z[n], reference.layer(params["layers"][f"{n}_bridge_norm"], i))
                if n == "image" and i == 1:
                    np.testing.assert_allclose(out["image_tower"].values[example], mapped, atol=2e-5)
            blocks = {n: reference.layer(params["layers"][n], i) for n in z}
            z = {n: reference.block(z[n], blocks[n], z["text" if n == "image" else "image"], "cross mlp") for n in z}
        for n, x in z.items():
            np.testing.assert_allclose(out[n].values[example], reference.norm(x, params[f"{n}_norm"]), atol=2e-4)


def test_each_pair_may_have_layers_of_its_own_and_read_the_past_only(rng):
    """Side by side along the width; a token reads as far as it stands, and further by what the lengths differ."""
    streams = make_streams(rng, (4, 3, 2), masked=False)
    edges = {"image": ("text", "audio"), "text": ("image",)}
    stage = Cross(2, BLOCK, "cross mlp", edges, original=True, past=True, apart=True)
    (params,) = init_stages([stage], streams, rng)
    out = apply_stages([stage], [params], streams)
    assert out["audio"].values is not None and set(params["layers"]) == {"image_text", "image_audio", "text_image"}
    np.testing.assert_array_equal(out["audio"].values, streams["audio"].values)
    here = {name: np.asarray(tokens.values[0], np.float64) for name, tokens in streams.items()}

    def read(name, other):
        length, rows = len(here[name]), []
        for place in range(length):
            x, seen = here[name][place : place + 1], here[other][: place + 1 + abs(length - len(here[other]))]
            for i in range(2):
                x = reference.block(x, reference.layer(params["layers"][f"{name}_{other}"], i), seen, "cross mlp")
            rows.append(reference.norm(x, params[f"{name}_{other}_norm"]))
        return np.concatenate(rows)

    for name, others in edges.items():
        expected = np.concatenate([read(name, other) for other in others], -1)
        np.testing.assert_allclose(out[name].values[0], expected, atol=2e-4)
    absent = {name: dataclasses.replace(t, mask=np.full(t.values.shape[:2], name != "audio")) for name, t in streams.items()}
    without = {name: t for name, t in streams.items() if name != "audio"}
    masked, alone = (apply_stages([stage], [params], s) for s in (absent, without))
    np.testing.assert_allclose(masked["image"].values, alone["image"].values, atol=1e-5)
    assert apply_stages([stage], [params], {"audio": streams["audio"]}).keys() == {"audio"}
    for wrong in ({"edges": None}, {"original": False}):
        with pytest.raises(InputError, match="Cross.apart"):
            init_stages([dataclasses.replace(stage, **wrong)], streams, rng)


@pytest.mark.parametrize("change", [{"rotary": 100.0}, {"relative": Buckets(8)}])
@pytest.mark.parametrize(
    "stage",
    [Joint(2), PerStream(2), Cross(2), Bottleneck(2), Cross(2, share=("cross", "self", "mlp"))],
    ids=lambda s: type(s).__name__,
)
def test_positions_in_attention_tell_the_order(rng, stage, change):
    """With rotary or relative positions, shuffled tokens are another input; distances are what counts."""
    stage = dataclasses.replace(stage, block=dataclasses.replace(BLOCK, **change))
    streams = make_streams(rng, (5, 3), masked=False)
    (params,) = init_stages([stage], streams, rng)
    before = apply_stages([stage], [params], streams)
    order = np.asarray([2, 0, 1, 4, 3])
    shuffled = streams | {"image": dataclasses.replace(streams["image"], values=streams["image"].values[:, order])}
    after = apply_stages([stage], [params], shuffled)
    assert np.abs(after["image"].values - before["image"].values[:, order]).max() > 1e-3
    padded = {  # two masked tokens in front: every place is another one, every distance the same
        n: Tokens(np.pad(t.values, ((0, 0), (2, 0), (0, 0))), np.pad(t.mask, ((0, 0), (2, 0)))) for n, t in streams.items()
    }
    if not isinstance(stage, Bottleneck):  # the shared tokens keep their places
        moved = apply_stages([stage], [params], padded)
        same({n: t.values[:, 2:] for n, t in moved.items()}, {n: t.values for n, t in before.items()})


def test_rotary_positions_go_by_coordinates(rng):
    """The tokens of an image may come in any order, if their coordinates come with them."""
    stage = Joint(2, dataclasses.replace(BLOCK, rotary=100.0))
    streams = make_streams(rng, (6, 3), masked=False)
    where = np.stack(np.divmod(np.arange(6), 3), -1).astype("f")
    streams["image"] = dataclasses.replace(streams["image"], coordinates=where)
    (params,) = init_stages([stage], streams, rng)
    before, order = apply_stages([stage], [params], streams), rng.permutation(6)
    image = dataclasses.replace(streams["image"], values=streams["image"].values[:, order], coordinates=where[order])
    after = apply_stages([stage], [params], streams | {"image": image})
    np.testing.assert_allclose(after["image"].values, before["image"].values[:, order], atol=1e-5)
    np.testing.assert_allclose(after["text"].values, before["text"].values, atol=1e-5)


@pytest.mark.parametrize("topology", EVERY)
def test_who_else_is_there_changes_nobodys_place(rng, topology):
    """With rotary positions, an absent video (three axes) leaves the image (two) where it stands."""
    stages = make_topology(topology, 2, dataclasses.replace(BLOCK, rotary=100.0))
    streams = make_streams(rng, (6, 3, 8), masked=False)
    where = {
        "image": np.stack(np.divmod(np.arange(6), 3), -1),
        "audio": np.stack([*np.divmod(np.arange(8), 4), np.arange(8)], -1),
    }
    streams |= {n: dataclasses.replace(streams[n], coordinates=w.astype("f")) for n, w in where.items()}
    params = init_stages(stages, streams, rng)
    absent = streams | {"audio": dataclasses.replace(streams["audio"], mask=np.zeros((3, 8), bool))}
    without = {name: streams[name] for name in ("image", "text")}
    masked, less = (at_mask(apply_stages(stages, params, s)) for s in (absent, without))
    masked.pop("audio", None)
    same({n: v[:, : less[n].shape[1]] for n, v in masked.items()}, less)


def test_bottleneck_and_latent_keep_a_causal_text_to_itself(rng):
    """They answer it; what it says reaches nobody."""
    for stage in (Bottleneck(2, block=BLOCK), Latent(2, 3, BLOCK)):
        streams = make_streams(rng, (4, 3), masked=False)
        streams["text"] = dataclasses.replace(streams["text"], causal=True)
        (params,) = init_stages([stage], streams, rng)
        before = apply_stages([stage], [params], streams)
        for changed, moved in (("image", {"image", "text"}), ("text", {"text"})):
            other = streams | {changed: dataclasses.replace(streams[changed], values=-streams[changed].values)}
            after = apply_stages([stage], [params], other)
            assert {n for n in streams if np.abs(after[n].values - before[n].values).max() > 1e-4} == moved
        alone = apply_stages([stage], [params], {"image": streams["image"]})
        np.testing.assert_allclose(alone["image"].values, before["image"].values, atol=1e-5)


def test_permuting_tokens_permutes_outputs(rng):
    for topology in EVERY:
        if topology == "early_summation":
            continue  # its tokens are aligned by position
        stages, streams = make_topology(topology, 2, BLOCK), make_streams(rng, (5, 3))
        params = init_stages(stages, streams, rng)
        order = rng.permutation(5)
        image = streams["image"]
        shuffled = streams | {"image": Tokens(image.values[:, order], image.mask[:, order])}
        before, after = (at_mask(apply_stages(stages, params, s)) for s in (streams, shuffled))
        same(after, before | {"image": before["image"][:, order]})


def test_sum_renormalises_over_the_streams_that_are_there():
    a = Tokens(np.full((1, 3, 2), 2.0, "f"), np.array([[True, True, False]]))
    b = Tokens(np.full((1, 2, 2), 6.0, "f"), np.array([[True, False]]))
    out = Sum({"a": 3.0}).apply({}, {"a": a, "b": b})["fused"]
    np.testing.assert_allclose(out.values[0, :, 0], [(3 * 2 + 6) / 4, 2, 0])
    np.testing.assert_array_equal(out.mask, [[True, True, False]])
    learned = Sum({"a": 3.0}, learned=True)
    variables = learned.init(jax.random.key(0), {"a": a, "b": b})
    np.testing.assert_allclose(learned.apply(variables, {"a": a, "b": b})["fused"].values, out.values, rtol=1e-6)
    gradient = jax.grad(lambda v: learned.apply(v, {"a": a, "b": b})["fused"].values.sum())(variables)
    assert all(np.any(g) for g in jax.tree.leaves(gradient))
    with pytest.raises(InputError, match="different special tokens"):
        Sum().apply({}, {"a": a, "b": dataclasses.replace(b, special=("class",))})
    with pytest.raises(InputError, match="weights are positive"):
        Sum({"a": -1.0}).apply({}, {"a": a})


def test_edges_say_who_reads_whom(rng):
    stage, streams = Cross(2, BLOCK, edges={"text": ("image",)}), make_streams(rng, (4, 3, 2), masked=False)
    (params,) = init_stages([stage], streams, rng)
    before = apply_stages([stage], [params], streams)
    for changed in ("image", "audio"):
        other = streams | {
            changed: dataclasses.replace(streams[changed], values=streams[changed].values + 1 + streams[changed].values ** 2)
        }
        after = apply_stages([stage], [params], other)
        moved = {n for n in streams if np.abs(after[n].values - before[n].values).max() > 1e-4}
        assert moved == ({"image", "text"} if changed == "image" else {"audio"})


def test_streams_that_do_not_step_are_read_and_left_alone(rng):
    """An ALBEF: the text goes through the layers and reads the image, which leaves as it came."""
    stage, streams = Cross(2, BLOCK, "self cross mlp", edges={"text": ("image",)}, steps=("text",)), make_streams(rng, (4, 3))
    (params,) = init_stages([stage], streams, rng)
    assert set(params) == {"layers", "text_norm"} and set(params["layers"]) == {"text"}
    out = apply_stages([stage], [params], streams)
    np.testing.assert_array_equal(out["image"].values, streams["image"].values)
    for example in range(3):
        here = {n: t.values[example][t.mask[example]].astype(np.float64) for n, t in streams.items()}
        x = here["text"]
        for i in range(2):
            x = reference.block(x, reference.layer(params["layers"]["text"], i), here["image"], "self cross mlp")
        found = out["text"].values[example][np.asarray(streams["text"].mask[example])]
        np.testing.assert_allclose(found, reference.norm(x, params["text_norm"]), atol=2e-4)


def test_shared_weights_serve_all_streams(rng):
    streams = make_streams(rng, (4, 3))
    for stage in (Cross(2, BLOCK, share=("cross", "self", "mlp")), PerStream(2, BLOCK, share=True)):
        (params,) = init_stages([stage], streams, rng)
        swapped = {"image": streams["text"], "text": streams["image"]}
        out, crossed = (apply_stages([stage], [params], s) for s in (streams, swapped))
        np.testing.assert_allclose(out["image"].values, crossed["text"].values, atol=1e-5)


def test_directions_share_one_sublayer(rng):
    """LXMERT: cross-attention is one for both, all else is each stream's own."""
    streams, stage = make_streams(rng, (4, 3)), Cross(2, BLOCK, share=("cross",))
    (params,) = init_stages([stage], streams, rng)
    assert set(params["layers"]["shared"]) == {"cross", "cross_norm"}
    assert set(params["layers"]["text"]) == {"self", "self_norm", "mlp", "mlp_norm"} and "text_norm" in params
    copied = {name: params["layers"][name] | params["layers"]["shared"] for name in streams}
    apart = apply_stages([Cross(2, BLOCK)], [params | {"layers": copied}], streams)
    same(at_mask(apart), at_mask(apply_stages([stage], [params], streams)))
    for share, block in ((("crosss",), BLOCK), (("cross",), {"image": BLOCK, "text": dataclasses.replace(BLOCK, heads=1)})):
        with pytest.raises(InputError, match="Cross.share"):
            init_stages([dataclasses.replace(stage, share=share, block=block)], streams, rng)


def test_self_attention_may_be_one_for_several_streams(rng):
    """The Q-Former: queries and text see each other, queries alone read the image, each has an MLP of its own."""
    block = dataclasses.replace(BLOCK, norm="post", skip=True)
    options = {"edges": {"text": ("image",)}, "steps": ("text", "audio"), "together": ("text", "audio")}
    stage = Cross(2, block, "self cross mlp self mlp", share=("self",), **options)
    streams = make_streams(rng, (4, 3, 2))
    (params,) = init_stages([stage], streams, rng)
    assert set(params["layers"]["shared"]) == {"self", "self_norm", "self_1", "self_1_norm"}
    assert set(params["layers"]["audio"]) == {"mlp", "mlp_norm", "mlp_1", "mlp_1_norm"}
    out = apply_stages([stage], [params], streams)
    for example in range(2):
        here = {n: t.values[example][t.mask[example]] for n, t in streams.items()}
        x, count = np.concatenate([here["text"], here["audio"]]), len(here["text"])
        for i in range(2):
            p = {n: reference.layer(params["layers"][n], i) for n in ("shared", "text", "audio")}
            for end in ("", "_1"):
                x = post_norm(x, p["shared"], "self", end)
                text, audio = x[:count], x[count:]
                if not end and len(here["image"]):
                    text = post_norm(text, p["text"], "cross", end, here["image"])
                x = np.concatenate([post_norm(text, p["text"], "mlp", end), post_norm(audio, p["audio"], "mlp", end)])
        found = [out[n].values[example][np.asarray(streams[n].mask[example])] for n in ("text", "audio")]
        np.testing.assert_allclose(np.concatenate(found), x, atol=2e-4)
    with pytest.raises(InputError, match="add 'self' to share"):
        init_stages([dataclasses.replace(stage, share=())], streams, rng)


def post_norm(x, params, kind, end, context=None):
    """One sublayer of one example, `kind` with the name's `end`."""
    if not len(x):
        return x
    params = {f"{kind}{rest}": params[f"{kind}{end}{rest}"] for rest in ("", "_norm")}
    block = Block(dataclasses.replace(BLOCK, norm="post"), kind)
    return np.asarray(block.apply({"params": params}, x[None], context=None if context is None else context[None]))[0]


def test_streams_are_adapted_before_they_meet(rng):
    streams = make_streams(rng, (4, 3, 2))
    stage = Adapt(("text", "image"), width=6, type=True, norm=1e-5, share=True)
    (params,) = init_stages([stage], streams, rng)
    assert set(params) == {"shared_project", "shared_norm", "text_type_bias", "image_type_bias"}
    out = apply_stages([stage], [params], streams)
    np.testing.assert_array_equal(out["audio"].values, streams["audio"].values)
    for name in ("text", "image"):
        project, norm = params["shared_project"], params["shared_norm"]
        x = streams[name].values @ project["kernel"] + project["bias"] + params[f"{name}_type_bias"]
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * norm["scale"] + norm["bias"]
        np.testing.assert_allclose(out[name].values, x, atol=1e-4)


def test_streams_are_scaled_and_have_positions_before_they_go_on(rng):
    streams = make_streams(rng, (4, 3))
    x = np.array(streams["image"].values)
    x[0, 1, 0] = x[2, 3, 0] = 0
    streams["image"] = dataclasses.replace(streams["image"], values=x)
    out = Adapt(("image",), scale=3.0, positions="counted").apply({}, streams)
    angles = np.arange(1, 5)[:, None] / 10_000 ** (np.arange(4) / 3)
    table = np.broadcast_to(np.concatenate([np.sin(angles), np.cos(angles)], 1), x.shape)
    np.testing.assert_allclose(out["image"].values, 3 * x + np.where(x[..., :1] == 0, 0, table), atol=1e-5)
    stage = Adapt(positions=4)
    (params,) = init_stages([stage], streams, rng)
    for name, tokens in stage.apply({"params": params}, streams).items():
        length = tokens.values.shape[1]
        np.testing.assert_allclose(tokens.values, streams[name].values + params[f"{name}_position"][:length], atol=1e-6)
    for wrong in (3, "counte"):
        with pytest.raises(InputError, match="'image' has 4 tokens"):
            Adapt(positions=wrong).apply({}, streams)


def test_tokens_stay_behind_or_are_seen_again(rng):
    streams = make_streams(rng, (4, 3))
    where = np.arange(12.0).reshape(3, 4, 1)
    streams["image"] = dataclasses.replace(streams["image"], special=("class",), coordinates=where)
    (params,) = init_stages([stage := Adapt(("image",), drop=1)], streams, rng)
    out = stage.apply({"params": params}, streams)
    np.testing.assert_array_equal(out["image"].values, streams["image"].values[:, 1:])
    np.testing.assert_array_equal(out["image"].mask, streams["image"].mask[:, 1:])
    np.testing.assert_array_equal(out["image"].coordinates, where[:, 1:])
    assert out["image"].special == () and out["text"] is streams["text"]
    out = Adapt(("text",), unmask=True).apply({}, streams)
    assert out["text"].mask is None and out["image"].mask is not None


def test_a_few_learned_tokens_take_a_streams_place(rng):
    streams, stage = make_streams(rng, (4, 3)), Pool("image", heads=2, tokens=2, width=6, eps=1e-5)
    (params,) = init_stages([stage], streams, rng)
    out = stage.apply({"params": params}, streams)
    pool = AttentionPool(2, 2, 6, norm=True, eps=1e-5)
    x = pool.apply({"params": params["pool"]}, streams["image"].values, streams["image"].mask)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(out["image"].values, x * params["norm"]["scale"] + params["norm"]["bias"], atol=1e-5)
    np.testing.assert_array_equal(out["image"].present, streams["image"].present)
    assert out["text"] is streams["text"] and stage.apply({"params": params}, {"text": streams["text"]}).keys() == {"text"}


def test_streams_of_cross_may_differ_in_width(rng):
    """ViLBERT: 1024 beside 768. Who reads one stream reads it as it is; who reads several has them projected."""
    blocks = {n: BlockConfig(width=w, heads=2, head_size=4, mlp=8) for n, w in (("image", 8), ("text", 12), ("audio", 16))}
    two = make_streams(rng, (4, 3))
    (params,) = init_stages([Cross(2, blocks)], two, rng)
    assert params["layers"]["text"]["cross"]["key"]["kernel"].shape == (2, 8, 2, 4)
    assert params["layers"]["image"]["cross"]["key"]["kernel"].shape == (2, 12, 2, 4)
    out = apply_stages([Cross(2, blocks)], [params], two)
    assert {n: t.values.shape[-1] for n, t in out.items()} == {"image": 8, "text": 12}
    for example in range(3):
        x = {n: t.values[example][t.mask[example]].astype(np.float64) for n, t in two.items()}
        x["text"] = x["text"] @ params["text_project"]["kernel"] + params["text_project"]["bias"]
        for i in range(2):
            p = {n: reference.layer(params["layers"][n], i) for n in x}
            x = {
                n: reference.block(x[n], p[n], x[other], "cross self mlp") for n, other in (("image", "text"), ("text", "image"))
            }
        for n in x:
            found = out[n].values[example][np.asarray(two[n].mask[example])]
            np.testing.assert_allclose(found, reference.norm(x[n], params[f"{n}_norm"]), atol=2e-4)
    three = make_streams(rng, (4, 3, 2))
    names = dict(zip(three, ("image", "text", "audio"), strict=True))
    three = {names[n]: t for n, t in three.items()}
    (params,) = init_stages([Cross(2, blocks)], three, rng)
    assert params["layers"]["text_reads_audio_project"]["kernel"].shape == (2, 16, 12)


def test_attention_projections_for_each_modality(rng):
    """BEiT-3: with equal weights in both, multiway attention is the attention they would share."""
    streams, multiway = make_streams(rng, (4, 3)), Joint(2, BLOCK, multiway=("attention", "mlp", "norm"))
    (one,) = init_stages([Joint(2, BLOCK)], streams, rng)
    (params,) = init_stages([multiway], streams, rng)
    layer = params["stack"]["layers"]["block"]
    assert {"query_image", "query_text", "out_image", "out_text"} < set(layer["self"]) and "query" not in layer["self"]

    def copy(own, path=()):
        if not isinstance(own, dict):
            shared = one
            for name in path:
                shared = shared[name if name in shared else name.rsplit("_", 1)[0]]
            return shared
        return {name: copy(value, (*path, name)) for name, value in own.items()}

    same(*(at_mask(apply_stages([s], [p], streams)) for s, p in ((multiway, copy(params)), (Joint(2, BLOCK), one))))
    changed = jax.tree.map(np.copy, copy(params))
    changed["stack"]["layers"]["block"]["self"]["value_text"]["kernel"] += 1
    before, after = apply_stages([multiway], [copy(params)], streams), apply_stages([multiway], [changed], streams)
    assert np.abs(after["image"].values - before["image"].values).max() > 1e-3


def test_relative_positions_of_the_past(rng):
    """T5's decoder: a number for each distance behind, and that of no distance for what is to come."""
    bias, table = Buckets(8, furthest=10, past=True).bias(2, 1.0, None), rng.standard_normal((8, 2)).astype("f")
    found = bias.apply({"params": {"bias": table}}, Sight(lines=(Line(4),)))
    for i in range(4):
        for j in range(4):
            np.testing.assert_array_equal(found[:, i, j], table[max(i - j, 0)])


def test_relative_positions_by_coordinates(rng):
    axes, where = ((8, 16), (10, 64)), rng.integers(0, 90, (3, 5, 2)).astype("f")
    module, sight = Axes(axes).bias(2, 0.5, None), Sight(coordinates=where)
    params = jax.tree.map(lambda p: rng.standard_normal(p.shape).astype("f"), module.init(jax.random.key(0), sight))
    found, tables = np.asarray(module.apply(params, sight)), params["params"]
    assert found.shape == (3, 2, 5, 5)
    for example, head, row, column in np.ndindex(found.shape):
        expected = 0.0
        for axis, (buckets, furthest) in enumerate(axes):
            away = where[example, column, axis] - where[example, row, axis]
            bucket = distance_buckets(away.astype(int), buckets, furthest)
            expected += 0.5 * tables[f"bias_{axis}"][head, bucket]
        np.testing.assert_allclose(found[example, head, row, column], expected, atol=1e-6)
    np.testing.assert_allclose(module.apply(params, Sight(coordinates=where[0])), found[0], atol=1e-6)
    with pytest.raises(InputError, match="2 axes"):
        module.apply(params, Sight(coordinates=where[..., :1]))
    with pytest.raises(InputError, match="at least 4 buckets"):
        Axes(((8, 2),))
    block = dataclasses.replace(BLOCK, relative=Axes(((8, 16),)))
    tokens, stage = Tokens(rng.standard_normal((3, 5, 8)).astype("f"), coordinates=where[..., :1]), PerStream(1, block)
    params = stage.init(jax.random.key(0), {"text": tokens})
    assert params["params"]["text"]["relative"]["bias_0"].shape == (2, 8)
    a, b = (stage.apply(params, {"text": dataclasses.replace(tokens, coordinates=w)}) for w in (where[..., :1], where[..., 1:]))
    assert np.abs(a["text"].values - b["text"].values).max() > 1e-6


def test_gathering_is_the_formula(rng):
    streams = make_streams(rng, (2, 3, 4))
    streams["audio"] = dataclasses.replace(streams["audio"], causal=True)
    whole = Gather(None, True, 6, True, 5, True, ("class",), 1e-6)
    params = jax.tree.map(lambda p: rng.standard_normal(p.shape).astype("f"), whole.init(jax.random.key(0), streams))
    out, p = whole.apply(params, streams), params["params"]
    x = [
        streams[n].values @ p[f"{n}_project"]["kernel"] + p[f"{n}_project"]["bias"] + p[f"{n}_type_bias"]
        for n in ("image", "text")
    ]
    x = np.concatenate(x, 1) + p["position"]
    x = np.concatenate([np.broadcast_to(p["special"], (3, 1, 6)), x], 1)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["norm"]["scale"] + p["norm"]["bias"]
    np.testing.assert_allclose(out[FUSED].values, x, atol=1e-4)
    masks = [streams[n].mask for n in ("image", "text")]
    np.testing.assert_array_equal(out[FUSED].mask[:, 1:], np.concatenate(masks, 1))
    np.testing.assert_array_equal(out[FUSED].mask[:, 0], np.concatenate(masks, 1).any(1))
    assert list(out) == [FUSED, *streams] and out["text"] is streams["text"]
    assert list(Gather(("text",)).apply({}, streams)) == [FUSED, "image", "audio"]  # a causal stream is left out
    assert Gather().apply({}, {"audio": streams["audio"]}).keys() == {"audio"}
    plain = Gather(norm=1e-6, norm_beside="image").apply({}, {"text": streams["text"]})
    np.testing.assert_array_equal(plain[FUSED].values, streams["text"].values)
    params = Gather(positions=4).init(jax.random.key(0), streams)
    added = Gather(positions=4).apply(params, streams)[FUSED].values - Gather().apply({}, streams)[FUSED].values
    np.testing.assert_allclose(added[0], np.asarray(params["params"]["position"])[[0, 1, 2, 3, 3]], atol=1e-6)


@pytest.mark.slow
def test_latent_tokens_leave_and_answer_at_learned_places(rng):
    """Blocks gone through again are the same layers twice; a stream that is not answered ends; widths are as they come."""
    streams = {name: Tokens(rng.standard_normal((2, 4, 6)).astype("f")) for name in ("image", "text")}
    reply = BlockConfig(width=4, heads=2, cross_residual=False)
    once = Latent(2, 3, BLOCK, answer=reply, queries={"text": 5})
    params = once.init(jax.random.key(0), streams)["params"]
    assert params["text_query"].shape == (5, 4) and params["read"]["cross"]["key"]["kernel"].shape == (6, 2, 4)
    out = once.apply({"params": params}, streams)
    assert {name: t.values.shape for name, t in out.items()} == {"latent": (2, 3, 8), "text": (2, 5, 4)}
    twice, four = once.clone(blocks=2), once.clone(depth=4)
    assert jax.tree.map(jnp.shape, twice.init(jax.random.key(0), streams)["params"]) == jax.tree.map(jnp.shape, params)
    double = jax.tree.map(lambda p: jnp.concatenate([p, p]), params["stack"]["layers"])
    straight = BLOCK if not BLOCK.ends_with_norm else dataclasses.replace(BLOCK, final_norm=False)
    bare = {**params, "stack": {"layers": params["stack"]["layers"]}}
    a, states = twice.clone(block=straight).apply({"params": bare}, streams, mutable=["intermediates"])
    b = four.clone(block=straight).apply({"params": {**params, "stack": {"layers": double}}}, streams)
    for name in a:
        np.testing.assert_allclose(a[name].values, b[name].values, atol=1e-5)
    assert states["intermediates"]["stack"]["layers"]["states"].shape == (2, 2, 2, 3, 8)
    assert list(once.clone(queries={}).apply({"params": params}, streams)) == ["latent"]


@pytest.mark.parametrize("stage", [PerStream(2), Cross(2), Bottleneck(2)], ids=lambda s: type(s).__name__)
def test_every_layer_may_have_relative_positions_of_its_own(stage, rng):
    """With equal tables in all layers it is one table for all, and not with others."""
    streams = {name: Tokens(rng.standard_normal((2, 4, 8)).astype("f")) for name in ("image", "text")}
    shared = stage.clone(block=dataclasses.replace(BLOCK, relative=Buckets(8)))
    each = stage.clone(block=dataclasses.replace(BLOCK, relative=Buckets(8, each=True)))
    params, own = (flat(s.init(jax.random.key(0), streams)["params"]) for s in (shared, each))
    of = {path.replace("layers/", ""): leaf for path, leaf in params.items()}
    assert set(own) != set(params)
    own = {path: np.broadcast_to(of[path.replace("layers/", "")], leaf.shape) for path, leaf in own.items()}
    one, many = (
        s.apply({"params": unflatten_dict(p, sep="/")}, streams)["text"].values for s, p in ((shared, params), (each, own))
    )
    np.testing.assert_allclose(one, many, atol=1e-6)
    own = {path: 30 * p if "relative/bias" in path else p for path, p in own.items()}
    other = each.apply({"params": unflatten_dict(own, sep="/")}, streams)["text"].values
    assert np.abs(other - one).max() > 1e-3


def test_a_norm_for_each_stream_that_is_named(rng):
    streams, stage = make_streams(rng, (2, 3)), Adapt(norm={"text": 1e-6})
    params = jax.tree.map(lambda p: rng.standard_normal(p.shape).astype("f"), stage.init(jax.random.key(0), streams))
    out, x, p = stage.apply(params, streams), streams["text"].values, params["params"]["text_norm"]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]
    np.testing.assert_allclose(out["text"].values, x, atol=1e-5)
    assert set(params["params"]) == {"text_norm"} and out["image"].values is streams["image"].values
    with pytest.raises(InputError, match="one norm have one eps"):
        Adapt(norm={"text": 1e-6}, share=True).apply({}, streams)


def test_relative_positions_on_a_grid(rng):
    """BEiT's table: by rows and columns between two patches, and three numbers for the class token."""
    grid = (2, 3)
    bias, table = Grid(*grid).bias(2, 1.0, None), rng.standard_normal((3 * 5 + 3, 2)).astype("f")
    found = bias.apply({"params": {"bias": table}}, Sight(lines=(Line(7, 1, grid),)))
    where = np.stack(np.divmod(np.arange(6), 3), -1)
    for i in range(7):
        for j in range(7):
            row, column = (where[i - 1] - where[j - 1]) if i and j else (0, 0)
            index = (row + 1) * 5 + column + 2 if i and j else 15 + (2 if i == j else 0 if i == 0 else 1)
            np.testing.assert_array_equal(found[:, i, j], table[index])
    larger = bias.apply({"params": {"bias": table}}, Sight(lines=(Line(20, 0, (4, 5)),)))
    assert larger.shape == (2, 20, 20) and len(np.unique(np.asarray(larger[0]).round(6))) == 7 * 9
    lines = (Line(6, 0, grid), Line(2))
    params = bias.init(jax.random.key(0), Sight(lines=lines))["params"]
    both = bias.apply({"params": params}, Sight(lines=lines))
    np.testing.assert_array_equal(both[:, :6, :6], bias.apply({"params": params}, Sight(lines=lines[:1])))
    np.testing.assert_array_equal(both[:, :6, 6:], np.broadcast_to(params["between_bias"][:, None, None], (2, 6, 2)))
    model = mmx.build_model(
        {"image": mmx.modalities.Patches((8, 12), (4, 4), special=("class",)), "text": mmx.modalities.Ids(9, 4)},
        (PerStream(1),),
        width=8,
        heads=2,
        relative=Grid(*grid),
    )
    params = model.init(jax.random.key(0), mmx.example_batch(model))["params"]
    assert params["stages_0"]["image"]["relative"]["bias"].shape == (18, 2)
    with pytest.raises(InputError, match="at least one row"):
        Grid(0, 2)


def test_places_may_continue_from_stream_to_stream(rng):
    """LLaVA: an image of 4 and a text of 3 with rotary positions are one sequence of 7."""
    block = dataclasses.replace(BLOCK, rotary=100.0)
    streams = make_streams(rng, (4, 3), masked=False)
    one = {"fused": Tokens(np.concatenate([t.values for t in streams.values()], 1))}
    stage = Joint(2, block, places="continued")
    (params,) = init_stages([stage], streams, rng)
    (together,) = apply_stages([Joint(2, block)], [params], one).values()
    found = apply_stages([stage], [params], streams)
    np.testing.assert_allclose(np.concatenate([t.values for t in found.values()], 1), together.values, atol=1e-5)
    own = apply_stages([Joint(2, block)], [params], streams)
    assert np.abs(own["text"].values - found["text"].values).max() > 1e-3
    hidden = dataclasses.replace(streams["image"], mask=np.asarray([[1, 1, 0, 0]] * 3, bool))
    shorter = Tokens(streams["image"].values[:, :2])
    texts = [apply_stages([stage], [params], streams | {"image": image})["text"].values for image in (hidden, shorter)]
    np.testing.assert_allclose(*texts, atol=1e-5)
    with pytest.raises(InputError, match="did you mean 'continued'"):
        init_stages([dataclasses.replace(stage, places="continue")], streams, rng)


def test_groups_of_a_causal_stream_see_each_other_both_ways(rng):
    """A prefix of two tokens, then two that see what is before them: changing one token shows who saw it."""
    x = rng.standard_normal((2, 4, 8)).astype("f")
    groups = np.asarray([[0, 0, -1, -1], [-1, -1, 5, 5]])
    stage = PerStream(1, BLOCK)

    def run(params, x):
        return stage.apply({"params": params}, {"text": Tokens(x, None, groups=groups, causal=True)})["text"].values

    params = init_stages((stage,), {"text": Tokens(x, None, groups=groups, causal=True)}, rng)[0]
    sees = np.asarray([np.abs(np.asarray(run(params, x) - run(params, np.where(np.arange(4)[:, None] == i, -x, x)))).max(-1) > 1e-6
                       for i in range(4)])  # fmt: skip
    np.testing.assert_array_equal(sees.transpose(1, 2, 0), [
        [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]],
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]],
    ])  # fmt: skip
    both = stage.apply({"params": params}, {"text": Tokens(x, None, groups=np.zeros((2, 4), int), causal=True)})
    plain = stage.apply({"params": params}, {"text": Tokens(x)})
    np.testing.assert_allclose(both["text"].values, plain["text"].values, atol=1e-6)


@pytest.mark.parametrize("hidden", [None, 5])
def test_insert_puts_tokens_where_slots_say(rng, hidden):
    """Two images for each example, a class token in front of each that stays out."""
    image = rng.standard_normal((4, 3, 6)).astype("f")
    text = rng.standard_normal((2, 6, 8)).astype("f")
    slots = np.asarray([[-1, 0, 1, -1, 2, 3], [3, -1, -1, -1, -1, 0]])
    there = rng.random((4, 3)) < 0.6
    streams = {"image": Tokens(image, there, special=("class",)), "text": Tokens(text, slots={"image": slots})}
    stage = Insert(hidden=hidden, activation="relu")
    p = init_stages((stage,), streams, rng)[0]
    out = stage.apply({"params": p}, streams)
    mapped = image[:, 1:]
    if hidden:
        mapped = np.maximum(mapped @ p["transform"]["kernel"] + p["transform"]["bias"], 0)
    mapped = (mapped @ p["project"]["kernel"] + p["project"]["bias"]).reshape(2, 4, 8)
    expected, mask = text.copy(), np.ones((2, 6), bool)
    for b, place in np.argwhere(slots >= 0):
        expected[b, place] = mapped[b, slots[b, place]]
        mask[b, place] = there[:, 1:].reshape(2, 4)[b, slots[b, place]]
    np.testing.assert_allclose(out["text"].values, expected, atol=1e-5)
    np.testing.assert_array_equal(out["text"].mask, mask)
    assert out["image"].values.shape == (4, 2, 8) and out["image"].special == ()
    pairs = np.where(slots[..., None] < 0, -1, np.stack([2 * np.arange(2)[:, None] + slots // 2, slots % 2], -1))
    told = stage.apply({"params": p}, {**streams, "text": Tokens(text, slots={"image": pairs})})["text"]
    np.testing.assert_array_equal(told.values, out["text"].values)
    np.testing.assert_array_equal(told.mask, out["text"].mask)
    pairs[0, 1] = 4, 0  # there is no such row
    assert np.isnan(
        stage.apply({"params": p}, {**streams, "text": Tokens(text, slots={"image": pairs})})["text"].values[0, 1]
    ).all()
    absent = stage.apply({"params": p}, {"text": streams["text"]})["text"]
    np.testing.assert_array_equal(absent.mask, slots < 0)
    np.testing.assert_array_equal(absent.values, text)
    unplaced = stage.apply({"params": p}, {**streams, "text": Tokens(text)})["text"]
    np.testing.assert_array_equal(unplaced.values, text)
    assert list(stage.apply({"params": p}, {"image": streams["image"]})) == ["image"]


def test_scatter_adds_tokens_to_those_they_are_of(rng):
    """Two clips of one video and one of another; a frame may be in several, and what is masked is in none."""
    frame, video = rng.standard_normal((3, 2, 8)).astype("f"), rng.standard_normal((2, 4, 8)).astype("f")
    slots = np.asarray([[[0, 0], [0, 2]], [[0, 2], [0, 3]], [[1, 1], [-1, -1]]])
    there = np.asarray([[1, 1], [1, 0], [1, 1]], bool)
    streams = {"frame": Tokens(frame, there, slots={"video": slots}), "video": Tokens(video)}
    out = Scatter("frame", "video").apply({}, streams)
    expected = video.copy()
    expected[0, 0] += frame[0, 0]
    expected[0, 2] += frame[0, 1] + frame[1, 0]
    expected[1, 1] += frame[2, 0]
    np.testing.assert_allclose(out["video"].values, expected, atol=1e-6)
    assert out["frame"] is streams["frame"]
    for rest in ({"video": streams["video"]}, {"frame": streams["frame"]}, {**streams, "frame": Tokens(frame)}):
        unchanged = Scatter("frame", "video").apply({}, rest)
        assert unchanged.keys() == rest.keys() and all(unchanged[name] is rest[name] for name in rest)
    narrow = {"frame": dataclasses.replace(streams["frame"], values=frame[..., :5]), "video": streams["video"]}
    (params,) = init_stages([Scatter("frame", "video")], narrow, rng)
    assert params["frame_project"]["kernel"].shape == (5, 8)


def test_joint_may_leave_streams_alone(rng):
    """Even one with another number of rows."""
    streams = make_streams(rng, (4, 3))
    (params,) = init_stages([Joint(1, BLOCK)], streams, rng)
    beside = {"video": Tokens(rng.standard_normal((2, 5, 8)).astype("f")), **streams}
    out = Joint(1, BLOCK, streams=("image", "text")).apply({"params": params}, beside)
    assert list(out) == ["video", "image", "text"] and out["video"] is beside["video"]
    same(
        {name: out[name].values for name in streams},
        {n: t.values for n, t in apply_stages([Joint(1, BLOCK)], [params], streams).items()},
    )


def test_an_absent_image_is_the_same_as_one_that_is_masked_in_a_text(rng):
    model = mmx.build_model(
        {"image": mmx.modalities.Patches((8, 8), (4, 4)), "text": mmx.modalities.Ids(20, 8)},
        (PerStream({"image": 1}), Insert(), PerStream({"text": 2}, causal=("text",))),
        width=8,
        heads=2,
    )
    params = model.init(jax.random.key(0), mmx.example_batch(model))["params"]
    ids, slots = rng.integers(0, 20, (2, 8)), np.tile([-1, 0, 1, 2, 3, -1, -1, -1], (2, 1))
    text = {"ids": ids, "slots": {"image": slots}}
    image = rng.standard_normal((2, 8, 8, 3)).astype("f")
    without = model.apply({"params": params}, {"text": text}).streams["text"]
    masked = model.apply({"params": params}, {"text": text, "image": mmx.Masked(image * np.nan, np.zeros(2, bool))}).streams[
        "text"
    ]
    whole = model.apply({"params": params}, {"text": text, "image": image}).streams["text"]
    np.testing.assert_array_equal(without.dense_mask, masked.dense_mask)
    kept = without.dense_mask[..., None]
    np.testing.assert_allclose(np.where(kept, without.values, 0), np.where(kept, masked.values, 0), atol=1e-6)
    assert whole.dense_mask.all() and np.abs(whole.values[:, -1] - without.values[:, -1]).max() > 1e-3


def test_streams_may_differ_in_depth_width_and_causality(rng):
    blocks = {"image": BLOCK, "text": BlockConfig(width=16, heads=4, mlp=8)}
    stage, streams = PerStream({"image": 2, "text": 1}, blocks, causal=("text",)), make_streams(rng, (4, 3), masked=False)
    (params,) = init_stages([stage], streams, rng)
    out = apply_stages([stage], [params], streams)
    assert out["image"].values.shape == (3, 4, 8) and out["text"].values.shape == (3, 3, 16)
    text = np.array(streams["text"].values)
    text[:, 2] += 1
    after = stage.apply({"params": params}, streams | {"text": dataclasses.replace(streams["text"], values=text)})
    np.testing.assert_allclose(after["text"].values[:, :2], out["text"].values[:, :2], atol=1e-6)
    joint = Joint(1, BLOCK)
    (joint_params,) = init_stages([joint], out, rng)
    assert {t.values.shape[-1] for t in joint.apply({"params": joint_params}, out).values()} == {8}


@pytest.mark.parametrize("row", catalogue.PUBLISHED, ids=lambda row: row.models)
def test_published_stages_build(row):
    """At full depth, through shapes only; with any one of their streams alone, too."""
    streams = {name: Tokens(jax.ShapeDtypeStruct((2, 3, 8), np.float32)) for name in row.streams.split()}
    for present in (streams, dict([next(iter(streams.items()))])):
        out = present
        for stage in (fill_block(stage, BLOCK) for stage in row.stages):
            out = jax.eval_shape(lambda s, stage=stage: stage.init_with_output(jax.random.key(0), s)[0], out)
        assert set(out) in (set(present), {FUSED})


def test_every_structure_and_timing_has_a_row():
    rows = catalogue.PUBLISHED
    assert {row.structure for row in rows} == set(catalogue.STRUCTURES)
    assert {row.timing for row in rows} == set(catalogue.TIMINGS)
    page = (Path(mmx.__file__).parent.parent / "docs/topologies.md").read_text()
    assert page.endswith(f"<!-- mmx.topologies.list() -->\n{mmx.topologies.list()}\n")


def test_tuples_add(rng):
    stages, streams = cross_attention(2, BLOCK) + early_concatenation(1, BLOCK), make_streams(rng, (4, 3))
    params = init_stages(stages, streams, rng)
    assert apply_stages(stages, params, streams)["image"].values.shape == (3, 4, 8)


def test_wrong_topologies_are_refused():
    streams = {"text": Tokens(np.zeros((2, 3, 8), "f"))}
    for stage, message in (
        (PerStream(2, BLOCK, taken={"text": (3,)}), "'text' has layers 0 to 2"),
        (Insert(activation="rlu"), "did you mean 'relu'"),
        (Bridge(3, BLOCK), "'text' is 8 wide, which is not one state for each of 3 layers"),
    ):
        with pytest.raises(InputError, match=message):
            stage.init(jax.random.key(0), streams)
    with pytest.raises(InputError, match="did you mean 'multi_to_one'"):
        make_topology("multi_to_on", 4)
    with pytest.raises(InputError, match="needs depth >= 2, got 1"):
        make_topology("multi_to_one", 1)
    modalities = {"image": mmx.modalities.Patches((8, 8), (4, 4)), "text": mmx.modalities.Ids(9, 4)}
    for stage in (
        PerStream(1, causal=("txt",)),
        Cross(1, steps=("txt",)),
        Cross(1, edges={"image": ("txt",)}),
        Joint(1, sees={"image": ("txt",)}),
    ):
        with pytest.raises(InputError, match="did you mean 'text'"):
            mmx.build_model(modalities, (stage,), width=8, heads=2)
    for stage, message in (
        (Insert("imag", "text"), "Insert.source: unknown stream 'imag'; did you mean 'image'"),
        (Insert("image", "txet"), "Insert.into: unknown stream 'txet'; did you mean 'text'"),
        (Scatter("image", "txet"), "Scatter.into: .* did you mean 'text'"),
        (Pool("txet", 2, 4), "Pool.stream: .* did you mean 'text'"),
        (Adapt(("txet",)), "Adapt.streams: .* did you mean 'text'"),
        (Gather(norm_beside="imag"), "Gather.norm_beside: .* did you mean 'image'"),
        (Adapt(norm={"imag": 1e-5}), "Adapt.norm: .* did you mean 'image'"),
        (Latent(1, queries={"txet": 3}), "Latent.queries: .* did you mean 'text'"),
        (Sum({"txet": 2.0}), "Sum.weights: .* did you mean 'text'"),
        (Bridge(1, towers={"imag": True}), "Bridge.towers: .* did you mean 'image'"),
        (Pool("fused", 2, 4), "Pool.stream: unknown stream 'fused'"),
    ):
        with pytest.raises(InputError, match=message):
            mmx.build_model(modalities, (stage,), width=8, heads=2)
    made = (Bridge(1, towers={"text": True}), Adapt(("text_tower",)), Gather(keep=True), Pool("fused", 2, 4), Adapt(("fused",)))
    mmx.build_model(modalities, made, width=8, heads=2)
    with pytest.raises(InputError, match="no block for stream 'text'"):
        model = mmx.build_model(modalities, (PerStream(1, {"image": BLOCK}),), width=8, heads=2)
        model.init(jax.random.key(0), mmx.example_batch(model))
    own = mmx.build_model(modalities, (PerStream(1, BLOCK),), width=8, heads=2, dtype="bfloat16")
    out = jax.eval_shape(lambda: own.init_with_output(jax.random.key(0), mmx.example_batch(own))[0])
    assert out.streams["text"].values.dtype == jnp.bfloat16
    for wrong in ({"relative": 512}, {"rotary": -1.0}):
        with pytest.raises(InputError, match="block: r"):
            dataclasses.replace(BLOCK, **wrong)
    for count in (512, 3):
        with pytest.raises(InputError, match=f"count={count}"):
            Buckets(count)
    with pytest.raises(InputError, match="no block"):
        Joint(1).init(jax.random.key(0), {"image": Tokens(np.zeros((1, 2, 8), "f"))})
