"""Distillation: who has a teacher, and of what it speaks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives_of_all import ALL, IMAGE, TEXT, make

from mmx import objectives
from mmx.errors import InputError
from mmx.objectives import (
    Captioning,
    Context,
    Distillation,
    Mask,
    MaskedModelling,
)
from mmx.topologies import PerStream
from mmx.types import Masked


@pytest.mark.parametrize("what", ["logits", "embeddings", "pooled", "states"])
def test_who_has_no_teacher_learns_nothing_of_it(tiny, labelled, what):
    """The teacher reads texts, of which three examples have none: the loss is that of the others."""
    same = {"logits": "text", "embeddings": "image", "pooled": "image", "states": "image"}[what]
    objective = Distillation(("image",), ("text",) if same == "text" else ("image/better",), what=what, head="classify_group")
    chosen = {"group": ALL["group"], "x": objective}
    model, params = make(tiny, chosen)
    there = np.arange(8) < 5
    batch = {**labelled, "image/better": Masked(255 - labelled["image"], there)}
    batch["text"] = Masked(labelled["text"].array, labelled["text"].mask & there[:, None])
    average = jax.tree.map(lambda x: 1.3 * x, params)

    @jax.jit
    def values(batch):
        out = objective.corrupt(batch, jax.random.key(0), Context(model, params, average))
        return objectives.forward({"x": objective}, model, params, out, None)["x"]

    found = values(batch)
    np.testing.assert_array_equal(found["there"], there)
    expected = objective.loss(jax.tree.map(lambda x: x[:5], found))[0]
    np.testing.assert_allclose(objective.loss(found)[0], expected, rtol=1e-6)
    assert expected > 1e-4


def test_states_are_taught_token_by_token(tiny, labelled):
    """The mean cosine distance of the tokens that exist, in NumPy; other widths are refused by name."""
    objective = Distillation(("text",), ("text",), what="states")
    model, params = make(tiny, {"x": objective})
    average = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), params)
    a, b = (np.asarray(model.apply({"params": p}, {"text": labelled["text"]}).streams["text"].values) for p in (params, average))
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    there = labelled["text"].mask
    expected = np.mean([(1 - cosine)[i][there[i]].mean() for i in range(8)])
    out = objective.corrupt(labelled, jax.random.key(0), Context(model, params, average))
    values = objectives.forward({"x": objective}, model, params, out, None)["x"]
    np.testing.assert_allclose(objective.loss(values)[0], expected, rtol=1e-4)
    wide, wider = make(tiny, {"x": objective}, width=64, embed=32)
    out = Distillation(("text",), ("text",), what="states").corrupt(labelled, jax.random.key(0), Context(wide, wider, wider))
    with pytest.raises(InputError, match=r"'text' has \(12, 32\) of an example and, of the teacher, \(12, 64\)"):
        objectives.forward({"x": objective}, model, params, out, None)


@pytest.mark.parametrize("other", [Captioning(), MaskedModelling(masks={"text": Mask()}), ALL["left"]])
def test_a_teacher_of_each_token_gives_no_logits(tiny, other):
    (head,) = other.heads({"image": IMAGE, "text": TEXT})
    with pytest.raises(InputError, match=f"objectives.x: head='{head}' is a .*, without one answer an example"):
        make(tiny, {"other": other, "x": Distillation(what="logits", head=head)})


def test_of_two_streams_the_one_that_is_there_is_taught(tiny, labelled):
    """Three examples have no text: their loss is that of the image alone; of the others it is the mean of both."""
    there = np.arange(8) < 5
    batch = {**labelled, "text": Masked(labelled["text"].array, labelled["text"].mask & there[:, None])}
    both, image, text = (Distillation(names, names, what="embeddings") for names in (("image", "text"), ("image",), ("text",)))
    model, params = make(tiny, {"x": both})
    average = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), params)
    model = model.clone(stages=(PerStream(1, model.stages[0].block),))  # nothing of one reaches the other
    params, average = ({n: x for n, x in p.items() if not n.startswith("stages_1")} for p in (params, average))

    def values(objective):
        def run(params, average):
            out = objective.corrupt(batch, jax.random.key(0), Context(model, params, average))
            return objectives.forward({"x": objective}, model, params, out, None)["x"]

        return jax.jit(run)(params, average)

    found, of_image, of_text = map(values, (both, image, text))
    assert found["there"].all() and (of_text["there"] == there).all()
    expected = np.where(there, (of_image["loss"] + of_text["loss"]) / 2, of_image["loss"])
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)
    assert expected.min() > 1e-4
