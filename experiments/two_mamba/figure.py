"""Draw figure.svg: text and recall of the methods, a row of panels for each file of results."""

import json
from pathlib import Path

import matplotlib
import numpy as np

HERE = Path(__file__).parent
LABELS = {
    "softmax": "softmax",
    "two_mamba_e": "2Mamba-E",
    "two_mamba": "2Mamba",
    "two_mamba_step": "2Mamba, decay of Mamba-2",
    "mamba_2s": "Mamba-2S",
    "mamba_2s_step": "Mamba-2S, decay of Mamba-2",
    "mamba_2s_by_head": "Mamba-2S, each head normed",
    "linear_convolution": "linear with convolution",
    "linear": "linear",
    "mamba2": "Mamba-2",
}


def main() -> None:
    """One row of two panels for each arm, of results/cpu*.json and results/h200*.json."""
    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "two_mamba"
    arms = {name: sorted(HERE.glob(f"results/{name}*.json")) for name in ("cpu", "h200")}
    arms = {name: files for name, files in arms.items() if files}
    figure, axes = pyplot.subplots(
        len(arms), 2, figsize=(9, 3 * len(arms)), layout="constrained", squeeze=False
    )
    for (text, recall), (arm, files) in zip(axes, arms.items(), strict=True):
        rows = [row for path in files for row in json.loads(path.read_text())["rows"]]
        rows = [row for row in rows if "error" not in row]
        shown = 0
        for color, method in enumerate(LABELS):
            mine = [row for row in rows if row["method"] == method]
            bits = [row["bits_per_byte"] for row in mine if row["part"] == "text"]
            if bits:
                text.barh(LABELS[method], np.mean(bits), color=f"C{color}")
                text.text(np.mean(bits), shown, f" {np.mean(bits):.3f}", va="center")
                shown += 1
            accuracy = [row["accuracy"] for row in mine if row["part"] == "recall"]
            if accuracy:
                pairs = list(map(int, accuracy[0]))
                mean = np.mean([list(a.values()) for a in accuracy], axis=0)
                recall.plot(pairs, mean, "o-", color=f"C{color}", label=LABELS[method])
        text.invert_yaxis()
        text.margins(x=0.2)
        text.set_title(f"Python source, {arm}")
        text.set_xlabel("bits per byte")
        recall.set_title(f"associative recall, {arm}")
        recall.set_xscale("log", base=2)
        recall.set_xlabel("pairs")
        recall.set_ylabel("share of right answers")
        recall.set_ylim(0, 1.02)
        if recall.lines:
            recall.legend(fontsize="small")
    figure.savefig(HERE / "figure.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
