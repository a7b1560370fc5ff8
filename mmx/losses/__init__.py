"""Losses: pure functions of float32 arrays. One function, one idea; each says its shapes and its source.

Those of tokens or examples return one number for each, `(...)`, in nats; `masked_mean` brings them together, by a mask or by
weights. Those that compare the examples of a batch with each other return the mean, and take a mask of the rows or their weights:
a row of weight 0 is neither partner nor negative, any other is a negative like all, and counts in the mean by its weight.
"""

from mmx.losses.alignment import (
    cosine_cost,
    grounding_loss,
    transport_distance,
    transport_plan,
    word_region_alignment_loss,
)
from mmx.losses.boxes import corners, generalized_iou, set_assignment, set_grounding_loss
from mmx.losses.contrasting import (
    batch_ranking_loss,
    clip_loss,
    hard_negatives,
    late_interaction,
    mil_nce_loss,
    momentum_contrastive_loss,
    ranking_loss,
    sigmoid_loss,
    similarity,
    symmetric_cross_entropy,
    unit_vectors,
)
from mmx.losses.distillation import (
    attention_distillation_loss,
    cosine_distance,
    distillation_loss,
)
from mmx.losses.masking import (
    info_nce,
    normalised_each,
    reconstruction_loss,
    region_labels,
    regression_loss,
    sampled_nce,
)
from mmx.losses.scores import (
    LOWEST,
    binary_cross_entropy,
    chunked_cross_entropy,
    cross_entropy,
    kl_divergence,
    masked_mean,
)

__all__ = [
    "LOWEST",
    "attention_distillation_loss",
    "batch_ranking_loss",
    "binary_cross_entropy",
    "chunked_cross_entropy",
    "clip_loss",
    "corners",
    "cosine_cost",
    "cosine_distance",
    "cross_entropy",
    "distillation_loss",
    "generalized_iou",
    "grounding_loss",
    "hard_negatives",
    "info_nce",
    "kl_divergence",
    "late_interaction",
    "masked_mean",
    "mil_nce_loss",
    "momentum_contrastive_loss",
    "normalised_each",
    "ranking_loss",
    "reconstruction_loss",
    "region_labels",
    "regression_loss",
    "sampled_nce",
    "set_assignment",
    "set_grounding_loss",
    "sigmoid_loss",
    "similarity",
    "symmetric_cross_entropy",
    "transport_distance",
    "transport_plan",
    "unit_vectors",
    "word_region_alignment_loss",
]
