"""The public functions: check, lay out, choose an implementation."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels._core import compat, dispatch
from pallas_kernels.linear_cross_entropy import xla
from pallas_kernels.linear_cross_entropy.ref import Options
from pallas_kernels.linear_cross_entropy.support import TABLE, Facts


def linear_cross_entropy(
    hidden: Float[Array, "*batch D"],
    weight: Float[Array, "V D"],
    labels: Int[Array, "*batch"],
    *,
    weights: Float[Array, "*batch"] | None = None,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    chunk_logits: int = 2**24,
    implementation: str | tuple[str, ...] = "auto",
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Weighted sum of the cross-entropy of softmax(hidden weight^T), in nats, logits in chunks.

    Args:
      hidden: float32 or bfloat16; the matrix products run in this type, sums in float32.
      weight: rows of the classifier, cast to the type of `hidden`; its gradient comes back in its
        own type.
      labels: in [0, V); a row of weight 0 may have any label.
      weights: of each row's loss; None: all one. No gradient.
      soft_cap: logits become c tanh(logits / c).
      z_loss: coefficient z of z * logsumexp(logits)^2.
      chunk_logits: logits alive at once (at least one row or column of them); memory does not grow
        with V.
      implementation: "auto", a name, or names in order of preference; `explain` tells the choice.
        "xla_rows": gradients in the forward pass, three matrix products; that of the weight is
        float32 while it is summed. "xla_vocabulary": logits computed again in the backward pass,
        four products; that of hidden is float32 while it is summed. "ref": all logits alive.

    Returns:
      total: sum_i w_i (lse_i - logit_i[label_i] + z lse_i^2); gradients in hidden and weight.
      sums: the parts, without gradients: loss_sum (cross-entropy alone), z_loss_sum, weight_sum,
        correct_sum (weights of rows where no logit is higher than the label's).

    Raises:
      ValueError: unknown implementation, no rows, or shapes that do not fit.
    """
    weights = jnp.ones(labels.shape) if weights is None else lax.stop_gradient(weights)
    choice = explain(hidden, weight, implementation=implementation)
    if not labels.shape == weights.shape == hidden.shape[:-1]:
        raise ValueError(
            f"linear_cross_entropy: labels {labels.shape} and weights {weights.shape} must have "
            f"the shape of the rows, {hidden.shape[:-1]}"
        )
    if labels.size == 0 or chunk_logits < 1:
        raise ValueError(
            f"linear_cross_entropy: {labels.size} rows, chunk_logits={chunk_logits}; both must be "
            "at least 1"
        )
    hidden, labels, weights = _rows(hidden), labels.reshape(-1), weights.reshape(-1)
    options = Options(soft_cap, z_loss, chunk_logits)
    total, sums = choice.implementation.load()(hidden, weight, labels, weights, options)
    return total, jax.tree.map(lax.stop_gradient, sums)


def explain(hidden, weight, *, implementation: str | tuple[str, ...] = "auto") -> dispatch.Choice:
    """Which implementation `linear_cross_entropy` takes for these arguments, and why not others.

    Arrays may be jax.ShapeDtypeStruct. `str()` of the result is one line for people.
    """
    if hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"linear_cross_entropy: hidden {hidden.shape} and weight {weight.shape} must have the "
            "same last dimension"
        )
    facts = Facts(compat.target(), hidden.dtype.name)
    return dispatch.choose("linear_cross_entropy", TABLE, facts, implementation)


def linear_cross_entropy_per_token(
    hidden: Float[Array, "*batch D"],
    weight: Float[Array, "V D"],
    labels: Int[Array, "*batch"],
    *,
    soft_cap: float | None = None,
    chunk_logits: int = 2**24,
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """(loss in nats, 1.0 where no logit is higher than the label's) of each row; no gradient.

    Arguments as in `linear_cross_entropy`; the logits are chunked by rows.
    """
    batch = labels.shape
    hidden, weight = lax.stop_gradient((_rows(hidden), weight))
    options = Options(soft_cap, 0.0, chunk_logits)
    scores = xla.scores_by_rows(hidden, weight, labels.reshape(-1), options)
    losses = (scores.lse - scores.label_logit).reshape(batch)
    return losses, scores.correct.astype(jnp.float32).reshape(batch)


def _rows(hidden: Float[Array, "*batch D"]) -> Float[Array, "R D"]:
    return hidden.reshape(-1, hidden.shape[-1])
