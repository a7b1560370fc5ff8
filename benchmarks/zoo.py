"""Published models in mmx against transformers on torch, and CLIP against a plain Flax model, side by side.

    python benchmarks/zoo.py --torch-python /path/to/python                   all of it; without the option, Flax only
    python benchmarks/zoo.py --torch-python ... --only clip step float32      a part: words of what is to be measured

A step is forward, backward, and the update by AdamW: in mmx its own train step, with its guard against what is not finite;
in mmx and in plain Flax with the norm of the gradient. All sides begin with the same weights and see the same batch; their losses are compared first. Each side
runs a few times, then the next one, and again. torch lives in a process of its own (zoo_torch.py), in the fastest of its
settings, which is looked for first: attention, memory format, compilation; in bfloat16, autocast or all of it.
"""

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import mmx
from mmx.model import abstract_params
from mmx.parallel import MeshConfig, make_mesh, shardings
from mmx.train import Task, TrainState, compile_step, train_step
from mmx.zoo import build, configuration, save_pretrained
from mmx.zoo.pretrained import Pretrained

ADAMW = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
DEPTH = 12  # no model has more layers: mmx without a scan over them, as on the other sides
CLOSE = {"float32": 1e-4, "bfloat16": 3e-2}  # how far losses may be apart, relatively


@dataclasses.dataclass(frozen=True)
class Case:
    """A published model: what transformers calls it, and a batch for it."""

    name: str
    batch: int
    train: str
    infer: str
    output: str  # of inference, by its published name
    inputs: Callable[[np.random.Generator, int], dict[str, np.ndarray]]
    heads: tuple[str, ...] = ()
    flags: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    labels: tuple[str, ...] = ()  # inputs that are for training only


def _clip(rng: np.random.Generator, batch: int) -> dict[str, np.ndarray]:
    ids = rng.integers(1, 40000, (batch, 77))
    ids[:, -1] = 49407
    return {"input_ids": ids, "pixel_values": _pixels(rng, batch, 224)}


def _vilt(rng: np.random.Generator, batch: int) -> dict[str, np.ndarray]:
    ids = rng.integers(1000, 30000, (batch, 40))
    labels = np.where(rng.random(ids.shape) < 0.15, ids, -100)
    return {"input_ids": ids, "pixel_values": _pixels(rng, batch, 384), "labels": labels}


def _flava(rng: np.random.Generator, batch: int) -> dict[str, np.ndarray]:
    ids = rng.integers(1000, 30000, (batch, 77))
    hidden, removed = rng.random(ids.shape) < 0.15, rng.random((batch, 14, 14)) < 0.4
    return {
        "input_ids": ids,
        "input_ids_masked": np.where(hidden, 103, ids),
        "pixel_values": _pixels(rng, batch, 224),
        "bool_masked_pos": removed.astype(np.int64),
        "mlm_labels": np.where(hidden, ids, -100),
        "mim_labels": rng.integers(0, 8192, removed.shape),
        "itm_labels": np.arange(batch) % 4 // 3 ^ 1,  # every fourth text is of another image
    }


def _pixels(rng: np.random.Generator, batch: int, size: int) -> np.ndarray:
    return rng.standard_normal((batch, 3, size, size), np.float32)


FLAVA = ("input_ids_masked", "mlm_labels", "mim_labels", "itm_labels", "bool_masked_pos")
FLAVA_HEADS = ("masked-image", "masked-lm", "joint-masked-image", "joint-masked-lm", "matching")
CASES = {
    "clip": Case("clip-vit-base-patch32", 16, "CLIPModel", "CLIPModel", "logits_per_image", _clip, (), {"return_loss": True}),
    "vilt": Case("vilt-b32", 8, "ViltForMaskedLM", "ViltForMaskedLM", "logits", _vilt, ("masked-lm",), {}, ("labels",)),
    "flava": Case(
        "flava-full",
        4,
        "FlavaForPreTraining",
        "FlavaModel",
        "multimodal_embeddings",
        _flava,
        FLAVA_HEADS,
        {"return_loss": True},
        FLAVA,
    ),
}


# A two-tower model as one writes it by hand in Flax, in the manner of big_vision: a loop over blocks, flax's attention.


class Block(nn.Module):
    heads: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        y = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="self_norm")(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype, name="self")(y, y, mask=mask)
        y = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="mlp_norm")(x)
        y = nn.Dense(4 * x.shape[-1], dtype=self.dtype, name="up")(y)
        y = y * nn.sigmoid(1.702 * y)
        return x + nn.Dense(x.shape[-1], dtype=self.dtype, name="down")(y)


class Plain(nn.Module):
    """CLIP ViT-B/32: images `(B, 224, 224, 3)` and ids `(B, 77)` -> unit vectors, and the inverse temperature."""

    dtype: str

    @nn.compact
    def __call__(self, image: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        width, dtype = 768, self.dtype
        x = nn.Conv(width, (32, 32), (32, 32), use_bias=False, dtype=dtype, name="patch")(image)
        x = x.reshape(len(x), -1, width)
        special = self.param("special", nn.initializers.zeros, (1, width)).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(special, (len(x), 1, width)), x], 1)
        x = x + self.param("image_position", nn.initializers.zeros, (50, width)).astype(x.dtype)
        x = nn.LayerNorm(epsilon=1e-5, dtype=dtype, name="image_norm")(x)
        for i in range(12):
            x = Block(12, dtype, name=f"image_{i}")(x)
        x = nn.LayerNorm(epsilon=1e-5, dtype=dtype, name="image_pool")(x[:, 0])
        z = nn.Embed(49408, 512, dtype=dtype, name="token")(ids)
        z = z + self.param("text_position", nn.initializers.zeros, (77, 512)).astype(z.dtype)
        for i in range(12):
            z = Block(8, dtype, name=f"text_{i}")(z, nn.make_causal_mask(ids))
        z = nn.LayerNorm(epsilon=1e-5, dtype=dtype, name="text_norm")(z)
        z = z[jnp.arange(len(z)), (ids == 49407).argmax(-1)]
        x = nn.Dense(512, use_bias=False, dtype=dtype, name="image_embed")(x).astype(jnp.float32)
        z = nn.Dense(512, use_bias=False, dtype=dtype, name="text_embed")(z).astype(jnp.float32)
        scale = jnp.exp(self.param("logit_scale", nn.initializers.zeros, ()))
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True), z / jnp.linalg.norm(z, axis=-1, keepdims=True), scale


def plain_params(ours: Any) -> Any:
    """mmx's parameters of CLIP as those of `Plain`."""

    def blocks(name: str) -> dict[str, Any]:
        block = ours["stages_0"][name]["layers"]["block"]
        block = {**{k: v for k, v in block.items() if k != "mlp"}, **block["mlp"]}
        return {f"{name}_{i}": jax.tree.map(lambda x, i=i: jnp.array(x[i]), block) for i in range(12)}

    image, text = ours["modalities_image"], ours["modalities_text"]
    tree = {
        "patch": {"kernel": image["patch"]["kernel"].reshape(32, 32, 3, 768)},
        "special": image["special"],
        "image_position": image["position"],
        "image_norm": image["norm"],
        **blocks("image"),
        "image_pool": ours["poolers_image"]["norm"],
        "image_embed": ours["projections_image"]["projection"],
        "token": text["token"],
        "text_position": text["position"],
        **blocks("text"),
        "text_norm": ours["stages_0"]["text"]["norm"],
        "text_embed": ours["projections_text"]["projection"],
        "logit_scale": ours["logit_scale"],
    }
    return jax.tree.map(jnp.array, tree)


def plain_logits(model: Plain, params: Any, batch: Mapping[str, Any]) -> jax.Array:
    image, text, scale = model.apply({"params": params}, jnp.moveaxis(batch["pixel_values"], 1, -1), batch["input_ids"])  # type: ignore[misc]
    return scale * image @ text.T


def plain_side(ours: Pretrained, batch: Mapping[str, Any], train: bool, dtype: str) -> Callable[[], Any]:
    model, params = Plain(dtype), plain_params(ours.params)
    if not train:
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        forward = jax.jit(functools.partial(plain_logits, model))
        return lambda: forward(params, batch)
    optimizer = adamw()
    moments = optimizer.init(params)

    def loss(params: Any, batch: Any) -> jax.Array:
        logits = plain_logits(model, params, batch)
        pairs = jnp.arange(len(logits))
        both = [optax.softmax_cross_entropy_with_integer_labels(x, pairs).mean() for x in (logits, logits.T)]
        return (both[0] + both[1]) / 2

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, moments: Any, batch: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, moments = optimizer.update(gradient, moments, params)
        norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(gradient)))  # which big_vision's step measures too
        return optax.apply_updates(params, updates), moments, (value, norm)

    def run() -> jax.Array:
        nonlocal params, moments
        params, moments, (value, _) = step(params, moments, batch)
        return value

    return run


def adamw() -> optax.GradientTransformation:
    (b1, b2), more = ADAMW["betas"], {n: v for n, v in ADAMW.items() if n not in ("lr", "betas")}
    return optax.adamw(ADAMW["lr"], b1, b2, **more)


# mmx.


@dataclasses.dataclass(frozen=True, eq=False)
class PublishedLoss(Task):
    """A task whose loss is the one that the published model returns."""

    pretrained: Pretrained = dataclasses.field(kw_only=True)
    flags: Mapping[str, bool] = dataclasses.field(kw_only=True)

    def forward(self, params: Any, batch: Any, key: jax.Array | None) -> Any:
        return self.pretrained.apply(params, **batch, **self.flags)["loss"]

    def loss(self, values: Any, memory: Any = None) -> tuple[jax.Array, dict[str, Any]]:
        return values, {}


def our_side(ours: Pretrained, case: Case, batch: Mapping[str, Any], train: bool, dtype: str) -> Callable[[], Any]:
    if not train:
        small = dataclasses.replace(ours, params=jax.tree.map(lambda x: x.astype(dtype), ours.params))
        return lambda: small(**batch)[case.output]
    optimizer, mesh = adamw(), make_mesh(MeshConfig(), jax.devices()[:1])
    params, zero = jax.tree.map(jnp.array, ours.params), jnp.zeros((), jnp.int32)
    state = TrainState(zero, params, optimizer.init(params), None, jax.random.key(0), zero + 0, zero + 0)
    with jax.set_mesh(mesh):
        task = PublishedLoss(ours.model, {}, pretrained=ours, flags=case.flags)
        step = functools.partial(train_step, task=task, optimizer=optimizer, schedule=lambda _: ADAMW["lr"])
        shapes = jax.eval_shape(lambda s: s, state)
        layout = shardings(mesh, shapes, params=shapes.params)
        step = compile_step(step, mesh, layout).lower(state, batch).compile()
        state = jax.device_put(state, layout)

    def run() -> jax.Array:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics["loss"]

    return run


def timed(run: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        result = run()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / count


class Torch:
    """The other process."""

    def __init__(self, python: str, threads: int):
        command = [python, str(Path(__file__).with_name("zoo_torch.py")), str(threads)]
        # what belongs to this interpreter is nothing to the other one
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def __call__(self, do: str, **order: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        print(json.dumps({"do": do, **order}), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError("the torch side has ended; its last words are above")
        return json.loads(answer)


def random_model(case: Case, heads: tuple[str, ...], folder: Path) -> None:
    """Writes the model at its full size with random weights."""
    family, config = configuration(case.name)
    model = build(family, config, heads, "float32")
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        name = path[-1].key
        if name == "logit_scale":
            return np.float32(np.log(1 / 0.07))
        return 0.02 * rng.standard_normal(leaf.shape, np.float32) + np.float32(name == "scale")

    params = jax.tree_util.tree_map_with_path(draw, abstract_params(model))
    save_pretrained(folder, Pretrained(model, params, config, family, heads))


def compare(key: str, train: bool, dtype: str, torch: Torch | None, args: argparse.Namespace, folder: Path) -> None:
    case = CASES[key]
    heads = case.heads if train or case.train == case.infer else ()
    weights = folder / key
    if not weights.exists():
        random_model(case, case.heads, weights)
    ours = mmx.load_pretrained(weights, heads=heads, dtype=dtype, unroll=DEPTH)
    batch = case.inputs(np.random.default_rng(1), args.batch or case.batch)
    batch = batch if train else {name: x for name, x in batch.items() if name not in case.labels}
    np.savez(folder / "batch.npz", **batch)
    here = {n: jnp.asarray(x.astype(np.int32) if x.dtype == np.int64 else x) for n, x in batch.items()}
    sides = {"mmx": our_side(ours, case, here, train, dtype)}
    if key == "clip":
        sides["flax"] = plain_side(ours, here, train, dtype)
    first = {name: np.asarray(run(), np.float32) for name, run in sides.items()}
    again = {name: np.asarray(run(), np.float32) for name, run in sides.items()}  # behind the first update
    del ours
    count = args.count or (1 if train else 4)
    runs = {name: functools.partial(timed, run, count) for name, run in sides.items()}
    setting = ""
    if torch is not None:
        order = {
            "class": case.train if train else case.infer,
            "folder": str(weights),
            "inputs": str(folder / "batch.npz"),
            "result": str(folder / "result.npy"),
            "train": train,
            "output": "loss" if train else case.output,
            "flags": dict(case.flags) if train else {},
            "dtype": dtype,
            "adamw": ADAMW,
            "search": not args.no_search,
            "setting": json.loads(args.setting),
        }
        answer = torch("prepare", **order)
        first["torch"] = np.load(folder / "result.npy")
        runs["torch"] = lambda: torch("run", count=count)
        chosen = {n: v for n, v in answer["setting"].items() if n != "pure" or dtype == "bfloat16"}
        setting = ", ".join(f"{name}={value}" for name, value in chosen.items())
        if args.verbose:
            print(json.dumps(answer["seconds"], indent=1))
    largest = max(1.0, float(np.abs(first["mmx"]).max()))
    for name, value in first.items():
        apart = float(np.abs(value - first["mmx"]).max()) / largest
        assert apart < CLOSE[dtype], f"{key}: {name} is {apart:.1e} apart; not the same computation"
    if train and "flax" in again:
        assert abs(again["flax"] - again["mmx"]) / largest < CLOSE[dtype], f"{key}: another update"
    rounds = [{name: run() for name, run in runs.items()} for _ in range(args.rounds)]
    what, size = "step" if train else "inference", len(here["pixel_values"])
    mine = np.median([r["mmx"] for r in rounds])
    line = f"{key:<6}{what:<10}{dtype:<9} mmx {1e3 * mine:7.0f} ms, {size / mine:6.1f} examples/s"
    for name in runs:
        if name != "mmx":
            ratio = np.array([r[name] / r["mmx"] for r in rounds])
            low, high = np.quantile(ratio, (0.25, 0.75))
            line += f" | {name} {1e3 * np.median([r[name] for r in rounds]):7.0f} ms, {np.median(ratio):.2f} x ({low:.2f} to {high:.2f})"
    print(line + (f" | {setting}" if setting else ""), flush=True)
    if torch is not None:
        torch("forget")


def load(torch: Torch | None, args: argparse.Namespace, folder: Path) -> None:
    """Loading CLIP ViT-B/32 from its folder, and until every number was read once: transformers maps the file and reads none."""
    case, weights = CASES["clip"], folder / "clip"
    if not weights.exists():
        random_model(case, case.heads, weights)

    def ours(read: bool) -> float:
        start = time.perf_counter()
        params = jax.block_until_ready(mmx.load_pretrained(weights).params)
        if read:
            sum(float(np.asarray(x).sum()) for x in jax.tree.leaves(params))
        return time.perf_counter() - start

    for read in (False, True):
        ours(read)
        rounds = []
        for _ in range(args.rounds):
            mine = ours(read)
            order = {"class": case.train, "folder": str(weights), "read": read}
            rounds.append((mine, torch("load", **order) if torch else mine))
        mine, other = 1e3 * np.median(rounds, 0)
        ratio = np.median([b / a for a, b in rounds])
        what = "load, read" if read else "load"
        print(f"clip  {what:<19} mmx {mine:7.0f} ms | torch {other:7.0f} ms, {ratio:.2f} x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--torch-python", help="an interpreter with torch and transformers")
    parser.add_argument("--only", nargs="*", default=(), help="words: clip vilt flava, step inference load, float32 bfloat16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--count", type=int, help="runs of a side in a round")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--no-search", action="store_true", help="torch in one setting, without looking for the fastest")
    parser.add_argument("--setting", default="{}", help='JSON: settings of torch that are given, such as {"pure": false}')
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    torch = Torch(args.torch_python, cores) if args.torch_python else None
    print(
        f"jax {jax.__version__}" + (f", {torch('hello')}" if torch else "") + f", {cores} cores, load {os.getloadavg()[0]:.1f}",
        flush=True,
    )

    def wanted(*words: str) -> bool:
        kinds = [set(CASES), {"step", "inference", "load"}, {"float32", "bfloat16"}]
        return all(not (kind & set(args.only)) or set(words) & kind & set(args.only) for kind in kinds if kind & set(words))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if wanted("clip", "load"):
            load(torch, args, folder)
        for key in CASES:
            for train in (True, False):
                for dtype in CLOSE:
                    if wanted(key, "step" if train else "inference", dtype):
                        compare(key, train, dtype, torch, args, folder)
                        jax.clear_caches()


if __name__ == "__main__":
    main()
