"""Train configs/tinyshakespeare.py through its door, beside nanoGPT when a clone is given."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import peer
from record import REPOSITORY, Record, environment_with_repository

PEER_FLAGS = {
    "cpu": {
        "device": "cpu", "compile": False, "eval_iters": 20, "block_size": 64, "batch_size": 12,
        "n_layer": 4, "n_head": 4, "n_embd": 128, "max_iters": 2000, "lr_decay_iters": 2000,
        "dropout": 0.0,
    },
    "gpu": {},
}  # fmt: skip
SMOKE = {
    "model.embed_dim": 48, "model.num_layers": 1, "model.ffns.dense.hidden_dim": 32,
    "model.max_length": 32, "data.sequence_length": 32, "data.batch_size": 4,
    "training.steps": 20, "training.sample_tokens": 0,
}  # fmt: skip
PEER_SMOKE = {"n_embd": 32, "n_layer": 1, "block_size": 32, "batch_size": 4, "max_iters": 20,
              "eval_interval": 20, "eval_iters": 1, "device": "cpu", "compile": False}  # fmt: skip

# Changes to configs/tinyshakespeare.py:gpu. The recipe overfits, so most of them regularise; the
# ones that say most come first.
_ADAMW = {"optimizer.name": "adamw", "optimizer.learning_rate": 1e-3, "optimizer.b2": 0.99}
GPU_VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("config", {}),
    ("dropout 0.1", {"model.dropout": 0.1}),
    ("dropout 0.15", {"model.dropout": 0.15}),
    ("AdamW", _ADAMW | {"optimizer.weight_decay": 0.1}),
    ("AdamW, weight decay 1", _ADAMW | {"optimizer.weight_decay": 1.0}),
    ("weight decay 0.1", {"optimizer.weight_decay": 0.1}),
    ("weight decay 1.5", {"optimizer.weight_decay": 1.5}),
    ("learning rate 1e-3", {"optimizer.learning_rate": 1e-3}),
    ("wsd", {"optimizer.schedule.name": "wsd", "optimizer.schedule.decay_fraction": 0.7}),
    ("EMA 0.9995", {"optimizer.ema_decay": 0.9995}),
]


def run(result: Record, arguments) -> None:
    """Runs of ours with the peer's in their middle, or the sweep of variants."""
    arm = result.values["arm"]
    smoke = SMOKE if arguments.smoke else {}
    plan = [(f"seed {seed}", {"training.seed": seed, "data.seed": seed})
            for seed in range(arguments.seeds)]  # fmt: skip
    if arguments.sweep:
        plan = GPU_VARIANTS
    given = dict(change.split("=", 1) for change in arguments.change)
    plan = [(name, changes | given) for name, changes in plan]
    for index, (name, changes) in enumerate(plan):
        if index == 1 and arguments.peer is not None:
            run_peer(result, arguments)
        if result.elapsed() > arguments.seconds and arguments.sweep:
            result.add({"what": "ours", "name": name, "error": "no time left"})
            continue
        result.add({"what": "ours", "name": name} | train(arm, arguments.data, changes | smoke))
    if len(plan) == 1 and arguments.peer is not None:
        run_peer(result, arguments)


def run_peer(result: Record, arguments) -> None:
    """nanoGPT's recipe for this arm."""
    flags = PEER_FLAGS[result.values["arm"]]
    flags = flags | PEER_SMOKE if arguments.smoke else flags
    text = arguments.data.read_text()
    with tempfile.TemporaryDirectory() as directory:
        row = peer.train(arguments.peer, text, Path(directory), flags)
    result.add({"what": "nanoGPT"} | row)


def train(arm: str, data: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """One run of `python -m efficient_lm.train`; losses in nats a character, times in seconds."""
    with tempfile.TemporaryDirectory() as directory:
        workdir = Path(directory) / "run"
        command = [sys.executable, "-m", "efficient_lm.train", f"--workdir={workdir}"]
        command += [f"--config={REPOSITORY}/configs/tinyshakespeare.py:{arm}"]
        command += [f"--config.data.paths=('{data.resolve()}',)"]
        command += [f"--config.{name}={value}" for name, value in changes.items()]
        began = time.perf_counter()
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment_with_repository(),
        )  # fmt: skip
        seconds = time.perf_counter() - began
        if done.returncode:
            return {"changes": changes, "error": done.stderr.strip()[-400:]}
        summary = json.loads((workdir / "summary.json").read_text())
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    valid = [(row["loss"], row["step"]) for row in rows if row["split"] == "valid"]
    times = [row["step_seconds"] for row in rows if row["split"] == "train"]
    return {
        "changes": changes,
        "valid_loss": summary["valid"]["loss"],
        "valid_loss_best": min(valid)[0],
        "best_step": min(valid)[1],
        "valid_tokens": summary["valid"]["tokens"],
        "valid_curve": [[step, round(loss, 4)] for loss, step in valid],
        "train_loss_end": [row["loss"] for row in rows if row["split"] == "train"][-1],
        "step_seconds": statistics.median(times),
        "step_seconds_best_tenth": float(np.quantile(times, 0.1)),
        "compile_seconds": summary["compile_seconds"],
        "seconds": round(seconds, 1),
        "parameters": summary["parameters"],
    }
