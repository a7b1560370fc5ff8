"""The losses of published heads, as their classes count them."""

import math
from typing import Any

import jax.numpy as jnp

from mmx.errors import InputError, unknown
from mmx.losses import binary_cross_entropy, cross_entropy, masked_mean, regression_loss

REGRESSION, SINGLE, MULTI = PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


def token_loss(logits: Any, labels: Any, ignored: int = -100) -> Any:
    """The mean cross-entropy of labels, `(..., V), (...) -> ()`; those that are `ignored` do not count."""
    return masked_mean(cross_entropy(logits, jnp.maximum(labels, 0)), labels != ignored)


def class_loss(logits: Any, labels: Any, problem_type: str | None = None) -> Any:
    """What a head of C classes is trained with, `(B, C), (B,) or (B, C) -> ()`, by the published `problem_type`.

    Where it is not told: one class is a number to come near to, labels `(B,)` are classes, `(B, C)` questions of their own.
    """
    if problem_type is None:
        problem_type = REGRESSION if logits.shape[-1] == 1 else SINGLE if labels.ndim == 1 else MULTI
    if problem_type not in PROBLEMS:
        raise InputError("problem_type: " + unknown("problem", problem_type, PROBLEMS))
    shape = logits.shape[:1] if problem_type == SINGLE else logits.shape
    if labels.shape[:1] != shape[:1] or labels.size != math.prod(shape):
        raise InputError(f"labels: expected {shape} where problem_type is {problem_type!r}, got {labels.shape}")
    if problem_type == SINGLE:
        if not jnp.issubdtype(labels.dtype, jnp.integer):
            raise InputError(f"labels: expected integers where problem_type is {problem_type!r}, got {labels.dtype}")
        return token_loss(logits, labels.reshape(-1))
    each = regression_loss if problem_type == REGRESSION else binary_cross_entropy
    return each(logits, labels.reshape(logits.shape)).mean()
