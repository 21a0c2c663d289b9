"""Tokens/s of decoding behind a context, and the bytes of the state."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import shapes

from efficient_lm.config import Config
from efficient_lm.evaluation.results import attempt
from efficient_lm.inference.decode import CHUNK
from efficient_lm.inference.engine import bucket
from efficient_lm.inference.model import Model
from efficient_lm.inference.speed import DecodeTimer, random_model, state_bytes


def rows(
    shape: shapes.Shape, contexts: list[int], mixers: list[str], chunks: int
) -> Iterator[dict[str, Any]]:
    """A row for each mixer and context: `shape.rows` sequences, `chunks` dispatches of CHUNK."""
    for mixer in mixers:
        longest = replace(shape, length=bucket(max(contexts) + chunks * CHUNK))
        config = Config.from_dict({"model": shapes.model_fields(longest, mixer)})
        model = random_model(config.model)
        for context in contexts:
            row = {"what": "decode", "mixer": mixer, "context": context, "batch": shape.rows}
            yield attempt(row, partial(measure, model, shape.rows, context, chunks))


def measure(model: Model, batch: int, context: int, chunks: int) -> dict[str, Any]:
    """Seconds a step of all rows, the best of three runs, and the bytes of one row's state."""
    timer = DecodeTimer(model, batch, context, chunks)
    seconds = timer.seconds_a_step()
    return {
        "step_milliseconds": 1e3 * seconds,
        "tokens_per_second": batch / seconds,
        "state_bytes": state_bytes(model.config, timer.slots),
        "weight_bytes": sum(x.nbytes for x in jax.tree.leaves(model.arrays)),
    }
