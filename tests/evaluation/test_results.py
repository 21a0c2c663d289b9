"""Results are kept as they come, and a failure costs one row."""

import argparse
import functools
import json
import sys
import threading

import pytest

from efficient_lm.evaluation.results import (
    Results,
    above_zero,
    attempt,
    attempt_prepared,
    new_file,
    positive,
)


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


@pytest.mark.parametrize("text", ["0", "-1", "2.5", "many", ""])
def test_a_number_below_one_is_refused_in_a_line(text, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--at_once", type=positive)
    assert parser.parse_args(["--at_once=12"]).at_once == 12
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args([f"--at_once={text}"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"argument --at_once: {text!r} is not a whole number of at least 1")


def test_rates_and_files_that_cannot_be_are_refused_in_a_line(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=above_zero)
    parser.add_argument("--out", type=new_file)
    given = parser.parse_args(["--rate=1e-3", f"--out={tmp_path / 'x.json'}"])
    assert given.rate == 0.001 and given.out == tmp_path / "x.json"
    for bad in ("--rate=0", "--rate=nan", "--rate=fast", f"--out={tmp_path}"):
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args([bad])
        last = capsys.readouterr().err.splitlines()[-1]
        assert "is not a number above 0" in last or "is a directory; give the name" in last


def test_jobs_prepare_together_run_alone_and_one_that_fails_stops_no_other():
    meet, events = threading.Barrier(2, timeout=60), []

    def prepare(name):
        meet.wait()  # for ever, were one job to prepare after the other
        events.append("prepared")

        def measure():
            events.append(name)
            if name == 2:
                fails()
            return {"done": True}

        return measure

    jobs = [({"job": name}, functools.partial(prepare, name)) for name in range(4)]
    jobs += [({"job": 4}, fails)]
    rows = list(attempt_prepared(jobs, 2))
    assert events == ["prepared", "prepared", 0, 1, "prepared", "prepared", 2, 3]
    assert ["error" in row for row in rows] == [False, False, True, False, True]
    assert [row["job"] for row in rows] == list(range(5))
