"""The figures that README.md leads with: a table, and the series of its picture."""

from collections.abc import Callable
from typing import Any

from docs import mixers, tables
from docs.tables import number, source, table, three_digits

OPS = {
    "gated_delta_rule": "gated delta rule",
    "delta_rule": "delta rule",
    "kda": "delta rule, vector decay",
    "scalar_decay": "scalar decay",
    "plain": "linear attention",
}
SHAPE = "B8_T4096"  # 16 heads of 128 features
Row = tuple[str, str, str, str, str]


def headlines() -> str:
    """Ours beside the best known implementation; rows of every kind, won or lost."""
    rows = [*_ops(), *_convolution(), *_attention(), *_steps(), *_hybrid(), *_decoding(), *_loss()]
    return table(("on one NVIDIA H200, but for the last", "ours", "beside", "ahead", "from"), rows)


def pairs() -> dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]]:
    """Rows of ours and of flash-linear-attention, by op and pass, where both have a time."""
    ours, theirs = mixers.sides().values()
    places = [(SHAPE, op, what) for op in OPS for what in ("forward", "forward_backward")]
    return {
        place[1:]: (ours[place], theirs[place])
        for place in places
        if all("milliseconds" in side.get(place, {}) for side in (ours, theirs))
    }


def speedups() -> list[tuple[str, str, float]]:
    """(op, pass, how many times faster than flash-linear-attention)."""
    return [
        (OPS[op], what.replace("_", " + "), theirs["milliseconds"] / ours["milliseconds"])
        for (op, what), (ours, theirs) in pairs().items()
    ]


def training_rates() -> dict[str, dict[int, float]]:
    """Tokens/s by mixer and length; of what was measured twice, the first file has it."""
    found: dict[str, dict[int, float]] = {}
    for result in tables.results("experiments/gated_deltanet/results/h200*.json"):
        for row in result["rows"]:
            if row["what"] == "speed" and "error" not in row:
                rates = found.setdefault(row["mixer"], {})
                rates.setdefault(row["length"], row["tokens_per_second"])
    return {mixer: dict(sorted(rates.items())) for mixer, rates in found.items()}


def recall() -> dict[str, dict[int, float]]:
    """Accuracy by mixer and number of pairs."""
    return {
        row["mixer"]: {int(pairs): value for pairs, value in row["accuracy"].items()}
        for result in tables.results("experiments/gated_deltanet/results/h200_recall.json")
        for row in result["rows"]
        if "error" not in row
    }


def ahead(ratio: float) -> str:
    """A ratio above 1 is ours ahead."""
    return number(ratio, ".2f", "x")


def _ops() -> list[Row]:
    rows = []
    for (op, what), (ours, theirs) in pairs().items():
        times = [row["milliseconds"] for row in (ours, theirs)]
        links = dict.fromkeys(row["from"] for row in (ours, theirs))
        rows.append((
            f"{OPS[op]}, {what.replace('_', ' + ')}", f"{three_digits(times[0])} ms",
            f"flash-linear-attention {three_digits(times[1])} ms", ahead(times[1] / times[0]),
            ", ".join(links),
        ))  # fmt: skip
    return rows


def _convolution() -> list[Row]:
    """That of the values of Gated DeltaNet; JAX's own depthwise convolution is slower than both."""
    rows = []
    for result in tables.results("pallas_kernels/results/short_convolution_nvidia_h200.json"):
        for what in ("forward", "forward_backward"):
            times = {
                row["contestant"]: row["milliseconds"]
                for row in result["rows"]
                if (row["case"], row["pass"]) == ("gated_deltanet_value", what)
            }
            ours, peer = times["ours:auto"], times["ours:xla"]
            rows.append((
                f"short convolution and SiLU, {what.replace('_', ' + ')}",
                f"{three_digits(ours)} ms", f"shifted sums by XLA {three_digits(peer)} ms",
                ahead(peer / ours), source(result),
            ))  # fmt: skip
    return rows


def _attention() -> list[Row]:
    """Softmax attention is cuDNN's, so that what we add to it is all that there is to see."""
    rows = []
    for result in tables.results("pallas_kernels/results/attention_nvidia_h200.json"):
        for what in ("forward", "forward_backward"):
            times = {
                row["contestant"]: row["milliseconds"]
                for row in result["rows"]
                if (row["case"], row.get("pass")) == ("h128_4k", what) and "milliseconds" in row
            }
            ours, peer = times["ours:auto"], times["jax.nn:cudnn"]
            rows.append((
                f"attention by cuDNN, {what.replace('_', ' + ')}", f"{three_digits(ours)} ms",
                f"jax.nn with cuDNN {three_digits(peer)} ms", ahead(peer / ours), source(result),
            ))  # fmt: skip
    return rows


def _steps() -> list[Row]:
    rows = []
    for result in tables.results("experiments/nanogpt/results/speed_h200_side_by_side.json"):
        best = {
            who: max(
                row.get("tokens_per_second", 0) for row in result["results"] if row["what"] == who
            )
            for who in ("ours", "nanoGPT")
        }
        rows.append((
            "training GPT-2 124M", f"{best['ours']:,.0f} tokens/s",
            f"nanoGPT, torch.compile {best['nanoGPT']:,.0f}", ahead(best["ours"] / best["nanoGPT"]),
            source(result),
        ))  # fmt: skip
    return rows


def _hybrid() -> list[Row]:
    """A later file, with kernels of later, has the lengths that it has."""
    rows = {}
    for result in tables.results("experiments/gated_deltanet/results/h200_speed*.json"):
        rates = {(row["mixer"], row["length"]): row["tokens_per_second"] for row in result["rows"]}
        for length in (2048, 8192, 32_768):
            if ("hybrid", length) in rates:
                ours, full = rates["hybrid", length], rates["attention", length]
                rows[length] = (
                    f"training 0.94 B, 3:1 hybrid, rows of {length // 1024}k",
                    f"{ours:,.0f} tokens/s", f"attention alone, cuDNN {full:,.0f}",
                    ahead(ours / full), source(result),
                )  # fmt: skip
    return list(rows.values())


def _decoding() -> list[Row]:
    return [
        (
            f"decoding 8 B shapes, batch {row['batch']}",
            f"{row['tokens_per_second']:,.0f} tokens/s",
            f"its bytes at the rate of a large copy {row['tokens_per_second'] / fraction:,.0f}",
            ahead(fraction), source(result),
        )
        for result in tables.results("experiments/decode_speed/results/*.json")
        for row in result["rows"]
        if (fraction := row["fraction_of_copy_roof"])
    ]  # fmt: skip


def _loss() -> list[Row]:
    rows = []
    for result in tables.results("experiments/nanogpt/results/cpu.json"):
        losses = {who: [row["valid_loss"] for row in result["results"] if row["what"] == who]
                  for who in ("ours", "nanoGPT")}  # fmt: skip
        ours, peer = max(losses["ours"]), min(losses["nanoGPT"])
        rows.append((
            "tinyshakespeare, nanoGPT's CPU budget", f"valid loss {ours:.3f}",
            f"nanoGPT {peer:.3f}",
            number(peer - ours, ".2f", " nats"), source(result),
        ))  # fmt: skip
    return rows


SERIES = (speedups, training_rates, recall)  # of the picture
BLOCKS: dict[str, Callable[[], str]] = {"headlines": headlines}
