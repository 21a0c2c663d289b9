"""Workloads of a sweep: the command lines that xpk is given."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from efficient_lm.errors import ConfigError, UserError
from efficient_lm.sweeping import Sweep, launch, over, xpk
from efficient_lm.sweeping.attempts import state_of
from efficient_lm.sweeping.runs import plan

ROOT = Path(__file__).parents[2]
OPTIONS = {
    "cluster": "my-cluster", "tpu_type": "v5p-128", "num_slices": 2, "project": "my-project",
    "zone": "us-east5-a", "docker_image": "gcr.io/my-project/elm:1", "storage": ["data", "more"],
    "xpk": ["priority=low", "max-restarts=3", "spot"], "pod_workdir": "/data/Sweep_1",
}  # fmt: skip
# Given to xpk 1.16.0 with --dry-run, which accepted it and wrote the command into its manifest.
RECORDED = (
    "xpk workload create --workload=sweep-1-e1cff4df --cluster=my-cluster --tpu-type=v5p-128 "
    "--num-slices=2 --project=my-project --zone=us-east5-a --docker-image=gcr.io/my-project/elm:1 "
    "--storage=data --storage=more --priority=low --max-restarts=3 --spot "
    "'--command=exec python -m efficient_lm.train --config=configs/debug.py "
    "'\"'\"'--config.training.sample_prompt=it is \"so\"'\"'\"' "
    "--workdir=/data/Sweep_1/sample_prompt=it-is-so-e1cff4df'"
)


@pytest.fixture
def runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    return plan(Sweep("configs/debug.py", over("training.sample_prompt", ['it is "so"'])))


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Path:
    """A stand-in for xpk that keeps its arguments; it fails while the file `broken` is there."""
    path = tmp_path / "bin/xpk"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/arguments\n'
                    f"test ! -e {tmp_path}/broken")  # fmt: skip
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:/bin:/usr/bin")
    return tmp_path


def start(runs, directory, retry=False, **changed):
    return launch.start(
        runs, directory, where="xpk", retry=retry, parallel=None, gpus_per_run=None,
        slurm_options={}, xpk_options=OPTIONS | changed,
    )  # fmt: skip


def test_commands_are_written_and_printed_where_there_is_no_xpk(
    runs, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("PATH", "/bin:/usr/bin")
    directory = tmp_path / "Sweep_1"
    start(runs, directory)
    out = capsys.readouterr().out
    assert RECORDED in out.splitlines()
    assert f"xpk is not installed here; run sh {directory}/xpk.sh" in out
    assert (directory / "xpk.sh").read_text().splitlines() == ["#!/bin/sh", "set -e", RECORDED]
    assert state_of(directory, runs[0]).status == "waiting"


def test_the_script_and_the_launcher_give_the_same_arguments(runs, installed):
    directory = installed / "Sweep_1"
    start(runs, directory)
    arguments = shlex.split(RECORDED)[1:]
    assert (installed / "arguments").read_text().splitlines() == arguments
    (installed / "arguments").unlink()
    subprocess.run(["sh", directory / "xpk.sh"], check=True)
    assert (installed / "arguments").read_text().splitlines() == arguments
    command = arguments[-1].removeprefix("--command=exec ")
    assert shlex.split(command) == ["python", *runs[0].arguments("/data/Sweep_1")]


def test_a_run_is_submitted_once_and_again_under_another_name(runs, installed, capsys):
    directory = installed / "Sweep_1"
    start(runs, directory)
    start(runs, directory)
    assert "1 runs, 0 to start" in capsys.readouterr().out
    start(runs, directory, retry=True)
    name = (installed / "arguments").read_text().splitlines()[2]
    assert name == f"--workload=sweep-1-{runs[0].name[-8:]}-2"
    (installed / "broken").touch()
    with pytest.raises(UserError, match="xpk ended with exit code 1 for sample_prompt"):
        start(runs, directory, retry=True)


def test_a_line_break_is_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    runs = plan(Sweep("configs/debug.py", over("training.sample_prompt", ["a\nb"])))
    with pytest.raises(ConfigError, match="no line breaks"):
        start(runs, tmp_path / "sweep")


@pytest.mark.parametrize("name", ["9_UPPER case", "x" * 60, "---", "läufe"])
def test_names_are_such_as_xpk_allows(runs, name, tmp_path):
    workload = xpk.workload_name(runs[0], tmp_path / name)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", workload) and len(workload) <= 40


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"cluster": None}, "--launch=xpk needs --cluster"),
        ({"tpu_type": None}, "needs --tpu_type, such as --tpu_type=v5p-128"),
        ({"pod_workdir": None}, "needs --pod_workdir"),
        ({"num_slices": 0}, "--num_slices=0; it must be at least 1"),
        ({"base_docker_image": "x"}, "give one"),
    ],
)
def test_what_is_missing_is_told(runs, tmp_path, changed, words):
    with pytest.raises(ConfigError, match=words):
        start(runs, tmp_path / "sweep", **changed)
