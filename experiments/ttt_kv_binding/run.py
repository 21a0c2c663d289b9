"""Test-time training with key-value binding: the paper's probes, its ladder, and the speed of it.

`python experiments/ttt_kv_binding/run.py --arm=cpu --out=x.json`
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import jax
import speed
from models import METHODS, QUALITY, SPEED, Run, make_config

from efficient_lm.model.definition import define
from efficient_lm.training.in_memory import evaluate_in_memory, load_batches, train_in_memory
from efficient_lm.training.manifest import versions


def quality_rows(run: Run, methods: list[str], at_once: int) -> Iterator[dict]:
    """A row for each method and seed, as they end."""
    batches = load_batches(make_config("window_only", run))
    with ThreadPoolExecutor(at_once) as pool:
        jobs = [
            pool.submit(quality_row, run, method, seed, batches)
            for method in methods
            for seed in run.seeds
        ]
        for job in as_completed(jobs):
            yield job.result()


def quality_row(run: Run, method: str, seed: int, batches: tuple[list, list]) -> dict:
    """Train and score one model; the baseline also with more inner steps than in training."""
    began = time.perf_counter()
    config = make_config(method, run, seed)
    trained = train_in_memory(config, batches[0])
    bits = {}
    for inner_steps in run.inner_steps if method == "baseline" else (1,):
        same = config if inner_steps == 1 else make_config(method, run, seed, inner_steps)
        score = evaluate_in_memory(same, trained.parameters, batches[1])
        bits[str(inner_steps)] = round(score["bits_per_byte"], 4)
    row = {
        "part": "quality", "method": method, "seed": seed,
        "bits_per_byte": bits["1"],
        "parameters": define(config.model).count(),
        "milliseconds_a_step": round(1e3 * trained.seconds_a_step, 2),
        "seconds": round(time.perf_counter() - began, 1),
        "losses": [round(x, 4) for x in trained.losses[:: max(1, run.steps // 50)]],
    }  # fmt: skip
    return row | ({"bits_per_byte_by_inner_steps": bits} if len(bits) > 1 else {})


def main() -> None:
    """Run an arm; the JSON is written again after each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=QUALITY, required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--parts", nargs="+", choices=("speed", "quality"),
                        default=["speed", "quality"])  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--steps", type=int, help="default: those of the arm")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: those of the arm")
    parser.add_argument(
        "--at_once", type=int, default=1,
        help="models trained at the same time, so that compilations overlap",
    )  # fmt: skip
    given = parser.parse_args()
    began = time.perf_counter()
    values = {
        "command": " ".join(["experiments/ttt_kv_binding/run.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
        "settings": {"speed": asdict(SPEED[given.arm])},
        "rows": [],
    }
    run = QUALITY[given.arm]
    changes = {"steps": given.steps, "seeds": given.seeds}
    run = replace(run, **{name: value for name, value in changes.items() if value})
    values["settings"]["quality"] = asdict(run)
    for part in given.parts:
        if part == "speed":
            rows = speed.rows(SPEED[given.arm], 1 if given.arm == "smoke" else 10)
        else:
            rows = quality_rows(run, given.methods, given.at_once)
        for row in rows:
            values["rows"].append(row)
            values["seconds"] = round(time.perf_counter() - began, 1)
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(values, indent=1) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
