"""The local launcher with quick stand-ins for training: failures, signals, locks, results."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.sweeping import Sweep, launch, local, over, product
from efficient_lm.sweeping.attempts import read_record, state_of
from efficient_lm.sweeping.results import gather
from efficient_lm.sweeping.runs import Run, plan, read_index

ROOT = Path(__file__).parents[2]
OPTIONS = {"slurm_options": {}, "xpk_options": {}, "gpus_per_run": None}


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> Path:
    """A copy of the stand-in, which the commands of all runs now call."""
    script = tmp_path / "stand_in.py"
    shutil.copy(Path(__file__).with_name("stand_in.py"), script)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        Run, "command", lambda run, workdir: [sys.executable, str(script), *run.arguments(workdir)]
    )
    return script


def runs_of(seeds, rates=(0.5,)) -> tuple[Run, ...]:
    fields = {"optimizer.learning_rate": rates, "training.seed": seeds}
    return plan(Sweep("configs/debug.py", product(*(over(f, v) for f, v in fields.items()))))


def start(runs, directory, *, retry=False, parallel=2):
    return launch.start(runs, directory, where="local", retry=retry, parallel=parallel, **OPTIONS)


def finish(runs, directory, stopped=None):
    return launch.finish(runs, directory, "loss", stopped)


def statuses(runs, directory):
    return [state_of(directory, run).status for run in runs]


def test_failures_are_shown_kept_and_retried(stand_in, tmp_path, capsys):
    directory, runs = tmp_path / "sweep", runs_of([0, 1, 3], [0.5, 0.25])
    assert start(runs, directory) is None
    assert statuses(runs, directory) == ["finished", "failed", "finished"] * 2
    assert finish(runs, directory) == 1
    out = capsys.readouterr().out
    assert f"{runs[1].name}: failed with exit code 3: the disk is full" in out
    assert f"lowest loss: {runs[3].name}" in out and "2 of 6 runs failed; --retry" in out

    before = {path: path.stat().st_mtime_ns for path in directory.rglob("summary.json")}
    start(runs, directory)
    assert "6 runs, 0 to start" in capsys.readouterr().out
    stand_in.with_name("mended").touch()
    start(runs, directory, retry=True)
    assert "6 runs, 2 to start" in capsys.readouterr().out
    assert finish(runs, directory) == 0
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert [read_record(directory, run)["attempts"] for run in runs] == [1, 2, 1] * 2

    result = json.loads((directory / "results.json").read_text())
    assert result["best"] == runs[3].name and result["command"] == sys.argv
    table = list(csv.DictReader((directory / "results.csv").read_text().splitlines()))
    for run, row, line in zip(runs, result["runs"], table, strict=True):
        loss = run.settings["optimizer.learning_rate"] + run.settings["training.seed"]
        assert row["name"] == line["name"] == run.name and row["settings"] == run.settings
        assert row["metrics"]["loss"] == float(line["loss"]) == loss
        assert (line["step"], line["error"], line["tokens_per_second"]) == ("10", "", "7.0")
    plots = {path.name for path in (directory / "plots").iterdir()}
    assert plots == {"loss.svg", "optimizer.learning_rate.svg", "training.seed.svg"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(stand_in, tmp_path, capsys, number):
    directory, runs = tmp_path / "sweep", runs_of([2, 0, 3])

    def send():
        while not (directory / runs[0].name / "started").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    assert start(runs, directory, parallel=1) == number
    thread.join()
    assert statuses(runs, directory) == ["stopped", "waiting", "waiting"]
    assert state_of(directory, runs[0]).step == 4
    assert finish(runs, directory, number) == 128 + number
    out = capsys.readouterr().out
    assert f"{number.name}: 1 runs are told to save" in out and "to go on: python -m" in out
    stand_in.with_name("mended").touch()
    assert start(runs, directory) is None
    assert statuses(runs, directory) == ["finished"] * 3


def test_a_second_sweep_is_refused_while_a_run_lives(stand_in, tmp_path):
    directory, runs = tmp_path / "sweep", runs_of([2])
    with local.locked(directory) as lock:
        assert local.in_use(directory)
        with pytest.raises(CheckpointError, match=rf"in use by process {os.getpid()} on .*--workd"):
            start(runs, directory)
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1, pass_fds=[lock])
    with pytest.raises(CheckpointError, match="in use"):  # what a killed sweep leaves behind
        start(runs, directory)
    child.communicate(b"\n")
    assert not local.in_use(directory)


def test_a_changed_file_adds_runs_and_keeps_old_ones(stand_in, tmp_path, capsys):
    directory = tmp_path / "sweep"
    start(runs_of([0, 3]), directory)
    runs = runs_of([0, 4])
    start(runs, directory)
    assert "2 runs, 1 to start" in capsys.readouterr().out
    finish(runs, directory)
    rows = json.loads((directory / "results.json").read_text())["runs"]
    assert [(row["settings"]["training.seed"], row["in_sweep"]) for row in rows] == [
        (0, True), (4, True), (3, False)]  # fmt: skip
    assert capsys.readouterr().out.count("(old)") == 2  # the run, and what it means
    assert len(read_index(directory)) == 3


def test_a_run_that_now_has_more_steps_goes_on(stand_in, tmp_path, capsys):
    directory, (run,) = tmp_path / "sweep", runs_of([0])
    start([run], directory)
    longer = dataclasses.replace(run, steps=20)
    state = state_of(directory, longer)
    assert (state.status, state.step, state.exit_code) == ("stopped", 10, 0)
    start([longer], directory)
    assert "1 runs, 1 to start" in capsys.readouterr().out


def test_a_changed_config_is_told(stand_in, tmp_path, capsys):
    directory, runs = tmp_path / "sweep", runs_of([0])
    start(runs, directory)
    values = json.loads(json.dumps(runs[0].values))
    values["model"]["embed_dim"] = 99
    (directory / runs[0].name / "config.json").write_text(json.dumps(values))
    start(runs, directory)
    assert "warning: 1 finished runs have another config.model.embed_dim" in capsys.readouterr().err


def test_runs_that_died_silently_are_told(stand_in, tmp_path):
    directory, (run,) = tmp_path / "sweep", runs_of([0])
    for program, status, error in (
        ("import os; os.kill(os.getpid(), 9)", "failed", "ended by SIGKILL; perhaps the memory"),
        ("raise KeyError('x')", "failed", "KeyError: 'x'"),
        ("raise SystemExit(143)", "stopped", None),
    ):
        stand_in.write_text(program)
        start([run], directory, retry=True)
        state = state_of(directory, run)
        assert state.status == status
        assert error is None or state.error.startswith(error)
    record = directory / "logs" / f"{run.name}.json"  # a sweep that was killed with its runs
    record.write_text(json.dumps(json.loads(record.read_text()) | {"ended": None}))
    assert state_of(directory, run).status == "stopped"
    assert gather(directory, [run], alive=[run.name])[0]["status"] == "running"


def test_each_place_has_its_gpus(stand_in, tmp_path):
    directory, runs = tmp_path / "sweep", runs_of([0, 3, 4])
    stand_in.write_text("import os, time\nprint('error:', os.environ['CUDA_VISIBLE_DEVICES'])\n"
                        "time.sleep(0.5)\nraise SystemExit(2)")  # fmt: skip
    options = OPTIONS | {"gpus_per_run": 2}
    launch.start(runs, directory, where="local", retry=False, parallel=2, **options)
    seen = [state_of(directory, run).error for run in runs]
    assert seen[:2] == ["0,1", "2,3"] and seen[2] in seen[:2]
    with pytest.raises(ConfigError, match="--parallel=0; it must be at least 1"):
        start(runs, directory, parallel=0)


def test_describe_starts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    launch.describe(runs_of([0, 1]), tmp_path / "sweep")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[0].endswith(": waiting")
    assert lines[1].startswith("  python -m efficient_lm.train --config=configs/debug.py ")
    assert not (tmp_path / "sweep").exists()
