"""Test-time training with key-value binding: the paper's probes, its ladder, and the speed of it.

`python experiments/ttt_kv_binding/run.py --arm=cpu --out=x.json`
"""

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import speed
from inner import prepare_inner_loss
from models import METHODS, QUALITY, SPEED, Run, make_config

from efficient_lm.evaluation.results import (
    Results,
    above_zero,
    attempt_prepared,
    new_file,
    positive,
)
from efficient_lm.model.definition import define
from efficient_lm.training.in_memory import load_batches, prepare_evaluator, prepare_training


def prepare(
    run: Run, method: str, seed: int, batches: tuple[list, list]
) -> Callable[[], dict[str, Any]]:
    """Compile one model; the function that trains and scores it.

    It scores the baseline also with more inner steps than in training.
    """
    config = make_config(method, run, seed)
    train = prepare_training(config, batches[0])
    evaluators, inner = {}, {}
    for inner_steps in run.inner_steps if method == "baseline" else (1,):
        same = config if inner_steps == 1 else make_config(method, run, seed, inner_steps)
        evaluators[str(inner_steps)] = prepare_evaluator(same, batches[1][0])
        if method == "baseline":
            inner[str(inner_steps)] = prepare_inner_loss(same, batches[1][0])

    def row() -> dict[str, Any]:
        began, done = time.perf_counter(), train()
        bits = {
            inner_steps: round(evaluate(done.parameters, batches[1])["bits_per_byte"], 4)
            for inner_steps, evaluate in evaluators.items()
        }
        found = {
            "bits_per_byte": bits["1"],
            "parameters": define(config.model).count(),
            "milliseconds_a_step": round(1e3 * done.seconds_a_step, 2),
            "seconds": round(time.perf_counter() - began, 1),
            "losses": [round(x, 4) for x in done.losses[:: max(1, run.steps // 50)]],
        }
        if inner:
            found["bits_per_byte_by_inner_steps"] = bits
            found["inner_loss_by_inner_steps"] = {
                inner_steps: round(loss(done.parameters, batches[1]), 4)
                for inner_steps, loss in inner.items()
            }
        return found

    return row


def main() -> None:
    """Run an arm; the JSON is written again after each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=QUALITY, required=True)
    parser.add_argument("--out", type=new_file, required=True, help="JSON file to write")
    parser.add_argument("--parts", nargs="+", choices=("speed", "quality"),
                        default=["speed", "quality"])  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--steps", type=positive, help="default: those of the arm")
    parser.add_argument("--rate", type=above_zero, help="of learning; default: that of the arm")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: those of the arm")
    parser.add_argument(
        "--at_once", type=positive, default=1,
        help="programs compiled at the same time; they run one after the other",
    )  # fmt: skip
    given = parser.parse_args()
    run, layer = QUALITY[given.arm], SPEED[given.arm]
    changes = {"steps": given.steps, "rate": given.rate, "seeds": given.seeds}
    run = replace(run, **{name: value for name, value in changes.items() if value})
    settings = {"speed": asdict(layer), "quality": asdict(run)}
    results = Results(given.out, "experiments/ttt_kv_binding/run.py", settings=settings)
    for part in given.parts:
        if part == "speed":
            rows = speed.rows(layer, 1 if given.arm == "smoke" else 10, given.at_once)
        else:
            batches = load_batches(make_config("window_only", run))
            jobs = [
                ({"part": "quality", "method": method, "seed": seed},
                 partial(prepare, run, method, seed, batches))
                for seed, method in itertools.product(run.seeds, given.methods)
            ]  # fmt: skip
            rows = attempt_prepared(jobs, given.at_once)
        for row in rows:
            results.add(row)


if __name__ == "__main__":
    main()
