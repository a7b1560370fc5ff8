"""One set of weights for five tasks: retrieval, matching, captions, answers to questions, and text alone. About 12 minutes.

The same layers read an image alone and a text alone (retrieval), both together (matching), write about an image (captions, and
answers behind questions that are read both ways), and write with nothing given (a language model).

python train.py configs/one_model.py
"""

import mmx
from mmx.data import DataConfig
from mmx.evaluate import Captions, Retrieval, Scores
from mmx.objectives import Captioning, Contrastive, Matching

OBJECTIVES = {
    "retrieval": Contrastive(),
    "matching": Matching(negatives="hard"),
    "captions": Captioning(),
    "answers": Captioning(text="text/answer"),
    "language": Captioning(given=(), weight=0.5),
}


def config() -> mmx.Experiment:
    """The default model; an emoji's name, and a question about it with its answer, are read and written as the same modality."""
    return mmx.Experiment(
        steps=600,
        objectives=OBJECTIVES,
        data=DataConfig(fields={"image": "image", "text": "name", "text/answer": ("question", "answer")}),
        evaluators={
            "composition": Retrieval(),
            "captions": Captions(),
            "answers": Captions(text="text/answer"),
            "held_out": Scores(OBJECTIVES),
        },
    )
