"""Runs as one array of SLURM jobs through submitit; time limits and preemption save and requeue."""

import getpass
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficient_lm.errors import ConfigError, UserError
from efficient_lm.sweeping.attempts import LOGS, Attempt, read_record
from efficient_lm.sweeping.runs import Run, replace_text

FOLDER = "slurm"  # in the directory of the sweep: what submitit keeps
_WARNING = 300  # seconds before the limit at which a run is told to save
_REQUEUES = 1000  # after time limits


@dataclass(frozen=True)
class SlurmOptions:
    """What each run is given; None leaves it to the cluster."""

    minutes: int = 24 * 60  # limit of one job; a run that is cut off is saved and queued again
    nodes: int = 1
    tasks_per_node: int = 1  # processes that train a run together; one sees all GPUs of its node
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    memory_gb: int | None = None  # of a node
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    sbatch: Sequence[str] = ()  # further options of sbatch, "name=value" or "name"


class Task:
    """What a job calls: one attempt at a run, in each of its processes."""

    def __init__(self, run: Run, directory: Path):
        self.run, self.directory = run, directory
        self.attempt: Attempt | None = None

    def __call__(self) -> None:
        """Train; RuntimeError with the error of the run, so that the job counts as failed."""
        rank = int(os.environ.get("SLURM_PROCID", "0"))
        # SLURM sends the warning of a time limit to the child too, which would end without
        # saving: it inherits that the signal is ignored, and is told by SIGTERM.
        handler = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        self.attempt = Attempt(
            self.run, self.directory, self.run.command(self.directory), rank=rank
        )
        # submitit calls `checkpoint` in the first process alone.
        signal.signal(signal.SIGUSR2, (lambda *_: self.attempt.stop()) if rank else handler)
        code = self.attempt.wait()
        if code != 0:
            error = read_record(self.directory, self.run).get("error")
            raise RuntimeError(f"{self.run.name}: exit code {code}: {error}")

    def checkpoint(self) -> Any:
        """Called by submitit before the time is over: save, then queue the same again."""
        import submitit

        if self.attempt is not None:
            self.attempt.stop()
            self.attempt.wait()
        return submitit.helpers.DelayedSubmission(Task(self.run, self.directory))


def submit(
    runs: Sequence[Run], directory: Path, options: SlurmOptions, *, parallel: int
) -> list[str]:
    """Queue the runs, at most `parallel` of them at work at once; the ids of their jobs.

    Raises UserError where submitit, the commands of SLURM or an option are missing or refused.
    """
    submitit = _submitit()
    # Absolute, because a job starts where sbatch was called, and runs may be queued again later.
    directory = directory.resolve()
    try:
        executor = submitit.AutoExecutor(
            directory / FOLDER, cluster="slurm", slurm_max_num_timeout=_REQUEUES
        )
    except RuntimeError:
        raise ConfigError(
            "--launch=slurm: there is no srun here; run this where jobs are submitted"
        ) from None
    executor.update_parameters(**_parameters(directory, options, parallel))
    try:
        with executor.batch():
            jobs = [executor.submit(Task(run, directory)) for run in runs]
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"sbatch refused the jobs: {' '.join(str(error).split())}") from None
    for run, job in zip(runs, jobs, strict=True):
        replace_text(_job_path(directory, run), job.job_id + "\n")
    return [job.job_id for job in jobs]


def alive(runs: Sequence[Run], directory: Path) -> set[str]:
    """The names of runs whose job is queued or at work; UserError where SLURM does not answer.

    Where there is no squeue, these are all that were submitted and did not end.
    """
    paths = {run.name: _job_path(directory, run) for run in runs}
    jobs = {name: path.read_text().strip() for name, path in paths.items() if path.exists()}
    if not jobs:
        return set()
    if shutil.which("squeue") is None:
        return {
            r.name for r in runs if r.name in jobs and not read_record(directory, r).get("ended")
        }
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--user={getpass.getuser()}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"{shlex.join(command)} failed: {done.stderr.strip()}; try again later")
    queued = set(done.stdout.split())
    return {name for name, job in jobs.items() if job in queued}


def _parameters(directory: Path, options: SlurmOptions, parallel: int) -> dict[str, Any]:
    """Options under submitit's names; ConfigError for a number below 1."""
    for name in ("minutes", "nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task",
                 "memory_gb"):  # fmt: skip
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name}={value}; it must be at least 1")
    parts = [option.partition("=") for option in options.sbatch]
    extra = {name: value or True for name, _, value in parts}
    cpus = options.cpus_per_task
    return {
        "name": directory.name,
        "timeout_min": options.minutes,
        "nodes": options.nodes,
        "tasks_per_node": options.tasks_per_node,
        "gpus_per_node": options.gpus_per_node,
        "cpus_per_task": cpus,
        "mem_gb": options.memory_gb,
        "slurm_partition": options.partition,
        "slurm_account": options.account,
        "slurm_qos": options.qos,
        "slurm_array_parallelism": parallel,
        "slurm_signal_delay_s": min(_WARNING, 30 * options.minutes),
        "slurm_additional_parameters": extra or None,
        # srun does not take it from sbatch since SLURM 22.05.
        "slurm_srun_args": cpus and [f"--cpus-per-task={cpus}"],
    }


def _submitit():
    """The module; ConfigError says how to install it."""
    if importlib.util.find_spec("submitit") is None:
        raise ConfigError(
            "--launch=slurm needs submitit, which is not installed: pip install -e '.[slurm]'"
        )
    import submitit

    return submitit


def _job_path(directory: Path, run: Run) -> Path:
    return directory / LOGS / f"{run.name}.job"
