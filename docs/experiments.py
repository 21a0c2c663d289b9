"""Blocks of the READMEs of experiments, made from their committed results."""

import functools
import json
from collections.abc import Callable
from statistics import mean
from typing import Any

from docs import tables
from docs.tables import number, short, table

MIXERS = {
    "softmax": "softmax attention",
    "two_mamba_e": "2Mamba-E",
    "two_mamba": "2Mamba",
    "two_mamba_step": "2Mamba with the decay of Mamba-2",
    "mamba_2s": "Mamba-2S",
    "mamba_2s_step": "Mamba-2S with the decay of Mamba-2",
    "mamba_2s_by_head": "Mamba-2S, each head normalised",
    "linear_convolution": "linear attention with a convolution",
    "linear": "linear attention",
    "mamba2": "Mamba-2, full width",
}
ARMS = {"cpu": "CPU", "h200": "H200"}
Rows = list[dict[str, Any]]


def rows_of(experiment: str, arm: str) -> Rows:
    """Those of all files of an arm: the first command's, and of later ones with the same sizes."""
    files = tables.results(f"experiments/{experiment}/results/{arm}*.json")
    return [row for result in files for row in result["rows"]]


def of_seeds(rows: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> str:
    """The value of each seed's row, or why there is none."""
    cells = [f"failed: {short(row['error'], 40)}" if "error" in row else f"{value(row):.3f}"
             for row in sorted(rows, key=lambda row: row["seed"])]  # fmt: skip
    return " / ".join(cells) or "-"


def two_mamba(arm: str) -> str:
    """Bits per byte, recall by number of pairs, and the state of the text model, by mixer."""
    found = rows_of("two_mamba", arm)
    run = next(iter(tables.results(f"experiments/two_mamba/results/{arm}.json")), None)
    if run is None:
        return table((), ())
    pairs, length = run["runs"]["recall"]["pairs"], run["runs"]["text"]["length"]
    rows = []
    for method, name in MIXERS.items():
        text, recall = (
            [r for r in found if (r["part"], r["method"]) == (part, method)]
            for part in ("text", "recall")
        )
        if not text + recall:
            continue
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


Scores = dict[str, dict[int, float]]  # by method and seed


def scores(rows: Rows, part: str, value: Callable[[dict[str, Any]], float]) -> Scores:
    """Those of a part's rows that did not fail; of a method and seed that ran twice, the first."""
    found: Scores = {}
    for row in rows:
        if row["part"] == part and "error" not in row:
            found.setdefault(row["method"], {}).setdefault(row["seed"], value(row))
    return found


def less(values: Scores, one: str, other: str) -> float | None:
    """The difference of two methods, in the mean of the seeds that both have; None for none."""
    a, b = values.get(one, {}), values.get(other, {})
    seeds = a.keys() & b.keys()
    return mean(a[seed] - b[seed] for seed in seeds) if seeds else None


def two_mamba_values(rows: Rows) -> dict[str, float | None]:
    """What `expected.json` bounds."""
    bits = scores(rows, "text", lambda row: row["bits_per_byte"])
    recall = scores(rows, "recall", lambda row: list(row["accuracy"].values())[-1])
    first_order = "mamba_2s" if "mamba_2s" in bits else "mamba_2s_by_head"
    of_recall = "mamba_2s" if "mamba_2s" in recall else "mamba_2s_by_head"
    return {
        "2Mamba above softmax attention": less(bits, "two_mamba", "softmax"),
        "2Mamba-E above softmax attention": less(bits, "two_mamba_e", "softmax"),
        "Mamba-2S above 2Mamba": less(bits, first_order, "two_mamba"),
        "Mamba-2, full width, above 2Mamba": less(bits, "mamba2", "two_mamba"),
        "linear attention with a convolution above Mamba-2S": less(
            bits, "linear_convolution", "mamba_2s"
        ),
        "linear attention above that with a convolution": less(
            bits, "linear", "linear_convolution"
        ),
        "Mamba-2S with the decay of Mamba-2 above Mamba-2S": less(
            bits, "mamba_2s_step", "mamba_2s"
        ),
        "recall of the most pairs, 2Mamba less Mamba-2S": less(recall, "two_mamba", of_recall),
    }


def ttt_kv_binding_values(rows: Rows) -> dict[str, float | None]:
    """What `expected.json` bounds."""
    bits = scores(rows, "quality", lambda row: row["bits_per_byte"])
    gains, falls = [], []
    for row in rows:
        if "bits_per_byte_by_inner_steps" in row:
            one, *more = row["bits_per_byte_by_inner_steps"].values()
            gains.append(one - min(more))
        if "inner_loss_by_inner_steps" in row:
            one, *more = row["inner_loss_by_inner_steps"].values()
            falls.append(one - more[-1])
    forward = [r for r in rows if r["part"] == "speed" and r.get("what") == "forward"]
    rates = {(r["method"], r["form"]): r.get("tokens_per_second") for r in forward}
    ratios = [
        rates[method, "parallel"] / rates[method, "sequential"]
        for method in ("no_weight_norm", "single_layer", "rate_one", "no_momentum")
        if rates.get((method, "parallel")) and rates.get((method, "sequential"))
    ]
    return {
        "ascent less baseline": less(bits, "ascent", "baseline"),
        "no_query less baseline": less(bits, "no_query", "baseline"),
        "gain of more inner steps at test": max(gains, default=None),
        "fall of the inner loss with the most inner steps": min(falls, default=None),
        "last_layer less baseline": less(bits, "last_layer", "baseline"),
        "no_muon less no_momentum": less(bits, "no_muon", "no_momentum"),
        "parallel over sequential, no_weight_norm to no_momentum": min(ratios, default=None),
    }


def expected(experiment: str, values: Callable[[Rows], dict[str, float | None]]) -> str:
    """Each bound of `expected.json` and what the arms gave."""
    measured = {arm: rows_of(experiment, arm) for arm in ARMS}
    if not any(measured.values()):
        return table((), ())
    found = {arm: values(rows) for arm, rows in measured.items()}
    path = tables.ROOT / f"experiments/{experiment}/expected.json"
    rows = []
    for what, bound in json.loads(path.read_text()).items():
        low, high = bound.get("at_least", -float("inf")), bound.get("at_most", float("inf"))
        wanted = [f"at {side} {bound[f'at_{side}']:g}" for side in ("least", "most")
                  if f"at_{side}" in bound]  # fmt: skip
        cells = []
        for arm in ARMS:
            value = found[arm][what]
            missed = value is not None and not low <= value <= high
            cells.append(f"**{value:.3f}: missed**" if missed else number(value, ".3f"))
        rows.append((f"{what} ({bound['unit']})", " and ".join(wanted), *cells))
    return table(("what", "expected", *ARMS.values()), rows)


def by_setting(experiment: str, part: str, key: str, name: str, title: str) -> str:
    """Bits per byte on the CPU by a setting, of the methods that had it at more than one value."""
    rows_at: dict[float, Rows] = {}
    for pattern in ("cpu*", f"{name}_*_cpu"):
        for result in tables.results(f"experiments/{experiment}/results/{pattern}.json"):
            if part in result[key]:
                rows_at.setdefault(result[key][part][name], []).extend(result["rows"])
    if len(rows_at) < 2:
        return table((), ())
    found = {
        value: scores(rows, part, lambda row: row["bits_per_byte"])
        for value, rows in sorted(rows_at.items())
    }
    methods = set.intersection(*(set(values) for values in found.values()))
    order = [m for values in found.values() for m in values if m in methods]
    rows = [
        (MIXERS.get(m, m), *(number(found[value][m].get(0), ".3f") for value in found))
        for m in dict.fromkeys(order)
    ]
    return table((title, *(f"{value:,}" for value in found)), rows)


RATES = ("rate", "bits per byte at a learning rate of")
BLOCKS: dict[str, Callable[[], str]] = {
    f"{block.__name__}_{arm}": functools.partial(block, arm)
    for block in (two_mamba, ttt_kv_binding)
    for arm in ARMS
} | {
    "two_mamba_expected": functools.partial(expected, "two_mamba", two_mamba_values),
    "ttt_kv_binding_expected": functools.partial(expected, "ttt_kv_binding", ttt_kv_binding_values),
    "two_mamba_rates": functools.partial(by_setting, "two_mamba", "text", "runs", *RATES),
    "two_mamba_steps": functools.partial(
        by_setting, "two_mamba", "text", "runs", "steps", "bits per byte after so many steps"
    ),
    "ttt_kv_binding_rates": functools.partial(
        by_setting, "ttt_kv_binding", "quality", "settings", *RATES
    ),
}
