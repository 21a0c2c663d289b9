"""The experiment on test-time training runs in small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from docs import experiments

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
    assert set(trained["inner_loss_by_inner_steps"]) == {"1", "2"}
    assert 5 < trained["bits_per_byte"] < 9


def test_all_that_is_expected_is_compared_with_what_came(monkeypatch):
    """In the table of the README; rows that failed, and methods that are missing, give none."""
    for name, values in (
        ("ttt_kv_binding", experiments.ttt_kv_binding_values),
        ("two_mamba", experiments.two_mamba_values),
    ):
        bounds = json.loads((RUN.parents[1] / name / "expected.json").read_text())
        assert set(bounds) == set(values([]))
        assert set(values([]).values()) == {None}
        failed = {"part": "quality", "method": "ascent", "seed": 0, "error": "out of memory"}
        rows = [
            failed,
            failed | {"method": "baseline", "seed": 1},
        ]
        assert values(rows) == values([])
    rows = [
        {"part": "quality", "method": method, "seed": seed, "bits_per_byte": bits}
        for method, seed, bits in (
            ("baseline", 0, 2.0), ("baseline", 1, 3.0), ("ascent", 1, 3.25), ("ascent", 2, 9.0),
        )
    ]  # fmt: skip
    monkeypatch.setattr(experiments, "rows_of", lambda experiment, arm: rows)
    shown = experiments.BLOCKS["ttt_kv_binding_expected"]()
    assert "| at least -0.03 and at most 0.03 | **0.250: missed** | **0.250: missed** |" in shown
