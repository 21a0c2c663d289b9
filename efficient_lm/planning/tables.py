"""A plan as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from efficient_lm.planning.topologies import GIB


def text(plan: Mapping[str, Any]) -> str:
    """The tables that the command prints."""
    parts = [_title(plan), _memory(plan), _work(plan), _collectives(plan), _times(plan)]
    parts += [f"note: {note}" for note in plan["notes"]]
    return "\n\n".join(parts)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; all but the first and last are set to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def one(line):
        cells = [
            cell.ljust(width) if i in (0, len(line) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([one(header), "  ".join("-" * w for w in widths), *map(one, rows)])


def size(count: float | int) -> str:
    """Bytes in a readable unit."""
    for unit, scale in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float | int | None) -> str:
    """Seconds in a readable unit; a question mark for None."""
    if seconds is None:
        return "?"
    if seconds < 1e-4:
        return f"{1e6 * seconds:.2f} us"
    return f"{seconds:.3f} s" if seconds >= 1 else f"{1e3 * seconds:.2f} ms"


def parameters(plan: Mapping[str, Any]) -> str:
    """The size of the model, in words."""
    count = plan["step"]["parameters"]
    for unit, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g}{unit} parameters"
    return f"{count} parameters"


def verdict(memory: Mapping[str, Any]) -> str:
    """Whether the step fits, in one line."""
    if memory["available"] is None:
        return f"needs {size(memory['total'])} a device; how much there is, is not known"
    against = f"{size(memory['total'])} of {size(memory['available'])} a device"
    if memory["fits"]:
        return f"fits: {against}"
    return f"does not fit: {against}; the largest term is {memory['largest']}"


def _title(plan) -> str:
    topology, step = plan["topology"], plan["step"]
    mesh = ", ".join(f"{axis}={n}" for axis, n in plan["mesh"].items() if n > 1) or "one device"
    what = f"{step['kind']} step of {parameters(plan)}"
    chips = f"{topology['devices']} devices ({topology['device']})"
    rows = f"batch {step['batch']} x {step['length']} tokens"
    if step["kind"] == "train":
        rows += f", microbatches {step['accumulation_steps']}, remat {step['remat']}"
    else:
        rows = f"{step['batch']} rows, context {step['length']}"
    times = plan["seconds"]
    return (
        f"{what} on {topology['name']}: {chips}, mesh {mesh}; {rows}\n"
        f"traced in {times['trace']:.1f} s, compiled in {times['compile']:.1f} s"
    )


def _memory(plan) -> str:
    memory = plan["memory"]
    share = memory["available"] or memory["total"]
    rows = [
        [row["kind"], size(row["bytes"]), f"{100 * row['bytes'] / share:.1f}%", row["source"]]
        for row in memory["rows"]
    ]
    rows.append(["total", size(memory["total"]), f"{100 * memory['total'] / share:.1f}%", ""])
    lines = [table(["memory of a device", "bytes", "share", "source"], rows), verdict(memory)]
    if memory["host"]:
        lines.append(f"in the memory of the host, for each device: {size(memory['host'])}")
    if not memory["fits"]:
        lines += [
            f"  {size(row['bytes'])}: {row['arrays'][:100]}"
            for row in memory["largest_temporaries"][:3]
        ]
        lines.append(f"nearest change that would fit: {plan['advice']}")
    return "\n".join(lines)


def search_text(rows: Sequence[Mapping[str, Any]], shown: int = 12) -> str:
    """The first rows of `search.search`, best first."""
    lines = []
    for row in rows[:shown]:
        mesh = ", ".join(f"{axis}={n}" for axis, n in row["mesh"].items() if n > 1)
        seconds, plan = row["seconds"], row.get("plan")
        mfu = f"{100 * plan['roofline']['mfu_bound']:.1f}%" if plan else ""
        lines.append(
            [mesh or "one device", str(row["accumulation_steps"]), row["remat"],
             "yes" if row["fits"] else "no", size(row["memory"]), duration(seconds["compute"]),
             duration(seconds["memory"]), duration(seconds["interconnect"]),
             duration(seconds["overlapped"]), duration(seconds["serial"]), mfu,
             "compiled" if plan else "estimated"]
        )  # fmt: skip
    header = ["mesh", "microbatches", "remat", "fits", "a device", "compute", "memory", "links",
              "overlapped", "serial", "MFU", "source"]  # fmt: skip
    best = rows[0]
    end = f"{len(rows)} variants; times are lower bounds"
    if best["fits"]:
        end += f". The first: {' '.join(best['flags']) or 'as given'}"
    else:
        end += "; none fits"
    return table(header, lines) + "\n" + end


def _work(plan) -> str:
    flops = plan["flops"]
    kinds = sorted(flops["by_kind"].items(), key=lambda item: -item[1])
    rows = [[kind, f"{value / 1e12:,.3f}", flops["source"]] for kind, value in kinds]
    rows.append(["executed, all", f"{flops['executed'] / 1e12:,.3f}", ""])
    each = {"train": 6, "decode": 2}[plan["step"]["kind"]]
    model = f"{each} a weight and the cores of mixers, nothing twice"
    rows.append(["of the model", f"{flops['model'] / 1e12:,.3f}", model])
    return table(["work of a device", "TFLOP", "source"], rows)


def _collectives(plan) -> str:
    rows = [
        [f"{row['kind']} over {row['axes']}", f"{row['count']:,}", size(row["bytes"]),
         duration(row["seconds"])]
        for row in plan["collectives"]["rows"]
    ]  # fmt: skip
    rows = rows or [["none", "", "", ""]]
    source = f"source: {plan['collectives']['source']}"
    return table(["collectives of a step", "number", "bytes", "at least"], rows) + "\n" + source


def _times(plan) -> str:
    roofline = plan["roofline"]
    seconds = roofline["seconds"]
    rate = plan["topology"]["flops_per_second"] / 1e12
    rows = [
        ["compute", duration(seconds["compute"]), f"executed FLOPs at {rate:,.3g} TFLOP/s"],
        ["memory", duration(seconds["memory"]), size(plan["memory_traffic"]["bytes"])],
        ["interconnect", duration(seconds["interconnect"]), "all collectives, one after another"],
        ["step, all overlapped", duration(seconds["overlapped"]),
         f"MFU at most {100 * roofline['mfu_bound']:.1f}%, "
         f"{roofline['tokens_per_second']:,.0f} tokens/s"],
        ["step, nothing overlapped", duration(seconds["serial"]),
         f"MFU {100 * roofline['mfu_without_overlap']:.1f}%"],
    ]  # fmt: skip
    return table(["roofline", "at least", ""], rows)
