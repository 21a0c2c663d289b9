"""Perplexity, bits per byte, accuracy and loss by position over batches of a split."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from efficient_lm.config import Config
from efficient_lm.errors import DataError
from efficient_lm.model.definition import ModelDefinition
from efficient_lm.parallel.mixing import use_mesh
from pallas_kernels.linear_cross_entropy import linear_cross_entropy_per_token

Batch = dict[str, Any]
# Batches sent ahead of the one whose sums are fetched, so that the device never waits.
AHEAD = 2


def make_scorer(
    config: Config, definition: ModelDefinition, mesh: Mesh, byte_lengths: np.ndarray
) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """scorer(parameters, batch) -> sums over the weighted labels of a batch; to be jitted.

    loss_sum in nats, weight_sum, correct_sum and bytes_sum (of the text that the labels stand for)
    are scalars; position_loss_sum and position_weight_sum are [T], by place in the window. Logits
    are alive in chunks of `config.objective.chunk_logits` only.
    """
    table = np.zeros(config.model.vocabulary_size, np.float32)
    table[: len(byte_lengths)] = byte_lengths

    def scorer(parameters: Any, batch: Batch) -> dict[str, jax.Array]:
        model = definition.bind(parameters)
        use_mesh(model, mesh, config.parallel)
        hidden = model(
            batch["tokens"],
            segment_ids=batch["segment_ids"],
            positions=batch["positions"],
            logits=False,
        ).hidden

        def per_token(weight, hidden, labels):
            return linear_cross_entropy_per_token(
                hidden,
                weight,
                labels,
                soft_cap=config.model.logits_soft_cap,
                chunk_logits=config.objective.chunk_logits,
            )

        losses, correct = model.over_tokens(
            per_token,
            model.unembedding(),
            hidden,
            batch["labels"],
            dtype=hidden.dtype,
            summed=False,
        )
        weights = batch["weights"]
        losses = jnp.where(weights > 0, losses * weights, 0.0)
        label_bytes = jnp.take(jnp.asarray(table), batch["labels"])
        return {
            "loss_sum": jnp.sum(losses),
            "weight_sum": jnp.sum(weights),
            "correct_sum": jnp.sum(correct * weights),
            "bytes_sum": jnp.sum(label_bytes * weights),
            "position_loss_sum": jnp.sum(losses, axis=0),
            "position_weight_sum": jnp.sum(weights, axis=0),
        }

    return scorer


def evaluate_batches(
    step: Callable[[Batch], dict[str, Any]], batches: Iterable[Batch]
) -> dict[str, Any]:
    """Metrics over all batches, from the sums that `step(batch)` returns.

    `step` is a scorer with its parameters bound, or the evaluation step of training, which has no
    sums by position. Sums are added on the host in double precision.

    Returns:
      loss: nats a token. perplexity: exp(loss). bits_per_byte: None where no label stands for
      text. accuracy: share of tokens whose logit is the highest. tokens, bytes: that were scored.
      position_loss: mean loss at each place of the window, None where nothing was scored.
      position_tokens: that were scored at each place; a stride scores few tokens at most places.
      tokens_per_second: scored tokens over the time after the first batch, which may compile.

    Raises:
      DataError: nothing is scored.
    """
    totals: dict[str, Any] = {}
    pending: deque = deque()
    began, first = time.perf_counter(), None

    def take() -> None:
        for name, value in jax.device_get(pending.popleft()).items():
            totals[name] = totals.get(name, 0.0) + np.asarray(value, np.float64)

    for batch in batches:
        pending.append(step(batch))
        if first is None:
            take()
            first = (time.perf_counter(), float(totals["weight_sum"]))
        elif len(pending) > AHEAD:
            take()
    while pending:
        take()
    tokens = float(totals.get("weight_sum", 0.0))
    if tokens == 0:
        raise DataError("no token to score; the split is empty or all of its weights are 0")
    seconds, later = time.perf_counter() - first[0], tokens - first[1]
    loss, size = float(totals["loss_sum"]) / tokens, float(totals.get("bytes_sum", 0.0))
    metrics = {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": float(totals["loss_sum"]) / math.log(2) / size if size else None,
        "accuracy": float(totals["correct_sum"]) / tokens,
        "tokens": tokens,
        "bytes": size,
        "seconds": time.perf_counter() - began,
        "tokens_per_second": later / seconds if later else None,
    }
    if "position_loss_sum" in totals:
        sums, weights = totals["position_loss_sum"], totals["position_weight_sum"]
        metrics["position_loss"] = [
            float(s / w) if w else None for s, w in zip(sums, weights, strict=True)
        ]
        metrics["position_tokens"] = [float(w) for w in weights]
    return metrics
