"""SLURM jobs of a sweep: what sbatch is given, and the batch file run with a stand-in for srun."""

import getpass
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from efficient_lm.errors import ConfigError, UserError
from efficient_lm.sweeping import Sweep, launch, over, product, slurm
from efficient_lm.sweeping.attempts import state_of
from efficient_lm.sweeping.runs import Run, plan

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "sbatch": 'cp "$1" "$HERE/batch.sh"; [ ! -e "$HERE/full" ] || { echo no room >&2; exit 1; }\n'
              "echo Submitted batch job 12",
    "srun": 'echo $$ > "$HERE/srun.pid"; shift; shift 4; exec "$@"',
    "squeue": 'echo "$@" > "$HERE/squeue.arguments"; cat "$HERE/queue"',
    "scontrol": 'echo "$@" >> "$HERE/scontrol.arguments"',
}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with stand-ins for SLURM's commands, which are all that PATH finds."""
    for name, text in COMMANDS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\nHERE={tmp_path}\n{text}\n")
        path.chmod(0o755)
    (tmp_path / "queue").write_text("")
    shutil.copy(Path(__file__).with_name("stand_in.py"), tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    monkeypatch.chdir(ROOT)
    return tmp_path


def runs_of(here: Path, seeds) -> tuple[Run, ...]:
    """Runs whose commands call the stand-in for training, also in the jobs."""

    class Quick(Run):  # local, so that it is pickled by value
        def command(self, workdir):
            return [sys.executable, str(here / "stand_in.py"), *self.arguments(workdir)]

    fields = over("optimizer.learning_rate", [0.5]), over("training.seed", seeds)
    planned = plan(Sweep("configs/debug.py", product(*fields)))
    return tuple(Quick(run.name, run.config, run.settings, run.steps) for run in planned)


def job(here: Path, index: int, rank: int = 0) -> subprocess.Popen:
    """Task `index` of the array that was submitted, as SLURM starts it."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "SLURM_JOB_ID": str(12 + index), "SLURM_ARRAY_JOB_ID": "12",
        "SLURM_ARRAY_TASK_ID": str(index), "SLURM_PROCID": str(rank), "SLURM_NTASKS": "2",
        "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_LOCALID": str(rank),
    }  # fmt: skip
    with (here / "batch.err").open("a") as log:
        return subprocess.Popen(
            ["bash", str(here / "batch.sh")],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=log,
        )


EXPECTED = """
#SBATCH --account=lab
#SBATCH --array=0-2%2
#SBATCH --constraint=h200
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --job-name=sweep
#SBATCH --mem=512GB
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --partition=gpu
#SBATCH --qos=high
#SBATCH --signal=USR2@300
#SBATCH --time=60
#SBATCH --wckey=submitit
"""


def test_sbatch_is_given_the_options(here):
    options = slurm.SlurmOptions(
        minutes=60, nodes=2, tasks_per_node=8, gpus_per_node=8, cpus_per_task=12, memory_gb=512,
        partition="gpu", account="lab", qos="high", sbatch=["constraint=h200", "exclusive"],
    )  # fmt: skip
    directory = here / "sweep"
    assert slurm.submit(runs_of(here, range(3)), directory, options, parallel=2) == [
        "12_0", "12_1", "12_2"]  # fmt: skip
    lines = (here / "batch.sh").read_text().splitlines()
    flags = [line for line in lines if line.startswith("#SBATCH")
             and not line.startswith(("#SBATCH --output=", "#SBATCH --error="))]  # fmt: skip
    assert flags == EXPECTED.split("\n")[1:-1]
    folder, log = directory / "slurm", directory / "slurm/%A_%a_%t_log"
    assert lines[-1] == (
        f"srun --unbuffered --output {log}.out --error {log}.err --cpus-per-task=12 "
        f"{sys.executable} -u -m submitit.core._submit {folder}"
    )


def start(runs, directory, **options):
    options = {"retry": False, "parallel": None, "gpus_per_run": None, "xpk_options": {},
               "slurm_options": {}} | options  # fmt: skip
    return launch.start(runs, directory, where="slurm", **options)


def test_jobs_train_record_and_are_not_submitted_twice(here, capsys):
    directory, runs = here / "sweep", runs_of(here, [0, 1])
    start(runs, directory)
    assert "submitted as 12_0, 12_1" in capsys.readouterr().out
    (here / "queue").write_text("12_0\n12_1\n7\n")
    start(runs, directory)
    assert "2 runs, 0 to start" in capsys.readouterr().out
    assert (here / "squeue.arguments").read_text() == (
        f"--noheader --array --format=%i --user={getpass.getuser()}\n"
    )
    assert job(here, 0).wait() == 0
    assert job(here, 1).wait() != 0
    (here / "queue").write_text("")
    states = [state_of(directory, run) for run in runs]
    assert [state.status for state in states] == ["finished", "failed"]
    assert (states[1].exit_code, states[1].error) == (3, "the disk is full")
    start(runs, directory)
    assert "2 runs, 0 to start" in capsys.readouterr().out
    (here / "mended").touch()
    start(runs, directory, retry=True)
    assert "2 runs, 1 to start" in capsys.readouterr().out


@pytest.mark.parametrize("rank", [0, 1])
def test_the_warning_of_a_time_limit_saves_and_queues_again(here, rank):
    directory, runs = here / "sweep", runs_of(here, [0, 2])
    start(runs, directory)
    process = job(here, 1, rank)
    started = directory / runs[1].name / "started"
    deadline = time.monotonic() + 60
    while not started.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    pid = int((here / "srun.pid").read_text())
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert len(children) == 1
    for number in (int(children[0]), pid):  # SLURM signals every process of a step
        os.kill(number, signal.SIGUSR2)
    assert process.wait(60) != 0
    assert "SIGTERM: saved step 4" in (
        directory / "logs" / f"{runs[1].name}{'.1' if rank else ''}.log").read_text()  # fmt: skip
    if rank:  # only the first process queues the job again and keeps the record
        assert not (here / "scontrol.arguments").exists()
        assert state_of(directory, runs[1]).status == "waiting"
        return
    assert (here / "scontrol.arguments").read_text() == "requeue 12_1\n"
    assert state_of(directory, runs[1]).status == "stopped"
    (here / "mended").touch()
    assert job(here, 1).wait(60) == 0
    assert state_of(directory, runs[1]).status == "finished"


def test_what_is_missing_is_told(here, monkeypatch):
    runs, directory = runs_of(here, [0, 1]), here / "sweep"
    with pytest.raises(ConfigError, match="--nodes=0; it must be at least 1"):
        start(runs, directory, slurm_options={"nodes": 0})
    (here / "full").touch()
    with pytest.raises(UserError, match=r"sbatch refused the jobs: .*no room"):
        start(runs, directory)
    (here / "bin/srun").unlink()
    with pytest.raises(ConfigError, match="there is no srun here"):
        start(runs, directory)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed: pip install -e '\.\[slurm\]'"):
        start(runs, directory)
