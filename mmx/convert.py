"""`mmx convert`: from the published layout to a run folder, and back."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mmx.errors import InputError, at_least
from mmx.pretrained import is_run, load_pretrained, save_run
from mmx.zoo import save_pretrained


@dataclasses.dataclass(frozen=True)
class Convert:
    """Makes a run folder of a published folder, and a published folder of a run.

    A run folder is where training starts from (`mmx train CONFIG.py --resume TARGET`). A published folder is config.json and
    safetensors, with tokenizer and preprocessing, which the original library reads; of a run whose model is not a published
    one it has mmx's own names, which `mmx.load_pretrained` reads.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """The folder that is read; of a run, its last checkpoint, or the one that is named."""
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    """The folder that is written; it must be new or empty."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of published weights that are written; a run's are float32."""
    shard: float = 5.0
    """The most GiB of a published file."""
    family: str = ""
    """The published family of a source whose config.json has no `model_type`."""

    def __post_init__(self) -> None:
        at_least(self, shard=1e-6)


def convert(config: Convert) -> str:
    """Converts, and returns a line that says what was made.

    Raises:
        InputError: the source cannot be read, or the target is there and not empty.
    """
    source, target = Path(config.source), Path(config.target)
    if not source.is_dir():
        raise InputError(f"there is no folder {source}; name a run folder, or one with config.json and safetensors")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} is there and not empty; choose another target")
    from_run = is_run(source)
    if not from_run and config.dtype != "float32":
        raise InputError(f"--dtype {config.dtype}: {source} becomes a run folder, whose weights are float32")
    if not from_run and config.shard != Convert.shard:
        raise InputError(f"--shard {config.shard}: {source} becomes a run folder, which has no published files; leave it out")
    pretrained = load_pretrained(source, family=config.family or None)
    if not from_run:
        save_run(target, pretrained)
        return f"{target}: a run folder at step 0 with the weights of {source}; train with --resume {target} --run NEW"
    save_pretrained(target, pretrained, config.dtype, int(config.shard * 2**30))
    layout = f"the published layout of {pretrained.family.name}" if pretrained.config is not None else "mmx's own layout"
    return f"{target}: the weights of {source} in {layout}, {config.dtype}"
