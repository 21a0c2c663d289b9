"""Time the recurrent ops beside flash-linear-attention's, on one GPU: ours, theirs, ours again.

python experiments/recurrence_speed/run.py --out=FILE. Each side is a process of its own; the
last repeats the forward pass of the first shape, which shows how steady the device is.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

from shapes import OPS, SHAPES

SIDES = ("ours", "fla", "ours_again")
HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def main(arguments: list[str] | None = None) -> int:
    """Write the rows of all three processes; a process that fails leaves its exit code.

    The exit code is 2 without a GPU.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    names = [shape.name for shape in SHAPES]
    parser.add_argument("--shapes", nargs="+", choices=names, default=names)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    flags = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    report = {"command": "python experiments/recurrence_speed/run.py " + " ".join(given)}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    ours = [sys.executable, "-m", "experiments.recurrence_speed.ours"]
    peer = [sys.executable, str(HERE / "peer.py")]
    both = ["forward", "forward_backward"]
    sides = {
        "ours": (ours, flags.shapes, both),
        "fla": (peer, flags.shapes, both),
        "ours_again": (ours, flags.shapes[:1], both[:1]),
    }
    for side in flags.sides:
        command, shapes, passes = sides[side]
        report[side] = {"environment": None, "rows": []}
        with subprocess.Popen(
            [*command, json.dumps(shapes), json.dumps(flags.ops), json.dumps(passes)],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            for line in filter(lambda line: line.startswith("{"), process.stdout):
                row = json.loads(line)
                if "environment" in row:
                    report[side] |= row
                else:
                    report[side]["rows"].append(row)
                    print(side, line, end="", flush=True)
                flags.out.parent.mkdir(parents=True, exist_ok=True)
                flags.out.write_text(json.dumps(report, indent=1) + "\n")
        if process.returncode == 2:  # it has said why
            return 2
        if process.returncode:
            report[side]["exit_code"] = process.returncode
            flags.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    return 0


def table(report: dict) -> str:
    """Milliseconds of a pass by side, a line each."""
    found: dict[tuple, dict] = {}
    for side in SIDES:
        for row in report.get(side, {"rows": []})["rows"]:
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
        values = [sides.get(side, "") for side in SIDES]
        lines.append("| " + " | ".join([*place, *values]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
