"""Exact scores of synthetic tasks: is every answer the model's first choice?"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from efficient_lm.config import Config
from efficient_lm.data import synthetic
from efficient_lm.errors import DataError
from efficient_lm.model.definition import ModelDefinition
from efficient_lm.parallel.mixing import use_mesh


def make_predictor(
    config: Config, definition: ModelDefinition, mesh: Mesh
) -> Callable[[Any, dict[str, Any]], Int[Array, "B T"]]:
    """predictor(parameters, batch) -> the most likely next token at each place; to be jitted."""

    def predictor(parameters: Any, batch: dict[str, Any]) -> Int[Array, "B T"]:
        model = definition.bind(parameters)
        use_mesh(model, mesh, config.parallel)
        hidden = model(
            batch["tokens"],
            segment_ids=batch["segment_ids"],
            positions=batch["positions"],
            logits=False,
        ).hidden

        def one_row(row: Float[Array, "T D"]) -> Int[Array, "T"]:
            return jnp.argmax(model.logits(row[None])[0], axis=-1).astype(jnp.int32)

        # Row groups, so that few logits are alive at once.
        rows = max(1, config.objective.chunk_logits // (hidden.shape[1] * len(model.unembedding())))
        return jax.lax.map(one_row, hidden, batch_size=min(rows, len(hidden)))

    return predictor


def evaluate_recall(
    predict: Callable[[dict[str, Any]], Any], batches: Iterable[dict[str, np.ndarray]]
) -> dict[str, float]:
    """Exact scores over all batches, as `data.synthetic.score` defines them for one.

    predict: a predictor with its parameters bound. batches: host arrays of all rows.

    Returns:
      accuracy: share of right answers. exact_match: share of rows with all answers right. queries,
      rows: the numbers they are shares of.

    Raises:
      DataError: no batch asks for anything.
    """
    totals = {"accuracy": 0.0, "exact_match": 0.0}
    queries = rows = 0
    for batch in batches:
        scores = synthetic.score(np.asarray(predict(batch)), batch)
        if scores["queries"]:
            totals["accuracy"] += scores["accuracy"] * scores["queries"]
            totals["exact_match"] += scores["exact_match"] * scores["rows"]
        queries, rows = queries + scores["queries"], rows + scores["rows"]
    if not queries:
        raise DataError("no answer to score; all weights of the batches are 0")
    return {
        "accuracy": totals["accuracy"] / queries,
        "exact_match": totals["exact_match"] / rows,
        "queries": queries,
        "rows": rows,
    }
