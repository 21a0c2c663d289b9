"""One training step of Llama-3 shapes on a mesh, timed: a child of `run.py`, so that running out of
memory costs one row. Reads a JSON object on stdin and prints one."""

import json
import sys


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
    """Seconds a step, and bytes by the compiler and by the allocator, in one row.

    given: `config` (nested fields of Config), `devices`, `steps` (0: compile only).
    """
    import jax

    from efficient_lm.config import Config
    from efficient_lm.model.definition import define
    from efficient_lm.parallel.check import check_mesh
    from efficient_lm.parallel.mesh import make_mesh
    from efficient_lm.training.speed import device_memory_bytes
    from efficient_lm.training.step_time import compile_step, time_step

    config = Config.from_dict(given["config"])
    devices = jax.devices()[: given["devices"]]
    check_mesh(config, define(config.model), make_mesh(config.parallel, devices))
    compiled = compile_step(config, devices)
    row = compiled.facts | {"device": devices[0].device_kind}
    if given["steps"]:
        row |= time_step(compiled, 1, given["steps"])
        tokens = config.data.batch_size * config.data.sequence_length
        row |= {"steps": given["steps"], "tokens_per_second": tokens / row["step_seconds"]}
        peak = device_memory_bytes(devices[0])
        if peak is not None:
            row["peak_bytes"] = peak
    return row


if __name__ == "__main__":
    main()
