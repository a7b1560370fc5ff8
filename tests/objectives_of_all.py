"""Every objective at a small size, and a model for it: what the tests of objectives share."""

import dataclasses

import jax

import mmx
from mmx import modalities, objectives
from mmx.objectives import (
    Captioning,
    Classification,
    Context,
    Contrastive,
    Distillation,
    Grounding,
    Mask,
    MaskedModelling,
    Matching,
    Ordering,
)

IMAGE = modalities.Patches((32, 32), (8, 8), mask_token=True)


TEXT = modalities.Ids(300, 12, mask_token=True)


ALL = {
    "words": MaskedModelling(masks={"text": Mask(0.3)}),
    "patches": MaskedModelling(masks={"image": Mask(0.4, "block", "normalised")}, given=("text",)),
    "which": MaskedModelling(masks={"image": Mask(0.4, answer="contrast")}, given=("text",)),
    "together": MaskedModelling(masks={"image": Mask(0.4, "frame"), "text": Mask(0.3, "span", mask_id=4)}, given=()),
    "left": MaskedModelling(masks={"image": Mask(0.75, drop=True)}, given=("text",)),
    "modality": MaskedModelling(masks={"text": Mask(0.9, "modality")}),
    "believed": MaskedModelling(masks={"text": Mask(0.3)}, teacher=0.4),
    "hard": Matching(negatives="hard"),
    "aligned": Matching(alignment=0.1),
    "taught": Contrastive(teacher=0.4, queue=12),
    "tokenwise": Contrastive(tokens=8),
    "ranked": Contrastive(kind="ranking"),
    "bags": Contrastive(("image", "text", "text/other"), kind="mil_nce"),
    "where": Grounding(labels=("patch", "patches")),
    "answer": Grounding("text", ("image",), ("word",)),
    "regions": Grounding(labels=("patches",), kind="binary"),
    "order": Ordering(rate=0.5),
    "runs": Ordering("text", ("image",), 0.5, size=3),
    "group": Classification(label="group", classes=3),
    "number": Classification(label="size", classes=1, answer="regression"),
    "prefix": Captioning(prefix=0.5),
    "denoised": Captioning(masks={"image": Mask(0.5)}),
    "language": Captioning(given=()),
    "distilled": Distillation(),
    "soft": Distillation(what="logits", head="classify_group"),
    "pooled": Distillation(what="pooled"),
    "states": Distillation(what="states"),
}


SUMMED = {"left", "aligned", "tokenwise", "where", "answer", "regions"}  # what summation cannot do


def make(tiny, chosen, topology="multi_to_one", image=IMAGE, **model):
    experiment = dataclasses.replace(
        tiny,
        topology=topology,
        modalities={"image": image, "text": TEXT},
        objectives=chosen,
        model=dataclasses.replace(tiny.model, **model),
    )
    model = experiment.build_model()
    params = jax.jit(lambda key: model.init(key, mmx.example_batch(model)))(jax.random.key(0))["params"]
    return model, params


def program(chosen, model, gradient=True):
    """`(params, batch) -> (total loss, metrics), gradient`, compiled once."""
    memory = objectives.memories(chosen, model)

    def loss(params, batch):
        context = Context(model, params, params, memory)
        prepared = objectives.corrupt(chosen, batch, jax.random.key(3), context)
        total, found = objectives.total_loss(chosen, objectives.forward(chosen, model, params, prepared, None), memory)
        return total, objectives.flatten_metrics(found)

    return jax.jit(jax.value_and_grad(loss, has_aux=True) if gradient else lambda *args: (loss(*args), None))


def run(chosen, model, params, batch):
    """Total loss, metrics and gradient."""
    (value, metrics), gradient = program(chosen, model)(params, batch)
    return value, metrics, gradient


def traced(chosen, model, params, batch):
    """The loss as a program, which is made and not run."""
    return jax.eval_shape(program(chosen, model, gradient=False), params, batch)[0][0]


def prepared(objective, model, batch, key=0):
    return jax.jit(lambda b: objective.corrupt(b, jax.random.key(key), Context(model)))(batch)


def entry_of(objective, modality):
    return next(entry for view in objective.views() for m, entry in view.reads if m == modality)


def values_of(objective, model, params, batch):
    batch = objective.corrupt(batch, jax.random.key(3), Context(model, params, params))
    return objectives.forward({"x": objective}, model, params, batch, None)["x"]
