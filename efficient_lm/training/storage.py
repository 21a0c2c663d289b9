"""The file system under a run: its paths, flushing, and failures told in one line."""

import errno
import os
import shutil
import time
from pathlib import Path

from efficient_lm.errors import CheckpointError


def local_path(workdir: str | Path) -> Path:
    """`workdir` as a path; buckets are refused, since a directory cannot be renamed there."""
    if "://" in str(workdir):
        raise CheckpointError(
            f"workdir {workdir} is a URL; mount the bucket (gcsfuse) and give the mounted path"
        )
    return Path(workdir).absolute()


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
