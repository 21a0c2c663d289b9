"""Results are kept as they come, and a failure costs one row."""

import json
import sys
import threading

from efficient_lm.evaluation.results import Results, attempt, attempt_all


def fails():
    raise RuntimeError("out of memory " + 1000 * "x")


def test_the_file_is_whole_after_each_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/somewhere/run.py", "--arm=cpu"])
    path = tmp_path / "new" / "x.json"
    results = Results(path, "experiments/x/run.py", arm="cpu")
    for number in (1, 2):
        results.add({"number": number})
        found = json.loads(path.read_text())
        assert found["rows"] == [{"number": n + 1} for n in range(number)]
    assert found["command"] == "experiments/x/run.py --arm=cpu"
    assert found["device"] == "cpu" and found["versions"]["jax"] and found["arm"] == "cpu"
    assert [json.loads(line)["number"] for line in capsys.readouterr().out.splitlines()] == [1, 2]


def test_a_failure_is_a_row_in_one_short_line():
    assert attempt({"a": 1}, lambda: {"b": 2}) == {"a": 1, "b": 2}
    row = attempt({"a": 1}, fails)
    assert row["a"] == 1 and row["error"].startswith("RuntimeError: out of memory")
    assert len(row["error"]) <= 300


def test_jobs_run_at_the_same_time_and_one_that_fails_stops_no_other():
    meet = threading.Barrier(2, timeout=60)

    def waits():
        meet.wait()  # for ever, were one job to run after the other
        return {"done": True}

    jobs = [({"job": "bad"}, fails), ({"job": 1}, waits), ({"job": 2}, waits)]
    rows = {row["job"]: row for row in attempt_all(jobs, 2)}
    assert rows[1]["done"] and rows[2]["done"] and "error" in rows["bad"]
