"""What each topology costs in mmx, against the same computation written by hand in plain JAX, and over sequence length.

    python benchmarks/topologies.py           the train step of every topology, side by side; examples/s and ratio
    python benchmarks/topologies.py lengths   forward passes over sequence length: summation, bottleneck, concatenation

The hand-written side: arrays in dicts, a Python loop over layers, no scan, no masks, no mesh, no configuration; every rewriting
that we know to be faster on a CPU is in it.
"""

import dataclasses
import functools
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import mmx
from mmx.layers import BlockConfig
from mmx.modalities import Ids, Patches
from mmx.objectives import view
from mmx.parallel import MeshConfig, make_mesh
from mmx.topologies import BEYOND, TOPOLOGIES, make_topology
from mmx.train import ModelConfig, Task, compile_step, make_optimizer, make_schedule, make_state, train_step
from mmx.types import Tokens

BATCH, WIDTH, HEADS, HIDDEN, DEPTH, LENGTH, VOCAB = 64, 128, 4, 384, 4, 16, 1024  # 16 patches beside 16 words
ROUNDS, STEPS = 25, 4


@dataclasses.dataclass(frozen=True)
class JointContrastive:
    """Both modalities in one forward pass, then CLIP's loss: a train step that every topology takes part in."""

    weight: float = 1.0

    def heads(self):
        return {}

    def corrupt(self, batch, key):
        return batch

    def views(self):
        return (view("image", "text"),)

    def select(self, outputs, batch):
        (out,) = outputs
        return {"embeddings": out.embeddings, "scale": jnp.broadcast_to(out.logit_scale, (BATCH,))}

    def loss(self, values):
        e = values["embeddings"]
        return mmx.losses.clip_loss(e["image"], e["text"], values["scale"].mean()), {}


def experiment(topology: str) -> mmx.Experiment:
    return mmx.Experiment(
        topology=topology,
        batch_size=BATCH,
        model=ModelConfig(width=WIDTH, mlp=HIDDEN, heads=HEADS, depth=DEPTH, embed=WIDTH, unroll=DEPTH),
        modalities={"image": Patches((32, 32), (8, 8)), "text": Ids(VOCAB, LENGTH)},
        objectives={"joint": JointContrastive()},
        evaluators={},
    )


# By hand. Parameters: {"name": array or list of layers}.


def norm(x, p):
    mean, square = x.mean(-1, keepdims=True), jnp.square(x).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(square - mean * mean + 1e-6) * p["scale"] + p["bias"]


def attention(x, context, p):
    def heads(y, p):
        rows = y.reshape(-1, WIDTH)  # as one matrix, which XLA's CPU backend is faster with
        return (rows @ p["kernel"].reshape(WIDTH, WIDTH) + p["bias"].reshape(-1)).reshape(*y.shape[:2], HEADS, -1)

    query, key, value = heads(x, p["query"]), heads(context, p["key"]), heads(context, p["value"])
    scores = jnp.einsum("bqhk,bmhk->bhqm", query / np.sqrt(WIDTH // HEADS), key)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))  # divided last, as mmx does
    y = jnp.einsum("bhqm,bmhk->bqhk", weights, value) / weights.sum(-1).swapaxes(1, 2)[..., None]
    return (y.reshape(-1, WIDTH) @ p["out"]["kernel"].reshape(WIDTH, WIDTH) + p["out"]["bias"]).reshape(x.shape)


def mlp(x, p):
    rows = x.reshape(-1, WIDTH)
    rows = jax.nn.gelu(rows @ p["up"]["kernel"] + p["up"]["bias"]) @ p["down"]["kernel"] + p["down"]["bias"]
    return rows.reshape(x.shape)


def block(x, p, context=None):
    if context is not None:
        x = x + attention(norm(x, p["cross_norm"]), context, p["cross"])
    y = norm(x, p["self_norm"])
    x = x + attention(y, y, p["self"])
    return x + mlp(norm(x, p["mlp_norm"]), p["mlp"])


def stack(x, p):
    for layer in p["layers"]:
        x = block(x, layer["block"])
    return norm(x, p["norm"])


def per_stream(z, p):
    return {name: stack(x, p[name]) for name, x in z.items()}


def joint(z, p):
    x = stack(jnp.concatenate([z["image"], z["text"]], 1), p["stack"])
    return {"image": x[:, :LENGTH], "text": x[:, LENGTH:]}


def cross(z, p):
    for layer in p["layers"]:
        z = {"image": block(z["image"], layer["image"], z["text"]), "text": block(z["text"], layer["text"], z["image"])}
    return {name: norm(x, p[f"{name}_norm"]) for name, x in z.items()}


def total(z, p):
    return {"fused": (z["image"] + z["text"]) / 2}


BY_HAND = {
    "early_summation": (total, per_stream),
    "early_concatenation": (joint,),
    "multi_to_one": (per_stream, joint),
    "one_to_multi": (joint, per_stream),
    "cross_attention": (cross,),
    "cross_to_concatenation": (cross, joint),
}


def by_hand(params, batch, topology):
    image = (batch["image"].astype(jnp.float32) / 255 - 0.5) / 0.5
    patches = image.reshape(-1, 4, 8, 4, 8, 3).swapaxes(2, 3).reshape(BATCH, 16, -1)
    p = params["modalities_image"]
    z = {"image": patches @ p["patch"]["kernel"] + p["patch"]["bias"] + p["position"]}
    p = params["modalities_text"]
    z["text"] = p["token"]["embedding"][batch["text"]] + p["position"]
    for i, stage in enumerate(BY_HAND[topology]):
        z = stage(z, params.get(f"stages_{i}"))
    out = {}
    for name in ("image", "text"):
        x = z.get(name, z.get("fused")).mean(1) @ params[f"embed_{name}"]["projection"]["kernel"]
        out[name] = x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True))
    scale = jnp.minimum(jnp.exp(params["logit_scale"]), 100.0)
    logits = scale * out["image"] @ out["text"].T
    pairs = jnp.diagonal(logits)
    return ((jax.nn.logsumexp(logits, 1) - pairs).mean() + (jax.nn.logsumexp(logits, 0) - pairs).mean()) / 2


def unstack(params):
    """Layers as a list, not as one array."""
    if not isinstance(params, dict):
        return params
    new = {name: unstack(value) for name, value in params.items()}
    if "layers" in new:
        depth = len(jax.tree.leaves(new["layers"])[0])
        new["layers"] = [jax.tree.map(lambda x, i=i: jnp.array(x[i]), new["layers"]) for i in range(depth)]
    return new


def compare(topology: str) -> None:
    e = experiment(topology)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 255, (BATCH, 32, 32, 3), np.uint8),
        "text": rng.integers(0, VOCAB, (BATCH, LENGTH), np.int32),
    }
    batch = jax.device_put(batch)
    mesh, task = make_mesh(MeshConfig()), Task(e.build_model(), e.active_objectives)
    optimizer, schedule = make_optimizer(e.optimizer, 1000), make_schedule(e.optimizer, 1000)
    state, layout = make_state(task.model, optimizer, False, 0, mesh)
    hand = unstack(jax.tree.map(jnp.array, state.params))
    moments = optimizer.init(hand)
    with jax.set_mesh(mesh):
        step = functools.partial(train_step, task=task, optimizer=optimizer, schedule=schedule)
        step = compile_step(step, mesh, layout).lower(state, batch).compile()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def hand_step(params, moments, batch):
        loss, gradient = jax.value_and_grad(by_hand)(params, batch, topology)
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, loss

    def ours():
        nonlocal state
        for _ in range(STEPS):
            state, metrics = step(state, batch)
        return metrics["loss"]

    def theirs():
        nonlocal hand, moments
        for _ in range(STEPS):
            hand, moments, loss = hand_step(hand, moments, batch)
        return loss

    a, b = float(ours()), float(theirs())  # the same steps from the same parameters
    assert abs(a / b - 1) < 1e-3, f"{topology}: loss {a} in mmx, {b} by hand; not the same computation"
    times = [(timed(ours), timed(theirs)) for _ in range(ROUNDS)]
    mine, other = np.median(times, 0) / STEPS
    low, high = np.quantile([y / x for x, y in times], (0.25, 0.75))
    print(
        f"{topology:<24}{BATCH / mine:>8,.0f} against {BATCH / other:>6,.0f} examples/s, ratio {other / mine:.3f} "
        f"(half of the rounds: {low:.3f} to {high:.3f})",
        flush=True,
    )


def timed(run) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


class Stages(nn.Module):
    """Stages and nothing else."""

    stages: tuple

    @nn.compact
    def __call__(self, streams):
        for stage in self.stages:
            streams = stage(streams)
        return {name: tokens.values for name, tokens in streams.items()}


def lengths() -> None:
    """Milliseconds of a forward pass of two streams of N tokens each, four layers of width 64, batch 2."""
    block = BlockConfig(width=64, heads=4, mlp=128)
    names = ("early_summation", "bottleneck", "latent", "early_concatenation", "cross_attention")
    print("| tokens of each stream | " + " | ".join(names) + " | summation / concatenation | bottleneck / concatenation |")
    print("|---" * (len(names) + 3) + "|")
    for length in (64, 128, 256, 512, 1024):
        runs = []
        for name in names:
            model = Stages(make_topology(name, 4, block))
            streams = {n: Tokens(jnp.ones((2, length, 64))) for n in ("image", "text")}
            variables = model.init(jax.random.key(0), streams)
            forward = jax.jit(model.apply)
            jax.block_until_ready(forward(variables, streams))
            runs.append(functools.partial(forward, variables, streams))
        rounds = [[timed(run) for run in runs] for _ in range(9)]
        times = dict(zip(names, 1e3 * np.median(rounds, 0), strict=True))
        whole = times["early_concatenation"]
        cells = [f"{times[name]:.1f}" for name in names]
        cells += [f"{times['early_summation'] / whole:.2f}", f"{times['bottleneck'] / whole:.2f}"]
        print(f"| {length} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}", flush=True)
    if sys.argv[1:] == ["lengths"]:
        lengths()
        return
    assert set(BY_HAND) == set(TOPOLOGIES) and not set(BY_HAND) & set(BEYOND)
    for topology in BY_HAND:
        compare(topology)


if __name__ == "__main__":
    main()
