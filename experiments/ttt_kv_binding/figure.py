"""Draw figure.svg: what rules and probes learn, and the speed of both forms."""

import json
from pathlib import Path

import matplotlib

HERE = Path(__file__).parent


def main() -> None:
    """One row of three panels for each of results/cpu.json and results/h200.json that is there."""
    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "ttt_kv_binding"
    files = [path for name in ("cpu", "h200") if (path := HERE / f"results/{name}.json").exists()]
    figure, axes = pyplot.subplots(
        len(files), 3, figsize=(13, 3.4 * len(files)), layout="constrained", squeeze=False
    )
    for (quality, inner, speed), path in zip(axes, files, strict=True):
        rows = [row for row in json.loads(path.read_text())["rows"] if "error" not in row]
        trained = [row for row in rows if row["part"] == "quality"]
        methods = list(dict.fromkeys(row["method"] for row in trained))
        for method in methods:
            bits = [row["bits_per_byte"] for row in trained if row["method"] == method]
            quality.plot(bits, [method] * len(bits), "o", color="C0", alpha=0.6)
        quality.grid(axis="x", alpha=0.3)
        quality.invert_yaxis()
        quality.set_xlabel("bits per byte, a dot for each seed")
        quality.set_title(f"Python source, {path.stem}")
        for row in trained:
            if "bits_per_byte_by_inner_steps" in row:
                found = row["bits_per_byte_by_inner_steps"]
                inner.plot(list(map(int, found)), list(found.values()), "o-")
        inner.set_xscale("log", base=2)
        inner.set_xlabel("inner steps at test (1 in training)")
        inner.set_ylabel("bits per byte")
        timed = [r for r in rows if r["part"] == "speed" and r["what"] == "forward"]
        names = list(dict.fromkeys(row["method"] for row in timed))
        for shift, form in ((-0.2, "sequential"), (0.2, "parallel")):
            found = {
                row["method"]: row["tokens_per_second"] for row in timed if row["form"] == form
            }
            places = [names.index(name) + shift for name in found]
            speed.barh(places, [x / 1e6 for x in found.values()], height=0.4, label=form)
        speed.set_yticks(range(len(names)), names)
        speed.invert_yaxis()
        speed.set_xlabel("million tokens/s of the fast weights, forward")
        if timed:
            speed.legend(fontsize="small")
    figure.savefig(HERE / "figure.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
