"""Attention, blocks and stacks against NumPy, and under masks."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx.errors import InputError
from mmx.flops import _sub_jaxprs
from mmx.layers import MLP, AttentionPool, Block, BlockConfig, Line, Sight, Stack, attend, make_norm, visibility
from mmx.layers.products import DenseGeneral

SMALL = BlockConfig(width=8, heads=2, mlp=16)


def numpy_attention(query, key, value, allowed):
    """softmax(Q K^T / sqrt(K)) V one head and one row at a time; a row without keys is zero."""
    size, length, heads, _ = query.shape
    out = np.zeros_like(query)
    for b in range(size):
        for h in range(heads):
            g = h // (heads // key.shape[2])
            for i in range(length):
                keys = np.flatnonzero(allowed[b, i])
                if keys.size == 0:
                    continue
                scores = key[b, keys, g] @ query[b, i, h] / np.sqrt(query.shape[-1])
                weights = np.exp(scores - scores.max())
                out[b, i, h] = weights @ value[b, keys, g] / weights.sum()
    return out


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_attend_equals_numpy(rng, kv_heads, masked):
    query = rng.standard_normal((2, 5, 4, 3)).astype(np.float32)
    key, value = rng.standard_normal((2, 2, 6, kv_heads, 3)).astype(np.float32)
    mask = rng.random((2, 6)) < 0.6
    mask[1] = False
    visible = rng.random((5, 6)) < 0.7
    allowed = mask[:, None, :] & visible[None] if masked else np.ones((2, 5, 6), bool)
    arguments = (mask, visible) if masked else (None, None)
    np.testing.assert_allclose(attend(query, key, value, *arguments), numpy_attention(query, key, value, allowed), atol=2e-6)


def test_weights_of_attention_are_left_where_they_are_asked_for(rng):
    x, mask = rng.standard_normal((2, 3, 8)).astype("f"), np.asarray([[True, True, False], [False] * 3])
    stack = Stack(2, SMALL)
    params = stack.init(jax.random.key(0), x)
    assert set(params) == {"params"}
    _, left = stack.apply(params, x, Sight(mask), mutable=["attentions"])
    weights = left["attentions"]["layers"]["block"]["self"]["weights"]  # (depth, B, H, L, L)
    own = jax.tree.map(lambda p: p[0], params["params"]["layers"]["block"])
    y = make_norm("layer", SMALL.eps, "float32", "norm").apply({"params": own["self_norm"]}, x[0])
    query, key = (jnp.einsum("ld,dhk->hlk", y, own["self"][n]["kernel"]) for n in ("query", "key"))
    scores = np.exp(query @ key.swapaxes(1, 2) / 2) * mask[0]
    np.testing.assert_allclose(weights[0, 0], scores / scores.sum(-1, keepdims=True), atol=1e-6)
    assert weights.shape == (2, 2, 2, 3, 3) and not np.any(weights[:, 1])


def test_rows_without_keys_give_zero_in_value_and_gradient(rng):
    x = rng.standard_normal((2, 4, 2, 3)).astype(np.float32)
    mask = np.array([[True] * 4, [False] * 4])

    def loss(q, k, v):
        return jnp.square(attend(q, k, v, mask)).sum()

    assert not np.any(attend(x, x, x, mask)[1])
    np.testing.assert_allclose(attend(x, x, x, mask, blind=True)[1], np.broadcast_to(x[1].mean(0), x[1].shape), atol=1e-6)
    for gradient in jax.grad(loss, argnums=(0, 1, 2))(x, x, x):
        assert np.isfinite(gradient).all() and not np.any(gradient[1]) and np.any(gradient[0])


def test_visibility_is_as_drawn():
    drawn = ["111...", "111...", "111...", "1111..", "11111.", "111111"]
    np.testing.assert_array_equal(visibility({"image": 3, "text": 3}, ["text"]), [[c == "1" for c in row] for row in drawn])
    assert visibility({"image": 3, "text": 3}) is None
    two = visibility({"a": 2, "b": 2}, ["a", "b"])
    assert two is not None and not two[:2, 2:].any() and not two[2:, :2].any()


def test_block_is_the_sum_of_its_sublayers(rng):
    """A pre-norm block, sublayer by sublayer, in NumPy."""
    x = rng.standard_normal((2, 3, 8)).astype(np.float32)
    block = Block(dataclasses.replace(SMALL, activation="relu", eps=1e-5))
    params = jax.tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape), block.init(jax.random.key(0), x)["params"])

    def norm(x, p):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    p, y = jax.tree.map(np.asarray, params), x
    h = norm(y, p["self_norm"])
    q, k, v = (np.einsum("bld,dhk->blhk", h, p["self"][n]["kernel"]) + p["self"][n]["bias"] for n in ("query", "key", "value"))
    attention = numpy_attention(q, k, v, np.ones((2, 3, 3), bool))
    y = y + np.einsum("blhk,hkd->bld", attention, p["self"]["out"]["kernel"]) + p["self"]["out"]["bias"]
    h = np.maximum(norm(y, p["mlp_norm"]) @ p["mlp"]["up"]["kernel"] + p["mlp"]["up"]["bias"], 0)
    y = y + h @ p["mlp"]["down"]["kernel"] + p["mlp"]["down"]["bias"]
    np.testing.assert_allclose(block.apply({"params": params}, x), y, atol=2e-5)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_cross_attention_to_nothing_adds_nothing(rng, norm):
    """A context that is all masked, and no context at all, give the same numbers."""
    config = dataclasses.replace(SMALL, norm=norm)
    x, context = rng.standard_normal((2, 2, 4, 8)).astype(np.float32)
    block = Block(config, "cross self mlp")
    params = block.init(jax.random.key(0), x, context=context)["params"]
    params = jax.tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape), params)
    nothing = block.apply({"params": params}, x, context=context, context_mask=np.zeros((2, 4), bool))
    np.testing.assert_allclose(nothing, block.apply({"params": params}, x), atol=1e-6)
    assert np.abs(nothing - block.apply({"params": params}, x, context=context)).max() > 1e-3


def test_cross_attention_to_nothing_may_be_left_out(rng):
    """With its norm, example by example; where there is something to read, nothing changes."""
    x, context = rng.standard_normal((2, 2, 4, 8)).astype(np.float32)
    here = np.asarray([[0, 0, 0, 0], [1, 0, 1, 0]], bool)
    block, left = (Block(dataclasses.replace(SMALL, norm="post", skip=skip), "self cross mlp") for skip in (False, True))
    params = block.init(jax.random.key(0), x, context=context)["params"]
    params = jax.tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape), params)
    alone = Block(block.config, "self mlp").apply({"params": params}, x)
    np.testing.assert_allclose(left.apply({"params": params}, x), alone, atol=1e-6)
    assert np.abs(block.apply({"params": params}, x) - alone).max() > 1e-3
    found = left.apply({"params": params}, x, context=context, context_mask=here)
    whole = block.apply({"params": params}, x, context=context, context_mask=here)
    np.testing.assert_allclose(found, np.stack([alone[0], whole[1]]), atol=1e-6)


def test_words_make_the_sublayers(rng):
    x = rng.standard_normal((1, 3, 8)).astype(np.float32)
    params = Block(SMALL, "cross mlp self mlp").init(jax.random.key(0), x, context=x)["params"]
    assert {name for name in params if not name.endswith("norm")} == {"cross", "mlp", "self", "mlp_1"}
    with pytest.raises(InputError, match="did you mean 'cross'"):
        Block(SMALL, "cros mlp").init(jax.random.key(0), x)


def test_scores_may_be_divided_by_the_number_of_the_layer(rng):
    """As two stacks of one layer each, whose scores have the scale told."""
    x = rng.standard_normal((2, 5, 8)).astype(np.float32)
    config = dataclasses.replace(SMALL, final_norm=False)
    stack = Stack(2, dataclasses.replace(config, scale_by_layer=True))
    params = stack.init(jax.random.key(0), x)["params"]
    expected = x
    for layer, scale in enumerate((1.0, 0.5)):
        one = Stack(1, dataclasses.replace(config, scale=scale * (SMALL.width // SMALL.heads) ** -0.5))
        expected = one.apply({"params": jax.tree.map(lambda p, layer=layer: p[layer : layer + 1], params)}, expected)
    np.testing.assert_allclose(stack.apply({"params": params}, x), expected, atol=1e-6)


@functools.lru_cache
def stack_program(config, depth, drops):
    """Compiled once for every test that asks for the same."""
    stack = Stack(depth, config)

    def run(x, key):
        weights = jnp.cos(jnp.arange(x.size)).reshape(x.shape)
        params = stack.init(jax.random.key(0), x)["params"]
        rngs = {"dropout": key} if drops else None
        return jax.value_and_grad(lambda p: (stack.apply({"params": p}, x, rngs=rngs) * weights).sum())(params)

    return jax.jit(run)


def stack_output(config, x, key=None, depth=3):
    return stack_program(config, depth, key is not None)(x, key)


def test_unrolling_and_remat_change_nothing(rng):
    x = rng.standard_normal((2, 5, 8)).astype(np.float32)
    value, gradient = stack_output(SMALL, x)
    for change in ({"unroll": 2}, {"unroll": 8}, {"unroll": 8, "remat": "full"}, {"remat": "full"}, {"remat": "dots"}):
        other_value, other_gradient = stack_output(dataclasses.replace(SMALL, **change), x)
        np.testing.assert_allclose(other_value, value, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), other_gradient, gradient)


@pytest.mark.slow
def test_unrolling_and_remat_change_no_random_numbers(rng):
    x = rng.standard_normal((2, 5, 8)).astype(np.float32)
    config = dataclasses.replace(SMALL, dropout=0.5, drop_path=0.3)
    value, _ = stack_output(config, x, jax.random.key(1))
    for change in ({"unroll": 2}, {"unroll": 3}, {"unroll": 3, "remat": "full"}, {"remat": "full"}):
        np.testing.assert_allclose(stack_output(dataclasses.replace(config, **change), x, jax.random.key(1))[0], value, rtol=1e-5)


def test_a_stack_that_is_called_twice_drops_otherwise(rng):
    class Twice(nn.Module):
        config: BlockConfig

        @nn.compact
        def __call__(self, x):
            stack = Stack(2, self.config)
            return stack(x), stack(x)

    x = rng.standard_normal((2, 5, 8)).astype(np.float32)
    config = dataclasses.replace(SMALL, dropout=0.5)
    params = Twice(config).init(jax.random.key(0), x)
    first, second = Twice(config).apply(params, x, rngs={"dropout": jax.random.key(1)})
    assert np.abs(first - second).max() > 0.1
    again = Twice(dataclasses.replace(config, unroll=2)).apply(params, x, rngs={"dropout": jax.random.key(1)})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), again, (first, second))


def test_remat_saves_memory():
    x = jax.ShapeDtypeStruct((64, 64, 128), jnp.float32)
    config = BlockConfig(width=128, heads=4)

    def temporary(remat):
        stack = Stack(8, dataclasses.replace(config, remat=remat))
        params = jax.eval_shape(lambda x: stack.init(jax.random.key(0), x)["params"], x)
        step = jax.jit(jax.grad(lambda p, x: jnp.square(stack.apply({"params": p}, x)).sum()))
        return step.lower(params, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary("full") < 0.5 * temporary("none")


def test_dropout_and_drop_path_act_only_with_a_key(rng):
    x = rng.standard_normal((16, 5, 8)).astype(np.float32)
    for change in ({"dropout": 0.5}, {"drop_path": 0.9}):
        config = dataclasses.replace(SMALL, **change)
        assert stack_output(config, x)[0] == stack_output(SMALL, x)[0]
        first, again, other = (stack_output(config, x, jax.random.key(k))[0] for k in (0, 0, 1))
        assert first == again != other


def test_drop_path_drops_whole_examples_and_keeps_the_mean(rng):
    block = Block(dataclasses.replace(SMALL, drop_path=0.5), "mlp")
    x = np.repeat(rng.standard_normal((1, 3, 8)).astype(np.float32), 2000, axis=0)
    params = block.init(jax.random.key(0), x)["params"]
    branch = block.apply({"params": params}, x) - x
    dropped = block.apply({"params": params}, x, drop_path=0.5, rngs={"dropout": jax.random.key(1)}) - x
    kept = np.abs(dropped).max((1, 2)) > 0
    assert 0.45 < kept.mean() < 0.55
    np.testing.assert_allclose(dropped[kept], 2 * branch[kept], atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"norm_kind": "rms"},
        {"norm_kind": "rms_offset"},
        {"qk_norm": True},
        {"layer_scale": 0.1},
        {"kv_heads": 1},
        {"bias": False},
        {"inner_norm": True},
    ],
)
def test_every_option_changes_the_block_and_has_gradients(rng, change):
    x = rng.standard_normal((2, 5, 8)).astype(np.float32)
    value, gradient = stack_output(dataclasses.replace(SMALL, **change), x, depth=1)
    assert value != stack_output(SMALL, x, depth=1)[0]
    assert all(np.isfinite(g).all() and np.any(g) for g in jax.tree.leaves(gradient) if g.ndim > 2)


def test_norms_stand_inside_before_the_last_matrix(rng):
    """A multiway block: every stream's own norms, over all heads of attention and over the hidden layer of the MLP."""
    parts, config = (("a", 2), ("b", 3)), dataclasses.replace(SMALL, inner_norm=True, activation="relu", eps=1e-3)
    x = rng.standard_normal((1, 5, 8)).astype(np.float32)
    block = Block(config, "self mlp", parts, ("attention", "mlp"))
    params = block.init(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda p: rng.standard_normal(p.shape).astype("f"), params)
    assert params["self"]["norm_a"]["scale"].shape == (8,) and params["mlp_b"]["norm"]["scale"].shape == (16,)

    def norm(x, p):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3) * p["scale"] + p["bias"]

    def each(y, apply):
        return np.concatenate([apply(y[:2], "a"), apply(y[2:], "b")])

    p, y = params["self"], norm(x[0], params["self_norm"])
    q, k, v = (
        each(y, lambda t, m, n=n: np.einsum("ld,dhk->lhk", t, p[f"{n}_{m}"]["kernel"]) + p[f"{n}_{m}"]["bias"])
        for n in ("query", "key", "value")
    )
    heads = numpy_attention(q[None], k[None], v[None], np.ones((1, 5, 5), bool))[0].reshape(5, 8)
    out = each(heads, lambda t, m: norm(t, p[f"norm_{m}"]) @ p[f"out_{m}"]["kernel"].reshape(8, 8) + p[f"out_{m}"]["bias"])
    z = x[0] + out
    p, y = params, norm(z, params["mlp_norm"])

    def mlp(t, m):
        up, down = p[f"mlp_{m}"]["up"], p[f"mlp_{m}"]["down"]
        return norm(np.maximum(t @ up["kernel"] + up["bias"], 0), p[f"mlp_{m}"]["norm"]) @ down["kernel"] + down["bias"]

    np.testing.assert_allclose(block.apply({"params": params}, x)[0], z + each(y, mlp), atol=2e-3, rtol=1e-4)


def test_post_norm_ends_normalised(rng):
    x = 5 * rng.standard_normal((2, 5, 8)).astype(np.float32)
    stack = Stack(2, dataclasses.replace(SMALL, norm="post"))
    variables = stack.init(jax.random.key(0), x)
    assert "norm" not in variables["params"]
    np.testing.assert_allclose(np.asarray(stack.apply(variables, x)).std(-1), 1, atol=1e-3)


def test_bfloat16_stays_bfloat16():
    """The residual stream is bfloat16, and so is everything that a matrix product reads."""
    stack = Stack(2, BlockConfig(width=16, heads=2, dtype="bfloat16"))
    x = jnp.zeros((2, 4, 16), jnp.bfloat16)
    variables = stack.init(jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert stack.apply(variables, x).dtype == jnp.bfloat16

    def products(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                yield {v.aval.dtype for v in eqn.invars}
            for value in eqn.params.values():
                for inner in _sub_jaxprs(value):
                    yield from products(inner)

    read = list(products(jax.make_jaxpr(stack.apply)(variables, x).jaxpr))
    assert len(read) >= 8 and all(dtypes == {jnp.dtype("bfloat16")} for dtypes in read)


@pytest.mark.parametrize(("axis", "shape"), [(-1, (24, 5, 2)), ((-2, -1), (4, 6, 3))])
def test_products_of_bfloat16_are_rounded_behind(rng, axis, shape):
    """Value and gradients are those of the rounded operands in float32, and a parameter's gradient is not rounded at all."""
    size = (2, 7, 24) if axis == -1 else (2, 7, 4, 6)
    x = rng.standard_normal(size).astype("f").astype(jnp.bfloat16)
    dense = DenseGeneral(shape[1:] if axis == -1 else shape[2:], axis=axis, dtype="bfloat16")
    params = {"kernel": rng.standard_normal(shape).astype("f"), "bias": rng.standard_normal(dense.features).astype("f")}
    weight = rng.standard_normal((2, 7, *dense.features)).astype("f").astype(jnp.bfloat16)

    def run(params, x):
        y = dense.apply({"params": params}, x)
        assert y.dtype == jnp.bfloat16
        return (y * weight).sum(dtype=jnp.float32)

    y, (gradient, dx) = dense.apply({"params": params}, x), jax.grad(run, (0, 1))(params, x)
    rows, matrix = np.float32(x).reshape(14, 24), np.float32(params["kernel"].astype(jnp.bfloat16)).reshape(24, -1)
    out = np.float32(weight).reshape(14, -1)
    np.testing.assert_allclose(np.float32(y).reshape(14, -1), rows @ matrix + params["bias"].reshape(-1), rtol=2**-8, atol=1e-5)
    np.testing.assert_allclose(gradient["kernel"].reshape(matrix.shape), rows.T @ out, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient["bias"].reshape(-1), out.sum(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.float32(dx).reshape(14, 24), out @ matrix.T, rtol=2**-8, atol=1e-4)


def test_a_norm_of_one_and_a_parameter(rng):
    x, scale = rng.standard_normal((2, 3, 8)).astype("f"), rng.standard_normal(8).astype("f")
    norm = make_norm("rms_offset", 1e-3, "float32", "norm")
    assert not np.any(norm.init(jax.random.key(0), x)["params"]["scale"])
    expected = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-3) * (1 + scale)
    np.testing.assert_allclose(norm.apply({"params": {"scale": scale}}, x), expected, atol=1e-5)


def test_states_are_taken_behind_some_layers(rng):
    x = rng.standard_normal((2, 3, 8)).astype("f")
    stack = Stack(3, SMALL)
    params = stack.init(jax.random.key(0), x)["params"]
    taken = dataclasses.replace(stack, taken=(0, 2, 3))
    jax.tree.map(np.testing.assert_array_equal, taken.init(jax.random.key(0), x)["params"], params)
    entered, second, third = np.split(taken.apply({"params": params}, x), 3, axis=-1)
    shorter = dataclasses.replace(stack, depth=2, config=dataclasses.replace(SMALL, final_norm=False))
    two = {"layers": jax.tree.map(lambda p: p[:2], params["layers"])}
    np.testing.assert_array_equal(entered, x)
    np.testing.assert_allclose(second, shorter.apply({"params": two}, x), atol=1e-6)
    np.testing.assert_allclose(make_norm("layer", SMALL.eps, "float32", "norm").apply({"params": params["norm"]}, third),
                               stack.apply({"params": params}, x), atol=1e-6)  # fmt: skip


def test_mlp_keeps_its_shape():
    x = jnp.ones((2, 3, 8))
    mlp = MLP(16, "gelu", False, True, "float32")
    assert mlp.apply(mlp.init(jax.random.key(0), x), x).shape == x.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 10, "heads": 4}, "width=10 is not a multiple of heads=4"),
        ({"heads": 4, "kv_heads": 3, "width": 8}, "kv_heads=3"),
        ({"activation": "gelu_tan"}, "did you mean 'gelu_tanh'"),
        ({"norm": "prenorm"}, "unknown norm"),
        ({"norm_kind": "lyer"}, "did you mean 'layer'"),
        ({"remat": "ful"}, "did you mean 'full'"),
    ],
)
def test_wrong_block_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        BlockConfig(**change)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("mlp", [None, 12])
def test_attention_pool_is_its_formula(rng, norm, mlp):
    x = rng.standard_normal((2, 5, 6)).astype(np.float32)
    mask = np.asarray([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]], bool)
    pool = AttentionPool(2, tokens=3, width=8, norm=norm, mlp=mlp, activation="relu", eps=1e-5)
    params = pool.init(jax.random.key(0), x, mask)["params"]
    p = jax.tree.map(lambda w: np.asarray(w + 0.1 * rng.standard_normal(w.shape)), params)

    def normal(x, p):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    y, z = np.broadcast_to(p["token"], (2, 3, 8)), x
    if norm:
        y, z = normal(y, p["token_norm"]), normal(z, p["context_norm"])
    c = p["cross"]
    q, k, v = (np.einsum("bld,dhk->blhk", a, c[n]["kernel"]) + c[n]["bias"] for n, a in (("query", y), ("key", z), ("value", z)))
    seen = numpy_attention(q, k, v, np.broadcast_to(mask[:, None], (2, 3, 5)))
    y = np.einsum("blhk,hkd->bld", seen, c["out"]["kernel"]) + c["out"]["bias"]
    if mlp:
        h = np.maximum(normal(y, p["mlp_norm"]) @ p["mlp"]["up"]["kernel"] + p["mlp"]["up"]["bias"], 0)
        y = y + h @ p["mlp"]["down"]["kernel"] + p["mlp"]["down"]["bias"]
    np.testing.assert_allclose(pool.apply({"params": p}, x, mask), y, atol=2e-5)


def numpy_norm(x, params, eps=1e-6):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * params["scale"] + params["bias"]


@pytest.mark.parametrize("context_norm", [None, "own", "shared"])
@pytest.mark.parametrize("residual", [True, False])
def test_cross_attention_by_the_formula(rng, context_norm, residual):
    """Values of another size than keys, a context of another width, its norm, and an answer that takes the query's place."""
    width = 8 if context_norm == "shared" else 5
    config = dataclasses.replace(SMALL, head_size=3, value_size=6, context_norm=context_norm, cross_residual=residual)
    x, context = rng.standard_normal((2, 3, 8)).astype("f"), rng.standard_normal((2, 4, width)).astype("f")
    block = Block(config, "cross")
    params = block.init(jax.random.key(0), x, context=context)["params"]
    params = jax.tree.map(lambda p: rng.standard_normal(p.shape).astype("f"), params)
    assert ("cross_context_norm" in params) == (context_norm == "own")
    norms = {None: lambda y: y, "own": lambda y: numpy_norm(y, params["cross_context_norm"])}
    read = norms.get(context_norm, lambda y: numpy_norm(y, params["cross_norm"]))(context)
    weights = params["cross"]
    query, key, value = (
        np.einsum("bld,dhk->blhk", y, weights[name]["kernel"]) + weights[name]["bias"]
        for name, y in (("query", numpy_norm(x, params["cross_norm"])), ("key", read), ("value", read))
    )
    out = np.stack([numpy_attention(query, key, value[..., i : i + 3], np.ones((2, 3, 4), bool)) for i in (0, 3)], -2)
    out = np.einsum("blhk,hkd->bld", out.reshape(2, 3, 2, 6), weights["out"]["kernel"]) + weights["out"]["bias"]
    np.testing.assert_allclose(block.apply({"params": params}, x, context=context), x * residual + out, atol=2e-4)


def test_a_context_has_a_norm_that_there_is():
    for wrong in ({"context_norm": "both"}, {"context_norm": "shared", "norm": "post"}):
        with pytest.raises(InputError, match="context_norm"):
            dataclasses.replace(SMALL, **wrong)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_both_is_self_attention_of_a_stream_and_its_context(rng, norm):
    """The first sublayer of "self" on all tokens, of which the stream's own are kept; masks and causal streams included."""
    x, context = rng.standard_normal((2, 3, 8)).astype("f"), rng.standard_normal((2, 4, 8)).astype("f")
    own, other = np.asarray([[1, 1, 0], [1, 1, 1]], bool), np.asarray([[1, 0, 1, 1], [0, 0, 0, 0]], bool)
    config = dataclasses.replace(SMALL, norm=norm)
    block = Block(config, "both mlp")
    params = block.init(jax.random.key(0), x, context=context)["params"]
    renamed = {name.replace("both", "self"): leaf for name, leaf in params.items()}
    alone = Block(config, "self mlp").apply({"params": renamed}, x, Sight(own))
    np.testing.assert_allclose(block.apply({"params": params}, x, Sight(own)), alone, atol=1e-6)
    for visible in (None, np.tri(3, dtype=bool)):
        found = block.apply({"params": params}, x, Sight(own, visible), context, other)
        rule = None if visible is None else np.block([[visible, np.ones((3, 4), bool)], [np.ones((4, 7), bool)]])
        whole = Sight(np.concatenate([own, other], 1), rule)
        expected = Block(config, "self mlp").apply({"params": renamed}, np.concatenate([x, context], 1), whole)[:, :3]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(
        block.apply({"params": params}, x, context=context),
        Block(config, "self mlp").apply({"params": renamed}, np.concatenate([x, context], 1))[:, :3],
        atol=1e-5,
    )


def test_what_is_read_of_a_context_may_be_ruled(rng):
    """A token that may read nothing else than the first two equals one whose context is these two."""
    x, context = rng.standard_normal((2, 3, 8)).astype("f"), rng.standard_normal((2, 4, 8)).astype("f")
    for word in ("cross mlp", "both mlp"):
        block = Block(SMALL, word)
        params = block.init(jax.random.key(0), x, context=context)["params"]
        for visible in (None, np.tri(3, dtype=bool), np.broadcast_to(np.tri(3, dtype=bool), (2, 1, 3, 3))):
            sight = Sight(visible=visible, reads=np.tri(3, 4, 1, dtype=bool))
            found = block.apply({"params": params}, x, sight, context)
            expected = block.apply({"params": params}, x, Sight(visible=visible), context[:, :2])
            np.testing.assert_allclose(found[:, 0], expected[:, 0], atol=1e-5)
            assert np.abs(found[:, 1:] - expected[:, 1:]).max() > 1e-3


def test_time_and_space_are_attention_along_each(rng):
    """Against the sublayer "self" on what belongs together; what is masked is seen by nobody."""
    frames, places = 3, 4
    x = rng.standard_normal((2, 1 + frames * places, 8)).astype("f")
    sight = Sight(lines=(Line(1 + frames * places, 1, (frames, 2, 2)),))
    config = dataclasses.replace(SMALL, layer_scale=None)
    for kind in ("time", "space"):
        block = Block(config, kind)
        params = block.init(jax.random.key(0), x, sight)["params"]
        params = jax.tree.map(lambda p: rng.standard_normal(p.shape).astype("f"), params)
        alone = {"self": params[kind], "self_norm": params[f"{kind}_norm"]}

        def attend_alone(y, alone=alone):
            return np.asarray(Block(config, "self").apply({"params": alone}, y)) - y

        own, expected = x[:, 1:].reshape(2, frames, places, 8), np.zeros_like(x)
        if kind == "time":
            y = np.stack([attend_alone(own[:, :, p]) for p in range(places)], 2).reshape(2, -1, 8)
            expected[:, 1:] = y @ params["time_project"]["kernel"] + params["time_project"]["bias"]
        else:
            y = np.stack([attend_alone(np.concatenate([x[:, :1], own[:, f]], 1)) for f in range(frames)], 1)
            expected[:, 0], expected[:, 1:] = y[:, :, 0].mean(1), y[:, :, 1:].reshape(2, -1, 8)
        np.testing.assert_allclose(block.apply({"params": params}, x, sight), x + expected, atol=1e-3, rtol=1e-4)
        mask = np.ones(x.shape[:2], bool)
        mask[0, [2, 9, 10, 11, 12]] = False  # a place of the first frame, and all of the last
        other = np.where(mask[..., None], x, 7.0).astype("f")
        a, b = (np.asarray(block.apply({"params": params}, v, dataclasses.replace(sight, mask=mask))) for v in (x, other))
        np.testing.assert_allclose(a[mask], b[mask], atol=1e-4)
        with pytest.raises(InputError, match="lies on a grid"):
            block.init(jax.random.key(0), x)
