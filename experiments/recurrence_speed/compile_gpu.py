"""Compile the recurrent ops' Hopper kernels at the shapes of models, for an H200 that is not here.

python -m experiments.recurrence_speed.compile_gpu --plugin=DIRECTORY --out=FILE, on a CPU with JAX
0.11 or later and ptxas of CUDA 13 on the PATH. DIRECTORY has the files of the wheels
jax-cuda13-pjrt and jax-cuda13-plugin of JAX's own version:
`pip install --no-deps --target=DIRECTORY jax-cuda13-pjrt==V jax-cuda13-plugin==V`.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterator

import jax
from jax.experimental.topologies import TopologyDescription
from jaxlib import xla_client

from experiments.recurrence_speed.compile_tpu import CASES, passes
from pallas_kernels._core import timing
from pallas_kernels._core.recurrence_bench import Case

# What XLA asks of an H200 (its data sheet, and CUDA's table of compute capability 9.0).
H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  name: "NVIDIA H200" device_vendor: "NVIDIA Corporation" driver_version: "13.0.0"
  runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  l2_cache_size: 52428800 memory_bandwidth: 4800000000000 device_memory_size: 151397597184
}
"""
PTXAS = re.compile(
    r"(\d+) bytes spill stores, (\d+) bytes spill loads\nptxas info +: Used (\d+) registers"
)


def main(arguments: list[str] | None = None) -> int:
    """Write every row; the exit code is 1 where one failed, 2 without the plugin."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plugin", required=True, type=pathlib.Path)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    flags = parser.parse_args(arguments)
    plugin = flags.plugin / "jax_plugins/xla_cuda13/xla_cuda_plugin.so"
    runtime = flags.plugin / "jax_cuda13_plugin/libmosaic_gpu_runtime.so"
    for path in (plugin, runtime):
        if not path.exists():
            print(f"error: {path} is not there; see the first lines of this file", file=sys.stderr)
            return 2
    os.environ["MOSAIC_GPU_RUNTIME_LIB_PATH"] = str(runtime)
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    device = h200(plugin)
    report = {
        "command": "python -m experiments.recurrence_speed.compile_gpu --plugin=DIRECTORY "
        f"--out={flags.out}",
        "device": "compiled for an NVIDIA H200, not run",
        "environment": timing.environment(),
        "rows": [],
    }
    for op, cases in CASES.items():
        for case in cases:
            if (op, case.decay) != ("gated_linear_attention", "vector"):  # XLA's on GPUs
                report["rows"].append({"op": op, "case": case.name} | row(device, op, case))
                print(json.dumps(report["rows"][-1]), flush=True)
                flags.out.write_text(json.dumps(report, indent=1) + "\n")
    return int(any("error" in row for row in report["rows"]))


def h200(plugin: pathlib.Path) -> jax.Device:
    """A device to compile for."""
    api = xla_client.load_pjrt_plugin_dynamically("cuda", str(plugin))
    topology = xla_client.make_c_api_device_topology(
        api, "", topology="1x1x1", target_config=H200
    )  # fmt: skip
    return TopologyDescription(topology._make_compile_only_devices()).devices[0]


def row(device: jax.Device, op: str, case: Case) -> dict:
    """What the compiler says of a pass forward and backward, as `compile_tpu.row` has it."""
    shape = {name: getattr(case, name) for name in ("B", "T", "H", "N", "K", "V", "decay", "dtype")}
    run, given = passes(op, case, "mosaic_gpu")
    one = jax.sharding.SingleDeviceSharding(device)
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), given)
    auto = (jax.sharding.AxisType.Auto,)
    target = jax.sharding.AbstractDevice("NVIDIA H200", None, "cuda")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=auto, abstract_device=target)
    try:
        with jax.sharding.use_abstract_mesh(mesh), printed() as lines:
            lowered = jax.jit(run["forward_backward"]).trace(*given).lower(
                lowering_platforms=("cuda",)
            )  # fmt: skip
            compiled = lowered.compile({"xla_gpu_autotune_level": 0})  # which needs a GPU
    except Exception as error:  # a kernel that does not compile is a result
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
        return {"shape": shape, "error": message}
    kernels = [
        {"registers": int(used), "spill_store_bytes": int(stored), "spill_load_bytes": int(loaded)}
        for stored, loaded, used in PTXAS.findall("".join(lines))
    ]
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return {"shape": shape, "kernels": kernels, "temporary_bytes": temporary}


@contextlib.contextmanager
def printed() -> Iterator[list[str]]:
    """What this process prints meanwhile, libraries in C++ too; the list is filled at the end."""
    lines: list[str] = []
    sys.stdout.flush()
    terminal = os.dup(1)
    with tempfile.TemporaryFile("w+") as file:
        os.dup2(file.fileno(), 1)
        try:
            yield lines
        finally:
            os.dup2(terminal, 1)
            os.close(terminal)
            file.seek(0)
            lines.extend(file)


if __name__ == "__main__":
    sys.exit(main())
