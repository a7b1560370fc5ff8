"""Ordering: what changes places, and what would tell where it stood."""

import dataclasses

import jax
import numpy as np
import pytest
from objectives_of_all import ALL, IMAGE, TEXT, entry_of, make, prepared

from mmx.errors import InputError
from mmx.objectives import (
    Ordering,
)


def test_tokens_that_change_places_are_moved_with_their_label(tiny, labelled):
    """The patches themselves are exchanged, positions stay: the model sees the same as in an image cut up by hand."""
    objective = Ordering(given=(), rate=0.5)
    model, params = make(tiny, {"order": objective})
    out = prepared(objective, model, labelled)
    entry = entry_of(objective, "image")
    label, moved = np.asarray(out[f"{entry}:label"]), np.asarray(out[f"{entry}:moved"])
    assert (moved.sum(1) == 8).all() and ((label != np.arange(16)) == moved).all() and (np.sort(label, 1) == np.arange(16)).all()
    patches = labelled["image"].reshape(8, 4, 8, 4, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(8, 16, 8, 8, 3)
    patches = np.take_along_axis(patches, label[..., None, None, None], 1)
    by_hand = patches.reshape(8, 4, 4, 8, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(8, 32, 32, 3)
    read = jax.jit(lambda image: model.apply({"params": params}, {"image": image}).logits["order_image"])
    np.testing.assert_allclose(read(out[entry]), read(by_hand), atol=1e-5)


def test_sentences_change_places_whole(tiny, labelled):
    objective = Ordering("text", (), 1.0, sentences="order", most=4)
    model, _ = make(tiny, {"order": objective})
    of = np.broadcast_to([-1, 0, 0, 0, 1, 1, 2, 2, -1, -1, -1, -1], (8, 12))
    out = prepared(objective, model, {**labelled, "label/order": of})
    entry = entry_of(objective, "text")
    for label, kept in zip(np.asarray(out[f"{entry}:label"]), np.asarray(out[entry].array["kept"]), strict=True):
        assert kept[0] == 0 and (kept[8:] == np.arange(8, 12)).all()
        starts = [i for i in range(1, 8) if label[i] != label[i - 1]]
        assert len(starts) == 3 and {tuple(kept[label == s]) for s in range(3)} == {(1, 2, 3), (4, 5), (6, 7)}


def test_tables_that_tell_the_place_are_refused_and_segments_are_not(tiny):
    corners = {"tables": {"segment": 2, "row": 8, "column": 8}}
    sides = {"joined": {"box": (("x", 100, 16), ("y", 100, 16))}}
    for given, named in ((corners, "row, column"), (sides, "box"), ({"vectors": {"when": 1}}, "when")):
        with pytest.raises(InputError, match=f"objectives.x: modality='text': its {named} would move with the tokens"):
            text = dataclasses.replace(TEXT, **given)
            dataclasses.replace(tiny, modalities={"image": IMAGE, "text": text}, objectives={"x": ALL["runs"]})
    text = dataclasses.replace(TEXT, tables={"segment": 2})
    sentences = dataclasses.replace(ALL["runs"], size=1, sentences="sentence")
    with pytest.raises(InputError, match="objectives.x: modality='text': its segment would move with the tokens"):
        dataclasses.replace(tiny, modalities={"image": IMAGE, "text": text}, objectives={"x": sentences})
    dataclasses.replace(tiny, modalities={"image": IMAGE, "text": text}, objectives={"x": ALL["runs"]})
