"""Sweep: `python -m efficient_lm.sweep --sweep=configs/sweeps/debug.py --workdir=runs/sweep`.

The same command goes on where it stopped, and shows the table of a sweep that is finished.
"""

from pathlib import Path
from typing import Any

from absl import flags

from efficient_lm.cli import run_door
from efficient_lm.errors import ConfigError

SWEEP = flags.DEFINE_string("sweep", None, "Python file whose get_sweep() returns a Sweep.")
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the sweep; one in it for each run.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "List the runs and their commands; start nothing.")
GATHER = flags.DEFINE_bool("gather", False, "Gather the results there are; start nothing.")
RETRY = flags.DEFINE_bool("retry", False, "Run the failed ones again.")
LAUNCH = flags.DEFINE_enum("launch", "local", ["local", "slurm", "xpk"], "Where runs are started.")
PARALLEL = flags.DEFINE_integer("parallel", None, "Runs at a time; default: 1, with slurm all.")
GPUS_PER_RUN = flags.DEFINE_integer("gpus_per_run", None, "local: GPUs of each run at a time.")
SLURM = [
    flags.DEFINE_integer("minutes", 24 * 60, "slurm: limit of a job; then it is queued again."),
    flags.DEFINE_integer("nodes", 1, "slurm: nodes of each run."),
    flags.DEFINE_integer("tasks_per_node", 1, "slurm: processes; one uses all GPUs of its node."),
    flags.DEFINE_integer("gpus_per_node", None, "slurm: GPUs of each node."),
    flags.DEFINE_integer("cpus_per_task", None, "slurm: CPU cores of each process."),
    flags.DEFINE_integer("memory_gb", None, "slurm: memory of each node."),
    flags.DEFINE_string("partition", None, "slurm: partition."),
    flags.DEFINE_string("account", None, "slurm: account."),
    flags.DEFINE_string("qos", None, "slurm: quality of service."),
    flags.DEFINE_list("sbatch", [], "slurm: more options of sbatch: constraint=h200,exclusive."),
]
XPK = [
    flags.DEFINE_string("cluster", None, "xpk: GKE cluster."),
    flags.DEFINE_string("tpu_type", None, "xpk: slice of each run, such as v5p-128."),
    flags.DEFINE_integer("num_slices", 1, "xpk: slices of each run."),
    flags.DEFINE_string("docker_image", None, "xpk: image with the code in it."),
    flags.DEFINE_string("base_docker_image", None, "xpk: image that the working directory joins."),
    flags.DEFINE_string("project", None, "xpk: project; default: that of gcloud."),
    flags.DEFINE_string("zone", None, "xpk: zone; default: that of gcloud."),
    flags.DEFINE_list("storage", [], "xpk: storages of the cluster to attach."),
    flags.DEFINE_list("xpk", [], "xpk: more flags of it: priority=low,max-restarts=3,spot."),
    flags.DEFINE_string("pod_workdir", None, "xpk: --workdir as the pods see it."),
]


def main() -> int:
    """Start what is left, and gather the results; 1 where runs have failed."""
    for flag, example in ((SWEEP, "configs/sweeps/debug.py"), (WORKDIR, "runs/sweeps/debug")):
        if not flag.value:
            raise ConfigError(f"no --{flag.name} is given: --{flag.name}={example}")
    from efficient_lm.sweeping import launch
    from efficient_lm.sweeping.runs import load_sweep, plan

    sweep = load_sweep(SWEEP.value)
    runs, directory = plan(sweep), Path(WORKDIR.value)
    if DRY_RUN.value:
        launch.describe(runs, directory)
        return 0
    stopped = None
    if not GATHER.value:
        stopped = launch.start(
            runs,
            directory,
            where=LAUNCH.value,
            retry=RETRY.value,
            parallel=PARALLEL.value,
            gpus_per_run=GPUS_PER_RUN.value,
            slurm_options=_values(SLURM),
            xpk_options=_values(XPK),
        )
    return launch.finish(runs, directory, sweep.metric, stopped)


def _values(holders) -> dict[str, Any]:
    """The flags by name."""
    return {holder.name: holder.value for holder in holders}


if __name__ == "__main__":
    run_door(main)
