"""The experiment on test-time training runs in small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[2] / "experiments/ttt_kv_binding/run.py"


@pytest.mark.slow
def test_parts_give_rows(tmp_path):
    out = tmp_path / "x.json"
    command = [sys.executable, str(RUN), "--arm=smoke", "--steps=2",
               "--methods", "baseline", f"--out={out}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *timed, trained = json.loads(out.read_text())["rows"]
    assert len(timed) == 2 * (2 + 2 * 5)  # steps without and with a parallel form
    assert all(row["tokens_per_second"] > 0 for row in timed)
    assert set(trained["bits_per_byte_by_inner_steps"]) == {"1", "2"}
    assert 5 < trained["bits_per_byte"] < 9
