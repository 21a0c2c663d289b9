"""Train configs/quickstart.py as the README does, and keep what came of it as JSON.

python experiments/quickstart/run.py [--out=experiments/quickstart/results/cpu.json]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import efficient_lm
from efficient_lm.training.manifest import versions
from efficient_lm.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
COMMAND = "python -m efficient_lm.train --config=configs/quickstart.py --workdir=runs/quickstart"
CURVES = ("step", "split", "loss", "bits_per_byte", "tokens_per_second", "learning_rate")
UNSEEN = '''
def count_words(lines):
    """Return a dictionary from each word to how often it occurs."""
    counts = {}
    for line in lines:
        for word in line.split():
            counts[word] = counts.get(word, 0) + 1
    return counts
'''
SUMMARY = ("step", "valid", "parameters", "compile_seconds", "run_seconds", "skipped_updates")


def main() -> int:
    """Run the door in a temporary work directory; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu.json")
    out = parser.parse_args().out.resolve()
    with tempfile.TemporaryDirectory() as directory:
        workdir = Path(directory) / "quickstart"
        words = [sys.executable, *COMMAND.replace("runs/quickstart", str(workdir)).split()[1:]]
        began = time.perf_counter()
        code = subprocess.run(words, cwd=ROOT, check=False).returncode
        seconds = time.perf_counter() - began
        if code:
            return code
        summary = json.loads((workdir / "summary.json").read_text())
        sample = json.loads((workdir / "samples.jsonl").read_text().splitlines()[-1])
        surprise = bits_of_bytes(workdir, UNSEEN)
        metrics = [
            {key: round(row[key], 6) if isinstance(row[key], float) else row[key]
             for key in CURVES if key in row}
            for row in read_metrics(workdir)
        ]  # fmt: skip
    result = {
        "command": COMMAND,
        "device": f"{len(os.sched_getaffinity(0))} x {processor()}",
        "load_at_end": round(os.getloadavg()[1], 1),  # above the cores: other work slowed it down
        "versions": versions() | {"python": platform.python_version()},
        "seconds": round(seconds, 1),
        "summary": {key: summary[key] for key in SUMMARY if key in summary},
        "sample": sample,
        "surprise": {"text": UNSEEN[1:], "bits": surprise},
        "metrics": metrics,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {out}")
    return 0


def bits_of_bytes(workdir: Path, text: str) -> list[float]:
    """Minus log2 of the probability of each byte of `text` after the first."""
    model, tokenizer, _ = efficient_lm.load(workdir)
    ids = tokenizer.encode(text)
    log_probabilities = jax.nn.log_softmax(model(ids[None, :-1]).logits[0])
    bits = -log_probabilities[jnp.arange(len(ids) - 1), ids[1:]] / jnp.log(2.0)
    return [round(float(value), 3) for value in bits]


def processor() -> str:
    """The name of the processor where the system tells it, else its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
