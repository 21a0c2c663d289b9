"""Runs on this machine, a few at a time, with one sweep at most in a directory."""

import errno
import fcntl
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.sweeping.attempts import LOGS, Attempt, state_of
from efficient_lm.sweeping.runs import Run

LOCK = "sweep.lock"
_SECONDS = 0.1  # between looks at the processes


@contextmanager
def locked(directory: Path) -> Iterator[int]:
    """Hold the directory of a sweep; gives a descriptor that processes of it keep open.

    While one of them lives, the directory is in use, even if the sweep itself was killed.
    Raises CheckpointError where it is in use or cannot be written.
    """
    path = directory / LOCK
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path} ({error.strerror}); give another --workdir"
        ) from None
    with file:
        if not _lock(file):
            file.seek(0)
            raise CheckpointError(
                f"{directory} is in use by {file.read().strip() or 'a sweep'} or by a run that it "
                "started; wait for it, stop it, or give another --workdir"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield file.fileno()


def in_use(directory: Path) -> bool:
    """Whether a sweep or a run of it is at work in this directory on this machine."""
    if not (directory / LOCK).exists():
        return False
    with (directory / LOCK).open("a") as file:
        return not _lock(file)


def _lock(file) -> bool:
    """Take the lock; False where another process has it. Some file systems have no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
    return True


def run_all(
    runs: Sequence[Run], directory: Path, *, parallel: int, gpus_per_run: int | None, lock: int
) -> int | None:
    """Train the runs, `parallel` at a time; the signal that ended this early, if one did.

    With `gpus_per_run`, the first run at work sees the first GPUs, the second the next, ...
    After SIGINT or SIGTERM, runs under way save and end, and no more are started; a second signal
    ends them at once.
    """
    waiting, count = list(enumerate(runs, start=1)), len(runs)
    working: dict[int, Attempt] = {}  # by place
    received: list[int] = []
    told = 0  # how many signals were passed on

    def handle(number, frame):
        received.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while working or (waiting and not received):
            for place in range(parallel):
                if place not in working and waiting and not received:
                    index, run = waiting.pop(0)
                    _say(f"[{index}/{count}] {run.name}: started")
                    command, environment = run.command(directory), _gpus(place, gpus_per_run)
                    working[place] = Attempt(
                        run, directory, command, environment=environment, keep_open=[lock]
                    )
            if told < len(received):
                told = len(received)
                name = signal.Signals(received[-1]).name
                order = "save and end" if told == 1 else "end at once"
                _say(f"{name}: {len(working)} runs are told to {order}")
                _stop(working)
            for place, attempt in list(working.items()):
                if attempt.poll() is not None:
                    del working[place]
                    _say(f"{attempt.run.name}: {_outcome(attempt.run, directory)}")
            time.sleep(_SECONDS)
    finally:
        _stop(working)
        for attempt in working.values():
            attempt.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    return received[0] if received else None


def check_places(parallel: int | None, gpus_per_run: int | None) -> None:
    """ConfigError for counts below 1."""
    for name, value in (("parallel", parallel), ("gpus_per_run", gpus_per_run)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name}={value}; it must be at least 1")


def _stop(working: Mapping[int, Attempt]) -> None:
    for attempt in working.values():
        attempt.stop()


def _gpus(place: int, count: int | None) -> dict[str, str] | None:
    """The variable by which CUDA shows a process some of the GPUs."""
    if count is None:
        return None
    return {"CUDA_VISIBLE_DEVICES": ",".join(str(place * count + i) for i in range(count))}


def _outcome(run: Run, directory: Path) -> str:
    state = state_of(directory, run)
    if state.status == "failed":
        return f"failed with exit code {state.exit_code}: {state.error} ({LOGS}/{run.name}.log)"
    return f"{state.status} at step {state.step} of {run.steps}"


def _say(line: str) -> None:
    print(line, flush=True)
