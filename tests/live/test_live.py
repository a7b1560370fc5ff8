"""Variants of every published class, made on the fly by the original libraries: the same numbers, in both directions."""

import pytest

for library in ("torch", "transformers", "open_clip"):
    pytest.importorskip(library)

import golden
import safetensors.numpy
from originals import again, make
from variants import REFERENCES, VARIANTS

import mmx
from mmx.errors import InputError

CASES = [(name, number) for name, variants in VARIANTS.items() for number in range(len(variants))]


@pytest.mark.parametrize(("name", "number"), CASES, ids=[f"{name}-{number}" for name, number in CASES])
def test_the_numbers_of_the_original_and_back(name, number, tmp_path):
    v, reference = VARIANTS[name][number], REFERENCES[name]
    make(name, v, reference, tmp_path / "given")
    family = golden.CLASSES.get(name, golden.Class()).family
    if v.refused:
        with pytest.raises(InputError, match=v.refused):
            mmx.load_pretrained(tmp_path / "given", family=family)
        return
    shares = golden.compare(tmp_path / "given")
    assert {n: share for n, share in shares.items() if not share <= 1} == {}
    mmx.save_pretrained(tmp_path / "saved", mmx.load_pretrained(tmp_path / "given", family=family))
    inputs = safetensors.numpy.load_file(tmp_path / "given/inputs.safetensors")
    expected, found = (again(name, tmp_path / folder, reference, inputs) for folder in ("given", "saved"))
    assert set(found) == set(expected)
    assert [n for n, x in expected.items() if not x.equal(found[n])] == []
