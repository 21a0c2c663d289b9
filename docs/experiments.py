"""Blocks of the READMEs of experiments, made from their committed results."""

import functools
from collections.abc import Callable
from typing import Any

from docs import tables
from docs.tables import number, short, table

MIXERS = {"softmax": "softmax attention", "two_mamba_e": "2Mamba-E", "two_mamba": "2Mamba",
          "mamba_2s": "Mamba-2S", "mamba2": "Mamba-2, full width"}  # fmt: skip


def of_seeds(rows: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> str:
    """The value of each seed's row, or why there is none."""
    cells = [f"failed: {short(row['error'], 40)}" if "error" in row else f"{value(row):.3f}"
             for row in sorted(rows, key=lambda row: row["seed"])]  # fmt: skip
    return " / ".join(cells) or "-"


def two_mamba(arm: str) -> str:
    """Bits per byte, recall by number of pairs, and the state of the text model, by mixer."""
    rows, pairs, length = [], [], 0
    for result in tables.results(f"experiments/two_mamba/results/{arm}.json"):
        pairs, length = result["runs"]["recall"]["pairs"], result["runs"]["text"]["length"]
        for method, name in MIXERS.items():
            text, recall = (
                [r for r in result["rows"] if (r["part"], r["method"]) == (part, method)]
                for part in ("text", "recall")
            )
            size = next((row["state_bytes"] for row in text if "error" not in row), None)
            rows.append((
                name,
                of_seeds(text, lambda row: row["bits_per_byte"]),
                *(of_seeds(recall, lambda row, n=n: row["accuracy"][str(n)]) for n in pairs),
                number(None if size is None else size / 1e3, ",.0f", " kB"),
            ))  # fmt: skip
    recalled = [f"recall of {n} pairs" for n in pairs]
    return table(("mixer", "bits per byte", *recalled, f"state at {length:,} tokens"), rows)


def ttt_kv_binding(arm: str) -> str:
    """Bits per byte, and million tokens/s of both forms, by rule."""
    rows = []
    for result in tables.results(f"experiments/ttt_kv_binding/results/{arm}.json"):
        trained = [row for row in result["rows"] if row["part"] == "quality"]
        rates = {
            (row["method"], row["form"], row["what"]): row["tokens_per_second"] / 1e6
            for row in result["rows"]
            if row["part"] == "speed" and "error" not in row
        }
        timed = [method for method, *_ in rates]
        for method in dict.fromkeys([*timed, *sorted(row["method"] for row in trained)]):
            found = [row for row in trained if row["method"] == method]
            bits = of_seeds(found, lambda row: row["bits_per_byte"])
            rows.append((method, bits, *both_forms(rates, method)))
    header = ("rule", "bits per byte", "sequential, forward, Mtoken/s", "parallel", "ratio",
              "ratio, forward and backward")  # fmt: skip
    return table(header, rows)


def both_forms(rates: dict[tuple[str, str, str], float], method: str) -> list[str]:
    """Forward sequential and parallel, their ratio, and that of both passes together."""
    cells = {
        (form, what): rates.get((method, form, what))
        for form in ("sequential", "parallel")
        for what in ("forward", "forward and backward")
    }
    found = [number(cells[form, "forward"], ".2f") for form in ("sequential", "parallel")]
    for what in ("forward", "forward and backward"):
        slow, fast = cells["sequential", what], cells["parallel", what]
        found.append(number(fast / slow if slow and fast else None, ".2f"))
    return found


BLOCKS: dict[str, Callable[[], str]] = {
    f"{block.__name__}_{arm}": functools.partial(block, arm)
    for block in (two_mamba, ttt_kv_binding)
    for arm in ("cpu", "h200")
}
