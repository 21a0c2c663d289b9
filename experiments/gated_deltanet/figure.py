"""Draw figure.svg from results: recall by pairs, bits per byte, and tokens/s by context."""

import json
from pathlib import Path

import matplotlib
import numpy as np

HERE = Path(__file__).parent
COLORS = {"attention": "#4c72b0", "hybrid": "#8172b3", "gated_deltanet": "#c44e52",
          "mamba2": "#55a868"}  # fmt: skip


def rows_of(what: str) -> list[dict]:
    """The rows of a part, from a GPU where there are any."""
    results = [json.loads(path.read_text()) for path in sorted(HERE.glob("results/*.json"))]
    for arm in ("gpu", "cpu"):
        found = [row for result in results if result["arm"] == arm for row in result["rows"]
                 if row["what"] == what and "error" not in row]  # fmt: skip
        if found:
            return found
    return []


def main() -> None:
    """Three panels."""
    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "gated_deltanet"
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(11, 3), layout="constrained")
    recall = rows_of("recall")
    for mixer in dict.fromkeys(row["mixer"] for row in recall):
        seeds = [row["accuracy_by_seed"] for row in recall if row["mixer"] == mixer]
        pairs = list(map(int, seeds[0]))
        values = np.concatenate([list(found.values()) for found in seeds], axis=1)  # [pairs, seeds]
        left.plot(pairs, values.mean(axis=1), label=mixer, color=COLORS[mixer])
        left.plot(pairs, values, ".", color=COLORS[mixer])
    left.set(
        xlabel="pairs",
        ylabel="accuracy",
        title="associative recall, a dot for each seed",
        ylim=(0, 1.03),
    )
    left.set_xscale("log", base=2)
    left.legend(fontsize=8)
    bits = {row["mixer"]: row["bits_per_byte"] for row in rows_of("language")}  # of the last file
    names = [name for name in COLORS if name in bits]
    heights = [bits[name] for name in names]
    shown = middle.bar(names, heights, color=[COLORS[name] for name in names])
    middle.bar_label(shown, fmt="%.3f", fontsize=8)
    middle.set(title="Python source, bits per byte", ylim=(0, None))
    middle.tick_params("x", labelsize=8)
    speeds = rows_of("speed")
    for mixer in dict.fromkeys(row["mixer"] for row in speeds):
        points: dict[int, float] = {}  # of what was measured twice, the first file has it
        for row in speeds:
            if row["mixer"] == mixer:
                points.setdefault(row["length"], row["tokens_per_second"] / 1e3)
        lengths, rates = zip(*sorted(points.items()), strict=True)
        right.plot(lengths, rates, "o-", label=mixer, color=COLORS[mixer])
    if speeds:
        right.set_xscale("log", base=2)
        right.set(xlabel="tokens of a row", title="training, thousand tokens/s", ylim=(0, None))
        right.legend(fontsize=8)
    else:
        right.set_axis_off()
    figure.savefig(HERE / "figure.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
