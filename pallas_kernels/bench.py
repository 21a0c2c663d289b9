"""Ours and the peers on one device: python -m pallas_kernels.bench --op=attention --out=FILE.

An op takes part with a module `pallas_kernels.<op>.bench` that has

    CASES                        with `name` and `tags`
    contestants(case)            {name: function}
    passes(case, function)       {pass name: timing.Pass}
    expected(case)               {pass name: fp32 arrays, of the leading rows if not of all}
    choice(case)                 what "auto" takes, for people

Every row is written as soon as it is measured; one that fails is kept with its error.
"""

import argparse
import dataclasses
import importlib
import json
import pathlib
import sys

import jax

from pallas_kernels._core import testing, timing


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; the exit code is 2 when no case is chosen."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench", description=__doc__)
    parser.add_argument("--op", required=True)
    parser.add_argument("--out", required=True, type=pathlib.Path, help="JSON file to write")
    parser.add_argument("--cases", default="", help="names or tags, by comma; default: all")
    parser.add_argument("--contestants", default="", help="names, by comma; default: all")
    parser.add_argument("--repeats", type=int, default=10)
    flags = parser.parse_args(arguments)
    op = importlib.import_module(f"pallas_kernels.{flags.op}.bench")
    wanted = set(filter(None, flags.cases.split(",")))
    cases = [c for c in op.CASES if not wanted or wanted & {c.name, *c.tags}]
    if not cases:
        known = ", ".join(case.name for case in op.CASES)
        print(f"no case is named or tagged {flags.cases!r}; known: {known}", file=sys.stderr)
        return 2
    given = sys.argv[1:] if arguments is None else arguments
    report = {
        "command": " ".join(["python", "-m", "pallas_kernels.bench", *given]),
        "environment": timing.environment(),
        "roofs": dataclasses.asdict(timing.measure_roofs()),
        "rows": [],
    }
    print(json.dumps(report["roofs"]))
    names = set(filter(None, flags.contestants.split(",")))
    for case in cases:
        for row in measure_case(op, case, names, flags.repeats):
            report["rows"].append(row)
            flags.out.parent.mkdir(parents=True, exist_ok=True)
            flags.out.write_text(json.dumps(report, indent=1) + "\n")
            print(describe(row), flush=True)
    return 0


def measure_case(op, case, names: set[str], repeats: int):
    """Rows of one case: a dict for each contestant and pass."""
    size = {k: v for k, v in dataclasses.asdict(case).items() if k not in ("name", "tags")}
    start = {"op": op.__name__.split(".")[-2], "case": case.name, "shape": size}
    try:
        start["auto"] = str(op.choice(case))
        expected = op.expected(case)
        contestants = op.contestants(case)
    except Exception as error:  # a row that fails is a result too
        yield start | {"contestant": None, "pass": None, "error": one_line(error)}
        return
    for name, function in contestants.items():
        if names and name not in names:
            continue
        try:
            passes = op.passes(case, function)
        except Exception as error:
            yield start | {"contestant": name, "pass": None, "error": one_line(error)}
            continue
        for label, one in passes.items():
            row = start | {"contestant": name, "pass": label}
            try:
                row |= measure_pass(one, expected.get(label), repeats)
            except Exception as error:
                row["error"] = one_line(error)
            yield row


def measure_pass(one: timing.Pass, expected, repeats: int) -> dict:
    """Milliseconds, rates and relative errors of one pass."""
    errors = None
    if expected is not None:
        actual = jax.tree.leaves(one.compared(*one.arguments))
        pairs = zip(actual, jax.tree.leaves(expected), strict=True)
        errors = [
            testing.relative_error(jax.device_get(a[: len(e)] if e.ndim else a).astype(e.dtype), e)
            for a, e in pairs
        ]
    time = timing.measure(one.function, *one.arguments, repeats=repeats)
    milliseconds = time.median / one.calls
    return {
        "milliseconds": milliseconds,
        "minimum_milliseconds": time.minimum / one.calls,
        "tflops_per_second": one.flops / milliseconds / 1e9,
        "gb_per_second": one.bytes / milliseconds / 1e6 if one.bytes else None,
        "relative_errors": errors,
    }


def one_line(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def describe(row: dict) -> str:
    """One row for people."""
    start = f"{row['case']:24} {row['contestant'] or '':14} {row['pass'] or '':17}"
    if "error" in row:
        return start + row["error"]
    errors = row["relative_errors"]
    worst = f"{max(errors):.1e}" if errors else "not compared"
    return (
        f"{start}{row['milliseconds']:10.3f} ms {row['tflops_per_second']:8.2f} TFLOP/s  "
        f"error {worst}"
    )


if __name__ == "__main__":
    sys.exit(main())
