"""The whole configuration of a run, as frozen dataclasses. The command line and its help are made from them."""

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import flax.linen as nn
import tyro

from mmx import data, evaluate, layers, modalities, objectives, parallel, topologies
from mmx.data import DataConfig
from mmx.errors import InputError, at_least, naming, unknown
from mmx.layers import BlockConfig
from mmx.layers.relative import Relative
from mmx.modalities import Ids, Patches
from mmx.model import MultimodalTransformer, build_model
from mmx.parallel import MeshConfig
from mmx.topologies import BEYOND, TOPOLOGIES, Stage
from mmx.train import optimizer
from mmx.train.optimizer import OptimizerConfig, make_schedule


@dataclasses.dataclass(frozen=True)
class ModelConfig(BlockConfig):
    """The size of the model, and what its blocks are like."""

    width: int = 128
    """Size of a token, D."""
    mlp: int | None = 384
    """Hidden size of the MLP, F. None: 4 x width."""
    relative: Annotated[Relative | None, tyro.conf.Suppress] = None
    """Relative positions, from a configuration file: `mmx.layers.Buckets` (T5), `Grid` (BEiT), `Axes` (LayoutLMv3), or None."""
    unroll: int = 2
    """Layers per iteration of the scan over layers. On a CPU, loops are slow and short stacks compile fast."""
    depth: int = 2
    """Layers on the way of a token; a topology of two parts gives the first part the larger half."""
    embed: int = 128
    """Size of the space shared by all modalities, E; 0: none."""
    logit_scale: float = 1 / 0.07
    """First value of the shared space's inverse temperature (SigLIP: 10)."""
    logit_bias: float | None = None
    """First value of what a sigmoid loss adds to similarities (SigLIP: -10); None: there is none."""

    pool_after: int | None = None
    """Stages that stand before the vectors of the shared space: towers that meet there before they meet in the stages behind
    (ALBEF, CoCa). None: all stages."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, depth=1, embed=0)

    def build(
        self,
        modalities: Mapping[str, nn.Module],
        topology: str | tuple[Stage, ...],
        outputs: Mapping[str, nn.Module],
    ) -> MultimodalTransformer:
        """Builds the model."""
        block = {field.name: getattr(self, field.name) for field in dataclasses.fields(BlockConfig)}
        own: dict[str, Any] = {
            name: getattr(self, name) for name in ("depth", "embed", "logit_scale", "logit_bias", "pool_after")
        }
        return build_model(modalities, topology, outputs=outputs, **own, **block)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved, and which checkpoints stay. Saving goes on beside the training."""

    every_steps: int = 0
    """Save after this many steps; 0: not by steps. The last step is always saved."""
    every_minutes: float = 10.0
    """Save after this much time; 0: not by time."""
    keep: int = 2
    """The last ones that stay."""
    best: str = "composition/image_to_text_R@1"
    """The metric whose best checkpoint stays too; a state is saved after each evaluation that gives it. Empty: none."""
    best_is: Literal["highest", "lowest"] = "highest"
    """Which value of that metric is best."""

    def __post_init__(self) -> None:
        at_least(self, every_steps=0, every_minutes=0, keep=1)


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is written while training."""

    every: int = 10
    """Steps between two records of metrics.jsonl."""
    tensorboard: bool = True
    """Whether TensorBoard event files are written too."""

    def __post_init__(self) -> None:
        at_least(self, every=1)


@dataclasses.dataclass(frozen=True)
class Published:
    """A published model as a run holds it; `mmx convert` makes one of a published folder."""

    family: str
    """Its `model_type`."""
    fields: dict[str, Any]
    """Those of its config.json."""
    heads: tuple[str, ...] = ()
    """Its published heads."""

    @property
    def parts(self) -> tuple[Any, Any]:
        """The family and its configuration."""
        from mmx.zoo import FAMILIES, parse  # other runs need not wait for it

        if self.family not in FAMILIES:
            raise InputError("published: " + unknown("family", self.family, FAMILIES))
        family = FAMILIES[self.family]
        return family, parse(family.config, self.fields, "published")

    def build(self, dtype: str) -> MultimodalTransformer:
        """The model, which computes in `dtype`."""
        from mmx.zoo import build

        return build(*self.parts, self.heads, dtype)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Trains, evaluates and resumes a multimodal Transformer. Without arguments: the default model on the emoji set."""

    topology: str = "multi_to_one"
    """How modalities attend to each other: early_summation, early_concatenation, multi_to_one, one_to_multi,
    cross_attention or cross_to_concatenation; and bottleneck or latent, beside the survey's six."""
    steps: int = 320
    """Optimizer steps."""
    batch_size: int = 128
    """Examples per step, over all devices."""
    microbatches: int = 1
    """Parts of a batch that are computed one after the other; the gradient is that of the whole batch."""
    seed: int = 0
    """Of parameters, data order and all other randomness."""
    run: str = ""
    """Folder of the run. Empty: a new one below runs/."""
    resume: str = "auto"
    """auto: go on if the run folder has a checkpoint; never: refuse a folder that has one; must: refuse one that has
    none; a path: start a new run from the state of that run or checkpoint."""
    model: ModelConfig = ModelConfig()
    modalities: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {"image": Patches((32, 32), (8, 8)), "text": Ids(1024, 21)}
    )
    modality_dropout: float = 0.0
    """How often a modality of an example is hidden in training; never the last one it has, and never in evaluation."""
    stages: Annotated[tuple[Stage, ...], tyro.conf.Suppress] = ()
    """An own topology, from a configuration file; it replaces `topology`."""
    published: Annotated[Published | None, tyro.conf.Suppress] = None
    """A published model, from a configuration file or `mmx convert`; it replaces `topology`, `modalities`, and but for the
    type of the computation `model`. Its objectives have to do with the heads it has."""
    objectives: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {
            "contrastive": objectives.Contrastive(),
            "matching": objectives.Matching(),
            "captioning": objectives.Captioning(),
        }
    )
    sampling: dict[str, float] = dataclasses.field(default_factory=dict)
    """Objectives of which each step takes one, drawn by these ratios: {"words": 2, "regions": 1}. Those that are not named take
    part in every step."""
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluators: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {"composition": evaluate.Retrieval(), "captions": evaluate.Captions()}
    )
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self) -> None:
        at_least(self, steps=1, batch_size=1, microbatches=1, seed=0, modality_dropout=0)
        if self.modality_dropout >= 1:
            raise InputError(f"modality_dropout={self.modality_dropout}; it has to be less than 1")
        if self.microbatches > self.batch_size:
            raise InputError(f"microbatches={self.microbatches}; there cannot be more than batch_size={self.batch_size}")
        if not self.stages and self.topology not in TOPOLOGIES | BEYOND:
            raise InputError(unknown("topology", self.topology, TOPOLOGIES | BEYOND))
        if self.published is not None:
            object.__setattr__(self, "modalities", dict(self.build_model().modalities))
        elif not self.active_objectives:
            raise InputError("objectives: every weight is 0; there is nothing to train")
        make_schedule(self.optimizer, self.steps)
        self._check_objectives()
        best = self.checkpoint.best.split("/")[0]
        if best and self.evaluators and best not in self.evaluators:
            raise InputError(
                f"checkpoint.best={self.checkpoint.best!r} begins with no evaluator's name (an empty one keeps no best "
                f"checkpoint): {unknown('evaluator', best, self.evaluators)}"
            )

    def _check_objectives(self) -> None:
        for name, objective in self.active_objectives.items():
            for modality in dict.fromkeys(m for view in objective.views() for m, _ in view.reads):
                if modality not in self.modalities:
                    raise InputError(f"objectives.{name}: " + unknown("modality", modality, self.modalities))
        for name, ratio in self.sampling.items():
            if name not in self.active_objectives:
                raise InputError("sampling: " + unknown("objective", name, self.active_objectives))
            if not ratio > 0:
                raise InputError(f"sampling.{name}={ratio}; it has to be more than 0")
        if self.active_objectives:
            model = self.build_model()
            objectives.check(self.active_objectives, model)
            for name, evaluator in self.evaluators.items():
                with naming(f"evaluators.{name}"):
                    objectives.check(getattr(evaluator, "objectives", {}), model)

    def __hash__(self) -> int:
        """By identity, so that it can be a static argument of jit; its fields hold dicts."""
        return id(self)

    @property
    def active_objectives(self) -> dict[str, Any]:
        """The objectives whose weight is not 0."""
        return {name: objective for name, objective in self.objectives.items() if objective.weight}

    def build_model(self) -> MultimodalTransformer:
        """The model, with the heads its objectives need."""
        if self.published is not None:
            return self.published.build(self.model.dtype)
        heads = objectives.needed_heads(self.active_objectives, self.modalities)
        return self.model.build(self.modalities, self.stages or self.topology, heads)


FREE = ("run", "resume", "mesh", "checkpoint", "log", "data.threads", "data.buffer", "data.keep")  # may differ when a run goes on


def to_json(value: Any) -> Any:
    """A configuration as plain JSON; every dataclass says its class, so that `from_json` can make it again."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [
            f.name for f in dataclasses.fields(value) if f.name not in ("parent", "name") or not isinstance(value, nn.Module)
        ]
        return {"class": type(value).__name__} | {name: to_json(getattr(value, name)) for name in fields}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return value


def from_json(value: Any) -> Any:
    """The configuration that `to_json` wrote.

    Raises:
        InputError: a class that mmx does not have, or a field its class does not have.
    """
    if isinstance(value, list):
        return tuple(from_json(item) for item in value)
    if not isinstance(value, Mapping):
        return value
    fields = {name: from_json(item) for name, item in value.items() if name != "class"}
    if "class" not in value:
        return fields
    homes = (sys.modules[__name__], evaluate, objectives, data, layers, modalities, parallel, topologies, optimizer)
    classes = {
        name: item
        for home in homes
        for name, item in vars(home).items()
        if isinstance(item, type) and dataclasses.is_dataclass(item)
    }
    cls: Any = classes.get(value["class"])
    if cls is None:
        raise InputError(f"{unknown('class', value['class'], classes)}; classes of your own cannot be made from their names")
    known = {field.name for field in dataclasses.fields(cls)}
    for name in fields:
        if name not in known:
            raise InputError(f"{value['class']}: " + unknown("field", name, known))
    return cls(**fields)


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """The fields in which two configurations, as JSON, differ: `field: old -> new`. What may differ is left out."""
    if path in FREE:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        found = [differences(old.get(k), new.get(k), f"{path}.{k}" if path else k) for k in keys]
        return [line for lines in found for line in lines]
    return [] if old == new else [f"{path}: {json.dumps(old)} -> {json.dumps(new)}"]


def load_config(path: Path) -> Experiment:
    """The Experiment that `config()` of a Python file returns.

    Raises:
        InputError: no such file, or no such function in it.
    """
    if not path.is_file() or path.suffix != ".py":
        known = ", ".join(str(p) for p in sorted(Path("configs").glob("*.py"))) or "none in configs/"
        raise InputError(f"no configuration file {path}; there are: {known}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    experiment = module.config() if hasattr(module, "config") else None
    if not isinstance(experiment, Experiment):
        raise InputError(f"{path} has no function config() that returns an mmx.Experiment")
    return experiment
