"""The decode speed experiment runs, and its JSON says what was measured and how."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_experiment_runs_on_a_tiny_model(tmp_path):
    program = (
        "import jax; jax.config.update('jax_platforms', 'cpu'); import runpy; "
        "runpy.run_path('experiments/decode_speed/run.py', run_name='__main__')"
    )
    flags = ["--model=tiny", "--batch=2", "--context=64", "--chunks=1", "--roof_bytes=1000000"]
    done = subprocess.run(
        [sys.executable, "-c", program, *flags, f"--out={tmp_path}"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "tiny_cpu.json").read_text())
    assert result["device"] == "cpu" and result["versions"]["jax"]
    (row,) = result["rows"]
    # Weights of 2 bytes without the embedding; keys and values of (64 + 64 / 2) tokens by hand.
    layer = 64 * (64 + 2 * 32 + 64) + 3 * 64 * 128
    norms = 4 * 64 * (2 * 2 + 1)
    assert row["weight_bytes"] == 2 * (2 * layer + 512 * 64) + norms
    assert row["cache_bytes"] == 2 * 2 * (2 * 2 * 2 * 16 + 8) * 96
    assert row["tokens_per_second"] > 0 and row["fraction_of_read_roof"] > 0
    assert not any("[2,2,128,16]" in line for line in row["large_copies"])  # [B, K, S, H]
