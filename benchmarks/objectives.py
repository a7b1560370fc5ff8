"""Every objective, trained alone on the embedded emoji set: what it scores on examples it has not seen, before and after.

    python benchmarks/objectives.py                 all of them, and writes docs/objectives.md; about 35 minutes on two cores
    python benchmarks/objectives.py words matching  some of them, and renews their lines there

Chance is what the commonest answer scores, or, where all answers are equally common, one of them.
"""

import argparse
import contextlib
import dataclasses
import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import mmx
from mmx.data import DataConfig, Label, Pipeline
from mmx.data.builders.emoji import read_entries
from mmx.evaluate import Scores
from mmx.evaluate.report import Evaluation
from mmx.modalities import Ids, Patches
from mmx.objectives import (
    Captioning,
    Classification,
    Contrastive,
    Distillation,
    Grounding,
    Mask,
    MaskedModelling,
    Matching,
    Objective,
    Ordering,
)
from mmx.parallel import MeshConfig, make_mesh
from mmx.train import CheckpointConfig, LogConfig, OptimizerConfig, make_optimizer, make_state, run

PAGE = Path(__file__).parents[1] / "docs" / "objectives.md"
GROUPS = tuple(sorted({entry["group"] for entry in read_entries()}))
BATCH = 64
HELD_OUT = 340  # a tenth of the split `train`, which is in a random order
WORDS = Mask(0.15, spare=(0, 2, 3))
HEAD = """# Objectives

Each was trained alone (or beside what it needs, which is said) on batches of {batch} from nine tenths of the emoji
set's split `train`, with the default model, and scored on the other tenth, untrained and trained. What is found in scenes was
trained on `emoji_scenes` (four emoji in a picture, three in a film), and scored on scenes of emoji it has not seen.
`python benchmarks/objectives.py` makes this page.

| type | objective | what is asked | steps | metric | untrained | trained | chance |
|---|---|---|---|---|---|---|---|
"""


@dataclasses.dataclass(frozen=True)
class Row:
    """An objective, what it is asked, and by which metric it is judged."""

    kind: str
    objective: Objective
    asks: str
    metric: str
    chance: str | float = 0.0
    beside: Mapping[str, Objective] = dataclasses.field(default_factory=dict)
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    times: int = 1  # as many steps, for what is slow to begin
    scenes: bool = False  # whether it is trained on `emoji_scenes`


def masked(what: str, given: str, **mask: Any) -> MaskedModelling:
    """One modality hidden in part, the other whole."""
    return MaskedModelling(masks={what: Mask(**mask)}, given=(given,) if given else ())


NEAR = {"near": Contrastive()}
GROUP = Classification(label="group", classes=len(GROUPS))
ROWS = {
    "words": Row(
        "masking",
        MaskedModelling(masks={"text": WORDS}),
        "hidden tokens of a text, with the image",
        "masked_text/accuracy",
        "commonest",
    ),
    "whole_words": Row(
        "masking", masked("text", "image", unit="word"), "hidden words, with the image", "masked_text/accuracy", "commonest"
    ),
    "spans": Row(
        "masking",
        masked("text", "image", unit="span", rate=0.3, spare=WORDS.spare),
        "hidden spans, with the image",
        "masked_text/accuracy",
        "commonest",
    ),
    "text": Row(
        "masking",
        masked("text", "image", unit="modality", rate=1.0, spare=WORDS.spare),
        "a whole text, from the image alone",
        "masked_text/accuracy",
        "commonest",
    ),
    "patches": Row("masking", masked("image", "text", rate=0.4), "hidden patches, their pixels", "masked_image/explained"),
    "blocks": Row(
        "masking",
        masked("image", "text", rate=0.4, unit="block", answer="normalised"),
        "hidden blocks, normalised pixels",
        "masked_image/explained",
    ),
    "left": Row(
        "masking", masked("image", "", rate=0.6, drop=True), "pixels from 40 % of the patches (MAE)", "left_image/explained"
    ),
    "contrast": Row(
        "masking",
        masked("image", "text", rate=0.3, answer="contrast"),
        "which patch of its image was hidden",
        "masked_image_contrast/accuracy",
        1 / 16,
    ),
    "both": Row(
        "masking",
        MaskedModelling(masks={"text": WORDS, "image": Mask(0.4, "block")}, given=()),
        "words and pixels, both hidden",
        "masked_text/accuracy",
        "commonest",
    ),
    "captioning": Row("describing", Captioning(), "the next token, with the image", "captioning/accuracy", "commonest"),
    "prefix": Row("describing", Captioning(prefix=0.5), "the next token behind a prefix", "captioning/accuracy", "commonest"),
    "denoising": Row(
        "describing",
        Captioning(masks={"image": Mask(0.5)}),
        "the next token, half of the image hidden",
        "captioning/accuracy",
        "commonest",
    ),
    "language": Row(
        "describing", Captioning(given=()), "the next token, nothing given", "captioning/alone/accuracy", "commonest"
    ),
    "answers": Row(
        "describing",
        Captioning(text="text/answer"),
        "the answer to a question about the image",
        "captioning/answer/accuracy",
        "commonest answer",
    ),
    "contrastive": Row("matching", Contrastive(), f"the text of an image among {HELD_OUT}", "contrastive/recall", 1 / HELD_OUT),
    "sigmoid": Row(
        "matching",
        Contrastive(kind="sigmoid"),
        "the same, each pair for itself",
        "contrastive/recall",
        1 / HELD_OUT,
        model={"logit_scale": 10.0, "logit_bias": -10.0},
    ),
    "tokens": Row("matching", Contrastive(tokens=128), "the same, token by token", "contrastive/recall", 1 / HELD_OUT),
    "ranking": Row("matching", Contrastive(kind="ranking"), "the same, by a margin", "contrastive/recall", 1 / HELD_OUT),
    "bags": Row(
        "matching",
        Contrastive(("image", "text", "text/group"), kind="mil_nce"),
        f"one of two texts of an image among {2 * HELD_OUT}",
        "contrastive/recall",
        1 / HELD_OUT,
    ),
    "where": Row(
        "matching",
        Grounding("image", ("text",), ("patches",)),
        "which patches of a picture of four a name means",
        "ground_patches/accuracy",
        1 / 4,
        times=5,
        scenes=True,
    ),
    "when": Row(
        "matching",
        Grounding("film", ("text/subtitle",), ("first", "last")),
        "the first and last frame of a subtitle",
        "ground_first_last/accuracy",
        "commonest moment",
        times=5,
        scenes=True,
    ),
    "matching": Row(
        "matching", Matching(), "whether a text is that of an image (beside contrastive)", "matching/accuracy", 0.5, NEAR, times=5
    ),
    "hard": Row(
        "matching",
        Matching(negatives="hard", stream="text"),
        "the same among near ones (beside contrastive)",
        "matching/accuracy",
        0.5,
        NEAR,
        times=5,
    ),
    "alignment": Row(
        "matching",
        Matching(alignment=0.1),
        "the same, with words and patches aligned (beside contrastive)",
        "matching/accuracy",
        0.5,
        NEAR,
        times=5,
    ),
    "order": Row("ordering", Ordering(rate=0.5), "where exchanged patches stood", "order_image/accuracy", 1 / 16),
    "order_words": Row(
        "ordering", Ordering("text", ("image",), 0.5), "where exchanged tokens stood", "order_text/accuracy", "one of its places"
    ),
    "group": Row("supervised", GROUP, "the group of an emoji", "classify_group/accuracy", "commonest group"),
    "distillation": Row(
        "distillation",
        Distillation(what="logits", head="classify_group", teacher=""),
        "the group that the average of the model tells of image and text, from the image (beside the group)",
        "distillation/agreement",
        "commonest group",
        {"group": GROUP},
    ),
}


EMOJI = DataConfig(
    split=f"train[:-{HELD_OUT}]",
    fields={"image": "image", "text": "name", "text/answer": ("question", "answer"), "text/group": "group"},
    labels={"group": Label("group", GROUPS)},
    words=True,
)
SCENES = DataConfig(
    name="emoji_scenes",
    fields={"image": "image", "text": "phrase", "film": "film", "text/subtitle": "subtitle"},
    labels={"patches": Label("patches"), "first": Label("first", 8), "last": Label("last", 8)},
)
TEXT = Ids(1024, 21, mask_token=True)


def held_out(row: Row) -> str:
    """The split it is scored on."""
    return "composition" if row.scenes else f"train[-{HELD_OUT}:]"


def experiment(row: Row, folder: str, steps: int) -> mmx.Experiment:
    """The default model with one objective, and what it needs."""
    default = mmx.Experiment()
    chosen = {"asked": row.objective, **row.beside}
    images = {"image": Patches((32, 32), (8, 8), mask_token=True)}
    if row.scenes:
        images = {"image": Patches((64, 64), (16, 16)), "film": Patches((8, 32, 32), (1, 32, 32))}
    return mmx.Experiment(
        steps=steps,
        batch_size=BATCH,
        run=folder,
        model=dataclasses.replace(default.model, **row.model),
        modalities={**images, "text": TEXT},
        objectives=chosen,
        data=SCENES if row.scenes else EMOJI,
        optimizer=dataclasses.replace(default.optimizer, ema=0.99) if row.kind == "distillation" else OptimizerConfig(),
        evaluators={"held_out": Scores(chosen, split=held_out(row))},
        checkpoint=CheckpointConfig(best=""),
        log=LogConfig(tensorboard=False),
    )


def untrained(wanted: mmx.Experiment) -> dict[str, float]:
    """What the model scores as it begins."""
    mesh, model = make_mesh(MeshConfig()), wanted.build_model()
    data = Pipeline(wanted.data, wanted.modalities, wanted.batch_size, wanted.seed)
    state, _ = make_state(model, make_optimizer(wanted.optimizer, wanted.steps), False, wanted.seed, mesh)
    return wanted.evaluators["held_out"](Evaluation(model, state.params, data, mesh, wanted.batch_size, False)).metrics


def chance(row: Row, data: Pipeline) -> float:
    """What the commonest answer scores on the held-out examples; it is the commonest one there."""
    if not isinstance(row.chance, str):
        return row.chance
    examples = data.examples(held_out(row))
    rows = [examples[i] for i in range(len(examples))]
    if row.chance == "commonest group":
        answers = np.array([example["label/group"] for example in rows])
    elif row.chance == "commonest moment":
        answers = np.array([8 * example["label/first"] + example["label/last"] for example in rows])
    elif row.chance == "one of its places":
        return float(np.mean([1 / example["text"].mask.sum() for example in rows]))
    elif row.chance == "commonest answer":
        answers = np.concatenate([x.array["ids"][x.mask & (x.array["group"] < 0)] for x in (e["text/answer"] for e in rows)])
    else:
        first = 1 if row.kind == "describing" else 0
        answers = np.concatenate([x.array[first:][x.mask[first:]] for x in (e["text"] for e in rows)])
        answers = answers if first else answers[~np.isin(answers, WORDS.spare)]
    return float(np.unique(answers, return_counts=True)[1].max() / len(answers))


def measure(name: str, steps: int) -> str:
    """Trains one, and returns its line of the table."""
    row = ROWS[name]
    with tempfile.TemporaryDirectory() as folder:
        wanted = experiment(row, folder + "/run", steps * row.times)
        data = Pipeline(wanted.data, wanted.modalities, wanted.batch_size, wanted.seed)
        before = untrained(wanted)[row.metric]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            after = run(wanted)[f"held_out/{row.metric}"]
        jax.clear_caches()
    cells = (row.kind, f"`{type(row.objective).__name__}`", row.asks, str(steps * row.times), f"`{row.metric}`")
    return "| " + " | ".join([*cells, *(f"{x:.3f}" for x in (before, after, chance(row, data)))]) + " |"


def asked(line: str) -> str:
    """What a line of the table is about."""
    return line.split(" | ")[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*ROWS, []], help="which; none: all")
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    known = {asked(line): line for line in PAGE.read_text().splitlines() if line.startswith("| ")} if PAGE.exists() else {}
    for name in args.names or ROWS:
        line = measure(name, args.steps)
        known[asked(line)] = line
        print(line, flush=True)
        lines = [known[row.asks] for row in ROWS.values() if row.asks in known]
        PAGE.write_text(HEAD.format(batch=BATCH) + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
