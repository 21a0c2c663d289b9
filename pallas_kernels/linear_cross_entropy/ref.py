"""Cross-entropy of a linear classifier: the specification, with all logits alive."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Options(NamedTuple):
    """What is fixed at compile time; `chunk_logits` bounds memory and changes no value."""

    soft_cap: float | None = None
    z_loss: float = 0.0
    chunk_logits: int = 2**24


def linear_cross_entropy(
    hidden: Float[Array, "*batch D"],
    weight: Float[Array, "V D"],
    labels: Int[Array, "*batch"],
    weights: Float[Array, "*batch"],
    options: Options,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """total = sum_i w_i (lse_i - l_i[label_i] + z lse_i^2) in float32, and its parts.

    l = hidden weight^T, capped to c tanh(l / c) when `soft_cap` is c (Gemma 2, arXiv:2408.00118);
    lse = logsumexp over the vocabulary; z-loss as in PaLM (arXiv:2204.02311, section 5).
    """
    logits = reference_logits(hidden, weight, options.soft_cap)  # [*batch, V]
    lse = jax.nn.logsumexp(logits, axis=-1)
    is_label = jax.nn.one_hot(labels, weight.shape[0], dtype=bool)
    label_logit = jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1)
    correct = label_logit >= jnp.max(logits, axis=-1)
    sums = {
        "loss_sum": jnp.sum(weights * (lse - label_logit)),
        "z_loss_sum": options.z_loss * jnp.sum(weights * lse**2),
        "weight_sum": jnp.sum(weights),
        "correct_sum": jnp.sum(jnp.where(correct, weights, 0.0)),
    }
    return sums["loss_sum"] + sums["z_loss_sum"], sums


def reference_logits(
    hidden: Float[Array, "*batch D"], weight: Float[Array, "V D"], soft_cap: float | None
) -> Float[Array, "*batch V"]:
    """Float32 logits, soft-capped."""
    logits = jnp.einsum(
        "...d,vd->...v",
        hidden.astype(jnp.float32),
        weight.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
