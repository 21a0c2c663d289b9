"""Tokens/s of a whole training step (forward, backward, optimizer) by context, mixer by mixer."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import shapes

from efficient_lm.config import Config
from efficient_lm.evaluation.results import attempt_prepared
from efficient_lm.training.step_time import compile_step, time_step


def make_config(shape: shapes.Shape, mixer: str, attention: str) -> Config:
    """Rows of one document each, so that attention runs its fastest kernel.

    attention: the implementation in the model of attention alone; the hybrid takes "auto".
    """
    fields = shapes.model_fields(shape, mixer)
    if mixer == "attention":
        fields["mixers"]["attention"]["implementation"] = attention
    data = {
        "sequence_length": shape.length,
        "batch_size": shape.rows,
        "mask_across_documents": False,
    }
    return Config.from_dict({
        "model": fields,
        "data": data,
        "objective": {"chunk_logits": 2**28},
        "optimizer": {"name": "adamw"},
        "parallel": {"data": 1},
    })  # fmt: skip


def rows(
    shape: shapes.Shape, lengths: list[int], mixers: list[str], steps: int, attention: str,
    workers: int,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A row for each length and mixer; `workers` steps compile at a time.

    Those of the first length one by one: XLA tries out matrix products on the device, which others
    would disturb, and takes what it found for later ones. shape: `rows` of `length` tokens; rows
    are made fewer for longer ones.
    """
    tokens = shape.rows * shape.length

    def prepare(length, mixer) -> Callable[[], dict[str, Any]]:
        made = replace(shape, length=length, rows=max(1, tokens // length))
        compiled = compile_step(make_config(made, mixer, attention), jax.devices()[:1])

        def measure() -> dict[str, Any]:
            times = time_step(compiled, 1, steps)
            rate = compiled.batch["tokens"].size / times["step_seconds"]
            return times | {"steps": steps, "tokens_per_second": rate}

        return measure

    jobs = [
        ({"what": "speed", "mixer": mixer, "length": length}, partial(prepare, length, mixer))
        for length, mixer in itertools.product(lengths, mixers)
    ]
    first = len(mixers)
    yield from attempt_prepared(jobs[:first], 1)
    yield from attempt_prepared(jobs[first:], workers)
