"""Plans of steps on TPU slices, and the table of the README: `run.py [NAME ...]`.

Without names only the table is written anew. A plan takes one to four minutes on two cores.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"
START, END = "<!-- plans -->", "<!-- end of plans -->"

LLAMA, QWEN = "--config=configs/llama3.py:8b", "--config=configs/qwen3_5.py:9b"


def split(data: int, fsdp: int, sequence: int = 1, tensor: int = 1) -> list[str]:
    """Flags of a mesh."""
    sizes = {"data": data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}
    return [f"--config.parallel.{axis}={size}" for axis, size in sizes.items()]


def batch(rows: int, length: int = 8192) -> list[str]:
    """Flags of a batch."""
    return [f"--config.data.batch_size={rows}", f"--config.data.sequence_length={length}"]


PLANS = {
    "v5e_16x16": [LLAMA, "--topology=v5e:16x16", *batch(256), *split(1, 256)],
    "v5p_8x8x8": [LLAMA, "--topology=v5p:8x8x8", *batch(512), *split(8, 64)],
    "v5p_8x8x8_fsdp_512": [LLAMA, "--topology=v5p:8x8x8", *batch(512), *split(1, 512)],
    "tpu7x_4x4x4": [LLAMA, "--topology=tpu7x:4x4x4", *batch(512), *split(2, 64)],
    "v5p_4x4x4_qwen3_5": [QWEN, "--topology=v5p:4x4x4", *batch(256), *split(1, 64)],
    "v5e_8x8_too_large": [LLAMA, "--topology=v5e:8x8", *batch(512), *split(1, 64)],
    "v5e_2x4_decode": [LLAMA, "--topology=v5e:2x4", "--decode", "--batch=16", "--context=8192",
                       *split(1, 1, tensor=8)],
}  # fmt: skip


def run(name: str) -> None:
    """Make one plan and keep its JSON and picture."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "efficient_lm.plan", *PLANS[name], f"--out={directory}"]
        subprocess.run(command, check=True, cwd=ROOT)
        for suffix in ("json", "png"):
            kept = RESULTS / f"{name}.{suffix}"
            kept.write_bytes((Path(directory) / f"plan.{suffix}").read_bytes())


def table() -> str:
    """Rows of the kept plans."""
    lines = [
        "| plan | of | mesh | compiled in | a device | step at least | MFU at most | most bytes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in PLANS:
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        plan = json.loads(path.read_text())
        memory, roofline = plan["memory"], plan["roofline"]
        model = PLANS[name][0].removeprefix("--config=configs/").replace(".py:", " ")
        mesh = ", ".join(f"{axis} {n}" for axis, n in plan["mesh"].items() if n > 1)
        size = f"{memory['total'] / 2**30:.2f} of {memory['available'] / 2**30:.2f} GiB"
        if not memory["fits"]:
            size += f", does not fit: `{plan['advice']}`"
        moved = max(plan["collectives"]["rows"], key=lambda row: row["bytes"])
        lines.append(
            f"| [{plan['step']['kind']}, {plan['topology']['name']}](results/{name}.json) "
            f"| {model} | {mesh} | {plan['seconds']['compile']:.0f} s | {size} "
            f"| {1e3 * roofline['seconds']['overlapped']:.1f} ms "
            f"| {100 * roofline['mfu_bound']:.1f}% "
            f"| {moved['kind']} over {moved['axes']}, {moved['bytes'] / 2**30:.1f} GiB |"
        )
    return "\n".join(lines)


def main() -> None:
    """Make the named plans, then the table."""
    unknown = [name for name in sys.argv[1:] if name not in PLANS]
    if unknown:
        raise SystemExit(f"unknown plan {unknown[0]!r}; known: {', '.join(PLANS)}")
    for name in sys.argv[1:]:
        run(name)
    before, _, rest = README.read_text().partition(START)
    README.write_text(f"{before}{START}\n{table()}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
