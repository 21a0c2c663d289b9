"""Runs as workloads of a GKE cluster with TPU slices: xpk commands, written out and, if there, run.

The command line is that of xpk 1.16 (`xpk workload create --help`).
"""

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from efficient_lm.errors import ConfigError, UserError
from efficient_lm.sweeping.attempts import LOGS
from efficient_lm.sweeping.runs import Run, replace_text

SCRIPT = "xpk.sh"
_LONGEST_WORKLOAD = 40  # characters that xpk allows


@dataclass(frozen=True)
class XpkOptions:
    """Where and on what the runs train; `pod_workdir` is the sweep's directory as pods see it."""

    cluster: str | None = None
    tpu_type: str | None = None  # v5p-128, v6e-256, tpu7x-4x4x4
    num_slices: int = 1
    docker_image: str | None = None  # None: xpk adds the working directory to its base image
    base_docker_image: str | None = None
    project: str | None = None
    zone: str | None = None
    storage: Sequence[str] = ()  # names of storages that xpk attached to the cluster
    xpk: Sequence[str] = ()  # further flags of `xpk workload create`, "name=value" or "name"
    pod_workdir: str | None = None

    def check(self) -> None:
        """ConfigError for what is missing or at odds."""
        for name in ("cluster", "tpu_type", "pod_workdir"):
            if not getattr(self, name):
                example = {"cluster": "my-cluster", "tpu_type": "v5p-128",
                           "pod_workdir": "/data/sweeps/x"}[name]  # fmt: skip
                raise ConfigError(f"--launch=xpk needs --{name}, such as --{name}={example}")
        if self.num_slices < 1:
            raise ConfigError(f"--num_slices={self.num_slices}; it must be at least 1")
        if self.docker_image and self.base_docker_image:
            raise ConfigError("--docker_image and --base_docker_image are both given; give one")


def submit(runs: Sequence[Run], directory: Path, options: XpkOptions) -> tuple[Path, bool]:
    """Write one command for each run to xpk.sh, print them, and run them where xpk is installed.

    Returns the script and whether the commands were run; UserError where one of them failed.
    """
    options.check()
    commands = [create_command(run, directory, options) for run in runs]
    script = directory / SCRIPT
    lines = ["#!/bin/sh", "set -e", *map(shlex.join, commands)]
    replace_text(script, "\n".join(lines) + "\n")
    for command in commands:
        print(shlex.join(command), flush=True)
    if shutil.which("xpk") is None:
        return script, False
    for run, command in zip(runs, commands, strict=True):
        done = subprocess.run(command, check=False)
        if done.returncode != 0:
            raise UserError(
                f"xpk ended with exit code {done.returncode} for {run.name}; its output is above. "
                "The same command goes on with this run"
            )
        replace_text(_job_path(directory, run), f"{_count(directory, run) + 1}\n")
    return script, True


def create_command(run: Run, directory: Path, options: XpkOptions) -> list[str]:
    """`xpk workload create` for one run; ConfigError for a value with a line break."""
    train = shlex.join(["python", *run.arguments(options.pod_workdir)])
    if "\n" in train:
        raise ConfigError(f"{run.name}: xpk takes no line breaks; leave them out of the settings")
    flags = {
        "workload": workload_name(run, directory),
        "cluster": options.cluster,
        "tpu-type": options.tpu_type,
        "num-slices": options.num_slices,
        "project": options.project,
        "zone": options.zone,
        "docker-image": options.docker_image,
        "base-docker-image": options.base_docker_image,
    }
    given = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    given += [f"--storage={name}" for name in options.storage]
    given += [f"--{flag}" for flag in options.xpk]
    # exec: the shell of the pod hands SIGTERM to what it started, which must be the training.
    return ["xpk", "workload", "create", *given, f"--command=exec {train}"]


def workload_name(run: Run, directory: Path) -> str:
    """A name that xpk allows: of the sweep, of the run, and of how often it was submitted."""
    end = "-" + run.name[-8:] + (f"-{n + 1}" if (n := _count(directory, run)) else "")
    kept = "".join(c if c.isascii() and c.isalnum() else "-" for c in directory.name.lower())
    start = kept.lstrip("-0123456789")[: _LONGEST_WORKLOAD - len(end)].rstrip("-")
    return (start or "sweep") + end


def submitted(runs: Sequence[Run], directory: Path) -> set[str]:
    """The names of runs that were handed to xpk; what became of them, xpk knows."""
    return {run.name for run in runs if _count(directory, run)}


def _count(directory: Path, run: Run) -> int:
    """How often a run was handed to xpk."""
    path = _job_path(directory, run)
    return int(path.read_text()) if path.exists() else 0


def _job_path(directory: Path, run: Run) -> Path:
    return directory / LOGS / f"{run.name}.workloads"
