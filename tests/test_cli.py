"""The command line: every field has a flag with its default and its meaning; what is mistyped is refused."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path

import flax.linen as nn
import pytest

import mmx
from mmx import cli
from mmx.cli import parse_experiment
from mmx.errors import InputError
from mmx.model import abstract_params
from mmx.train import Experiment
from mmx.train.experiment import from_json, load_config, to_json

ROOT = Path(mmx.__file__).parent.parent


def test_fields_are_typed():
    experiment = parse_experiment(
        [
            "--topology",
            "cross_attention",
            "--optimizer.learning-rate",
            "3e-4",
            "--modalities.image.patch",
            "4",
            "4",
            "--mesh.data",
            "1",
            "--objectives.captioning.weight",
            "0",
            "--optimizer.name",
            "lion",
            "--log.tensorboard",
            "False",
        ]
    )
    assert experiment.topology == "cross_attention" and experiment.optimizer.learning_rate == 3e-4
    assert experiment.modalities["image"].patch == (4, 4) and experiment.mesh.data == 1
    assert "captioning" not in experiment.active_objectives and experiment.optimizer.name == "lion"
    assert experiment.log.tensorboard is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--optimizer.learning-rat 1", "--optimizer.learning-rate"),
        ("--topolgy multi_to_one", "--topology"),
        ("--optimizer.name adam", "invalid choice"),
        ("--steps many", "steps"),
    ],
)
def test_mistyped_fields_are_refused_with_the_nearest(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        parse_experiment(arguments.split())
    assert exit_.value.code == 2
    assert message in re.sub(r"\s+", " ", capsys.readouterr().err)


def test_help_shows_every_field_with_its_default_and_meaning(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        parse_experiment(["--help"])
    text = capsys.readouterr().out
    missing, silent, own = [], [], ("stages", "relative", "published", "also")  # from a configuration file only

    def visit(value, path):
        for field in dataclasses.fields(value):
            if (field.name in ("parent", "name", "dtype") and isinstance(value, nn.Module)) or field.name in own:
                continue
            item, flag = getattr(value, field.name), f"{path}{field.name.replace('_', '-')}"
            if dataclasses.is_dataclass(item) or (isinstance(item, dict) and all(map(dataclasses.is_dataclass, item.values()))):
                for inner, name in [(item, "")] if not isinstance(item, dict) else [(v, f".{k}") for k, v in item.items()]:
                    visit(inner, f"{flag}{name}.")
                continue
            if isinstance(item, Mapping):
                flag = f"{flag}.{next(iter(item))}"
            found = re.search(rf"--{re.escape(flag)}[ \n](.*?)(?=\n[ │]*--|\Z)", text, re.S)
            if not found:
                missing.append(flag)
            elif "(default:" not in found[1]:
                silent.append(flag)

    visit(Experiment(), "")
    assert not missing and not silent


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_configuration_builds(path):
    experiment = load_config(path)
    assert to_json(parse_experiment([str(path), "--seed", "1"])) == to_json(dataclasses.replace(experiment, seed=1))
    written = json.loads(json.dumps(to_json(experiment)))
    assert to_json(from_json(written)) == to_json(experiment)
    assert mmx.count_parameters(abstract_params(experiment.build_model())) > 0
    assert f"configs/{path.name}" in path.read_text().split('"""')[1]


def test_a_configuration_file_can_be_overridden(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import mmx\n\n\ndef config():\n    return mmx.Experiment(steps=77, seed=5)\n")
    experiment = parse_experiment([str(path), "--seed", "6"])
    assert (experiment.steps, experiment.seed) == (77, 6)
    with pytest.raises(InputError, match="no configuration file"):
        load_config(tmp_path / "nothing.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(InputError, match="has no function config"):
        load_config(tmp_path / "empty.py")


def test_an_own_topology_from_a_configuration_file(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "import mmx\nfrom mmx.topologies import cross_attention, early_concatenation\n\n\n"
        "def config():\n    return mmx.Experiment(stages=cross_attention(1) + early_concatenation(1))\n"
    )
    assert len(parse_experiment([str(path), "--seed", "1"]).build_model().stages) == 2
    with pytest.raises(InputError, match="stages of its own"):
        parse_experiment([str(path), "--topology", "cross_attention"])


def test_the_command(capsys):
    assert cli.main([]) == 0 and "train" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out.strip() == mmx.__version__
    assert cli.main(["trian"]) == 2 and "did you mean 'train'" in capsys.readouterr().err
    assert cli.main(["train", "nothing.py"]) == 2 and "no configuration file" in capsys.readouterr().err


def test_models_are_listed_and_profiled(capsys):
    assert cli.main(["list", "clip-*", "gpt2"]) == 0
    assert capsys.readouterr().out.split() == [*mmx.list_models("clip-*"), "gpt2"]
    assert cli.main(["list"]) == 0 and capsys.readouterr().out.split() == mmx.list_models()
    assert cli.main(["profile", "ViT-S-32"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"ViT-S-32 +224 +384 +384 +384 +63\.09 +22\.64 +40\.44 +5\.66 +2\.29 +3\.38", out)
    assert "stages_0" in out and "attention in full" in out
    assert cli.main(["profile", "ViT-S-??"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["model", "ViT-S-16", "ViT-S-32", "FLOPs:"]
    assert cli.main(["profile", "ViT-B-3"]) == 2 and "did you mean 'ViT-B-32'" in capsys.readouterr().err
    assert cli.main(["profile"]) == 2 and "mmx list lists them" in capsys.readouterr().err
    assert cli.main(["list", "--help"]) == 0 and cli.main(["profile", "--help"]) == 0


@pytest.mark.slow
def test_a_study_matches_parameters_or_flops(tiny):
    from mmx.study import cost, match

    model, one = dataclasses.replace(tiny.model, width=64, mlp=256), {"contrastive": mmx.objectives.Contrastive()}
    base = dataclasses.replace(tiny, steps=100, model=model, objectives=one)
    names, flops = ("early_summation", "multi_to_one", "cross_attention"), cost(base)[1]
    most = cost(dataclasses.replace(base, topology="cross_attention"))[0]
    for name, same in match(base, names, "parameters").items():
        assert same.steps == 100 and abs(cost(same)[0] / most - 1) < 0.02 and same.model.mlp >= 256, name
    for name, same in match(base, names, "flops").items():
        assert same.model == base.model and abs(same.steps * cost(same)[1] / (100 * flops) - 1) < 0.02, name
    assert all(e.model == base.model and e.steps == 100 for e in match(base, names, "nothing").values())


@pytest.mark.slow
def test_study_table(tmp_path, monkeypatch, capsys, tiny):
    from mmx import study

    config = tmp_path / "tiny.py"
    config.write_text("from pathlib import Path\n\n\ndef config():\n    raise SystemExit\n")
    monkeypatch.setattr("mmx.study.load_config", lambda _: dataclasses.replace(tiny, mesh=dataclasses.replace(tiny.mesh, data=8)))
    todo = study.Study(("early_concatenation",), (0, 1), config=str(config), steps=4, folder=str(tmp_path / "study"))
    table = study.run_study(todo).read_text()
    assert "| `early_concatenation` |" in table and "±" in table
    for file in ("quality.png", "loss.png", "cost.png"):
        assert f"({file})" in table and (tmp_path / "study" / file).read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "study/study.json").read_text())["results"]["early_concatenation"]
    assert [len(r["curves"]["loss"]) for r in results] == [4, 4]
    assert all(r["missing/loss_complete"] > 0 and r["missing/loss_without_image"] > 0 for r in results)
    calls = []
    monkeypatch.setattr("mmx.study.run", lambda e: calls.append(e))
    assert study.run_study(todo).read_text() == table and not calls
    with pytest.raises(InputError, match="did you mean 'multi_to_one'"):
        study.run_study(dataclasses.replace(todo, topologies=("multi_to_on",)))
    monkeypatch.setattr("mmx.study.load_config", lambda _: load_config(ROOT / "configs/emoji_clip.py"))
    with pytest.raises(InputError, match="stages of its own"):
        study.run_study(todo)
