"""Time the recurrent ops beside flash-linear-attention's, on one GPU: ours, theirs, ours again.

python experiments/recurrence_speed/run.py --out=FILE. Each side is a process of its own.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def main(arguments: list[str] | None = None) -> int:
    """Write the rows of all three processes; those of a failing one are missing, with its error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--shapes", nargs="+", default=["B8_T4096", "B1_T32768"])
    flags = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    report = {"command": "python experiments/recurrence_speed/run.py " + " ".join(given)}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    ours = [sys.executable, "-m", "experiments.recurrence_speed.ours"]
    sides = {"ours": ours, "fla": [sys.executable, str(HERE / "peer.py")], "ours_again": ours}
    for side, command in sides.items():
        done = subprocess.run(
            [*command, json.dumps(flags.shapes)],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
        )  # fmt: skip
        lines = [json.loads(x) for x in done.stdout.splitlines() if x.startswith("{")]
        report[side] = {
            "environment": next((x["environment"] for x in lines if "environment" in x), None),
            "rows": [line for line in lines if "environment" not in line],
        }
        if done.returncode:
            report[side]["error"] = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        flags.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    return 0


def table(report: dict) -> str:
    """Milliseconds of a pass by side, a line each."""
    found: dict[tuple, dict] = {}
    for side in ("ours", "fla", "ours_again"):
        for row in report[side]["rows"]:
            place = row["shape"], row["op"], row["pass"]
            if row["pass"] == "errors":
                errors = [f"{error:.1e}" for error in row["relative_errors"]]
                found.setdefault(place, {})[side] = " ".join(errors)
            elif "error" in row:
                found.setdefault(place, {})[side] = row["error"][:40]
            else:
                found.setdefault(place, {})[side] = f"{row['milliseconds']:.3f}"
    lines = ["| shape | op | pass | ours | fla | ours again |", "| --- " * 6 + "|"]
    for place, sides in found.items():
        values = [sides.get(side, "") for side in ("ours", "fla", "ours_again")]
        lines.append("| " + " | ".join([*place, *values]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
