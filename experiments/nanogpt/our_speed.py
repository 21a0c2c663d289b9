"""Time our training step on a batch of random tokens, one JSON line a variant."""

import argparse
import json
import statistics
import sys
import time

import jax
import numpy as np

from efficient_lm import masks
from efficient_lm.config import Config, layer_options
from efficient_lm.model.definition import define
from efficient_lm.parallel.mesh import make_mesh
from efficient_lm.parallel.placement import place_batch
from efficient_lm.training.optimizer import make_optimizer
from efficient_lm.training.speed import peak_memory_bytes
from efficient_lm.training.state import abstract_state, make_initializer
from efficient_lm.training.step import make_train_step
from pallas_kernels.attention import explain


def main() -> None:
    """Time each variant; a failing one becomes a line with its error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, required=True, help="a repetition")
    parser.add_argument("--repetitions", type=int, required=True)
    parser.add_argument("--roof", help="dtype of the matrix products whose rate is measured first")
    arguments = parser.parse_args()
    if arguments.roof:
        from pallas_kernels._core.timing import matmul_flops

        print(json.dumps({"name": "roof", "flops": matmul_flops(arguments.roof)}), flush=True)
    for variant in json.load(sys.stdin):
        row = {"name": variant["name"]}
        try:
            row |= measure(variant, arguments.steps, arguments.repetitions)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:500]
        print(json.dumps(row), flush=True)


def measure(variant: dict, steps: int, repetitions: int) -> dict:
    """Seconds a step: the median over repetitions of the mean within one.

    variant: `config`, nested fields of Config, and `scan`, whether layers are scanned.
    """
    config = Config.from_dict(variant["config"])
    # One device, as the peer; the first also where there are more.
    mesh = make_mesh(config.parallel, jax.devices()[:1])
    definition = define(config.model, scan=variant["scan"])
    optimizer = make_optimizer(config.optimizer, definition.parameters, config.training.steps)
    initial = make_initializer(config, definition, optimizer)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(initial, definition, mesh))
    state = jax.jit(initial, out_shardings=shardings)()
    byte_lengths = np.ones(config.model.vocabulary_size, np.int32)
    train_step = make_train_step(config, definition, optimizer, mesh, byte_lengths)
    batch = place_batch(random_batch(config), mesh)

    began = time.perf_counter()
    step = jax.jit(train_step, donate_argnums=0).lower(state, batch).compile()
    compile_seconds = time.perf_counter() - began
    for _ in range(steps):
        state, metrics = step(state, batch)
    times = []
    for _ in range(repetitions):
        jax.block_until_ready(state)
        began = time.perf_counter()
        for _ in range(steps):
            state, metrics = step(state, batch)
        jax.block_until_ready(state)
        times.append((time.perf_counter() - began) / steps)
    return {
        "step_seconds": statistics.median(times),
        "step_seconds_best": min(times),
        "compile_seconds": compile_seconds,
        "parameters": definition.count(),
        "loss": float(metrics["loss_sum"] / metrics["weight_sum"]),
        "skipped": int(metrics["skipped"]),
        "temporary_bytes": int(np.asarray(step.memory_analysis().temp_size_in_bytes)),
        "peak_memory_bytes": peak_memory_bytes(step),
        "attention": attention_choice(config),
        "device": jax.devices()[0].device_kind,
    }


def attention_choice(config: Config) -> str:
    """Which implementation the first layer's attention takes, and why."""
    _, options, _ = layer_options(config.model)[0]
    heads, key_value_heads, head_dim = options.sizes(config.model)
    rows = (config.data.batch_size, config.data.sequence_length)
    query = jax.ShapeDtypeStruct((*rows, heads, head_dim), config.model.dtype)
    key = jax.ShapeDtypeStruct((*rows, key_value_heads, head_dim), config.model.dtype)
    mask = masks.Causal()
    if config.data.mask_across_documents:
        mask = mask & masks.Segments(np.ones(rows, np.int32))
    choice = explain(query, key, key, mask=mask.lower(), implementation=options.implementation)
    return str(choice)


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


if __name__ == "__main__":
    main()
