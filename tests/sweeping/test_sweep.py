"""A 2x3 sweep through the door: one run fails, the sweep is stopped, resumed, and retried."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from efficient_lm.sweeping.runs import load_sweep, plan
from efficient_lm.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
SWEEP = """
from efficient_lm.sweeping import Sweep, over, product

TINY = {"model.embed_dim": 16, "model.num_layers": 1, "data.sequence_length": 16,
        "data.source": "text", "data.paths": ("TEXT",), "data.batch_size": 4,
        "training.sample_tokens": 0, "evaluation.batches": 1, "evaluation.batch_size": 4}

def get_sweep():
    rates, seeds = over("optimizer.learning_rate", [1e-2, 1e-3]), over("training.seed", range(3))
    return Sweep("configs/debug.py", product((TINY,), rates, seeds))
"""


def start(sweep: Path, workdir: Path, *flags: str) -> subprocess.Popen:
    """The door in a process of its own, on one device."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "COLUMNS": "200",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "efficient_lm.sweep", f"--sweep={sweep}", f"--workdir={workdir}",
         "--parallel=2", *flags],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.slow
def test_a_sweep_fails_in_one_run_is_stopped_resumed_and_retried(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "text.txt").write_text("the same words again, and again. " * 200)
    sweep, workdir = tmp_path / "tiny.py", tmp_path / "sweep"
    sweep.write_text(SWEEP.replace("TEXT", str(tmp_path / "text.txt")))
    runs = plan(load_sweep(str(sweep)))
    broken = runs[1]
    workdir.mkdir()
    (workdir / broken.name).write_text("in the way")  # its directory cannot be made

    process = start(sweep, workdir)
    while process.poll() is None and not (workdir / runs[0].name / "summary.json").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "told to save and end" in output and f"--workdir={workdir}" in output.splitlines()[-1]

    first = {p: p.stat().st_mtime_ns for p in workdir.rglob("summary.json")}
    process = start(sweep, workdir)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert f"6 runs, {6 - 1 - len(first)} to start" in output
    line = f"{broken.name}: failed with exit code 4: cannot write to the work directory"
    assert line in output and "Traceback" not in output
    check_table(workdir, runs, failed=broken.name)

    (workdir / broken.name).unlink()
    process = start(sweep, workdir, "--retry")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "6 runs, 1 to start" in output
    assert all(path.stat().st_mtime_ns == then for path, then in first.items())
    check_table(workdir, runs, failed=None)


def check_table(workdir: Path, runs, failed: str | None) -> None:
    """results.csv has, for each run, its settings and what its own files say."""
    with (workdir / "results.csv").open() as file:
        table = {row["name"]: row for row in csv.DictReader(file)}
    assert list(table) == [run.name for run in runs] and len(runs) == 6
    seen = set()
    for run in runs:
        row = table[run.name]
        seen.add((float(row["optimizer.learning_rate"]), int(row["training.seed"])))
        assert float(row["optimizer.learning_rate"]) == run.settings["optimizer.learning_rate"]
        assert int(row["training.seed"]) == run.settings["training.seed"]
        if run.name == failed:
            assert (row["status"], row["exit_code"], row["loss"]) == ("failed", "4", "")
            assert row["error"].startswith("cannot write to the work directory")
            continue
        assert (row["status"], row["step"], row["error"]) == ("finished", "10", "")
        summary = json.loads((workdir / run.name / "summary.json").read_text())
        assert float(row["loss"]) == summary["valid"]["loss"]
        assert float(row["loss"]) == read_metrics(workdir / run.name, "valid")[-1]["loss"]
        config = json.loads((workdir / run.name / "config.json").read_text())
        assert config["training"]["seed"] == run.settings["training.seed"]
        assert config["model"]["embed_dim"] == 16
    assert seen == {(rate, seed) for rate in (1e-2, 1e-3) for seed in range(3)}
    losses = {name: float(row["loss"]) for name, row in table.items() if row["loss"]}
    assert len(set(losses.values())) == len(losses)
    best = json.loads((workdir / "results.json").read_text())["best"]
    assert best == min(losses, key=losses.get)
