"""Draw figure.svg: time and peak memory of the H200 rows, method by method."""

import json
from pathlib import Path

import matplotlib

HERE = Path(__file__).parent
COLORS = {"ulysses": "#4c72b0", "upipe4": "#dd8452", "upipe8": "#c44e52", "ring": "#55a868"}


def main() -> None:
    """Two panels with a bar for each length and method."""
    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "untied_ulysses"
    rows = json.loads((HERE / "results/h200_x4.json").read_text())["rows"]
    rows = [row for row in rows if row["what"] == "long context" and "step_seconds" in row]
    names = [f"{row['length'] // 1024}k {row['method']}" for row in rows]
    colors = [COLORS[row["method"]] for row in rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3), layout="constrained", sharey=True)
    left.barh(names, [row["tokens_per_second"] / 1e3 for row in rows], color=colors)
    left.set_xlabel("thousand tokens/s, 4 H200s together")
    right.barh(names, [row["peak_bytes"] / 1e9 for row in rows], color=colors)
    right.set_xlabel("peak memory of a GPU, GB")
    left.invert_yaxis()
    figure.savefig(HERE / "figure.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
