"""docs/models.md is what the code says. `python tests/test_pages.py` writes it; test_zoo.py checks its numbers."""

import json
import sys
from pathlib import Path

import golden
import safetensors

import mmx
from mmx.model import abstract_params
from mmx.zoo import FAMILIES, NAMES, pages

PAGES = Path(__file__).parent.parent / "docs" / "models.md"
PUBLISHED = Path(__file__).parent / "published"


def names_of(file: Path) -> list[str]:
    """The names in a safetensors file."""
    with safetensors.safe_open(str(file), "numpy") as opened:
        return sorted(opened.keys())


def calls() -> dict[str, pages.Call]:
    """By family, the published inputs and outputs that the parity tests compare, of all its classes."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    for folder in sorted(PUBLISHED.iterdir()):
        said = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else {}
        names = golden.CLASSES.get(golden.class_of(folder), golden.Class())
        family = names.family or said.get("model_type")
        if family is None:  # under the names of another library
            continue
        inputs, outputs = found.setdefault(family, (set(), set()))
        further = (*names.calls, *names.configs, "generate.")
        inputs |= {n.split(".")[0] for n in names_of(folder / "inputs.safetensors") if not n.startswith(further)}
        recorded = [n for n in names_of(folder / "outputs.safetensors") if not n.startswith(further)]
        outputs |= {names.rename.get(n.split(".")[0], names.rename.get(n, n)).split(".")[0] for n in recorded}
    return {family: (sorted(inputs), sorted(outputs)) for family, (inputs, outputs) in found.items()}


def test_the_pages_are_what_the_code_says():
    text = PAGES.read_text()
    counts = pages.counts_of(text)
    assert set(counts) == set(NAMES) and min(counts.values()) > 0
    assert pages.markdown(counts, calls()) == text, "docs/models.md is older than the code; run: python tests/test_pages.py"
    assert set(calls()) <= set(FAMILIES)


if __name__ == "__main__":
    known = pages.counts_of(PAGES.read_text()) if PAGES.exists() and "--keep" in sys.argv else {}
    counts = {n: known.get(n) or mmx.count_parameters(abstract_params(mmx.create_model(n))) for n in NAMES}
    PAGES.write_text(pages.markdown(counts, calls()))
