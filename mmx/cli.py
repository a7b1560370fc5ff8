"""The `mmx` command. Its flags and its help are made from the dataclasses of the configuration."""

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COMMANDS = {
    "train": "train a model: mmx train [CONFIG.py] [--field value ...]; see mmx train --help",
    "study": "train several topologies with several seeds and write one table; see mmx study --help",
    "list": "list the published models by name: mmx list [PATTERN], such as 'clip*'",
    "convert": "between published folders and run folders, in both directions: mmx convert SOURCE TARGET; see mmx convert --help",
    "profile": "parameters and FLOPs of published models: mmx profile NAME..., patterns allowed",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The `mmx` command; returns its exit code."""
    started = time.time()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: mmx COMMAND ...\n\n" + "\n".join(f"  {name:<8} {text}" for name, text in COMMANDS.items()))
        return 0
    if arguments[0] == "--version":
        import mmx

        print(mmx.__version__)
        return 0
    if arguments[0] not in COMMANDS:
        from mmx.errors import unknown

        print(f"error: {unknown('command', arguments[0], COMMANDS)}", file=sys.stderr)
        return 2
    if arguments[0] in ("list", "profile", "convert"):
        return _guarded(lambda: {"list": _list, "profile": _profile, "convert": _convert}[arguments[0]](arguments[1:]))
    return {"train": train, "study": study}[arguments[0]](arguments[1:], started)


def train(arguments: Sequence[str], started: float | None = None) -> int:
    """`mmx train`, the same as `python train.py`."""
    return _guarded(lambda: _train(arguments, started))


def study(arguments: Sequence[str], started: float | None = None) -> int:
    """`mmx study`."""
    return _guarded(lambda: _study(arguments))


def _train(arguments: Sequence[str], started: float | None) -> None:
    from mmx.train import run

    run(parse_experiment(arguments), started)


def _study(arguments: Sequence[str]) -> None:
    import tyro

    from mmx.study import Study, run_study

    run_study(tyro.cli(Study, args=list(arguments), prog="mmx study", config=(tyro.conf.FlagConversionOff,)))


def _convert(arguments: Sequence[str]) -> None:
    import tyro

    from mmx.convert import Convert, convert

    print(convert(tyro.cli(Convert, args=list(arguments), prog="mmx convert", config=(tyro.conf.FlagConversionOff,))))


def _list(arguments: Sequence[str]) -> None:
    if set(arguments) & {"-h", "--help"}:
        print(COMMANDS["list"])
        return
    print("\n".join(_named(arguments or ["*"])))


def _profile(arguments: Sequence[str]) -> None:
    from mmx.errors import InputError
    from mmx.profiling import profile, table

    if set(arguments) & {"-h", "--help"}:
        print(COMMANDS["profile"])
        return
    if not arguments:
        raise InputError("mmx profile needs the name of a model; mmx list lists them")
    profiles = [profile(name) for name in _named(arguments)]
    print(profiles[0] if len(profiles) == 1 else table(profiles))


def _named(patterns: Sequence[str]) -> list[str]:
    """The names that match patterns, in their order; a pattern without a match is refused with the nearest name."""
    from mmx.errors import InputError, unknown
    from mmx.zoo import NAMES, list_models

    found: dict[str, None] = {}
    for pattern in patterns:
        names = list_models(pattern)
        if not names:
            raise InputError(unknown("model", pattern, NAMES))
        found |= dict.fromkeys(names)
    return list(found)


def _guarded(command: Any) -> int:
    """Runs a command; what the user can correct is printed as one message, without a trace."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    _quiet()
    from mmx.errors import InputError

    try:
        command()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # who reads has seen enough: mmx list | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        from mmx.train import Stopped

        if not isinstance(error, Stopped):
            raise
        print(f"stopped: {error}", file=sys.stderr)
        return error.code
    return 0


def _quiet() -> None:
    """Libraries report their own affairs only from errors on."""
    import logging

    for name in ("absl", "orbax", "jax", "grain"):
        logging.getLogger(name).setLevel(logging.ERROR)


def parse_experiment(arguments: Sequence[str]) -> Any:
    """Flags, after an optional configuration file, to an Experiment. A wrong flag prints what is near and exits with 2."""
    import tyro

    from mmx.errors import InputError
    from mmx.train.experiment import Experiment, load_config

    arguments = list(arguments)
    default = load_config(Path(arguments.pop(0))) if arguments and not arguments[0].startswith("-") else Experiment()
    with _linen_rule():
        parsed = tyro.cli(Experiment, args=arguments, default=default, prog="train.py", config=(tyro.conf.FlagConversionOff,))
    if (default.stages or default.published) and parsed.topology != default.topology:
        raise InputError(f"--topology {parsed.topology}: the configuration has stages of its own, which would replace it")
    return parsed


def _linen_rule() -> Any:
    """Teaches tyro to make flags from a Linen module: all of its fields but Linen's own two."""
    import docstring_parser
    import flax.linen as nn
    from tyro import constructors

    registry = constructors.ConstructorRegistry()

    @registry.struct_rule
    def _(info: constructors.StructTypeInfo) -> constructors.StructConstructorSpec | None:
        if not (isinstance(info.type, type) and issubclass(info.type, nn.Module)):
            return None
        help_ = {p.arg_name: p.description for p in docstring_parser.parse(info.type.__doc__ or "").params}
        fields = [
            constructors.StructFieldSpec(f.name, f.type, getattr(info.default, f.name), help_.get(f.name))  # type: ignore[arg-type]
            for f in dataclasses.fields(info.type)  # type: ignore[arg-type]
            if f.name not in ("parent", "name", "dtype")  # the model decides the type for all
            and isinstance(getattr(info.default, f.name), (int, float, str, tuple, type(None)))
        ]
        return constructors.StructConstructorSpec(lambda **given: info.default.clone(**given), tuple(fields))

    return registry


if __name__ == "__main__":
    sys.exit(main())
