"""Time training steps of GPT-2 124M shapes: ours in several variants, and the compiled nanoGPT.

Every process is a child, so that XLA flags differ and a crash costs one variant.
"""

import copy
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import record
from record import Record

HERE = Path(__file__).parent
DATA_SHEET = 989e12  # dense bf16 FLOP/s of H100 and H200 SXM

SHAPE = {"layers": 12, "heads": 12, "embed": 768, "length": 1024, "vocabulary": 50304}
SMOKE_SHAPE = {"layers": 2, "heads": 2, "embed": 32, "length": 64, "vocabulary": 96}

# (name, fields that differ from the base, XLA flags); the first two are timed before and after the
# peer.
_PRODUCTS = {"model.remat": "products"}
_B64 = {"data.batch_size": 64, "objective.chunk_logits": 2**30}
_WHOLE = {"objective.chunk_logits": 2**32}  # all logits of a step at once, as the peer has them
VARIANTS = [
    ("B64 unrolled, whole loss", _B64 | _WHOLE | {"scan": False}, ""),
    ("B64 unrolled", _B64 | {"scan": False}, ""),
    ("B32 unrolled, whole loss", _WHOLE | {"scan": False}, ""),
    ("B16 unrolled, whole loss", {"data.batch_size": 16, "scan": False} | _WHOLE, ""),
    ("B32 products", _PRODUCTS, ""),
    ("B64 products", _B64 | _PRODUCTS, ""),
    ("B16 products", {"data.batch_size": 16} | _PRODUCTS, ""),
    ("B32", {}, ""),
    ("B32 products, muon", {"optimizer.name": "muon"} | _PRODUCTS, ""),
    ("B32 products, segments", {"data.mask_across_documents": True} | _PRODUCTS, ""),
    ("B64 products, merged products", _B64 | _PRODUCTS, "--xla_gpu_dot_merger_threshold_mb=4096"),
    ("B32 products, chunk 2^24", {"objective.chunk_logits": 2**24} | _PRODUCTS, ""),
    ("B32 products, by vocabulary", {"objective.implementation": "xla_vocabulary"} | _PRODUCTS, ""),
    ("B32 products, attention xla",
     {"model.mixers.attention.implementation": "xla"} | _PRODUCTS, ""),
]  # fmt: skip
PEER_BATCH_SIZES = (64, 32, 16)


def run(result: Record, arguments) -> None:
    """Ours first, then the peer, then ours once more: A, B, A."""
    shape = SMOKE_SHAPE if arguments.smoke else SHAPE
    steps, repetitions = (2, 2) if arguments.smoke else (10, 3)
    timing = ["--steps", str(steps), "--repetitions", str(repetitions)]
    variants = [make_variant(shape, *variant) for variant in VARIANTS]
    peer_batch_sizes = PEER_BATCH_SIZES
    if arguments.smoke:
        for variant in variants:
            variant["config"]["data"]["batch_size"] = 2
            # Flags and kernels of GPUs are unknown elsewhere.
            variant["flags"] = ""
            variant["config"]["model"]["mixers"]["attention"]["implementation"] = "auto"
            variant["config"]["model"]["dtype"] = "float32"
        variants, peer_batch_sizes = [variants[1], variants[4]], (2,)
    deadline = result.elapsed() + arguments.seconds
    dtype = variants[0]["config"]["model"]["dtype"]
    result.values["shape"] = shape
    result.values["base"] = variants[0]["config"]

    def ours(chosen: list[dict], label: str, roof: bool) -> None:
        command = [sys.executable, str(HERE / "our_speed.py"), *timing]
        for index, group in enumerate(group_by_flags(chosen)):
            extra = ["--roof", dtype] if roof and index == 0 else []
            run_variants(result, command + extra, group, label, shape, deadline)

    first, rest = variants[:2], variants[2:]
    ours(first, "ours", roof=True)
    if arguments.peer is not None:
        time_peer(result, arguments, shape, timing, peer_batch_sizes, deadline, dtype)
        ours(first, "ours again", roof=False)
    ours(rest, "ours", roof=False)


def make_variant(shape: dict[str, int], name: str, changes: dict[str, Any], flags: str) -> dict:
    """A variant as `our_speed` wants it: the base with `changes`."""
    config: dict[str, Any] = {
        "model": {
            "vocabulary_size": shape["vocabulary"],
            "embed_dim": shape["embed"],
            "num_layers": shape["layers"],
            "max_length": shape["length"],
            "mixers": {"attention": {"num_heads": shape["heads"], "implementation": "auto"}},
            "ffns": {"dense": {"activation": "gelu", "hidden_dim": 4 * shape["embed"]}},
            "dtype": "bfloat16",
        },
        "data": {
            "batch_size": 32,
            "sequence_length": shape["length"],
            "mask_across_documents": False,
        },
        "objective": {"implementation": "xla_rows", "chunk_logits": 2**28},
        "optimizer": {"name": "adamw", "learning_rate": 6e-4},
    }
    variant = {"name": name, "config": copy.deepcopy(config), "scan": True, "flags": flags}
    for path, value in changes.items():
        if path == "scan":
            variant["scan"] = value
            continue
        *sections, field = path.split(".")
        target = variant["config"]
        for section in sections:
            target = target[section]
        target[field] = value
    return variant


def group_by_flags(variants: list[dict]) -> list[list[dict]]:
    """Variants that can share a process, in order of their first."""
    groups: dict[str, list[dict]] = {}
    for variant in variants:
        groups.setdefault(variant["flags"], []).append(variant)
    return list(groups.values())


def run_variants(result, command, variants, label, shape, deadline) -> None:
    """Run `variants` in a child; after a crash a new child goes on behind the one that crashed."""
    while variants:
        if result.elapsed() > deadline:
            for variant in variants:
                result.add({"what": label, "name": variant["name"], "error": "no time left"})
            return
        environment = record.environment_with_repository()
        flags = [environment.get("XLA_FLAGS", ""), variants[0]["flags"]]
        environment["XLA_FLAGS"] = " ".join(flags).strip()
        done = 0
        for row in child(result, command, json.dumps(variants), environment, deadline):
            if row["name"] == "roof":
                result.values["measured_roof_flops"] = row["flops"]
                continue
            variant = variants[done]
            data = variant["config"]["data"]
            row = {"what": label} | row | {"batch_size": data["batch_size"]}
            row["scan"], row["flags"] = variant["scan"], variant["flags"]
            add_rates(result, row, shape)
            done += 1
        if done < len(variants):
            late = result.elapsed() > deadline
            reason = "no time left" if late else f"the process ended: {result.last_error}"
            row = {"what": label, "name": variants[done]["name"], "error": reason}
            result.add(row)
            done += 1
        variants = variants[done:]


def time_peer(result, arguments, shape, timing, batch_sizes, deadline, dtype) -> None:
    """nanoGPT's model under torch.compile, a process of its own."""
    fields = {
        "block_size": shape["length"],
        "vocab_size": shape["vocabulary"],
        "n_layer": shape["layers"],
        "n_head": shape["heads"],
        "n_embd": shape["embed"],
        "dropout": 0.0,
        "bias": False,
    }
    command = [sys.executable, str(HERE / "peer_speed.py"), *timing]
    command += ["--peer", str(arguments.peer), "--dtype", dtype, "--shape", json.dumps(fields)]
    command += ["--batch_sizes", json.dumps(batch_sizes)]
    if arguments.smoke:
        command.append("--no_compile")
    rows = 0
    for row in child(result, command, "", dict(os.environ), deadline):
        add_rates(result, {"what": "nanoGPT", "name": f"B{row['batch_size']}"} | row, shape)
        rows += 1
    if rows < len(batch_sizes):
        late = result.elapsed() > deadline
        reason = "no time left" if late else f"the process ended: {result.last_error}"
        result.add({"what": "nanoGPT", "name": f"B{batch_sizes[rows]}", "error": reason})


def child(result: Record, command, text: str, environment, deadline):
    """JSON lines of a child as they come; it is stopped at the deadline."""
    result.last_error = ""
    errors: list[str] = []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment, text=True,
    ) as process:  # fmt: skip
        reader = threading.Thread(target=lambda: errors.extend(process.stderr))
        reader.start()
        timer = threading.Timer(max(deadline - result.elapsed(), 1.0), process.kill)
        timer.start()
        try:
            process.stdin.write(text)
            process.stdin.close()
        except BrokenPipeError:  # it ended before it read; the reason is in its stderr
            pass
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
        process.wait()
        timer.cancel()
        reader.join()
    lines = [line.strip() for line in errors if line.strip()]
    result.last_error = f"code {process.returncode}; " + " | ".join(lines[-3:])[-400:]


def add_rates(result: Record, row: dict[str, Any], shape: dict[str, int]) -> None:
    """Add tokens/s and MFU by nanoGPT's formula: 6 N + 12 L H Q T FLOPs a token."""
    if "step_seconds" in row:
        attention = 12 * shape["layers"] * shape["embed"] * shape["length"]  # H Q = embed
        rate = row["batch_size"] * shape["length"] / row["step_seconds"]
        flops = rate * (6 * row["parameters"] + attention)
        row["tokens_per_second"] = round(rate)
        row["mfu_data_sheet"] = round(flops / DATA_SHEET, 4)
        if "measured_roof_flops" in result.values:
            row["mfu_measured"] = round(flops / result.values["measured_roof_flops"], 4)
    result.add(row)
