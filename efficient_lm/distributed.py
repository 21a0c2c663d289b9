"""Runs of several processes: found from flags, SLURM or TPU pods; joined, watched, and left."""

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from absl import flags

from efficient_lm import watch
from efficient_lm.errors import ProcessError, UserError


@dataclass(frozen=True)
class Limits:
    """Seconds: to wait for the other processes at the start; of silence after which a process
    counts as dead; that a process may be a step behind the others.
    """

    join: float = 300.0
    peer: float = 60.0
    stall: float = 600.0


@dataclass(frozen=True)
class Place:
    """A process's place in a run: `process_id` of `num_processes`; process 0 listens at
    `coordinator`, host:port, and at the port before it. `devices`: those of this host that are
    this process's, None for all. `source`: who said so.
    """

    coordinator: str
    num_processes: int
    process_id: int
    devices: tuple[int, ...] | None
    source: str


def define_flags() -> Callable[[], AbstractContextManager[None]]:
    """Define `--distributed`, `--coordinator`, `--num_processes`, `--process_id` and time limits.

    Returns a function for use in `main`: a context in which the processes work together.
    """
    flags.DEFINE_enum(
        "distributed", "auto", ["auto", "slurm", "tpu", "off"],
        "Where the processes of a run on several hosts are found, unless --coordinator says it; "
        "auto: in SLURM or a TPU pod if there is one.",
    )  # fmt: skip
    flags.DEFINE_string("coordinator", None, "host:port of process 0, where the others join it.")
    flags.DEFINE_integer("num_processes", None, "How many processes there are.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)
    flags.DEFINE_float(
        "join_timeout", Limits.join, "Seconds to wait for the other processes.", lower_bound=1.0
    )
    flags.DEFINE_float(
        "peer_timeout", Limits.peer,
        "Seconds without a sign of life after which a process counts as dead, and all end.",
        lower_bound=1.0,
    )  # fmt: skip
    flags.DEFINE_float(
        "stall_timeout", Limits.stall,
        "Seconds that a process may be a step behind another one, before all end.",
        lower_bound=1.0,
    )  # fmt: skip

    def joined() -> AbstractContextManager[None]:
        given = flags.FLAGS
        limits = Limits(given.join_timeout, given.peer_timeout, given.stall_timeout)
        place = from_flags(given.coordinator, given.num_processes, given.process_id)
        if place is None:
            place = find_place(given.distributed, os.environ, limits.join)
        return processes(place, limits)

    return joined


@contextmanager
def processes(place: Place | None, limits: Limits) -> Iterator[None]:
    """Join the other processes, and leave together; None or one process: nothing happens.

    In the context, a process that ends, falls silent or stays behind ends all of them, with one
    line and the exit code of ProcessError. An exception ends this process here (the orderly way out
    would wait for the others), and the others with it.
    """
    if place is None or place.num_processes == 1:
        yield
        return
    try:
        with _watched(place, limits):
            import jax  # costs a second, which those who are told to end here need not wait

            jax.config.update("jax_enable_preemption_service", False)  # the watch sees to signals
            jax.distributed.initialize(
                place.coordinator,
                place.num_processes,
                place.process_id,
                local_device_ids=place.devices,
                cluster_detection_method="deactivate",
                initialization_timeout=int(limits.join),
                # In case the watch itself fails; this one ends a process by a stack trace.
                heartbeat_timeout_seconds=int(max(100, 3 * limits.peer)),
            )
            yield
        jax.distributed.shutdown()  # threads that wait for another process's failed save end by it
    except SystemExit:
        jax.distributed.shutdown()
        raise
    except BaseException as error:
        if isinstance(error, UserError):
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        else:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.exit_code if isinstance(error, UserError) else 1)


@contextmanager
def attended() -> Iterator[None]:
    """The watch alone, where `jax.distributed.initialize` was called by hand; else nothing.

    An exception ends the other processes and is raised on.
    """
    import jax
    from jax._src.distributed import global_state  # the address has no public name

    if jax.process_count() == 1 or watch.current() is not None:
        yield
        return
    count, index = jax.process_count(), jax.process_index()
    place = Place(global_state.coordinator_address, count, index, None, "joined by hand")
    with _watched(place, Limits()):
        yield


@contextmanager
def _watched(place: Place, limits: Limits) -> Iterator[None]:
    """Wait for all processes and watch over them; at the end wait for all of them again."""
    host, port = watch.split_address(place.coordinator)
    hosts = watch.start(
        place.process_id,
        place.num_processes,
        f"{host}:{port - 1}",
        join_timeout=limits.join,
        peer_timeout=limits.peer,
        stall_timeout=limits.stall,
    )
    if place.process_id == 0:
        shown = ", ".join(dict.fromkeys(hosts))
        print(
            f"{place.num_processes} processes ({place.source}) on {shown}; "
            f"process 0 listens at {place.coordinator}",
            flush=True,
        )
    try:
        yield
    except SystemExit:  # a signal, obeyed by all
        watch.current().leave()
        raise
    except UserError as error:
        watch.current().fail(" ".join(str(error).split()), error.exit_code)
        raise
    except BaseException as error:
        watch.current().fail(f"{type(error).__name__}: {error}".splitlines()[0], 1)
        raise
    else:
        watch.current().leave()


def from_flags(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Place | None:
    """The place that the flags say; None when none is given. ProcessError when they do not fit."""
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if missing:
        raise ProcessError(f"{' and '.join(missing)} not given; several processes need all three: "
                           "--coordinator=host:port --num_processes=2 --process_id=0")  # fmt: skip
    if not re.fullmatch(r".+:\d{2,5}", coordinator):
        raise ProcessError(f"--coordinator={coordinator}; give host:port, such as node0:12345")
    if process_id >= num_processes:
        raise ProcessError(
            f"--process_id={process_id}; allowed: 0 to {num_processes - 1}, "
            f"since --num_processes={num_processes}"
        )
    return Place(coordinator, num_processes, process_id, None, "from flags")


def find_place(method: str, environment: Mapping[str, str], timeout: float) -> Place | None:
    """The place that SLURM or a TPU pod gives this process; None for a process on its own.

    Args:
      method: "auto", "slurm", "tpu" or "off"; with "slurm" and "tpu" it is an error (ProcessError)
        when there is none.
      timeout: seconds to wait for the name of a TPU pod's first host.
    """
    place = None
    if method in ("auto", "slurm"):
        place = slurm_place(environment)
    if place is None and method in ("auto", "tpu"):
        place = _tpu_place(method, environment, timeout)
    if place is None and method in ("slurm", "tpu"):
        raise ProcessError(
            f"--distributed={method}, but this is no process of "
            f"{'srun with several tasks' if method == 'slurm' else 'a TPU pod slice'}; "
            "leave the flag out, or give --coordinator, --num_processes and --process_id"
        )
    return place


def slurm_place(environment: Mapping[str, str]) -> Place | None:
    """The place of a task that srun started; None outside of one, or for a single task.

    Tasks of one host that all see its GPUs share them evenly, in their order.
    """
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if not all(name in environment for name in names):
        return None
    job, nodes, tasks, process, local = (environment[name] for name in names)
    if int(tasks) == 1:
        return None
    # From SLURM's own ports upwards, another one for each job of a host.
    coordinator = f"{first_host(nodes)}:{61000 + int(job) % 4000}"
    devices = None
    here = _tasks_here(environment)
    visible = [d for d in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    if here > 1 and len(visible) > 1:
        if len(visible) % here:
            raise ProcessError(
                f"{here} tasks on a host with {len(visible)} GPUs; start one task a host or one a "
                "GPU: srun --ntasks-per-node"
            )
        share = len(visible) // here
        devices = tuple(range(int(local) * share, (int(local) + 1) * share))
    return Place(coordinator, int(tasks), int(process), devices, "found by SLURM")


def first_host(nodes: str) -> str:
    """The first host of a SLURM list: "gpu[003-007,9],login" -> "gpu003"."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    return "".join(part or "" for part in match.groups())


def _tasks_here(environment: Mapping[str, str]) -> int:
    """Tasks of the step on this host, from a list such as "8(x2),4"."""
    node = int(environment.get("SLURM_NODEID", "0"))
    for entry in environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        number, _, times = entry.rstrip(")").partition("(x")
        node -= int(times or 1)
        if node < 0:
            return int(number)
    return 1


def _tpu_place(method: str, environment: Mapping[str, str], timeout: float) -> Place | None:
    """The place of a host of a TPU pod slice, as JAX finds it; None off TPUs and for one host."""
    several = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "MEGASCALE_COORDINATOR_ADDRESS")
    pod = any(name in environment for name in several) or os.path.exists("/dev/accel0")
    if method == "auto" and not pod and not os.path.exists("/dev/vfio/0"):
        return None
    from jax._src.clusters import ClusterEnv  # the detection has no public name

    for name in ("gketpu", "gcetpu"):
        cluster = next(c for c in ClusterEnv._cluster_types if c.name == name)
        if cluster.is_env_present():
            address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
                None, None, None, None, name, int(timeout)
            )
            return Place(address, count, index, None, "found as a TPU pod slice")
    return None
