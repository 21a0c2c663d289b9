"""Next-token prediction."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from efficient_lm.config import ObjectiveConfig
from pallas_kernels.linear_cross_entropy import linear_cross_entropy

Objective = Callable[..., tuple[Float[Array, ""], dict[str, Float[Array, ""]]]]


def autoregressive(config: ObjectiveConfig) -> Objective:
    """objective(model, batch, key) -> (loss, metrics): mean cross-entropy over weighted tokens.

    The loss, in nats a token, is (cross-entropy + z-loss) summed over the batch, divided by the
    sum of `batch["weights"]` (by 1 if no token counts), plus the model's auxiliary losses
    (`aux` entries whose name ends in "_loss"). Metrics are sums over the batch, to be added over
    microbatches: `loss_sum` is cross-entropy alone, so loss_sum / weight_sum is what perplexity
    is made of.
    """

    def objective(
        model: Callable, batch: Mapping[str, Any], key: Key[Array, ""] | None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        output = model(
            batch["tokens"],
            segment_ids=batch.get("segment_ids"),
            positions=batch.get("positions"),
            dropout_key=key,
            logits=False,
        )

        def token_sums(weight, hidden, labels, weights):
            return linear_cross_entropy(
                hidden,
                weight,
                labels,
                weights=weights,
                soft_cap=model.config.logits_soft_cap,
                z_loss=config.z_loss,
                chunk_logits=config.chunk_logits,
                implementation=config.implementation,
            )

        total, metrics = model.over_tokens(
            token_sums,
            model.unembedding(),
            output.hidden,
            batch["labels"],
            batch["weights"],
            dtype=output.hidden.dtype,
            summed=True,
        )
        loss = total / jnp.maximum(metrics["weight_sum"], 1.0)
        for name, value in (output.aux or {}).items():
            if name.endswith("_loss"):
                loss = loss + value
                weighted = value * metrics["weight_sum"]
                metrics[f"{name}_sum"] = jax.lax.stop_gradient(weighted)
        return loss, metrics

    return objective
