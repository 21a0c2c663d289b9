"""One training step of Llama-3 shapes on a mesh, timed: a child of `run.py`, so that running out of
memory costs one row. Reads a JSON object on stdin and prints one."""

import json
import sys
import time


def main() -> None:
    """Time the step that stdin describes."""
    given = json.load(sys.stdin)
    import jax

    if given["fake_devices"]:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", given["fake_devices"])
    try:
        row = measure(given)
    except Exception as error:
        row = {"error": f"{type(error).__name__}: {error}"[:300]}
        if "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower():
            row = {"error": "out of memory"}
    print(json.dumps(row), flush=True)


def measure(given: dict) -> dict:
    """Seconds a step (the best of a few), bytes by the compiler and by the allocator, in one row.

    given: `config` (nested fields of Config), `devices`, `steps` (0: compile only).
    """
    import jax
    import numpy as np

    from efficient_lm.config import Config
    from efficient_lm.model.definition import define
    from efficient_lm.parallel.check import check_mesh
    from efficient_lm.parallel.mesh import make_mesh
    from efficient_lm.parallel.rules import batch_sharding
    from efficient_lm.training.optimizer import make_optimizer
    from efficient_lm.training.state import abstract_state, make_initializer
    from efficient_lm.training.step import jit_train_step, make_train_step

    config = Config.from_dict(given["config"])
    mesh = make_mesh(config.parallel, jax.devices()[: given["devices"]])
    definition = define(config.model)
    check_mesh(config, definition, mesh)
    optimizer = make_optimizer(config.optimizer, definition.parameters, config.training.steps)
    initial = make_initializer(config, definition, optimizer)
    abstract = abstract_state(initial, definition, mesh, config.parallel.rules)
    step = make_train_step(
        config, definition, optimizer, mesh, np.ones(config.model.vocabulary_size, np.int32)
    )
    rows, length = config.data.batch_size, config.data.sequence_length
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.model.vocabulary_size, (rows, length + 1)).astype(np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "weights": np.ones((rows, length), np.float32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
        "segment_ids": np.ones((rows, length), np.int32),
    }
    batch = jax.device_put(batch, batch_sharding(mesh))
    began = time.perf_counter()
    compiled = jit_train_step(step, abstract).lower(abstract, batch).compile()
    analysis = compiled.memory_analysis()
    row = {
        "parameters": definition.count(),
        "compile_seconds": round(time.perf_counter() - began, 1),
        "temporary_bytes": int(analysis.temp_size_in_bytes),
        "argument_bytes": int(analysis.argument_size_in_bytes),
        "device": jax.devices()[0].device_kind,
    }
    if not given["steps"]:
        return row
    state = jax.jit(initial, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))()
    times = []
    for _ in range(given["steps"] + 1):  # the first one warms up
        jax.block_until_ready(state)
        began = time.perf_counter()
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - began)
    later = times[1:] or times
    row |= {
        "step_seconds": min(later),
        "steps": len(later),
        "tokens_per_second": rows * length / min(later),
        "loss": float(metrics["loss_sum"] / metrics["weight_sum"]),
        "skipped": int(metrics["skipped"]),
    }
    memory = jax.devices()[0].memory_stats()
    if memory and "peak_bytes_in_use" in memory:
        row["peak_bytes"] = int(memory["peak_bytes_in_use"])
    return row


if __name__ == "__main__":
    main()
