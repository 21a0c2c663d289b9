"""The file system under a run: its paths, flushing, and failures told in one line."""

import errno
import fcntl
import functools
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from efficient_lm.errors import CheckpointError

LOCK = ".lock"
_LOCK_PATIENCE = 5.0  # seconds, for a process that is about to end


def local_path(workdir: str | Path) -> Path:
    """`workdir` as a path; buckets are refused, since a directory cannot be renamed there."""
    if "://" in str(workdir):
        raise CheckpointError(
            f"workdir {workdir} is a URL; mount the bucket (gcsfuse) and give the mounted path"
        )
    return Path(workdir).absolute()


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Make the directory of a run, and hold it against other runs; process 0 does it for all.

    The lock is the kernel's (flock), so it ends with the process, however that ends. It holds
    between hosts where the file system shares locks (NFS, Lustre with -o flock); a mounted bucket
    locks within a host alone.

    Raises CheckpointError when another run has it, or when the directory cannot be written.
    """
    if jax.process_index() != 0:
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / LOCK, "a+")  # noqa: SIM115, closed below
    except OSError as error:
        raise CheckpointError(
            f"cannot write to the work directory {workdir}: {error.strerror}; "
            "free some space or choose another --workdir"
        ) from None
    with file:
        _lock(file, workdir)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def _lock(file, workdir: Path) -> None:
    end = time.monotonic() + _LOCK_PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                return  # this file system has no locks
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
        if time.monotonic() > end:
            file.seek(0)
            raise CheckpointError(
                f"the work directory {workdir} is in use by {file.read() or 'another run'}; "
                "stop that run or give another --workdir"
            )
        time.sleep(0.1)


def sync(directory: Path) -> None:
    """Flush the names in a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(directory: Path) -> None:
    """Delete a directory; threads of a failed save may write to it for a moment longer.

    What withstands is left: it has no name of a checkpoint, and the next save tries again.
    """
    for _ in range(20):
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists():
            return
        time.sleep(0.05)


def save_failure(error: Exception, directory: Path, step: int, needed: int) -> CheckpointError:
    """One line for a failed save; a full disk is told with the bytes needed and free."""
    if "No space left" in _chain(error) or getattr(error, "errno", None) == errno.ENOSPC:
        free = shutil.disk_usage(directory).free
        quota = " (a quota or the number of files is used up)" if free > needed else ""
        return CheckpointError(
            f"disk full: checkpoint {step} in {directory} needs about {needed:,} bytes, "
            f"{free:,} are free{quota}; earlier checkpoints are kept"
        )
    return CheckpointError(
        f"checkpoint {step} could not be saved in {directory}: {first_line(error)}; "
        "earlier checkpoints are kept"
    )


def _chain(error: BaseException | None) -> str:
    """The messages of an error and its causes."""
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def orbax():
    """Orbax's v1 interface, imported when first needed; its failures are told by us, in a line."""
    from orbax.checkpoint import v1

    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_no_failed_save)  # adding it twice has no effect
    _pass_over_closed_loops()
    return v1


@functools.cache
def _pass_over_closed_loops() -> None:
    """Print nothing of writes that Orbax gave up and that end after its event loop is closed."""
    print_unraisable = sys.unraisablehook

    def hook(unraisable) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            print_unraisable(unraisable)

    sys.unraisablehook = hook


def _is_no_failed_save(record: logging.LogRecord) -> bool:
    """False for what is logged of orbax's threads and futures beside the failure that we report."""
    message = record.getMessage()
    if "never retrieved" in message and "orbax-checkpoint-tmp" in message:
        return False
    return "_SignalingThread.run() raised" not in message and "Skipping merge of" not in message
