"""A plan: what a step of a config needs on a topology, and how fast it could be at best."""

import time
from importlib.metadata import version
from typing import Any

import jax

from efficient_lm.config import Config
from efficient_lm.planning import roofline
from efficient_lm.planning.collectives import read_collectives
from efficient_lm.planning.compile import (
    Program,
    bytes_per_device,
    compile_program,
    decode_program,
    train_program,
)
from efficient_lm.planning.count import count
from efficient_lm.planning.estimate import Estimator
from efficient_lm.planning.topologies import Topology
from efficient_lm.training.flops import training_flops_per_token

ARITHMETIC = "arithmetic of shapes and shardings"
COMPILER = "memory analysis of the compiler"
JAXPR = "jaxpr"


def make_plan(
    config: Config, topology: Topology, *, decode: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Compile the train step, or with `decode` (batch, context) a decode step; the plan as JSON.

    Bytes, FLOPs and seconds are of one device and one step unless their name says otherwise.
    Every figure's source stands beside it. ConfigError where the config cannot run there.
    """
    begin = time.perf_counter()
    if decode is None:
        program = train_program(config, topology)
    else:
        program = decode_program(config, topology, *decode)
    traced = time.perf_counter() - begin
    compiled = compile_program(program)
    devices, chip = program.mesh.size, topology.chip

    flat = [(name == "batch" or name == "cache") for name, tree in program.inputs.items()
            for _ in jax.tree.leaves(tree)]  # fmt: skip
    work = count(program.traced.jaxpr, flat)
    memory = memory_table(program, compiled, work.saved_bytes / devices, chip.memory)
    flops = work.total() / devices
    model_flops = model_flops_per_step(config, program, decode) / devices
    state = sum(row["bytes"] for row in memory["rows"] if row["of"] == "arguments")
    traffic = work.split_bytes / devices + work.whole_bytes / program.mesh.shape["tensor"]
    traffic += 2 * state if decode is None else 0
    notes = set(work.notes)
    if compiled.text is not None:
        source = "HLO that the compiler wrote"
        collectives, unread = read_collectives(compiled.text, program.mesh.shape)
        notes |= unread
    else:
        source = "the sharding rules, for want of readable HLO"
        collectives = Estimator(config, topology).collectives(config) if decode is None else []
    rows = roofline.by_axis(collectives, list(program.mesh.devices.flat), topology)
    if flops < model_flops:
        notes.add("MFU counts keys that masks leave out, as training does: its bound may pass 100%")
    link = None if any(row["seconds"] is None for row in rows) else sum(r["seconds"] for r in rows)
    seconds = roofline.bounds(topology, flops, traffic, link)
    return {
        "topology": {
            "name": topology.name,
            "device": topology.devices[0].device_kind,
            "devices": devices,
            "devices_per_chip": chip.devices,
            "memory_bytes": chip.memory,
            "flops_per_second": chip.flops,
            "memory_bytes_per_second": chip.memory_bandwidth,
            "link_bytes_per_second_one_way": chip.link_bandwidth,
            "network_bytes_per_second": chip.network,
        },
        "mesh": dict(program.mesh.shape),
        "step": {
            "kind": program.kind,
            "tokens": program.tokens,
            "batch": config.data.batch_size if decode is None else decode[0],
            "length": config.data.sequence_length if decode is None else decode[1],
            "accumulation_steps": config.optimizer.accumulation_steps if decode is None else 1,
            "remat": config.model.remat if decode is None else "none",
            "parameters": program.definition.count(),
        },
        "memory": memory,
        "flops": {
            "executed": flops,
            "by_kind": {kind: value / devices for kind, value in work.flops.items()},
            "model": model_flops,
            "source": JAXPR,
        },
        "memory_traffic": {
            "bytes": traffic,
            "source": f"{JAXPR}: operands and results of products and kernels, rows gathered and "
            "scattered, and the state, once each; element-wise work is taken as fused",
        },
        "collectives": {"rows": rows, "source": source},
        "roofline": {
            "seconds": seconds,
            "tokens_per_second": program.tokens / seconds["overlapped"],
            "mfu_bound": model_flops / chip.flops / seconds["overlapped"],
            "mfu_without_overlap": model_flops / chip.flops / seconds["serial"],
        },
        "notes": sorted(notes),
        "seconds": {"trace": traced, "compile": compiled.seconds},
        "versions": {name: version(name) for name in ("jax", "jaxlib")}
        | ({} if topology.local else {"libtpu": version("libtpu")}),
    }


def model_flops_per_step(config: Config, program: Program, decode: tuple[int, int] | None) -> float:
    """FLOPs of all devices by the convention of `training_flops_per_token`; decoding: a third."""
    if decode is None:
        per_token = training_flops_per_token(program.definition, config.data.sequence_length)
        return per_token * program.tokens
    return training_flops_per_token(program.definition, decode[1]) / 3 * program.tokens


def memory_table(
    program: Program, compiled, saved: float | int, available: float | int | None
) -> dict[str, Any]:
    """Bytes of a device by kind, whether they fit, and the largest kind."""
    rows = []

    def add(kind: str, size: float | int, of: str, source: str) -> None:
        rows.append({"kind": kind, "bytes": int(size), "of": of, "source": source})

    sizes = {name: bytes_per_device(tree) for name, tree in program.inputs.items()}
    small = [name for name in sizes if name not in ("parameters", "optimizer", "average", "cache",
                                                    "batch")]  # fmt: skip
    for name in ("parameters", "optimizer", "average", "cache", "batch"):
        if sizes.get(name):
            add(name, sizes[name], "arguments", ARITHMETIC)
    rows[0]["bytes"] += sum(sizes[name] for name in small)  # counters and keys
    if compiled.arguments is not None:
        padding = max(0, compiled.arguments - sum(row["bytes"] for row in rows))
        add("padding of these", padding, "arguments", COMPILER)
    if program.kind == "train":
        gradients = min(sizes["parameters"], compiled.temporaries)
        saved = min(saved, compiled.temporaries - gradients)
        add("gradients", gradients, "temporaries", f"{ARITHMETIC}: placed as parameters are")
        add("saved activations", saved, "temporaries", f"{JAXPR}: stacked by the loop over layers")
        rest = compiled.temporaries - gradients - saved
        add("other temporaries", rest, "temporaries", f"{COMPILER}, less the two above")
    else:
        add("temporaries", compiled.temporaries, "temporaries", COMPILER)
    if compiled.code:
        add("program", compiled.code, "code", COMPILER)
    total = sum(row["bytes"] for row in rows)
    return {
        "rows": rows,
        "total": total,
        "available": available,
        "fits": compiled.fits and (available is None or total <= available),
        "host": compiled.host,
        "largest": max(rows, key=lambda row: row["bytes"])["kind"],
        "largest_temporaries": [{"bytes": b, "arrays": text} for b, text in compiled.largest],
    }
