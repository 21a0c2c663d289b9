"""The live line of a run on a terminal, and a plain line now and then anywhere else."""

import math
import time
from collections.abc import Mapping

import jax
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_PLAIN_SECONDS = 10  # between lines where there is no terminal


class Progress:
    """Shows step, loss, bits per byte, tokens/s and the time left; a context manager.

    Process 0 alone shows anything. `start` is the step that the run resumed at.
    """

    def __init__(self, total: int, start: int = 0, *, console: Console | None = None):
        self._console = console or Console(quiet=jax.process_index() != 0, highlight=False)
        self._total, self._start = total, start
        self._step, self._text = start, "compiling"
        self._shown_at = -math.inf
        self._live = None
        if self._console.is_terminal or self._console.is_jupyter:
            self._live = Live(self, console=self._console, refresh_per_second=4)

    def __enter__(self) -> "Progress":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, step: int, row: Mapping[str, float | int]) -> None:
        """Show a line of metrics, with the keys of metrics.jsonl."""
        self._step, self._text = step, describe(row, self._total - step)
        now = time.monotonic()
        due = now - self._shown_at >= _PLAIN_SECONDS or step >= self._total
        if self._live is None and due:
            self._shown_at = now
            self.message(f"step {step:,}/{self._total:,}  {self._text}")

    def message(self, text: str) -> None:
        """Print a line that stays, above the live one."""
        self._console.print(text, markup=False, soft_wrap=True)

    def __rich__(self) -> Table:
        line = Table.grid(padding=(0, 2), expand=False)
        cells = [Text(f"step {self._step:,}/{self._total:,}"), Text(self._text)]
        room = self._console.width - sum(len(cell) + 2 for cell in cells)
        if room >= 8:  # the bar is what a narrow terminal can do without
            bar = ProgressBar(
                self._total, self._step, width=min(room, 24),
                style="grey37", complete_style="cyan", finished_style="cyan",
            )  # fmt: skip
            cells.insert(1, bar)
        line.add_row(*cells)
        return line


def describe(row: Mapping[str, float | int], steps_left: int) -> str:
    """ "loss 1.2345  1.781 bits/byte  45.2k tokens/s  2:03 left" with what `row` has."""
    parts = []
    if "loss" in row:
        parts.append(f"loss {row['loss']:.4f}")
    if "bits_per_byte" in row:
        parts.append(f"{row['bits_per_byte']:.3f} bits/byte")
    if "tokens_per_second" in row:
        parts.append(f"{_short(row['tokens_per_second'])} tokens/s")
    if math.isfinite(row.get("step_seconds", math.nan)):
        parts.append(f"{_clock(row['step_seconds'] * steps_left)} left")
    return "  ".join(parts)


def _short(number: float | int) -> str:
    """Three digits and a unit: 45.2k, 1.30M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def _clock(seconds: float | int) -> str:
    """2:03 or 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
