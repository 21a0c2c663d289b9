"""What the runs of a sweep came to: one table, as rows, in the terminal, as CSV and as JSON."""

import csv
import io
import json
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from efficient_lm.sweeping.attempts import read_record, state_of
from efficient_lm.sweeping.runs import Run, labels, replace_text
from efficient_lm.training import manifest
from efficient_lm.training.metrics import read_metrics

# Of summary.json; what is known of the validation split comes before them.
_SUMMARY = ("parameters", "tokens_per_second", "run_seconds", "skipped_updates", "device")
_WIDTH = 160  # of the table where there is no terminal


def gather(
    directory: Path, runs: Sequence[Run], old: Sequence[Run] = (), *, alive: Collection[str] = ()
) -> list[dict[str, Any]]:
    """One row for each run, those of the sweep file first, then `old` ones that it has no more.

    `alive` names the runs that something may be training now. Metrics are the last ones of the
    validation split, also of runs that are not finished.
    """
    rows = []
    for run in (*runs, *old):
        state = state_of(directory, run, alive=run.name in alive)
        valid = read_metrics(directory / run.name, "valid")
        path = directory / run.name / "summary.json"
        summary = json.loads(path.read_text()) if state.status == "finished" else {}
        metrics = dict(valid[-1]) if valid else {}
        rows.append(
            {
                "name": run.name,
                "status": state.status,
                "in_sweep": run in runs,
                "step": state.step,
                "steps": run.steps,
                "settings": dict(run.settings),
                "metrics": {k: v for k, v in metrics.items() if k not in ("step", "split")},
                **{name: summary.get(name) for name in _SUMMARY},
                "attempts": read_record(directory, run).get("attempts", 0),
                "exit_code": state.exit_code,
                "error": state.error,
            }
        )
    return rows


def fields_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The dotted fields that any run sets, in the order met."""
    return list(dict.fromkeys(field for row in rows for field in row["settings"]))


def best_of(rows: Sequence[Mapping[str, Any]], metric: str) -> str | None:
    """The name of the finished run of the sweep with the lowest metric."""
    values = {
        row["name"]: row["metrics"][metric]
        for row in rows
        if row["status"] == "finished" and row["in_sweep"]
        and math.isfinite(row["metrics"].get(metric, math.nan))
    }  # fmt: skip
    return min(values, key=values.__getitem__) if values else None


def write_results(directory: Path, rows: Sequence[Mapping[str, Any]], metric: str) -> list[Path]:
    """Write results.csv, results.json and the plots; their paths."""
    from efficient_lm.sweeping.plots import write_plots

    table, whole = directory / "results.csv", directory / "results.json"
    replace_text(table, _csv(rows))
    content = {
        "command": sys.argv,
        "versions": manifest.versions(),
        "metric": metric,
        "best": best_of(rows, metric),
        "runs": [_finite(row) for row in rows],
    }
    replace_text(whole, json.dumps(content, indent=2) + "\n")
    return [table, whole, *write_plots(directory, rows, metric)]


def print_results(rows: Sequence[Mapping[str, Any]], metric: str) -> None:
    """The table, the best run set apart, and the errors of failed runs below it.

    Fields that have one value in all runs are left to the files.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    fields = [f for f in fields_of(rows) if len({str(r["settings"].get(f)) for r in rows}) > 1]
    names = labels(fields)
    metrics = [m for m in dict.fromkeys([metric, "loss", "bits_per_byte"])
               if any(m in row["metrics"] for row in rows)]  # fmt: skip
    table = Table()
    for field in fields:
        table.add_column(names[field], overflow="fold")
    for name in ("status", "step"):
        table.add_column(name, no_wrap=True)
    for name in [*metrics, "tokens/s"]:
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    best = best_of(rows, metric)
    for row in rows:
        status = row["status"] + ("" if row["in_sweep"] else " (old)")
        cells = [_cell(row["settings"].get(f)) for f in fields]
        cells += [status, f"{row['step']:,}/{row['steps']:,}"]
        cells += [_cell(row["metrics"].get(m), 4) for m in metrics]
        cells += [_cell(row["tokens_per_second"], 0)]
        style = {"failed": "red", "finished": ""}.get(row["status"], "dim")
        table.add_row(*map(Text, cells), style="bold" if row["name"] == best else style)
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _WIDTH
    console.print(table, markup=False)
    for row in rows:
        if row["status"] == "failed":
            console.print(
                f"{row['name']}: failed with exit code {row['exit_code']}: {row['error']}",
                markup=False,
            )
    if not all(row["in_sweep"] for row in rows):
        console.print("(old): not in the sweep file now", markup=False)
    if best:
        console.print(f"lowest {metric.replace('_', ' ')}: {best}", markup=False)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each run; settings under their dotted names, metrics under theirs."""
    fields = fields_of(rows)
    metrics = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    plain = ["name", "status", "in_sweep", "step", "steps"]
    last = [*_SUMMARY, "attempts", "exit_code", "error"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*plain, *fields, *metrics, *last])
    for row in rows:
        row = _finite(row)
        writer.writerow(
            [row[name] for name in plain]
            + [row["settings"].get(field) for field in fields]
            + [row["metrics"].get(name) for name in metrics]
            + [row[name] for name in last]
        )
    return text.getvalue()


def _finite(value: Any) -> Any:
    """NaN and infinity, which JSON does not have, as None."""
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any, digits: int | None = None) -> str:
    if value is None:
        return ""
    if isinstance(value, (int, float)) and digits is not None:
        return f"{value:,.{digits}f}"
    return f"{value:g}" if isinstance(value, float) else str(value)
