"""Blocks about recurrent ops and the mixers that are made of them, from committed results."""

from collections.abc import Callable
from typing import Any

from docs import tables
from docs.tables import device, number, short, source, table, three_digits


def sides() -> dict[str, dict[tuple[str, str, str], dict[str, Any]]]:
    """Rows of "ours" and "fla" by shape, op and pass, with where they are `from`.

    Of a row that was measured twice, the last file has it.
    """
    found: dict[str, dict[tuple[str, str, str], dict[str, Any]]] = {"ours": {}, "fla": {}}
    for result in tables.results("experiments/recurrence_speed/results/*.json"):
        for side in found.keys() & result.keys():
            for row in result[side]["rows"]:
                place = row["shape"], row["op"], row["pass"]
                found[side][place] = row | {"from": source(result)}
    return found


def recurrences() -> str:
    """Recurrent ops beside flash-linear-attention's."""
    all_ours, all_theirs = sides().values()
    rows = []
    for place, ours in all_ours.items():
        shape, op, name = place
        if name == "errors":
            continue
        errors = all_ours.get((shape, op, "errors"), {}).get("relative_errors")
        if errors and name == "forward":
            errors = errors[:1]
        peer = all_theirs.get(place, {})
        time, theirs = ours.get("milliseconds"), peer.get("milliseconds")
        links = dict.fromkeys(x["from"] for x in (ours, peer) if x)
        rows.append((
            shape, op, name.replace("_", " + "), three_digits(time),
            short(peer["error"], 40) if "error" in peer else three_digits(theirs),
            number(theirs / time if theirs and time else None, ".2f", "x"),
            number(max(errors) if errors else None, ".1e"), ", ".join(links),
        ))  # fmt: skip
    header = ("shape", "op", "pass", "ours, ms", "fla, ms", "fla / ours", "error", "from")
    return table(header, rows, left=3)


def mixers() -> str:
    """What models of one size with different mixers learn: text, and recall by number of pairs."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for result in tables.results("experiments/gated_deltanet/results/*.json"):
        for row in result["rows"]:
            if row["what"] in ("language", "recall") and "error" not in row:
                place = (device(result), row["mixer"], source(result))
                found.setdefault(place, {})[row["what"]] = row
    rows = []
    for (where, mixer, link), entry in found.items():
        recall = entry.get("recall", {"accuracy": {}})
        accuracy = ", ".join(f"{pairs}: {a:.3f}" for pairs, a in recall["accuracy"].items())
        rows.append((
            where, mixer, accuracy or "-", number(recall.get("memory_bytes"), ","),
            number(entry.get("language", {}).get("bits_per_byte"), ".3f"), link,
        ))  # fmt: skip
    header = ("device", "mixer", "recall by pairs", "memory bytes", "bits per byte", "from")
    return table(header, rows, left=3)


def mixer_speed() -> str:
    """Training steps and decoding of models of one size with different mixers, by length."""
    rows = []
    for result in tables.results("experiments/gated_deltanet/results/*.json"):
        speeds = [row for row in result["rows"] if row["what"] in ("speed", "decode")]
        for row in sorted(speeds, key=lambda row: row.get("length", row.get("context"))):
            length = row.get("length", row.get("context"))
            start = (device(result), {"speed": "training"}.get(row["what"], "decoding"))
            if "error" in row:
                rows.append((*start, row["mixer"], f"{length:,}", short(row["error"], 40), "-", "-",
                             source(result)))  # fmt: skip
                continue
            rate = row["tokens_per_second"]
            full = [r["tokens_per_second"] for r in speeds
                    if (r["mixer"], r["what"]) == ("attention", row["what"]) and "error" not in r
                    and r.get("length", r.get("context")) == length]  # fmt: skip
            rows.append((
                *start, row["mixer"], f"{length:,}", number(rate, ",.0f"),
                number(rate / full[-1] if full else None, ".2f", "x"),
                number(row.get("state_bytes"), ","), source(result),
            ))  # fmt: skip
    header = ("device", "what", "mixer", "tokens", "tokens/s", "of attention's", "state bytes",
              "from")  # fmt: skip
    return table(header, rows, left=3)


BLOCKS: dict[str, Callable[[], str]] = {
    "recurrences": recurrences,
    "mixers": mixers,
    "mixer_speed": mixer_speed,
}
