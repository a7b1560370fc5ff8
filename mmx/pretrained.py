"""One door for weights: published folders, mmx's own run folders, and what `save_pretrained` made of a run."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mmx.data import Tokenizer
from mmx.errors import InputError, writing
from mmx.modalities import Ids
from mmx.model import MultimodalTransformer, abstract_params, change_blocks
from mmx.parallel import MeshConfig, make_mesh, shardings
from mmx.train import make_optimizer, make_state
from mmx.train.checkpoint import Checkpoints, find_checkpoint
from mmx.train.experiment import Experiment, Published, from_json, to_json
from mmx.train.folder import RunFolder, load_run
from mmx.zoo import tensors
from mmx.zoo.config import read_fields
from mmx.zoo.family import Family, Runner
from mmx.zoo.folders import as_published, load_published
from mmx.zoo.pretrained import Pretrained
from mmx.zoo.weights import Table, flat, resolve

MODEL_TYPE = "mmx"
TOKENIZER = "tokenizer.json"


def load_pretrained(
    folder: str | Path,
    *,
    family: str | None = None,
    heads: Sequence[str] | None = None,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    remat: str | None = None,
    unroll: int | None = None,
) -> Pretrained:
    """Loads weights: a folder in a published layout, a run folder of mmx, or one of its checkpoints. No torch, no network.

    Args:
        folder: where they lie: `config.json` and safetensors (sharded index included), or a run.
        family: which published family it is, where config.json has no `model_type`; not of a run.
        heads: which published heads; None: those the weights have; not of a run, which has its own.
        dtype: type of the computation; None: float32, or the run's.
        mesh: devices to load onto; each gets its part of every parameter.
        remat: of the blocks, `mmx.layers.BlockConfig`: what a backward pass computes again.
        unroll: likewise: layers per iteration of a scan; as many as there are: none, for speed on a CPU.

    Returns:
        What is called with published input names; a run's model with its modalities' names.

    Raises:
        InputError: no such folder or file, a configuration with something unsupported, or weights that do not fit it: one
            error with every name that is missing, unexpected, or of another shape.
    """
    folder = Path(folder)
    kind = _kind(folder)
    if kind in (MODEL_TYPE, "run"):
        for name, value in {"family": family, "heads": heads}.items():
            if value is not None:
                raise InputError(f"{name}={value!r} has no effect on {folder}, which is a run and has its own; leave it out")
        if kind == MODEL_TYPE:
            return _load_saved(folder, mesh, dtype, remat=remat, unroll=unroll)
        experiment, model, params, tokenizer = load_run(folder, mesh or make_mesh(MeshConfig()))
        model = _changed(experiment, model, dtype, remat=remat, unroll=unroll)
        if (published := experiment.published) is None:
            return _own(experiment, model, params, tokenizer)
        beside = RunFolder(find_checkpoint(folder)[0].parent).published
        return as_published(beside, *published.parts, published.fields, published.heads, model, params)
    return load_published(folder, family=family, heads=heads, dtype=dtype or "float32", mesh=mesh, remat=remat, unroll=unroll)


def save_run(folder: str | Path, pretrained: Pretrained) -> None:
    """Writes weights as a run folder of mmx, at step 0: what `load_pretrained` reads, and `--resume` starts training from.

    Args:
        folder: created if it is not there.
        pretrained: a published model, or one that `save_pretrained` made of a run.
    """
    run = RunFolder(Path(folder))
    if pretrained.family.name == MODEL_TYPE:
        experiment, beside = from_json(pretrained.extra["experiment"]), run.path
    else:
        pretrained = pretrained if pretrained.family.library is None else pretrained.under(None)
        published = Published(pretrained.family.name, pretrained.fields, pretrained.heads)
        experiment, beside = Experiment(published=published, objectives={}, evaluators={}), run.published
    beside.mkdir(parents=True, exist_ok=True)
    config = experiment.optimizer
    optimizer, mesh = make_optimizer(config, experiment.steps), make_mesh(MeshConfig())
    state, _ = make_state(experiment.build_model(), optimizer, config.ema > 0, experiment.seed, mesh, pretrained.params)
    checkpoints = Checkpoints(run.checkpoints, experiment.checkpoint, to_json(experiment))
    checkpoints.save(0, state)
    checkpoints.wait()
    checkpoints.close()
    run.keep(experiment, None)
    for name, content in pretrained.files.items():
        with writing(beside / name) as path:
            path.write_bytes(content)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, or one of its checkpoints."""
    return _kind(folder) == "run"


def _kind(folder: Path) -> str | None:
    """`run`, or the `model_type` that config.json names."""
    file = folder / "config.json"
    if not file.exists():
        with_checkpoint = folder.is_dir() and (folder.name.isdigit() or folder.name == "checkpoints")
        return "run" if with_checkpoint and find_checkpoint(folder) else None
    fields = read_fields(file)
    return "run" if fields.get("class") == Experiment.__name__ else fields.get("model_type")


def _changed(experiment: Experiment, model: MultimodalTransformer, dtype: str | None, **run: Any) -> MultimodalTransformer:
    """A run's model that computes in another type, or runs in another way; None: as it does."""
    if dtype is not None:
        model = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, dtype=dtype)).build_model()
    return change_blocks(model, dtype=dtype, **run)


def _load_saved(folder: Path, mesh: Mesh | None, dtype: str | None, **run: Any) -> Pretrained:
    experiment = from_json(read_fields(folder / "config.json")["experiment"])
    model = _changed(experiment, experiment.build_model(), dtype, **run)
    shapes = abstract_params(model)
    stored = tensors.Tensors(folder)
    weights = resolve(_table(shapes), shapes)
    tensors.check(weights, shapes, stored, (), {})
    params = tensors.read(weights, shapes, stored, {}, None if mesh is None else shardings(mesh, shapes))
    tokenizer = Tokenizer.load(folder / TOKENIZER) if (folder / TOKENIZER).exists() else None
    return _own(experiment, model, params, tokenizer)


def _own(experiment: Experiment, model: MultimodalTransformer, params: Any, tokenizer: Tokenizer | None) -> Pretrained:
    """A model of mmx's own: its modalities are its inputs, its embeddings and heads its outputs."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    family = Family(MODEL_TYPE, Experiment, lambda c, heads, dtype: model, lambda c: _table(shapes), _forward, names={})
    extra = {"experiment": to_json(experiment), "model_type": MODEL_TYPE}
    files = {} if tokenizer is None else {TOKENIZER: tokenizer.to_json().encode()}
    steps = _OwnSteps(tokenizer, {name: m.length for name, m in model.modalities.items() if isinstance(m, Ids)})
    return Pretrained(model, params, None, family, (), steps, extra, files)


@dataclasses.dataclass(frozen=True)
class _OwnSteps:
    """Texts to the ids and masks of a modality of ids, by the run's tokenizer: `preprocess(text=[...])`."""

    tokenizer: Tokenizer | None
    lengths: Mapping[str, int]

    def __call__(self, **raw: Any) -> dict[str, Any]:
        batch = {}
        for name, values in raw.items():
            if name in self.lengths and len(values) and isinstance(values[0], str):
                if self.tokenizer is None:
                    raise InputError(f"preprocess: {name} is given as text, but the run has no tokenizer; give ids")
                batch[name] = self.tokenizer(values, self.lengths[name])
            else:
                batch[name] = np.asarray(values)
        return batch


def _table(params: Any) -> Table:
    """Our own names, with dots."""
    return {path.replace("/", "."): path for path in flat(params)}


def _forward(run: Runner, config: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    r = run({name: inputs[name] for name in inputs})
    embeddings = {f"{name}_embeds": value for name, value in r.out.embeddings.items()}
    return {**embeddings, **r.out.logits, "logit_scale": r.out.logit_scale}
