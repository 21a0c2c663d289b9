"""2Mamba beside softmax attention, 2Mamba-E, Mamba-2S and Mamba-2: text, and recall by pairs.

`python experiments/two_mamba/run.py --arm=cpu --out=experiments/two_mamba/results/cpu.json`
"""

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from datetime import date
from pathlib import Path

import jax
import numpy as np
from models import ARMS, METHODS, Run, make_config, state_bytes

from efficient_lm.model.definition import define
from efficient_lm.training.in_memory import evaluate_in_memory, load_batches, train_in_memory
from efficient_lm.training.manifest import versions


def load(run: Run) -> tuple[list, dict]:
    """(training batches, evaluation batches by number of pairs, or under None for text)."""
    if not run.pairs:
        train, valid = load_batches(make_config("softmax", run))
        return train, {None: valid}
    parts = {pairs: load_batches(make_config("softmax", run, pairs=pairs)) for pairs in run.pairs}
    train = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*(train for train, _ in parts.values()), strict=True)
    ]
    return train, {pairs: valid for pairs, (_, valid) in parts.items()}


def row(part: str, run: Run, method: str, seed: int, batches: tuple[list, dict]) -> dict:
    """Train and score one model."""
    began = time.perf_counter()
    config = make_config(method, run, seed)
    trained = train_in_memory(config, batches[0])
    scores = {
        pairs: evaluate_in_memory(config, trained.parameters, valid)
        for pairs, valid in batches[1].items()
    }
    if run.pairs:
        result = {"accuracy": {str(pairs): round(s["accuracy"], 4) for pairs, s in scores.items()}}
    else:
        result = {"bits_per_byte": round(scores[None]["bits_per_byte"], 4),
                  "loss": round(scores[None]["loss"], 4)}  # fmt: skip
    return {
        "part": part, "method": method, "seed": seed, **result,
        "parameters": define(config.model).count(),
        "state_bytes": state_bytes(config),
        "milliseconds_a_step": round(1e3 * trained.seconds_a_step, 2),
        "seconds": round(time.perf_counter() - began, 1),
        "losses": [round(x, 4) for x in trained.losses[:: max(1, run.steps // 50)]],
    }  # fmt: skip


def main() -> None:
    """Run an arm; the JSON is written again after each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=ARMS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument(
        "--parts", nargs="+", choices=("text", "recall"), default=["text", "recall"]
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--steps", type=int, help="default: those of the arm")
    parser.add_argument(
        "--at_once", type=int, default=1,
        help="models trained at the same time, so that compilations overlap",
    )  # fmt: skip
    given = parser.parse_args()
    began = time.perf_counter()
    values = {
        "command": " ".join(["experiments/two_mamba/run.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
        "runs": {},
        "rows": [],
    }
    for part in given.parts:
        run = ARMS[given.arm][part]
        run = replace(run, steps=given.steps or run.steps)
        values["runs"][part] = vars(run)
        batches = load(run)
        with ThreadPoolExecutor(given.at_once) as pool:
            jobs = [
                pool.submit(row, part, run, method, seed, batches)
                for method in given.methods
                for seed in run.seeds
            ]
            for job in as_completed(jobs):
                values["rows"].append(job.result())
                values["seconds"] = round(time.perf_counter() - began, 1)
                given.out.parent.mkdir(parents=True, exist_ok=True)
                given.out.write_text(json.dumps(values, indent=1) + "\n")
                print(json.dumps(values["rows"][-1]), flush=True)


if __name__ == "__main__":
    main()
