"""The long-context experiment runs without a GPU, and its methods agree."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = ROOT / "experiments/untied_ulysses/run.py"


@pytest.mark.slow
def test_methods_give_one_loss(tmp_path):
    out = tmp_path / "x.json"
    command = [sys.executable, str(RUN), "--size=tiny", "--fake", "--devices=4", "--lengths", "64",
               "--methods", "ulysses", "upipe4", "ring", "--steps=1", f"--out={out}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row.get("error") for row in rows] == [None] * 3
    # The second step's loss, so gradients agree too.
    assert all(row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5) for row in rows)
    assert all(row["temporary_bytes"] > 0 and row["skipped"] == 0 for row in rows)


@pytest.mark.slow
def test_a_method_that_does_not_fit_is_a_row_and_no_crash(tmp_path):
    out = tmp_path / "x.json"
    command = [sys.executable, str(RUN), "--size=tiny", "--fake", "--devices=3", "--lengths", "66",
               "--methods", "ulysses", "--steps=0", f"--out={out}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert "8 heads" in row["error"]
