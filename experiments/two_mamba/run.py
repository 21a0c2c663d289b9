"""2Mamba beside softmax attention, 2Mamba-E, Mamba-2S and Mamba-2: text, and recall by pairs.

`python experiments/two_mamba/run.py --arm=cpu --out=experiments/two_mamba/results/cpu.json`
"""

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
from models import ARMS, LADDER, METHODS, Run, make_config

from efficient_lm.evaluation.results import (
    Results,
    above_zero,
    attempt_prepared,
    new_file,
    positive,
)
from efficient_lm.inference.speed import state_bytes
from efficient_lm.model.definition import define
from efficient_lm.training.in_memory import load_batches, prepare_evaluator, prepare_training


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


def prepare(
    run: Run, method: str, seed: int, batches: tuple[list, dict]
) -> Callable[[], dict[str, Any]]:
    """Compile one model; the function that trains and scores it."""
    config = make_config(method, run, seed)
    train = prepare_training(config, batches[0])
    evaluate = prepare_evaluator(config, next(iter(batches[1].values()))[0])

    def row() -> dict[str, Any]:
        began, done = time.perf_counter(), train()
        scores = {pairs: evaluate(done.parameters, valid) for pairs, valid in batches[1].items()}
        if run.pairs:
            accuracy = {str(pairs): round(s["accuracy"], 4) for pairs, s in scores.items()}
            result = {"accuracy": accuracy}
        else:
            result = {name: round(scores[None][name], 4) for name in ("bits_per_byte", "loss")}
        return result | {
            "parameters": define(config.model).count(),
            "state_bytes": state_bytes(config.model, run.length),
            "milliseconds_a_step": round(1e3 * done.seconds_a_step, 2),
            "seconds": round(time.perf_counter() - began, 1),
            "losses": [round(x, 4) for x in done.losses[:: max(1, run.steps // 50)]],
        }

    return row


def main() -> None:
    """Run an arm; the JSON is written again after each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=ARMS, required=True)
    parser.add_argument("--out", type=new_file, required=True, help="JSON file to write")
    parser.add_argument(
        "--parts", nargs="+", choices=("text", "recall"), default=["text", "recall"]
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS + LADDER, default=METHODS)
    parser.add_argument("--steps", type=positive, help="default: those of the arm")
    parser.add_argument("--rate", type=above_zero, help="of learning; default: that of the arm")
    parser.add_argument(
        "--at_once", type=positive, default=1,
        help="models compiled at the same time; they train one after the other",
    )  # fmt: skip
    given = parser.parse_args()
    runs = {
        part: replace(run, steps=given.steps or run.steps, rate=given.rate or run.rate)
        for part, run in ARMS[given.arm].items()
        if part in given.parts
    }
    settings = {part: asdict(run) for part, run in runs.items()}
    results = Results(given.out, "experiments/two_mamba/run.py", runs=settings)
    for part, run in runs.items():
        batches = load(run)
        jobs = [
            ({"part": part, "method": method, "seed": seed},
             partial(prepare, run, method, seed, batches))
            for seed, method in itertools.product(run.seeds, given.methods)
        ]  # fmt: skip
        for row in attempt_prepared(jobs, given.at_once):
            results.add(row)


if __name__ == "__main__":
    main()
