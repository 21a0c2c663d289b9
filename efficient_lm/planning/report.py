"""A plan kept: JSON, and a picture of memory and times."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efficient_lm.planning.tables import duration, parameters, size, verdict

COLORS = {
    "parameters": "#3b6ea8", "optimizer": "#7aa6d6", "average": "#b5cfeb", "cache": "#5b8c5a",
    "batch": "#9aa0a6", "padding of these": "#9aa0a6", "gradients": "#c4622d",
    "saved activations": "#e0935f", "other temporaries": "#f0c9a8", "temporaries": "#f0c9a8",
    "program": "#d0d4d9",
}  # fmt: skip


def write_report(plan: Mapping[str, Any], directory: Path) -> list[Path]:
    """Write plan.json and plan.png into the directory; their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / "plan.json", directory / "plan.png"]
    paths[0].write_text(json.dumps(plan, indent=1) + "\n")
    draw(plan, paths[1])
    return paths


def write_search(found: Mapping[str, Any], directory: Path) -> list[Path]:
    """Write search.json, the ranked variants with the plans of those compiled; its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "search.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    return [path]


def draw(plan: Mapping[str, Any], path: Path) -> None:
    """One picture: memory of a device by kind against what it has, and the least times."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    topology, step = plan["topology"], plan["step"]
    mesh = ", ".join(f"{axis}={n}" for axis, n in plan["mesh"].items() if n > 1) or "one device"
    figure.suptitle(
        f"{step['kind']} step, {parameters(plan)}, {topology['name']} "
        f"({mesh})",
        fontsize=11, x=0.01, ha="left",
    )  # fmt: skip
    _memory(left, plan["memory"])
    _times(right, plan["roofline"])
    figure.savefig(path, dpi=110)


def _memory(axes, memory) -> None:
    rows = memory["rows"][::-1]
    gib = [row["bytes"] / 2**30 for row in rows]
    axes.barh(
        [row["kind"] for row in rows], gib, color=[COLORS.get(r["kind"], "#888") for r in rows]
    )
    for i, row in enumerate(rows):
        axes.text(gib[i], i, f" {size(row['bytes'])}", va="center", fontsize=8)
    if memory["available"]:
        axes.axvline(memory["available"] / 2**30, color="#a02020", linestyle="--", linewidth=1)
    limit = max(*gib, (memory["available"] or 0) / 2**30)
    axes.set(xlim=(0, 1.22 * limit), xlabel="GiB a device (dashed: what it has)")
    axes.set_title(verdict(memory), fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def _times(axes, roofline) -> None:
    names = ("serial", "overlapped", "interconnect", "memory", "compute")
    shown = {n: roofline["seconds"][n] for n in names if roofline["seconds"][n] is not None}
    colors = ["#30363d" if n in ("serial", "overlapped") else "#7aa6d6" for n in shown]
    axes.barh(list(shown), list(shown.values()), color=colors)
    for i, seconds in enumerate(shown.values()):
        axes.text(seconds, i, f" {duration(seconds)}", va="center", fontsize=8)
    axes.set(xlim=(0, 1.3 * max(shown.values())), xlabel="seconds a step, at least")
    axes.set_title(f"MFU at most {100 * roofline['mfu_bound']:.1f}%", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
