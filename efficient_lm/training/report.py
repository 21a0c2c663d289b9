"""report.html: a run on one self-contained page, also while it is still under way."""

import base64
import datetime
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from efficient_lm.training import manifest
from efficient_lm.training.metrics import read_metrics

TRAIN, VALID = "#3b6ea8", "#c4622d"
_INK, _GRID = "#30363d", "#e3e6ea"
_STYLE = """
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #24292f;
  background: #fff; max-width: 1080px; margin: 40px auto 80px; padding: 0 24px; }
h1 { font-size: 26px; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 17px; margin: 44px 0 12px; padding-bottom: 6px; border-bottom: 1px solid #e3e6ea; }
p.sub { color: #6a737d; margin: 4px 0 28px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(185px, 1fr)); gap: 12px; }
.card { border: 1px solid #e3e6ea; border-radius: 8px; padding: 12px 16px; }
.card b { display: block; font-size: 21px; font-weight: 600; font-variant-numeric: tabular-nums; }
.card span { color: #6a737d; font-size: 13px; }
.figures { display: grid; grid-template-columns: 1fr 1fr; gap: 20px 28px; margin-top: 16px; }
.figures img { width: 100%; }
@media (max-width: 760px) { .figures { grid-template-columns: 1fr; } }
.groups { columns: 2; column-gap: 40px; }
@media (max-width: 760px) { .groups { columns: 1; } }
table { border-collapse: collapse; width: 100%; font-size: 13px; margin: 0 0 20px;
  break-inside: avoid; }
caption { text-align: left; font-weight: 600; padding-bottom: 4px; }
td { padding: 3px 12px 3px 0; border-top: 1px solid #eef0f2; vertical-align: top; }
td:first-child { color: #57606a; width: 44%; }
td:last-child { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 12px;
  overflow-wrap: anywhere; }
pre { background: #f6f8fa; border-radius: 8px; padding: 14px 16px; overflow-x: auto;
  white-space: pre-wrap; font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre b { font-weight: 600; color: #3b6ea8; }
"""


def write_report(workdir: str | Path) -> Path:
    """Write `workdir/report.html` from what the run has written so far; its path.

    Reads metrics.jsonl, config.json, samples.jsonl and summary.json; what is not there yet is
    left out. The page needs no other file and no network.
    """
    workdir = Path(workdir)
    metrics = read_metrics(workdir)
    summary = _read_json(workdir / "summary.json")
    body = [
        f"<h1>{html.escape(workdir.resolve().name)}</h1>",
        f'<p class="sub">{html.escape(_subtitle(summary))}</p>',
        _cards(metrics, summary),
        _figures(metrics),
        _samples(workdir / "samples.jsonl"),
        _configuration(_read_json(workdir / "config.json")),
        _environment(summary),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(workdir.resolve().name)}</title><style>{_STYLE}</style></head>\n"
        f"<body>{''.join(body)}</body></html>\n"
    )
    path = workdir / "report.html"
    path.write_text(page)
    return path


def _subtitle(summary: Mapping[str, Any]) -> str:
    """Device and date."""
    date = datetime.datetime.now().strftime("%-d %B %Y, %H:%M")
    if not summary:
        return f"in progress, as of {date}"
    count = summary.get("devices", 1)
    device = summary.get("device", "unknown device")
    return f"{f'{count} × ' if count > 1 else ''}{device} · {date}"


def _cards(metrics: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    """The few numbers that a reader looks for first."""
    train = [line for line in metrics if line["split"] == "train"]
    valid = [line for line in metrics if line["split"] == "valid"]
    cards = []

    def add(value: str, label: str) -> None:
        cards.append(f'<div class="card"><b>{value}</b><span>{label}</span></div>')

    last = (train or valid or [{}])[-1]
    if "step" in last:
        add(f"{max(line['step'] for line in metrics):,}", "steps")
    if valid:
        add(f"{valid[-1].get('loss', math.nan):.4f}", "validation loss, nats a token")
        if math.isfinite(valid[-1].get("bits_per_byte", math.nan)):
            add(f"{valid[-1]['bits_per_byte']:.3f}", "validation bits per byte")
    elif train:
        add(f"{last.get('loss', math.nan):.4f}", "training loss, nats a token")
    if summary.get("parameters"):
        add(_count(summary["parameters"]), "parameters")
    speeds = sorted(line["tokens_per_second"] for line in train if "tokens_per_second" in line)
    if speeds:
        add(_count(speeds[len(speeds) // 2]), "tokens a second, median")
    shares = sorted(line["mfu"] for line in train if math.isfinite(line.get("mfu", math.nan)))
    if shares:
        add(f"{100 * shares[len(shares) // 2]:.1f}%", "model FLOPs utilization, median")
    if "compile_seconds" in summary:
        add(_duration(summary["compile_seconds"]), "compile time")
    if "run_seconds" in summary:
        add(_duration(summary["run_seconds"]), "run time")
    if summary.get("peak_memory_bytes"):
        add(f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB", "peak memory a device")
    return f'<div class="cards">{"".join(cards)}</div>' if cards else "<p>No metrics yet.</p>"


def _figures(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Curves of loss, bits per byte, throughput, MFU, learning rate and gradient norm."""
    plots = [
        ("loss", "Loss, nats a token", 1, False),
        ("bits_per_byte", "Bits per byte", 1, False),
        ("tokens_per_second", "Throughput, tokens a second", 1, True),
        ("mfu", "Model FLOPs utilization, percent", 100, True),
        ("learning_rate", "Learning rate", 1, True),
        ("gradient_norm", "Gradient norm before clipping", 1, True),
    ]
    images = []
    for key, title, scale, from_zero in plots:
        curves = {
            split: [(line["step"], scale * line[key]) for line in metrics
                    if line["split"] == split and math.isfinite(line.get(key, math.nan))]
            for split in ("train", "valid")
        }  # fmt: skip
        if any(curves.values()):
            data = base64.b64encode(_plot(curves, title, from_zero).encode()).decode()
            images.append(f'<img alt="{title}" src="data:image/svg+xml;base64,{data}">')
    return f'<h2>Curves</h2><div class="figures">{"".join(images)}</div>' if images else ""


def _plot(
    curves: Mapping[str, Sequence[tuple[int, float | int]]], title: str, from_zero: bool
) -> str:
    """One figure as SVG."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = {
        "font.family": "sans-serif", "font.size": 9, "axes.edgecolor": _GRID,
        "axes.labelcolor": _INK, "text.color": _INK, "xtick.color": _INK, "ytick.color": _INK,
        "svg.fonttype": "path",
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5, 2.7))
        figure.subplots_adjust(left=0.1, right=0.97, top=0.88, bottom=0.17)
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        if curves["train"]:
            axes.plot(*zip(*curves["train"], strict=True), color=TRAIN, linewidth=1.3,
                      label="train", solid_joinstyle="round")  # fmt: skip
        if curves["valid"]:
            axes.plot(*zip(*curves["valid"], strict=True), color=VALID, linewidth=1.3,
                      marker="o", markersize=3.5, label="validation")  # fmt: skip
        axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
        axes.set_xlabel("step")
        axes.grid(color=_GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
        axes.set_ylim(*_limits(curves, from_zero))
        axes.yaxis.set_major_formatter(
            lambda value, _: _count(value) if value >= 1000 else f"{value:.4g}"
        )
        if curves["train"] and curves["valid"]:
            axes.legend(frameon=False, loc="upper right")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _limits(
    curves: Mapping[str, Sequence[tuple[int, float | int]]], from_zero: bool
) -> tuple[float, float]:
    """Limits of the vertical axis: the first steps and rare spikes must not flatten the rest."""
    last = max(step for curve in curves.values() for step, _ in curve)
    values = sorted(v for curve in curves.values() for step, v in curve if step >= 0.04 * last)
    low, high = values[0], values[-1 - len(values) // 100]
    if from_zero:
        low = min(low, 0.0)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - (0 if low == 0 else margin), high + margin


def _samples(path: Path) -> str:
    """The last few generated texts, the prompt set apart."""
    if not path.exists():
        return ""
    parts = ["<h2>Samples</h2>"]
    for text in path.read_text(errors="replace").splitlines()[-3:]:
        try:
            row = json.loads(text)
        except ValueError:  # a line that is being written
            continue
        parts.append(
            f'<p class="sub" style="margin: 12px 0 4px">after step {row.get("step", "?")}</p>'
            f"<pre><b>{html.escape(row.get('prompt', ''))}</b>"
            f"{html.escape(row.get('text', ''))}</pre>"
        )
    return "".join(parts) if len(parts) > 1 else ""


def _configuration(config: Mapping[str, Any]) -> str:
    """One small table for each section of the config."""
    if not config:
        return ""
    tables = [
        _table(section, _flatten(values) if isinstance(values, Mapping) else {"": values})
        for section, values in config.items()
    ]
    return f'<h2>Configuration</h2><div class="groups">{"".join(tables)}</div>'


def _environment(summary: Mapping[str, Any]) -> str:
    """Versions and every entry of the summary; asks for no device, which a run may be using."""
    tables = _table("versions", manifest.versions())
    if summary:
        tables += _table("summary", _flatten(summary))
    return f'<h2>Environment</h2><div class="groups">{tables}</div>'


def _table(caption: str, rows: Mapping[str, Any]) -> str:
    cells = "".join(
        f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(_value(value))}</td></tr>"
        for name, value in rows.items()
    )
    return f"<table><caption>{html.escape(caption)}</caption>{cells}</table>" if rows else ""


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings with dotted names."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)


def _count(number: float | int) -> str:
    """124M, 45.2k, 812."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def _duration(seconds: float | int) -> str:
    """48 s, 2 min 03 s or 1 h 02 min."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when the file is not there or half written."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
