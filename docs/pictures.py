"""Pictures of README.md as SVG: from committed results, and from what the code itself computes."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from docs import headlines
from docs.tables import QUICKSTART, ROOT
from efficient_lm import masks

FOLDER = ROOT / "docs/pictures"
BLUE, ORANGE, INK, PALE, GRID = "#3b6ea8", "#c4622d", "#30363d", "#eef2f7", "#e3e6ea"
OFF = "#eceff3"  # a pair that is masked
CELL = 10  # pixels of a pair in the image of a mask
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.edgecolor": GRID, "axes.labelcolor": INK,
    "text.color": INK, "xtick.color": INK, "ytick.color": INK, "svg.fonttype": "path",
    "svg.hashsalt": "efficient_lm",
}  # fmt: skip
MIXERS = {"attention": INK, "hybrid": BLUE, "gated_deltanet": ORANGE, "mamba2": "#6b9a5b"}
MONO = {"family": "DejaVu Sans Mono"}

CONFIG = """\
local = layer("attention", window=128)
wide = layer("attention",
             num_key_value_heads=1)

ModelConfig(
  num_layers=12,
  layers=(local,) * 3 + (wide,),
  mixers={"attention":
          {"qk_norm": True}},
  ffns={"dense":
        {"activation": "swiglu"}},
)"""


def overview() -> Figure:
    """From a config to a stack of layers to a curve that was measured."""
    measured = QUICKSTART.exists()
    figure = Figure(figsize=(11.5 if measured else 7.6, 3.7))
    widths = [1.25, 1.0, 1.35] if measured else [1.25, 1.0]
    grid = figure.add_gridspec(
        1, len(widths), width_ratios=widths, left=0.012, right=0.985, top=0.87, bottom=0.13,
        wspace=0.12,
    )  # fmt: skip
    _code(figure.add_subplot(grid[0]))
    _stack(figure.add_subplot(grid[1]))
    if measured:
        _curve(figure.add_subplot(grid[2]))
    return figure


def _title(axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10.5, fontweight="bold", pad=9)


def _blank(axes) -> None:
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.axis("off")


def _code(axes) -> None:
    _blank(axes)
    _title(axes, "1  A config names the layers")
    box = FancyBboxPatch((0.01, 0.0), 0.9, 0.99, boxstyle="round,pad=0,rounding_size=0.025",
                         facecolor=PALE, edgecolor="none")  # fmt: skip
    axes.add_patch(box)
    axes.text(0.05, 0.935, CONFIG, va="top", fontsize=8.6, linespacing=1.5,
              **MONO)  # fmt: skip


def _stack(axes) -> None:
    """Four layers with their masks, and the bracket of the scan."""
    _blank(axes)
    _title(axes, "2  The stack scans their period")
    for place in range(4):
        y = 0.02 + 0.25 * place
        wide = place == 3
        axes.add_patch(
            FancyBboxPatch((0.0, y), 0.72, 0.2, boxstyle="round,pad=0,rounding_size=0.02",
                           facecolor="white", edgecolor=ORANGE if wide else BLUE, linewidth=1.3)
        )  # fmt: skip
        mask = masks.Causal() if wide else masks.SlidingWindow(5)
        picture = axes.inset_axes((0.02, y + 0.02, 0.15, 0.16))
        _draw_mask(picture, mask, 12, ORANGE if wide else BLUE, lines=False)
        axes.text(0.2, y + 0.125, "attention, all tokens" if wide else "attention, window 128",
                  va="center", fontsize=8)  # fmt: skip
        axes.text(0.2, y + 0.06, "dense, SwiGLU", va="center", fontsize=7.5, color="#6a737d")
    axes.plot([0.76, 0.785, 0.785, 0.76], [0.02, 0.02, 0.97, 0.97], color=INK, linewidth=1)
    axes.text(0.81, 0.5, "× 3\none\nscan", va="center", fontsize=8.5, linespacing=1.5)


def _curve(axes) -> None:
    """Bits per byte of the quickstart run."""
    result = json.loads(QUICKSTART.read_text())
    _title(axes, "3  One line trains it: configs/quickstart.py")
    for split, color, marker in (("train", BLUE, None), ("valid", ORANGE, "o")):
        rows = [row for row in result["metrics"] if row["split"] == split]
        axes.plot([r["step"] for r in rows], [r["bits_per_byte"] for r in rows], color=color,
                  linewidth=1.4, marker=marker, markersize=4,
                  label={"train": "train", "valid": "validation"}[split])  # fmt: skip
    last = [row for row in result["metrics"] if row["split"] == "valid"][-1]
    axes.annotate(f"{last['bits_per_byte']:.2f}", (last["step"], last["bits_per_byte"]),
                  textcoords="offset points", xytext=(-2, 8), ha="right", color=ORANGE,
                  fontweight="bold")  # fmt: skip
    low = min(row["bits_per_byte"] for row in result["metrics"])
    axes.set(ylim=(low - 0.25, min(8.0, low + 3.6)), xlabel="step", ylabel="bits per byte")
    _plain(axes)
    axes.legend(frameon=False, loc="upper right")


def _plain(axes) -> None:
    """Horizontal grid, no frame."""
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _draw_mask(
    axes, mask: masks.MaskExpression, length: int, color: str = BLUE, lines: bool = True
) -> None:
    """Allowed pairs filled; queries from the top down, keys from left to right."""
    allowed = np.asarray(mask.lower().dense(length, length)[0])
    shades = np.array([matplotlib.colors.to_rgb(shade) for shade in (OFF, color)])
    cells = np.repeat(np.repeat(shades[allowed.astype(int)], CELL, axis=0), CELL, axis=1)
    if lines:  # white, between the cells
        cells[::CELL] = cells[:, ::CELL] = 1.0
    axes.imshow(cells, interpolation="none")  # a small image inside the SVG: few bytes
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def mask_algebra() -> Figure:
    """Masks and the expressions that make them."""
    segments = jnp.array([[1] * 5 + [2] * 7 + [3] * 4], jnp.int32)
    prefix = jnp.array([6], jnp.int32)
    expressions = [
        ("Causal()", masks.Causal()),
        ("SlidingWindow(4)", masks.SlidingWindow(4)),
        ("Causal() & Segments(ids)", masks.Causal() & masks.Segments(segments)),
        ("PrefixLM(length)", masks.PrefixLM(prefix)),
        ("BlockCausal(4)", masks.BlockCausal(4)),
        ("SlidingWindow(3) |\nCausal() & BlockDiagonal(8)",
         masks.SlidingWindow(3) | (masks.Causal() & masks.BlockDiagonal(8))),
    ]  # fmt: skip
    figure = Figure(figsize=(11.5, 2.35))
    for place, (text, mask) in enumerate(expressions):
        axes = figure.add_axes((0.012 + place * 0.1655, 0.02, 0.149, 0.73))
        _draw_mask(axes, mask, 16)
        axes.set_title(text, fontsize=7.6, pad=6, **MONO)
    return figure


def surprise() -> Figure:
    """A text that the quickstart model has not seen, each byte shaded by the bits it cost."""
    if not QUICKSTART.exists():
        return Figure(figsize=(1, 0.1))
    found = json.loads(QUICKSTART.read_text())["surprise"]
    lines = found["text"].splitlines(keepends=True)
    bits = iter(found["bits"])
    figure = Figure(figsize=(8.7, 0.21 * (len(lines) + 1.3)))
    axes = figure.add_axes((0.01, 0.0, 0.98, 1.0))
    axes.set(xlim=(0, 84), ylim=(len(lines), -1.3))
    axes.axis("off")
    shades = matplotlib.colors.LinearSegmentedColormap.from_list("bits", ["#ffffff", ORANGE])
    for row, line in enumerate(lines):
        for column, character in enumerate(line):
            bit = next(bits)
            axes.add_patch(Rectangle((column, row), 1, 1, color=shades(min(bit / 10, 1.0)), lw=0))
            if character != "\n":
                axes.text(column + 0.5, row + 0.54, character, ha="center", va="center",
                          fontsize=11.5, **MONO)  # fmt: skip
    for place in range(11):
        axes.add_patch(Rectangle((66 + place, -0.7), 1, 0.5, color=shades(place / 10), lw=0))
    axes.text(65.3, -0.45, "0", ha="right", va="center", fontsize=8)
    axes.text(77.6, -0.45, "10 bits", va="center", fontsize=8)
    return figure


def numbers() -> Figure:
    """Recurrent ops beside the fastest peer, training steps by length, recall by pairs."""
    figure = Figure(figsize=(11.5, 3.5))
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.25, 1, 1])
    figure.subplots_adjust(left=0.125, right=0.985, top=0.87, bottom=0.14, wspace=0.2)
    _title(left, "Our kernels, times faster than fla's")
    bars = headlines.speedups()
    for place, (name, what, ratio) in enumerate(bars[::-1]):
        left.barh(place, ratio, color=BLUE if what == "forward" else ORANGE, height=0.7)
        left.text(ratio + 0.04, place, f"{ratio:.2f}", va="center", fontsize=8)
        left.text(-0.04, place, name, va="center", ha="right", fontsize=8)
    for what, color in (("forward", BLUE), ("forward + backward", ORANGE)):
        left.barh(0, 0, color=color, label=what)
    left.axvline(1.0, color=INK, linewidth=0.8)
    left.set(yticks=[], xlabel="flash-linear-attention / ours, one H200, bf16", xlim=(0, 3.9))
    left.legend(frameon=False, loc=(0.54, 0.22), fontsize=7.5)
    _title(middle, "Training 0.94 B, 1000 tokens/s")
    rates = headlines.training_rates()
    _lines(middle, {m: {n: rate / 1e3 for n, rate in x.items()} for m, x in rates.items()})
    middle.set(xlabel="tokens a row", ylim=(0, None))
    _title(right, "Recall by key-value pairs")
    _lines(right, headlines.recall())
    right.set(xlabel="pairs in a row of 128 tokens", ylim=(0, 1.05))
    right.legend(frameon=False, fontsize=7.5)
    for axes in (left, middle, right):
        _plain(axes)
    return figure


def _lines(axes, series: dict[str, dict[int, float]]) -> None:
    """Values of mixers by powers of two."""
    for mixer, values in series.items():
        axes.plot(values.keys(), values.values(), marker="o", markersize=4, color=MIXERS[mixer],
                  linestyle=":" if mixer == "attention" else "-", label=mixer)  # fmt: skip
    places = sorted({place for values in series.values() for place in values})
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{p // 1024}k" if p >= 1024 else str(p) for p in places])
    axes.minorticks_off()


PICTURES: dict[Path, Callable[[], Figure]] = {
    FOLDER / "overview.svg": overview,
    FOLDER / "masks.svg": mask_algebra,
    FOLDER / "surprise.svg": surprise,
    FOLDER / "numbers.svg": numbers,
}


def digest() -> str:
    """A hash of all that the pictures are made from: this file, and the results it reads."""
    paths = [Path(__file__), ROOT / "efficient_lm/masks.py", QUICKSTART]
    content = b"".join(path.read_bytes() for path in paths if path.exists())
    content += repr([series() for series in headlines.SERIES]).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def outdated() -> list[Path]:
    """Pictures that are missing or were made from something else than what is there now."""
    mark = f"made from {digest()}"
    return [path for path in PICTURES if not path.exists() or mark not in path.read_text()]


def write(path: Path) -> None:
    """Draw one picture; what it was made from is in its metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        metadata = {"Date": None, "Creator": None, "Description": f"made from {digest()}"}
        PICTURES[path]().savefig(path, format="svg", facecolor="white", metadata=metadata)
