"""The comparison with nanoGPT runs end to end at tiny shapes, and its numbers are right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "nanogpt"
TEXT = "To be, or not to be, that is the question:\n" * 60


def run(*arguments: str) -> subprocess.CompletedProcess:
    """The experiment's command."""
    command = [sys.executable, str(FOLDER / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture
def speed(monkeypatch):
    """The module that times steps."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import speed

    yield speed
    for name in ("speed", "record"):
        sys.modules.pop(name)


class Results:
    """What `speed` needs of a Record."""

    def __init__(self, **values):
        self.values, self.rows = values, []

    def add(self, row):
        self.rows.append(row)

    def elapsed(self):
        return 0.0


@pytest.mark.slow
def test_quality_arm_trains_through_the_door(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "cpu.json"
    done = run("cpu", "--smoke", "--seeds=1", f"--data={tmp_path}/text.txt", f"--out={out}")
    assert done.returncode == 0, done.stderr
    values = json.loads(out.read_text())
    (row,) = values["results"]
    assert "error" not in row, row
    assert 0 < row["valid_loss_best"] <= row["valid_loss"] < 5
    assert row["step_seconds"] > 0
    assert values["command"].split()[-3:-1] == ["--seeds=1", f"--data={tmp_path}/text.txt"]


@pytest.mark.slow
def test_speed_arm_times_every_smoke_variant(tmp_path):
    out = tmp_path / "speed.json"
    done = run("speed", "--smoke", f"--out={out}")
    assert done.returncode == 0, done.stderr
    values = json.loads(out.read_text())
    assert [row.get("error") for row in values["results"]] == [None] * 2
    assert {row["scan"] for row in values["results"]} == {True, False}
    assert values["measured_roof_flops"] > 0


def test_a_crash_costs_one_variant_only(speed, tmp_path):
    script = tmp_path / "crash.py"
    script.write_text(
        "import json, os, sys\n"
        "for variant in json.load(sys.stdin):\n"
        "    if variant['name'] == 'bad':\n"
        "        print('out of memory', file=sys.stderr, flush=True); os._exit(9)\n"
        "    print(json.dumps({'name': variant['name']}), flush=True)\n"
    )
    variants = [speed.make_variant(speed.SMOKE_SHAPE, name, {}, "") for name in ("a", "bad", "b")]
    result = Results()
    speed.run_variants(
        result, [sys.executable, str(script)], variants, "ours", speed.SMOKE_SHAPE, 60.0
    )
    assert [row["name"] for row in result.rows] == ["a", "bad", "b"]
    assert [("error" in row) for row in result.rows] == [False, True, False]
    assert "out of memory" in result.rows[1]["error"]


def test_nothing_starts_after_the_deadline(speed):
    result = Results()
    variants = [speed.make_variant(speed.SMOKE_SHAPE, "late", {}, "")]
    speed.run_variants(result, ["false"], variants, "ours", speed.SMOKE_SHAPE, -1.0)
    assert result.rows == [{"what": "ours", "name": "late", "error": "no time left"}]


def test_mfu_is_nanogpts_formula(speed):
    result = Results(measured_roof_flops=800e12)
    shape = speed.SHAPE
    row = {"parameters": 123_587_328, "batch_size": 12, "step_seconds": 0.1}
    speed.add_rates(result, row, shape)
    tokens = 12 * 1024 / 0.1
    flops = tokens * (6 * 123_587_328 + 12 * 12 * 12 * 64 * 1024)
    assert row["tokens_per_second"] == round(tokens)
    assert row["mfu_data_sheet"] == pytest.approx(flops / 989e12, abs=1e-4)
    assert row["mfu_measured"] == pytest.approx(flops / 800e12, abs=1e-4)


def test_variants_differ_from_the_base_where_they_say(speed):
    base = speed.make_variant(speed.SHAPE, "base", {}, "")
    other = speed.make_variant(speed.SHAPE, "x", {"data.batch_size": 16, "scan": False}, "")
    assert other["config"]["data"].pop("batch_size") == 16
    assert base["config"]["data"].pop("batch_size") == 32
    assert (base["scan"], other["scan"]) == (True, False)
    assert base["config"] == other["config"]


def test_expected_names_results_that_exist():
    expected = json.loads((FOLDER / "expected.json").read_text())
    assert set(expected) == {"cpu", "gpu", "speed"}
