"""nanoGPT's train.py on tinyshakespeare, in a directory of its own, and what it printed."""

import json
import os
import pickle
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent


def prepare(clone: Path, text: str, directory: Path) -> None:
    """A working directory for train.py: links to its code, and the data as its prepare.py does."""
    data = directory / "data" / "shakespeare_char"
    data.mkdir(parents=True)
    for name in ("train.py", "model.py", "configurator.py", "config"):
        (directory / name).symlink_to((clone / name).resolve())
    characters = sorted(set(text))
    ids = {character: index for index, character in enumerate(characters)}
    tokens = np.array([ids[character] for character in text], np.uint16)
    cut = int(0.9 * len(text))
    tokens[:cut].tofile(data / "train.bin")
    tokens[cut:].tofile(data / "val.bin")
    names = {"vocab_size": len(characters), "stoi": ids, "itos": dict(enumerate(characters))}
    (data / "meta.pkl").write_bytes(pickle.dumps(names))


def train(clone: Path, text: str, directory: Path, flags: dict[str, Any]) -> dict[str, Any]:
    """Run the recipe config/train_shakespeare_char.py with `flags`; its losses and times.

    valid_loss_estimate: the last estimate that train.py printed (random windows); valid_loss: of
    the checkpoint it kept, over the whole split in windows of the context, each label once.
    """
    prepare(clone, text, directory)
    flags = flags | {"log_interval": 1}
    command = [sys.executable, "train.py", "config/train_shakespeare_char.py"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        return {"error": done.stderr.strip()[-400:]}
    estimates = re.findall(r"step (\d+): train loss [\d.]+, val loss ([\d.]+)", done.stdout)
    times = [
        float(t) / 1e3 for t in re.findall(r"iter \d+: loss [\d.]+, time ([\d.]+)ms", done.stdout)
    ]
    row = {
        "valid_loss_estimate": float(estimates[-1][1]),
        "valid_loss_estimate_best": min(float(loss) for _, loss in estimates),
        "step_seconds": statistics.median(times),
        "step_seconds_best_tenth": float(np.quantile(times, 0.1)),
        "seconds": round(seconds, 1),
        "flags": flags,
    }
    command = [sys.executable, str(HERE / "peer_evaluate.py"), str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    if done.returncode:
        return row | {"error": done.stderr.strip()[-400:]}
    return row | json.loads(done.stdout.splitlines()[-1])
