"""Blocks of README.md made from committed results; a file that is missing gives no rows."""

import ast
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "experiments/quickstart/results/cpu.json"
CONFIG_FIELDS = ("Device", "Expected time", "Expected metric")
NOT_MEASURED = "_Not measured yet._"


def results(pattern: str) -> list[dict[str, Any]]:
    """The JSON objects of the files that match, in order of their names, with their `file`."""
    found = []
    for path in sorted(ROOT.glob(pattern)):
        content = json.loads(path.read_text())
        found.append(content | {"file": path.relative_to(ROOT).as_posix()})
    return found


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> str:
    """A Markdown table, all columns after the first `left` ones aligned to the right."""
    rows = [[str(cell) for cell in row] for row in rows]
    if not rows:
        return NOT_MEASURED
    if any(len(row) != len(header) for row in rows):
        raise ValueError(f"a row has not the {len(header)} cells of the header {header}")
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(header), rule, *rows])


def number(value: float | int | None, form: str, unit: str = "") -> str:
    """A formatted number with its unit; a dash for none."""
    return "-" if value is None else f"{value:{form}}{unit}"


def three_digits(value: float | int | None) -> str:
    """Three significant digits, never an exponent: 0.0123, 4.50, 45.0, 12,345."""
    if value is None or value >= 100:
        return number(value, ",.0f")
    return f"{value:#.3g}"


def milliseconds(seconds: float | None) -> str:
    """Seconds as milliseconds."""
    return three_digits(None if seconds is None else 1e3 * seconds)


def source(result: dict[str, Any]) -> str:
    """A link to the file of a result."""
    return f"[{Path(result['file']).stem}]({result['file']})"


def short(message: str, limit: int = 80) -> str:
    """One cell from an error message."""
    line = " ".join(message.replace("|", "/").split())
    return f"failed: {line if len(line) <= limit else line[: limit - 1] + '…'}"


def device(result: dict[str, Any]) -> str:
    """The device of an experiment, without the version of its driver."""
    return result["device"].partition(",")[0]


def versions(result: dict[str, Any]) -> str:
    """The versions that matter, by name."""
    found = result.get("versions") or result["environment"]["versions"]
    return ", ".join(f"{name} {found[name]}" for name in ("jax", "torch") if name in found)


def quickstart() -> str:
    """What the first command of the README gave."""
    if not QUICKSTART.exists():
        return NOT_MEASURED
    result = json.loads(QUICKSTART.read_text())
    summary = result["summary"]
    load = result["load_at_end"]
    busy = f" that had other work too (load {load:.0f})" if load > 4 else ""
    return "\n".join(
        [
            f"{summary['parameters']:,} parameters, {summary['step']} steps, "
            f"{result['seconds']:.0f} s in all on {result['device']}{busy} "
            f"({versions(result)}): **{summary['valid']['bits_per_byte']:.2f} bits per byte** on "
            "files it has not seen. Its sample, untouched:",
            "```python",
            (result["sample"]["prompt"] + result["sample"]["text"]).replace("```", "'''").rstrip(),
            "```",
        ]
    )


def attempted(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of what was started: failures stay, what found no time left is no result."""
    return [row for row in result["results"] if row.get("error") != "no time left"]


def quality() -> str:
    """Validation loss at nanoGPT's budgets."""
    rows = []
    for result in results("experiments/nanogpt/results/*.json"):
        if result["arm"] not in ("cpu", "gpu"):
            continue
        for row in attempted(result):
            who = ", ".join(filter(None, [row["what"], row.get("name")]))
            start = [device(result), result["arm"], who]
            if "valid_loss" not in row:
                rows.append([*start, short(row["error"]), "", "", "", source(result)])
                continue
            rows.append(
                [
                    *start,
                    number(row["valid_loss"], ".4f"),
                    number(row.get("valid_loss_best"), ".4f"),
                    milliseconds(row.get("step_seconds")),
                    number(row.get("seconds"), ",.0f"),
                    source(result),
                ]
            )
    header = ["device", "recipe", "who", "valid loss", "best", "ms a step", "s in all", "from"]
    return table(header, rows, left=3)


def training_speed() -> str:
    """Training steps of GPT-2 124M shapes beside nanoGPT under torch.compile."""
    rows = []
    for result in results("experiments/nanogpt/results/*.json"):
        if result["arm"] != "speed":
            continue
        sheet = any(kind in result["device"] for kind in ("H100", "H200"))  # that of the formula
        for row in attempted(result):
            start = [device(result), row["what"], row["name"]]
            if "step_seconds" not in row:
                rows.append([*start, short(row["error"]), "", "", "", source(result)])
                continue
            rows.append(
                [
                    *start,
                    milliseconds(row["step_seconds"]),
                    number(row.get("tokens_per_second"), ",.0f"),
                    number(row.get("mfu_data_sheet") if sheet else None, ".1%"),
                    number(row.get("mfu_measured"), ".1%"),
                    source(result),
                ]
            )
    header = ["device", "who", "variant", "ms a step", "tokens/s", "MFU, data sheet",
              "MFU, measured roof", "from"]  # fmt: skip
    return table(header, rows, left=3)


def decoding() -> str:
    """How near decoding comes to the memory bandwidth."""
    rows = [
        [
            result["device"],
            result["model"]["name"],
            row["batch"],
            f"{row['context']:,}",
            three_digits(row["step_milliseconds"]),
            number(row["tokens_per_second"], ",.0f"),
            number(row["bytes_per_second"] / 1e9, ",.0f"),
            number(row["fraction_of_copy_roof"], ".0%"),
            number(row["fraction_of_data_sheet"], ".0%"),
            source(result),
        ]
        for result in results("experiments/decode_speed/results/*.json")
        for row in result["rows"]
    ]
    header = ["device", "shapes", "batch", "context", "ms a step", "tokens/s", "GB/s",
              "of a copy", "of the data sheet", "from"]  # fmt: skip
    return table(header, rows, left=2)


def kernels() -> str:
    """Each op beside its peers: what "auto" takes against the fastest of the others."""
    rows = []
    for result in results("pallas_kernels/results/*.json"):
        kind = result["environment"]["device"]["kind"]
        groups: dict[tuple, list[dict]] = {}
        for row in result["rows"]:
            groups.setdefault((row["op"], row["case"], row.get("pass")), []).append(row)
        for (op, case, label), members in groups.items():
            rows += _contest(kind, op, case, label, members, source(result))
    header = ["device", "op", "case", "pass", "ours", "ms", "fastest peer", "ms",
              "peer / ours", "error", "from"]  # fmt: skip
    return table(header, rows, left=5)


def _contest(kind, op, case, label, members, link) -> list[list[str]]:
    """One row for a case and pass; none for a contestant that failed before any pass."""
    ours = next((m for m in members if m["contestant"] == "ours:auto"), None)
    if ours is None:
        return []
    start = [kind, op, case, (label or "-").replace("_", " + ")]
    if "milliseconds" not in ours:
        return [[*start, "auto", short(ours["error"]), "", "", "", "", link]]
    chosen = ours.get("auto", ": auto").partition(": ")[2].partition(";")[0]
    peers = [m for m in members
             if "milliseconds" in m and not m["contestant"].startswith("ours:")]  # fmt: skip
    best = min(peers, key=lambda m: m["milliseconds"], default=None)
    errors = ours.get("relative_errors")
    return [
        [
            *start,
            chosen,
            three_digits(ours["milliseconds"]),
            best["contestant"] if best else "-",
            three_digits(best["milliseconds"] if best else None),
            number(best["milliseconds"] / ours["milliseconds"] if best else None, ".2f", "x"),
            number(max(errors) if errors else None, ".1e"),
            link,
        ]
    ]


def configs() -> str:
    """The configs, from their docstrings."""
    rows = []
    for path in sorted((ROOT / "configs").glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text()))
        found = re.findall(r"^([A-Z][a-z ]+): (.*(?:\n(?![A-Z][a-z ]+: ).+)*)", text, re.MULTILINE)
        fields = {name: " ".join(value.split()).rstrip(".") for name, value in found}
        start = [f"[{path.stem}](configs/{path.name})", text.partition("\n")[0].rstrip(".")]
        rows.append([*start, *(fields[name] for name in CONFIG_FIELDS)])
    header = ["config", "what", *(name.lower() for name in CONFIG_FIELDS)]
    return table(header, rows, left=len(header))


def long_context() -> str:
    """Steps of Llama-3-8B layers with embedding and loss, by length and method."""
    rows = [
        (
            f"{row['devices']} x {row['device']}", row["layers"], f"{row['length'] // 1024}k",
            row["method"],
            number(row.get("step_seconds"), ".2f"), number(row.get("tokens_per_second"), ",.0f"),
            number(row["temporary_bytes"] / 1e9, ".1f"),
            number(row["peak_bytes"] / 1e9 if "peak_bytes" in row else None, ".1f"),
            number(row["host_bytes"] / 1e9 if row.get("host_bytes") else None, ".1f"),
            source(result),
        )
        for result in results("experiments/untied_ulysses/results/*.json")
        for row in result["rows"]
        if row["what"] == "long context" and row["size"] == "8b" and "error" not in row
    ]  # fmt: skip
    header = ("devices", "layers", "tokens", "method", "s/step", "tokens/s", "temporary GB",
              "peak GB", "host GB", "")  # fmt: skip
    return table(header, rows, left=4)


def fsdp_scaling() -> str:
    """The 1B model over more and more devices, the same rows on each."""
    rows = []
    for result in results("experiments/untied_ulysses/results/*.json"):
        runs = [row for row in result["rows"] if row["what"] == "scaling" and "error" not in row]
        alone = [row["tokens_per_second"] for row in runs if row["devices"] == 1]
        rows += [
            (
                f"{row['devices']} x {row['device']}", number(row["tokens_per_second"], ",.0f"),
                number(row["tokens_per_second"] / row["devices"] / max(alone), ".1%"),
                number(row["peak_bytes"] / 1e9, ".1f"), source(result),
            )
            for row in runs
        ]  # fmt: skip
    return table(("devices", "tokens/s", "of one device, each", "peak GB", ""), rows)


def explanation() -> str:
    """What `explain` says on a CPU."""
    import jax
    import jax.numpy as jnp

    from efficient_lm import masks
    from pallas_kernels.attention import explain

    q = jax.ShapeDtypeStruct((8, 1024, 16, 128), jnp.bfloat16)
    k = v = jax.ShapeDtypeStruct((8, 1024, 4, 128), jnp.bfloat16)
    choice = str(explain(q, k, v, mask=masks.SlidingWindow(512).lower()))
    return "\n".join(["```text", choice.replace("; ", ";\n  "), "```"])


BLOCKS: dict[str, Callable[[], str]] = {
    "quickstart": quickstart,
    "quality": quality,
    "training_speed": training_speed,
    "decoding": decoding,
    "kernels": kernels,
    "long_context": long_context,
    "fsdp_scaling": fsdp_scaling,
    "configs": configs,
    "explanation": explanation,
}
