"""Compile the recurrent ops' TPU kernels at the shapes of models for chips that this host lacks.

python experiments/recurrence_speed/compile_tpu.py --out=FILE, on a CPU with JAX 0.11 or later and
libtpu. Every row is written as soon as it is there, and rows that the file has are kept.
"""

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

import pallas_kernels
from pallas_kernels._core import compat, testing, timing
from pallas_kernels._core.recurrence_bench import Case

# 8192 tokens of one row; heads of keys and of values.
CASES = {
    "gated_delta_rule": (
        Case("Qwen3.5 0.8B, 2B", 1, 8192, 16, 16, 128, 128, delta=True),
        Case("Qwen3.5 4B, 9B, 35B-A3B", 1, 8192, 16, 32, 128, 128, delta=True),
        Case("Qwen3.5 27B", 1, 8192, 16, 48, 128, 128, delta=True),
        Case("Qwen3.5 122B-A10B, 397B-A17B", 1, 8192, 16, 64, 128, 128, delta=True),
        Case("no decay", 1, 8192, 16, 16, 128, 128, "none", delta=True),
        Case("vector decay", 1, 8192, 16, 16, 128, 128, "vector", delta=True),
    ),
    "gated_linear_attention": (
        Case("scalar decay", 1, 8192, 16, 16, 128, 128),
        Case("no decay", 1, 8192, 16, 16, 128, 128, "none"),
        Case("vector decay", 1, 8192, 16, 16, 128, 128, "vector"),
        Case("Mamba-2 1.3B", 1, 8192, 1, 64, 128, 64),
        Case("Mamba-2 2.7B", 1, 8192, 1, 80, 128, 64),
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Write every row; the exit code is 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    flags = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    report = {
        "command": "python experiments/recurrence_speed/compile_tpu.py " + " ".join(given),
        "environment": timing.environment(),
        "rows": [],
    }
    if flags.out.exists():
        report["rows"] = json.loads(flags.out.read_text())["rows"]
    known = [{name: row[name] for name in ("op", "case", "chip", "pass")} for row in report["rows"]]
    for topology in testing.TPU_TOPOLOGIES:
        for op, cases in CASES.items():
            for case in cases:
                for label in ("forward", "forward_backward"):
                    chip = topology.split(":")[0]
                    place = {"op": op, "case": case.name, "chip": chip, "pass": label}
                    if place not in known:
                        report["rows"].append(place | row(topology, op, case, label))
                        print(json.dumps(report["rows"][-1]), flush=True)
                        flags.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report["rows"]))
    return int(any("error" in row for row in report["rows"]))


def row(topology: str, op: str, case: Case, label: str) -> dict:
    """What the compiler says of one pass, with packed documents, an initial and a final state."""
    shape = {name: getattr(case, name) for name in ("B", "T", "H", "N", "K", "V", "decay", "dtype")}
    found = {"shape": shape, "vmem_capacity": vmem_capacity(topology)}
    run, given = passes(op, case, "mosaic_tpu")
    try:
        compiled = testing.compile_for_tpu(topology, run[label], *given)
    except Exception as error:  # a kernel that a chip cannot take is a result
        return found | {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]}
    return found | {
        "kernels": kernels(compiled.as_text()),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def passes(op: str, case: Case, implementation: str) -> tuple[dict[str, Callable], tuple]:
    """Functions by the name of the pass, and the shapes of what they are called with."""
    arguments, _ = jax.eval_shape(case.inputs)
    state = jax.ShapeDtypeStruct((case.B, case.N, case.K, case.V), jnp.float32)
    segments = jax.ShapeDtypeStruct((case.B, case.T), jnp.int32)

    def forward(arguments, state, segments):
        return getattr(pallas_kernels, op)(
            *arguments, initial_state=state, segment_ids=segments, output_final_state=True,
            implementation=implementation,
        )  # fmt: skip

    def both(arguments, state, segments):
        out, pull = jax.vjp(lambda *given: forward(*given, segments), arguments, state)
        return out, pull(out)

    return {"forward": forward, "forward_backward": both}, (arguments, state, segments)


def kernels(program: str) -> list[dict]:
    """Bytes of VMEM that each Pallas kernel of a compiled program may use, and uses."""
    found = []
    for line in filter(lambda line: '"tpu_custom_call"' in line, program.splitlines()):
        sizes = {}
        for name, key in (
            ("limit", "scoped_memory_configs"),
            ("used", "used_scoped_memory_configs"),
        ):
            (size,) = re.findall(
                rf'"{key}":\[{{"memory_space":"1","offset":"0","size":"(\d+)"', line
            )
            sizes[f"vmem_{name}"] = int(size)
        found.append(sizes)
    return found


def vmem_capacity(topology: str) -> int:
    """Bytes of VMEM of a core."""
    mesh = jax.sharding.Mesh(np.array(compat.tpu_devices(topology)[:1]), ("device",))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return pltpu.get_tpu_info().vmem_capacity_bytes


def table(rows: list[dict]) -> str:
    """MiB of VMEM that the largest kernel of forward and backward uses, by chip."""
    chips = list(dict.fromkeys(row["chip"] for row in rows))
    capacity = {row["chip"]: row["vmem_capacity"] for row in rows}
    cells: dict[tuple, dict] = {}
    for row in rows:
        if row["pass"] == "forward_backward":
            sizes = row["shape"]
            heads = f"{sizes['H']}/{sizes['N']} x {sizes['K']}/{sizes['V']}"
            largest = max((x["vmem_used"] for x in row.get("kernels", [])), default=0)
            limit = max((x["vmem_limit"] for x in row.get("kernels", [])), default=0)
            place = row["op"], row["case"], heads, f"{limit / 2**20:.0f}"
            cell = "failed" if "error" in row else f"{largest / 2**20:.1f}"
            cells.setdefault(place, {})[row["chip"]] = cell
    head = [f"{chip} ({capacity[chip] / 2**20:.0f})" for chip in chips]
    lines = [
        "| " + " | ".join(["op", "shape", "heads x features", "limit", *head]) + " |",
        "| --- | --- | --- | ---: " + "| ---: " * len(chips) + "|",
    ]
    lines += [
        "| " + " | ".join([*place, *(found.get(chip, "-") for chip in chips)]) + " |"
        for place, found in cells.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
