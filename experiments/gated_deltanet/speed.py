"""Tokens/s of a whole training step (forward, backward, optimizer) by context, mixer by mixer."""

import itertools
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import shapes

from efficient_lm.config import Config
from efficient_lm.model.definition import define
from efficient_lm.parallel.mesh import make_mesh
from efficient_lm.parallel.placement import place_batch
from efficient_lm.training.optimizer import make_optimizer
from efficient_lm.training.state import abstract_state, make_initializer
from efficient_lm.training.step import make_train_step


@dataclass(frozen=True)
class Ready:
    """A compiled step, and what it starts from."""

    initial: Any
    step: Any
    batch: dict[str, np.ndarray]
    mesh: Any
    row: dict[str, Any]


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


def prepare(config: Config) -> Ready:
    """Compile the step of a config; nothing is allocated."""
    began = time.perf_counter()
    mesh = make_mesh(config.parallel, jax.devices()[:1])
    definition = define(config.model)
    optimizer = make_optimizer(config.optimizer, definition.parameters, config.training.steps)
    initial = make_initializer(config, definition, optimizer)
    abstract = abstract_state(initial, definition, mesh)
    step = make_train_step(
        config, definition, optimizer, mesh, np.ones(config.model.vocabulary_size, np.int32)
    )
    batch = random_batch(config)
    placed = jax.eval_shape(lambda: batch)
    compiled = jax.jit(step, donate_argnums=0).lower(abstract, placed).compile()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    start = jax.jit(initial, out_shardings=shardings).lower().compile()
    analysis = compiled.memory_analysis()
    row = {
        "parameters": definition.count(),
        "compile_seconds": round(time.perf_counter() - began, 1),
        "temporary_bytes": int(analysis.temp_size_in_bytes),
    }
    return Ready(start, compiled, batch, mesh, row)


def measure(ready: Ready, steps: int) -> dict[str, Any]:
    """Seconds a step: the median of `steps` after one that warms up."""
    state = ready.initial()
    batch = place_batch(ready.batch, ready.mesh)
    times = []
    for _ in range(steps + 1):
        jax.block_until_ready(state)
        began = time.perf_counter()
        state, metrics = ready.step(state, batch)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times[1:])
    return ready.row | {
        "step_seconds": seconds,
        "step_seconds_best": min(times[1:]),
        "steps": steps,
        "tokens_per_second": batch["tokens"].size / seconds,
        "loss": float(metrics["loss_sum"] / metrics["weight_sum"]),
        "skipped": int(metrics["skipped"]),
    }


def rows(
    shape: shapes.Shape, lengths: list[int], mixers: list[str], steps: int, attention: str,
    workers: int,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A row for each length and mixer; `workers` steps compile at a time, then those are timed.

    shape: `rows` of `length` tokens; rows are made fewer for longer ones.
    """
    tokens = shape.rows * shape.length

    def start(length, mixer):
        made = replace(shape, length=length, rows=max(1, tokens // length))
        return prepare(make_config(made, mixer, attention))

    plan = list(itertools.product(lengths, mixers))
    for wave in (plan[i : i + workers] for i in range(0, len(plan), workers)):
        with ThreadPoolExecutor(workers) as pool:  # at whose end nothing else runs
            jobs = [(entry, pool.submit(start, *entry)) for entry in wave]
        for (length, mixer), job in jobs:
            row = {"what": "speed", "mixer": mixer, "length": length}
            try:
                yield row | measure(job.result(), steps)
            except Exception as error:
                yield row | {"error": f"{type(error).__name__}: {error}"[:300]}


def random_batch(config: Config) -> dict[str, np.ndarray]:
    """Rows of one document each, uniform tokens and labels."""
    rng = np.random.default_rng(0)
    shape = (config.data.batch_size, config.data.sequence_length)
    tokens, labels = rng.integers(0, config.model.vocabulary_size, (2, *shape), dtype=np.int32)
    return {
        "tokens": tokens,
        "labels": labels,
        "weights": np.ones(shape, np.float32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy(),
    }
