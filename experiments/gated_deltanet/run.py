"""Full attention, Gated DeltaNet, their 3:1 hybrid and Mamba-2: quality, recall and speed.

`python experiments/gated_deltanet/run.py --part=recall --arm=cpu --out=x.json`; see README.md.
"""

import argparse
from pathlib import Path

ARMS = ("smoke", "cpu", "cpu_small_state", "gpu")
PARTS = ("language", "recall", "speed", "decode")


def main() -> None:
    """Run the parts that are asked for; the JSON is written again after each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--arm", choices=ARMS, required=True)
    parser.add_argument("--part", choices=PARTS, nargs="+", required=True)
    parser.add_argument("--mixers", nargs="+", help="default: those of the arm")
    parser.add_argument("--lengths", type=int, nargs="+", help="of the part speed")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the trainings")
    arguments = parser.parse_args()
    import arms  # after --help, because it imports JAX

    from efficient_lm.evaluation.results import Results

    results = Results(
        arguments.out, "experiments/gated_deltanet/run.py", arm=arguments.arm, settings={}
    )
    for part in arguments.part:
        plan = arms.plan(part, arguments.arm, arguments.mixers, arguments.lengths, arguments.seeds)
        results.values["settings"][part] = plan.settings
        for row in plan.rows:
            results.add(row)


if __name__ == "__main__":
    main()
