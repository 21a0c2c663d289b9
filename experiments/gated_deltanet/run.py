"""Full attention, Gated DeltaNet, their 3:1 hybrid and Mamba-2: quality, recall and speed.

`python experiments/gated_deltanet/run.py --part=recall --arm=cpu --out=x.json`; see README.md.
"""

import argparse
from pathlib import Path

import arms
from shapes import MIXERS

from efficient_lm.evaluation.results import Results, positive

ARMS = ("smoke", "cpu", "cpu_small_state", "gpu")
PARTS = ("language", "recall", "speed", "decode")


def main() -> None:
    """Run the parts that are asked for; the JSON is written again after each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--arm", choices=ARMS, required=True)
    parser.add_argument("--part", choices=PARTS, nargs="+", required=True)
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, help="default: those of the arm")
    parser.add_argument("--lengths", type=positive, nargs="+", help="of the part speed")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the trainings")
    arguments = parser.parse_args()
    chosen = arguments.arm, arguments.mixers, arguments.lengths, arguments.seeds
    plans = {part: arms.plan(part, *chosen) for part in arguments.part}
    settings = {part: plan.settings for part, plan in plans.items()}
    results = Results(
        arguments.out, "experiments/gated_deltanet/run.py", arm=arguments.arm, settings=settings
    )
    for plan in plans.values():
        for row in plan.rows:
            results.add(row)


if __name__ == "__main__":
    main()
