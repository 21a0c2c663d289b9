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
    "mamba_2s": "Mamba-2S",
    "mamba2": "Mamba-2",
}


def main() -> None:
    """One row of two panels for each of results/cpu.json and results/h200.json that is there."""
    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "two_mamba"
    files = [path for name in ("cpu", "h200") if (path := HERE / f"results/{name}.json").exists()]
    figure, axes = pyplot.subplots(
        len(files), 2, figsize=(9, 3 * len(files)), layout="constrained", squeeze=False
    )
    for (text, recall), path in zip(axes, files, strict=True):
        rows = [row for row in json.loads(path.read_text())["rows"] if "error" not in row]
        for place, method in enumerate(LABELS):
            mine = [row for row in rows if row["method"] == method]
            bits = [row["bits_per_byte"] for row in mine if row["part"] == "text"]
            if bits:
                text.barh(LABELS[method], np.mean(bits), color=f"C{place}")
                text.text(np.mean(bits), place, f" {np.mean(bits):.3f}", va="center")
            accuracy = [row["accuracy"] for row in mine if row["part"] == "recall"]
            if accuracy:
                pairs = list(map(int, accuracy[0]))
                mean = np.mean([list(a.values()) for a in accuracy], axis=0)
                recall.plot(pairs, mean, "o-", color=f"C{place}", label=LABELS[method])
        text.invert_yaxis()
        text.margins(x=0.2)
        text.set_title(f"Python source, {path.stem}")
        text.set_xlabel("bits per byte")
        recall.set_title(f"associative recall, {path.stem}")
        recall.set_xscale("log", base=2)
        recall.set_xlabel("pairs")
        recall.set_ylabel("share of right answers")
        recall.set_ylim(0, 1.02)
        if recall.lines:
            recall.legend(fontsize="small")
    figure.savefig(HERE / "figure.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
