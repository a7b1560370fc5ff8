"""What a model holds and what a forward pass of it costs, found from shapes alone: nothing is computed, no weights are made.

    print(mmx.profile("ViT-B-32"))

The columns are those of open_clip's `docs/model_profile.csv`, and so is the rule; where it lists a model, the numbers agree.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from mmx.flops import count_flops
from mmx.model import MultimodalTransformer, abstract_params, count_parameters, example_batch
from mmx.topologies import Stage
from mmx.zoo.weights import flat

RULE = "2 FLOPs for a multiply and an add; matrix products of one forward pass of one example at full length, attention in full"
COLUMNS = (
    *("image_size", "image_width", "text_width", "embed_dim", "mparams", "image_mparams", "text_mparams"),
    *("gflops", "image_gflops", "text_gflops"),
)
OWN = ("modalities", "poolers", "projections", "embed")  # parts that belong to one modality, `poolers_image`


@dataclasses.dataclass(frozen=True)
class Tower:
    """What one modality has for itself: its embedder, its part of the stages before the poolers, its pooler and projection.

    Attributes:
        width: size of a token, D.
        params: how many parameters.
        flops: of a forward pass with this modality alone.
        size: of an image, the longer side; None where there is no such thing.
    """

    width: int
    params: int
    flops: int
    size: int | None = None


@dataclasses.dataclass(frozen=True)
class Profile:
    """The size and cost of a model. open_clip's columns are attributes, too: `mparams`, `image_gflops`.

    Attributes:
        name: of the model; "" where it has none.
        params: how many parameters, each counted once.
        flops: of a forward pass with all modalities.
        embed_dim: size of the shared space, E; None: there is none.
        towers: modality -> what it has for itself. What no modality has for itself is in no tower.
        parts: part of the model, such as "stages_0" or "poolers_image" -> its parameters.
        rule: how FLOPs are counted.
    """

    name: str
    params: int
    flops: int
    embed_dim: int | None
    towers: Mapping[str, Tower]
    parts: Mapping[str, int]
    rule: str = RULE

    @property
    def columns(self) -> dict[str, Any]:
        """`{column: number}` with the columns of open_clip's table; None where there is no such tower."""
        values: dict[str, Any] = {"embed_dim": self.embed_dim, "mparams": self.params / 1e6, "gflops": self.flops / 1e9}
        for name in ("image", "text"):
            if tower := self.towers.get(name):
                values |= {f"{name}_width": tower.width, f"{name}_size": tower.size}
                values |= {f"{name}_mparams": tower.params / 1e6, f"{name}_gflops": tower.flops / 1e9}
        return {column: values.get(column) for column in COLUMNS}

    @property
    def row(self) -> dict[str, Any]:
        """The columns rounded as open_clip prints them."""
        return {n: round(value, 2) if isinstance(value, float) else value for n, value in self.columns.items()}

    def __getattr__(self, name: str) -> Any:
        """A column of the table, such as `gflops` or `image_mparams`."""
        if name in COLUMNS:
            return self.columns[name]
        raise AttributeError(f"Profile has no attribute {name!r}; columns: {', '.join(COLUMNS)}")

    def __str__(self) -> str:
        parts = "".join(f"\n  {name:<28}{count:>16,}" for name, count in self.parts.items())
        return f"{table([self])}\n\nparameters{self.params:>36,}{parts}"


def profile(model: str | MultimodalTransformer, *, heads: Sequence[str] = (), **fields: Any) -> Profile:
    """Counts the parameters and the FLOPs of a model.

    Args:
        model: a name that `mmx.list_models` lists, or a model.
        heads: published heads, for a name.
        **fields: published fields to change, for a name, as those of `mmx.create_model`.
    """
    name = model if isinstance(model, str) else ""
    if isinstance(model, str):
        from mmx.zoo import create_model

        model = create_model(model, heads=heads, **fields)
    batch = jax.eval_shape(lambda: example_batch(model, 1))
    params = abstract_params(model)

    def cost(model: MultimodalTransformer, *names: str) -> int:
        return count_flops(lambda p, b: model.apply({"params": p}, b), params, {n: batch[n] for n in names})

    alone = model if model.pool_after is None else model.clone(stages=model.stages[: model.pool_after], heads={})

    of: dict[str | None, int] = dict.fromkeys(model.modalities, 0)
    for path, leaf in flat(params).items():
        owner = owner_of(path, list(model.modalities), alone.stages)
        of[owner] = of.get(owner, 0) + leaf.size
    towers = {}
    for n, m in model.modalities.items():
        size = getattr(m, "size", None)
        towers[n] = Tower(getattr(m, "width", 0), of[n], cost(alone, n), max(size) if isinstance(size, tuple) else None)
    parts = {part: count_parameters(tree) for part, tree in params.items()}
    return Profile(name, count_parameters(params), cost(model, *model.modalities), model.embed, towers, parts)


def owner_of(path: str, modalities: Sequence[str], stages: Sequence[Stage]) -> str | None:
    """The modality that has the parameter at `path` for itself, in one of these stages; None: it serves several, or all."""
    first, *rest = path.split("/")
    if first.startswith("stages_"):
        number = int(first.removeprefix("stages_"))
        if number >= len(stages):
            return None
        if (only := getattr(stages[number], "stream", None)) in modalities:
            return only
    for name in sorted(modalities, key=len, reverse=True):  # of "image" and "image_2" the longer one first
        in_stage = first.startswith("stages_") and any(part == name or part.startswith(f"{name}_") for part in rest)
        if in_stage or first in [f"{own}_{name}" for own in OWN]:
            return name
    return None


def table(profiles: Sequence[Profile]) -> str:
    """A line for each model under open_clip's columns, and the rule."""
    lines: list[tuple[str, ...]] = [("model", *COLUMNS)]
    for p in profiles:
        lines.append((p.name, *(_shown(value) for value in p.row.values())))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(f"{cell:>{w}}" if i else f"{cell:<{w}}" for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
            for line in lines]  # fmt: skip
    return "\n".join([*text, f"FLOPs: {RULE}"])


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
