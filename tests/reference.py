"""The topologies in NumPy, written from the survey's formulas: one example at a time, tokens that exist only, no masks.

Parameters are those of the stages, a list with one dict for each stage.
"""

import numpy as np


def norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def mhsa(x, context, p):
    """MHSA(Q = x, KV = context)."""
    query, key, value = (np.einsum("ld,dhk->hlk", y, p[n]["kernel"]) + p[n]["bias"][:, None]
                         for y, n in ((x, "query"), (context, "key"), (context, "value")))  # fmt: skip
    scores = query @ key.swapaxes(1, 2) / np.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    heads = weights / weights.sum(-1, keepdims=True) @ value
    return np.einsum("hlk,hkd->ld", heads, p["out"]["kernel"]) + p["out"]["bias"]


def block(x, p, context=None, word="self mlp"):
    """Pre-norm; `cross` adds nothing where the context has no token."""
    for kind in word.split():
        y = norm(x, p[f"{kind}_norm"])
        if kind == "mlp":
            x = (
                x
                + gelu(y @ p["mlp"]["up"]["kernel"] + p["mlp"]["up"]["bias"]) @ p["mlp"]["down"]["kernel"]
                + p["mlp"]["down"]["bias"]
            )
        elif kind == "self":
            x = x + (mhsa(y, y, p["self"]) if len(y) else 0)
        elif context is not None and len(context):
            x = x + mhsa(y, context, p["cross"])
    return x


def layer(p, i):
    return {k: layer(v, i) if isinstance(v, dict) else v[i] for k, v in p.items()}


def depth(p):
    while isinstance(p, dict):
        p = next(iter(p.values()))
    return len(p)


def tf(x, p):
    """Transformer layers and the norm behind them."""
    for i in range(depth(p["layers"])):
        x = block(x, layer(p["layers"]["block"], i))
    return norm(x, p["norm"])


def split(x, z):
    ends = np.cumsum([len(v) for v in z.values()])
    return dict(zip(z, np.split(x, ends[:-1]), strict=True))


def total(z, places):
    """Token-aligned: `places[m]` are the positions of the tokens of m. Equal weights, over those present at a position."""
    at = {}
    for name, tokens in z.items():
        for place, token in zip(places[name], tokens, strict=True):
            at.setdefault(place, []).append(token)
    return {"fused": np.stack([np.mean(at[place], 0) for place in sorted(at)])}


def per_stream(z, p):
    return {name: tf(x, p[name]) for name, x in z.items()}


def joint(z, p):
    return split(tf(np.concatenate(list(z.values())), p["stack"]), z)


def cross(z, p, word="cross self mlp"):
    for i in range(depth(p["layers"])):
        z = {
            name: block(
                x, layer(p["layers"][name], i), np.concatenate([x[:0], *(y for other, y in z.items() if other != name)]), word
            )
            for name, x in z.items()
        }
    return {name: norm(x, p[f"{name}_norm"]) for name, x in z.items()}


def bottleneck(z, p):
    shared = p["token"]
    for i in range(depth(p["layers"])):
        both = {n: block(np.concatenate([x, shared]), layer(p["layers"][n], i)) for n, x in z.items()}
        shared = np.mean([both[n][len(x) :] for n, x in z.items() if len(x)], 0)
        z = {n: both[n][: len(x)] for n, x in z.items()}
    return {name: norm(x, p[f"{name}_norm"]) for name, x in z.items()}


def latent(z, p):
    x = block(p["token"], p["read"], np.concatenate(list(z.values())), "cross mlp")
    x = tf(x, p["stack"])
    return {name: norm(block(y, p["answer"], x, "cross mlp"), p["norm"]) for name, y in z.items()}


def apply(topology, z, places, params):
    match topology:
        case "early_summation":
            return per_stream(total(z, places), params[1])
        case "early_concatenation":
            return joint(z, params[0])
        case "multi_to_one":
            return joint(per_stream(z, params[0]), params[1])
        case "one_to_multi":
            return per_stream(joint(z, params[0]), params[1])
        case "cross_attention":
            return cross(z, params[0])
        case "cross_to_concatenation":
            return joint(cross(z, params[0]), params[1])
        case "bottleneck":
            return bottleneck(z, params[0])
        case "latent":
            return latent(z, params[0])
    raise ValueError(topology)
