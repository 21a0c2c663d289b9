"""A training step by itself: compiled before anything is allocated, and timed on random tokens."""

import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from efficient_lm.compilation import compiler_options
from efficient_lm.config import Config
from efficient_lm.data.batch import Batch
from efficient_lm.model.definition import define
from efficient_lm.parallel.mesh import make_mesh
from efficient_lm.parallel.placement import place_batch
from efficient_lm.parallel.rules import batch_sharding
from efficient_lm.training.optimizer import make_optimizer
from efficient_lm.training.speed import peak_memory_bytes
from efficient_lm.training.state import abstract_state, make_initializer
from efficient_lm.training.step import jit_train_step, make_train_step


class CompiledStep(NamedTuple):
    """start() gives the first state, and step(state, batch) takes its buffers."""

    start: Any
    step: Any
    batch: Batch
    mesh: Mesh
    facts: dict[str, Any]  # parameters, seconds of compilation, bytes


def compile_step(
    config: Config, devices: Sequence[jax.Device], scan: bool | None = None
) -> CompiledStep:
    """Compile the step of `config` on `devices`. scan: over layers; None: as config.model says."""
    began = time.perf_counter()
    mesh = make_mesh(config.parallel, devices)
    definition = define(config.model, scan=scan)
    optimizer = make_optimizer(config.optimizer, definition.parameters, config.training.steps)
    initial = make_initializer(config, definition, optimizer)
    abstract = abstract_state(initial, definition, mesh, config.parallel.rules)
    lengths = np.ones(config.model.vocabulary_size, np.int32)
    step = make_train_step(config, definition, optimizer, mesh, lengths)
    batch, sharding = random_batch(config), batch_sharding(mesh)
    placed = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for name, x in batch.items()
    }
    compiled = jit_train_step(step, abstract).lower(abstract, placed).compile()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    draw = jax.jit(initial, out_shardings=shardings, compiler_options=compiler_options(shardings))
    start = draw.lower().compile()
    facts = {
        "parameters": definition.count(),
        "compile_seconds": round(time.perf_counter() - began, 1),
        "temporary_bytes": int(compiled.memory_analysis().temp_size_in_bytes),
        "peak_memory_bytes": peak_memory_bytes(compiled),
    }
    return CompiledStep(start, compiled, batch, mesh, facts)


def time_step(compiled: CompiledStep, steps: int, repetitions: int) -> dict[str, Any]:
    """Seconds a step: the median over repetitions of the mean of `steps`, after `steps` to warm up;
    with the loss of the last step and how many updates were skipped."""
    state, batch = compiled.start(), place_batch(compiled.batch, compiled.mesh)
    times = []
    for _ in range(repetitions + 1):
        jax.block_until_ready(state)
        began = time.perf_counter()
        for _ in range(steps):
            state, metrics = compiled.step(state, batch)
        jax.block_until_ready((state, metrics))
        times.append((time.perf_counter() - began) / steps)
    return compiled.facts | {
        "step_seconds": statistics.median(times[1:]),
        "step_seconds_best": min(times[1:]),
        "loss": float(metrics["loss_sum"] / metrics["weight_sum"]),
        "skipped": int(metrics["skipped"]),
    }


def random_batch(config: Config) -> Batch:
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
