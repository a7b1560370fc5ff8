"""Evaluators: objects that say when they run and return a Report."""

from mmx.evaluate.captioning import Captions
from mmx.evaluate.missing import Missing
from mmx.evaluate.report import Evaluation, Evaluator, Report
from mmx.evaluate.retrieval import Retrieval, retrieval_metrics
from mmx.evaluate.scores import Scores
from mmx.evaluate.zero_shot import ZeroShot, build_zero_shot_classifier

__all__ = [
    "Captions",
    "Evaluation",
    "Evaluator",
    "Missing",
    "Report",
    "Retrieval",
    "Scores",
    "ZeroShot",
    "build_zero_shot_classifier",
    "retrieval_metrics",
]
