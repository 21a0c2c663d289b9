"""What the door calls: describe a sweep, start what is left of it, gather what there is."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from efficient_lm.sweeping import local, slurm, xpk
from efficient_lm.sweeping.attempts import read_record, state_of
from efficient_lm.sweeping.results import gather, print_results, write_results
from efficient_lm.sweeping.runs import Run, flatten, read_index, write_index

FAILED_EXIT_CODE = 1


def describe(runs: Sequence[Run], directory: Path) -> None:
    """Print each run, its state and its command."""
    alive = _alive(runs, directory)
    for run in runs:
        print(f"{run.name}: {state_of(directory, run, alive=run.name in alive).status}")
        print(f"  {shlex.join(['python', *run.arguments(directory)])}")
    print(f"{len(runs)} runs; nothing was started")


def start(
    runs: Sequence[Run],
    directory: Path,
    *,
    where: Literal["local", "slurm", "xpk"],
    retry: bool,
    parallel: int | None,
    gpus_per_run: int | None,
    slurm_options: Mapping[str, Any],
    xpk_options: Mapping[str, Any],
) -> int | None:
    """Start the runs that wait or were stopped, with `retry` also those that failed.

    Local runs are waited for; the signal that ended this early is returned, if one did. UserError
    where the directory is in use or cannot be written, or the launcher is not there.
    """
    local.check_places(parallel, gpus_per_run)
    with local.locked(directory) as lock:
        _warn_of_other_configs(runs, directory)
        write_index(directory, runs)
        alive = _alive(runs, directory, locked_here=True)
        states = {run.name: state_of(directory, run, alive=run.name in alive) for run in runs}
        wanted = ("waiting", "stopped", *(("failed",) if retry else ()))
        if retry and where == "xpk":
            wanted = (*wanted, "submitted")
        left = [run for run in runs if states[run.name].status in wanted]
        print(f"{len(runs)} runs, {len(left)} to start", flush=True)
        if not left:
            return None
        if where == "local":
            return local.run_all(
                left, directory, parallel=parallel or 1, gpus_per_run=gpus_per_run, lock=lock
            )
        if where == "slurm":
            options = slurm.SlurmOptions(**slurm_options)
            jobs = slurm.submit(left, directory, options, parallel=parallel or len(left))
            print(f"submitted as {', '.join(jobs)}")
            return None
        script, ran = xpk.submit(left, directory, xpk.XpkOptions(**xpk_options))
        print(f"submitted by {script}" if ran else f"xpk is not installed here; run sh {script}")
        return None


def finish(runs: Sequence[Run], directory: Path, metric: str, stopped: int | None) -> int:
    """Gather, write and print the results; the exit code of the door."""
    names = {run.name for run in runs}
    old = [run for run in read_index(directory).values() if run.name not in names]
    rows = gather(directory, runs, old, alive=_alive([*runs, *old], directory))
    files = write_results(directory, rows, metric)
    print_results(rows, metric)
    print(", ".join(map(str, files)))
    failed = [row["name"] for row in rows if row["status"] == "failed" and row["in_sweep"]]
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed; --retry runs them again")
    if stopped is not None:
        print(f"stopped; to go on: python -m efficient_lm.sweep {shlex.join(sys.argv[1:])}")
        return 128 + stopped
    return FAILED_EXIT_CODE if failed else 0


def _alive(runs: Sequence[Run], directory: Path, *, locked_here: bool = False) -> set[str]:
    """The names of runs that something may be training now."""
    found = slurm.alive(runs, directory) | xpk.submitted(runs, directory)
    if not locked_here and local.in_use(directory):
        found |= {run.name for run in runs if read_record(directory, run).get("ended", "") is None}
    return found


def _warn_of_other_configs(runs: Sequence[Run], directory: Path) -> None:
    """Say where finished runs were made with a config that has changed since."""
    changed: dict[str, int] = {}
    for run in runs:
        if state_of(directory, run).status != "finished":
            continue
        try:
            used = flatten(json.loads((directory / run.name / "config.json").read_text()))
        except (OSError, ValueError):
            continue
        now = flatten(run.values)
        for field in used.keys() & now.keys():
            if used[field] != now[field]:
                changed[field] = changed.get(field, 0) + 1
    for field, count in sorted(changed.items()):
        print(
            f"warning: {count} finished runs have another config.{field} than the config has now; "
            "they are kept: delete them, or give another --workdir, to run them anew",
            file=sys.stderr,
        )
