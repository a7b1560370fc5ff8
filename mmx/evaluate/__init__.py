"""Evaluators: objects that say when they run and return a Report."""

from mmx.evaluate.captioning import Captions
from mmx.evaluate.missing import Missing
from mmx.evaluate.report import Evaluation, Evaluator, Report
from mmx.evaluate.retrieval import Retrieval, retrieval_metrics
from mmx.evaluate.scores import Scores

__all__ = ["Captions", "Evaluation", "Evaluator", "Missing", "Report", "Retrieval", "Scores", "retrieval_metrics"]
