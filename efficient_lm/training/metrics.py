"""metrics.jsonl (one object a line) and TensorBoard files of a run, clean across resumes."""

import errno
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from efficient_lm.errors import CheckpointError

FILE_NAME = "metrics.jsonl"


class MetricsWriter:
    """Appends lines to `workdir/metrics.jsonl` and scalars to `workdir/tensorboard/`.

    A run that resumes at step s passes `resume_step=s`: lines of later steps, and a last line that
    was cut off, are dropped, so that the file holds one curve. None starts the file anew. A full
    disk is told to `warn` once and does not stop the run. Process 0 alone writes. Raises
    CheckpointError when the directory cannot be written at the start.
    """

    def __init__(
        self,
        workdir: str | Path,
        resume_step: int | None = None,
        *,
        tensorboard: bool = True,
        warn: Callable[[str], None] = logging.warning,
    ):
        self._path = Path(workdir) / FILE_NAME
        self._warn = warn
        self._warned = False
        self._resume_step = -1 if resume_step is None else resume_step
        self._tensorboard_directory = self._path.parent / "tensorboard" if tensorboard else None
        self._tensorboard = None
        self._file = None
        if jax.process_index() != 0:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            kept = [line for line in _lines(self._path) if line["step"] <= self._resume_step]
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text("".join(_encode(line) for line in kept))
            os.replace(temporary, self._path)
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115, closed in close()
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self._path} ({error.strerror}); give another --workdir"
            ) from None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.close()

    def write(self, step: int, split: Literal["train", "valid"], values: Mapping[str, Any]) -> None:
        """Append one line: step, split and `values` (numbers; non-finite ones become null).

        The usual keys are loss (nats a token), bits_per_byte, tokens_per_second, mfu (0 to 1),
        step_seconds, learning_rate and gradient_norm; others may be added.
        """
        if self._file is None:
            return
        line = {"step": int(step), "split": split, **{k: float(v) for k, v in values.items()}}
        try:
            self._append(_encode(line).encode())
            if self._tensorboard_directory is not None:
                self._write_tensorboard(line)
        except OSError as error:
            if not self._warned:
                self._warn(f"cannot write {self._path} ({error.strerror}); the run goes on")
                self._warned = True

    def close(self) -> None:
        """Flush and close the files."""
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _append(self, data: bytes) -> None:
        """Write a whole line or none of it."""
        end = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(self._file.fileno(), end)
            raise

    def _write_tensorboard(self, line: dict) -> None:
        if self._tensorboard is None:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(
                str(self._tensorboard_directory), purge_step=self._resume_step + 1
            )
        for name, value in line.items():
            if name not in ("step", "split") and math.isfinite(value):  # others it logs at length
                self._tensorboard.add_scalar(f"{line['split']}/{name}", value, line["step"])


def read_metrics(
    workdir: str | Path, split: Literal["train", "valid"] | None = None
) -> list[dict[str, Any]]:
    """The lines of a run's metrics in the order written; of one split if given.

    A last line that is being written is left out. Empty when the run has none yet. Null values
    (non-finite when written) come back as NaN.
    """
    lines = _lines(Path(workdir) / FILE_NAME)
    return [
        {key: math.nan if value is None else value for key, value in line.items()}
        for line in lines
        if split in (None, line["split"])
    ]


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    """The objects of a file whose last line may be cut off."""
    if not path.exists():
        return
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "step" in line and "split" in line:
            yield line


def _encode(line: Mapping[str, Any]) -> str:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in line.items()
    }
    return json.dumps(finite) + "\n"
