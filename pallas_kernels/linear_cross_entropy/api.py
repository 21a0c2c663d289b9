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
    shards: int = 1,
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
      chunk_logits: logits alive at once in each shard (at least one row or column of them); memory
        does not grow with V.
      shards: number of devices over which the first dimension of `hidden` is sharded, so that
        "xla_rows" cuts within shards; it must divide that dimension.
      implementation: "auto", a name, or names in order of preference; `explain` tells the choice.
        "xla_rows": gradients in the forward pass, three matrix products; each device holds a
        float32 gradient of the whole weight while it is summed. "xla_vocabulary": logits computed
        again in the backward pass, four products; no such gradient. "ref": all logits alive.

    Returns:
      total: sum_i w_i (lse_i - logit_i[label_i] + z lse_i^2); gradients in hidden and weight.
      sums: the parts, without gradients: loss_sum (cross-entropy alone), z_loss_sum, weight_sum,
        correct_sum (weights of rows where no logit is higher than the label's).

    Raises:
      ValueError: unknown implementation, features of hidden and weight differ, or `shards` does
        not divide the first dimension.
    """
    weights = jnp.ones(labels.shape) if weights is None else lax.stop_gradient(weights)
    choice = explain(hidden, weight, shards=shards, implementation=implementation)
    hidden, labels, weights = _by_shards(shards, hidden, labels, weights)
    options = Options(soft_cap, z_loss, chunk_logits)
    total, sums = choice.implementation.load()(hidden, weight, labels, weights, options)
    return total, jax.tree.map(lax.stop_gradient, sums)


def explain(
    hidden, weight, *, shards: int = 1, implementation: str | tuple[str, ...] = "auto"
) -> dispatch.Choice:
    """Which implementation `linear_cross_entropy` takes for these arguments, and why not others.

    Arrays may be jax.ShapeDtypeStruct. `str()` of the result is one line for people.
    """
    if hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"linear_cross_entropy: hidden {hidden.shape} and weight {weight.shape} must have the "
            "same last dimension"
        )
    facts = Facts(compat.target(), hidden.dtype.name, *weight.shape, shards)
    return dispatch.choose("linear_cross_entropy", TABLE, facts, implementation)


def linear_cross_entropy_per_token(
    hidden: Float[Array, "*batch D"],
    weight: Float[Array, "V D"],
    labels: Int[Array, "*batch"],
    *,
    soft_cap: float | None = None,
    chunk_logits: int = 2**24,
    shards: int = 1,
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """(loss in nats, 1.0 where no logit is higher than the label's) of each row; no gradient.

    Arguments as in `linear_cross_entropy`; the logits are chunked by rows.
    """
    batch = labels.shape
    hidden, labels = _by_shards(shards, lax.stop_gradient(hidden), labels)
    options = Options(soft_cap, 0.0, chunk_logits)
    scores = xla.scores_by_rows(hidden, lax.stop_gradient(weight), labels, options)
    losses = (scores.lse - scores.label_logit).reshape(batch)
    return losses, scores.correct.astype(jnp.float32).reshape(batch)


def _by_shards(shards: int, hidden, *per_row):
    """hidden [*batch, D] as [R, D], or [S, R, D] for several shards, and arrays [*batch] alike."""
    batch = hidden.shape[:-1]
    if shards > 1 and (not batch or batch[0] % shards):
        raise ValueError(
            f"linear_cross_entropy: shards={shards} does not divide the first dimension of hidden "
            f"{hidden.shape}"
        )
    rows = (-1,) if shards == 1 else (shards, -1)
    return hidden.reshape(*rows, hidden.shape[-1]), *(x.reshape(rows) for x in per_row)
