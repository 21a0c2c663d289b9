"""Pictures of a sweep: the curves of its runs, and the last metric against each field."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from efficient_lm.sweeping.runs import labels
from efficient_lm.training.metrics import read_metrics

FOLDER = "plots"
_NAMED_CURVES = 12  # more of them are told apart by the table only
_DECADE = 10  # a positive field that spans this factor has a logarithmic axis


def write_plots(directory: Path, rows: Sequence[Mapping[str, Any]], metric: str) -> list[Path]:
    """Write plots/METRIC.svg (curves) and plots/FIELD.svg for each field with several values."""
    folder = directory / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    fields = list(dict.fromkeys(field for row in rows for field in row["settings"]))
    names, written = labels(fields), []
    curves = {row["name"]: _curve(directory / row["name"], metric) for row in rows}
    curves = {name: curve for name, curve in curves.items() if curve}
    if curves:
        path = folder / f"{metric}.svg"
        _plot_curves(path, curves, {row["name"]: _label(row, names) for row in rows}, metric)
        written.append(path)
    for field in fields:
        points = [
            (row["settings"][field], row["metrics"][metric])
            for row in rows
            if row["status"] == "finished" and field in row["settings"]
            and math.isfinite(row["metrics"].get(metric, math.nan))
        ]  # fmt: skip
        if len({str(x) for x, _ in points}) > 1:
            path = folder / f"{field}.svg"
            _plot_points(path, points, field, metric)
            written.append(path)
    return written


def _curve(workdir: Path, metric: str) -> list[tuple[int, float | int]]:
    """(step, value) of the validation split."""
    return [
        (row["step"], row[metric])
        for row in read_metrics(workdir, "valid")
        if math.isfinite(row.get(metric, math.nan))
    ]


def _label(row: Mapping[str, Any], names: Mapping[str, str]) -> str:
    return ", ".join(f"{names[field]} {value}" for field, value in row["settings"].items())


def _plot_curves(path: Path, curves, names: Mapping[str, str], metric: str) -> None:
    """The metric of each run by step; colors go from the first run to the last."""
    import matplotlib

    with _axes(path, metric) as axes:
        colors = matplotlib.colormaps["viridis"]
        for index, (name, curve) in enumerate(curves.items()):
            color = colors(0.9 * index / max(1, len(curves) - 1))
            axes.plot(*zip(*curve, strict=True), color=color, linewidth=1.2, marker="o",
                      markersize=3, label=names[name])  # fmt: skip
        axes.set_xlabel("step")
        if len(curves) <= _NAMED_CURVES:
            axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0))


def _plot_points(path: Path, points: Sequence[tuple[Any, float | int]], field: str, metric: str):
    """The last metric of each run by one field, and the median of those that share a value."""
    numeric = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x, _ in points)
    if not numeric:
        points = [(str(x), y) for x, y in points]
    groups: dict[Any, list[float | int]] = {}
    for x, y in sorted(points) if numeric else points:
        groups.setdefault(x, []).append(y)
    with _axes(path, metric) as axes:
        axes.plot(list(groups), [statistics.median(ys) for ys in groups.values()],
                  color="#8da9c4", linewidth=1.2, zorder=1, label="median")  # fmt: skip
        axes.scatter(*zip(*points, strict=True), color="#3b6ea8", s=16, zorder=2, label="run")
        if numeric and min(groups) > 0 and max(groups) / min(groups) >= _DECADE:
            axes.set_xscale("log")
        axes.set_xlabel(field)
        axes.legend(frameon=False, fontsize=8)


class _axes:
    """Axes of a new figure, which is saved as SVG on leaving."""

    def __init__(self, path: Path, metric: str):
        self._path, self._metric = path, metric

    def __enter__(self):
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        self._figure = Figure(figsize=(6.4, 3.6))
        FigureCanvasSVG(self._figure)
        axes = self._figure.add_subplot()
        axes.set_title(f"validation {self._metric.replace('_', ' ')}", loc="left", fontsize=10)
        axes.grid(color="#e3e6ea", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelsize=8)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        return axes

    def __exit__(self, kind, error, traceback) -> None:
        if error is None:
            self._figure.savefig(
                self._path, format="svg", bbox_inches="tight", metadata={"Date": None}
            )
