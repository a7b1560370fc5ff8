"""Distillation: what another model knows."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from mmx.losses.scores import kl_divergence


def distillation_loss(
    student: Float[Array, "... V"], teacher: Float[Array, "... V"], temperature: float = 1.0
) -> Float[Array, "..."]:
    """How far the student's softened answers are from the teacher's: `(..., V), (..., V) -> (...)`, times temperature squared.

    arXiv 1503.02531, 2. The teacher's scores have no gradient.
    """
    target = jax.nn.softmax(jax.lax.stop_gradient(teacher.astype(jnp.float32)) / temperature)
    return temperature**2 * kl_divergence(student / temperature, target)


def cosine_distance(a: Float[Array, "... D"], b: Float[Array, "... D"]) -> Float[Array, "..."]:
    """1 - cosine: `(..., D), (..., D) -> (...)`; distillation of features whose length does not matter (DistilBERT, EVA)."""
    return optax.losses.cosine_distance(a.astype(jnp.float32), b.astype(jnp.float32), epsilon=1e-6)


def attention_distillation_loss(
    student: Float[Array, "... L M"], teacher: Float[Array, "... L M"], mask: Bool[Array, "... L"] | None = None
) -> Float[Array, "..."]:
    """The mean divergence of rows of attention weights: `(..., L, M), (..., L, M) -> (...)` (MiniLM, arXiv 2002.10957, 3.1).

    Args:
        student: weights, rows with sum 1.
        teacher: weights; they have no gradient.
        mask: which rows exist.
    """
    student, teacher = jnp.maximum(student.astype(jnp.float32), 1e-12), jax.lax.stop_gradient(teacher.astype(jnp.float32))
    rows = optax.losses.kl_divergence(jnp.log(student), teacher)
    mask = jnp.ones(rows.shape, bool) if mask is None else mask
    return jnp.where(mask, rows, 0).sum(-1) / jnp.maximum(mask.sum(-1), 1)
