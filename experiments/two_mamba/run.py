"""2Mamba beside softmax attention, 2Mamba-E, Mamba-2S and Mamba-2: text, and recall by pairs.

`python experiments/two_mamba/run.py --arm=cpu --out=experiments/two_mamba/results/cpu.json`
"""

import argparse
import itertools
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
from models import ARMS, METHODS, Run, make_config

from efficient_lm.evaluation.results import Results, allow_threads, attempt_all
from efficient_lm.inference.speed import state_bytes
from efficient_lm.model.definition import define
from efficient_lm.training.in_memory import load_batches, make_evaluator, train_in_memory


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


def trained(run: Run, method: str, seed: int, batches: tuple[list, dict]) -> dict:
    """Train and score one model."""
    began = time.perf_counter()
    config = make_config(method, run, seed)
    done = train_in_memory(config, batches[0])
    evaluate = make_evaluator(config)
    scores = {pairs: evaluate(done.parameters, valid) for pairs, valid in batches[1].items()}
    if run.pairs:
        result = {"accuracy": {str(pairs): round(s["accuracy"], 4) for pairs, s in scores.items()}}
    else:
        result = {"bits_per_byte": round(scores[None]["bits_per_byte"], 4),
                  "loss": round(scores[None]["loss"], 4)}  # fmt: skip
    return {
        **result,
        "parameters": define(config.model).count(),
        "state_bytes": state_bytes(config.model, run.length),
        "milliseconds_a_step": round(1e3 * done.seconds_a_step, 2),
        "seconds": round(time.perf_counter() - began, 1),
        "losses": [round(x, 4) for x in done.losses[:: max(1, run.steps // 50)]],
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
    if given.at_once > 1:
        allow_threads()
    runs = {
        part: replace(run, steps=given.steps or run.steps)
        for part, run in ARMS[given.arm].items()
        if part in given.parts
    }
    settings = {part: asdict(run) for part, run in runs.items()}
    results = Results(given.out, "experiments/two_mamba/run.py", runs=settings)
    for part, run in runs.items():
        batches = load(run)
        jobs = [
            ({"part": part, "method": method, "seed": seed},
             partial(trained, run, method, seed, batches))
            for seed, method in itertools.product(run.seeds, given.methods)
        ]  # fmt: skip
        for row in attempt_all(jobs, given.at_once):
            results.add(row)


if __name__ == "__main__":
    main()
