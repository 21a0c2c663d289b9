"""The public functions: check, lay out, choose an implementation."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.linear_cross_entropy import ref, xla

IMPLEMENTATIONS = ("ref", "xla_rows", "xla_vocabulary")


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
    implementation: str = "auto",
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
      chunk_logits: logits alive at once over all devices (at least one row of the vocabulary a
        shard, or one column of all rows); memory does not grow with V.
      shards: number of devices over which the first dimension of `hidden` is sharded, so that
        "xla_rows" cuts within shards; it must divide that dimension.
      implementation: "xla_rows" (gradients in the forward pass, three matrix products, the
        weight gradient held twice in float32), "xla_vocabulary" (logits computed again in the
        backward pass, four products), "ref" (all logits alive), or "auto" ("xla_rows").

    Returns:
      total: sum_i w_i (lse_i - logit_i[label_i] + z lse_i^2); gradients in hidden and weight.
      sums: the parts, without gradients: loss_sum (cross-entropy alone), z_loss_sum, weight_sum,
        correct_sum (weights of rows where no logit is higher than the label's).

    Raises:
      ValueError: unknown implementation, or `shards` does not divide the first dimension.
    """
    weights = jnp.ones(labels.shape) if weights is None else lax.stop_gradient(weights)
    if implementation == "auto":
        implementation = "xla_rows"
    if implementation == "ref":
        total, sums = ref.linear_cross_entropy_ref(
            hidden, weight, labels, weights, soft_cap=soft_cap, z_loss=z_loss
        )
    elif implementation in IMPLEMENTATIONS:
        function = xla.by_rows if implementation == "xla_rows" else xla.by_vocabulary
        hidden, labels, weights = _by_shards(shards, hidden, labels, weights)
        options = xla.Options(soft_cap, z_loss, chunk_logits)
        total, sums = function(hidden, weight, labels, weights, options)
    else:
        raise ValueError(
            f"linear_cross_entropy: implementation={implementation!r}; "
            f"allowed: auto, {', '.join(IMPLEMENTATIONS)}"
        )
    return total, jax.tree.map(lax.stop_gradient, sums)


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
    options = xla.Options(soft_cap, 0.0, chunk_logits)
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
