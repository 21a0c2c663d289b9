"""One attempt at a run: its process, its log, and the record of how it ended."""

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from efficient_lm.errors import CheckpointError
from efficient_lm.sweeping.runs import Run, replace_text
from efficient_lm.training.metrics import read_metrics

LOGS = "logs"  # in the directory of the sweep: NAME.log, NAME.json and NAME.job
Status = Literal["waiting", "submitted", "running", "stopped", "failed", "finished"]

# How a run ends that was told to stop, or was stopped before it could listen.
_STOPPED = tuple(sign * number + base for number in (signal.SIGINT, signal.SIGTERM)
                 for sign, base in ((1, 128), (-1, 0)))  # fmt: skip
_SECONDS = 0.05  # between looks at a process
_TAIL = 20_000  # bytes of a log that are searched for the error


@dataclass(frozen=True)
class State:
    """Where a run stands, read from its files."""

    status: Status
    step: int  # of the last line of metrics, or of the summary
    exit_code: int | None = None
    error: str | None = None


class Attempt:
    """A process that trains a run; `poll` and `wait` record its end.

    `rank` is that of this process among those that train the run together; only the first of them
    keeps the record. Raises CheckpointError where the log cannot be written.
    """

    def __init__(
        self,
        run: Run,
        directory: Path,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        keep_open: Sequence[int] = (),
        rank: int = 0,
    ):
        self.run, self._directory, self._rank = run, directory, rank
        self._log = directory / LOGS / (run.name + (f".{rank}" if rank else "") + ".log")
        self._record = {
            "attempts": read_record(directory, run).get("attempts", 0) + 1,
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "ended": None,
            "exit_code": None,
            "error": None,
        }
        self._write()
        try:
            with self._log.open("ab") as log:
                self._begin = log.tell()
                # A session of its own: Ctrl-C in the terminal is for the sweep to pass on, once.
                self.process = subprocess.Popen(
                    list(command),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=None if environment is None else {**os.environ, **environment},
                    pass_fds=tuple(keep_open),
                    start_new_session=True,
                )
        except OSError as error:
            raise CheckpointError(
                f"cannot start {run.name} ({error.strerror}: {error.filename}); "
                "free some space or give another --workdir"
            ) from None
        # A thread waits, so that signal handlers can look at what it found without any lock.
        self._code: int | None = None
        threading.Thread(target=self._watch, daemon=True).start()

    def stop(self) -> None:
        """Tell the run to save and end; a second time: to end at once."""
        if self._code is None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGTERM)

    def poll(self) -> int | None:
        """The exit code once the process has ended; a signal's is its negative number."""
        if self._code is not None and self._record["ended"] is None:
            self._finish(self._code)
        return self._code

    def wait(self) -> int:
        """The exit code, once there is one."""
        while self._code is None:
            time.sleep(_SECONDS)
        return self.poll()

    def _watch(self) -> None:
        self._code = self.process.wait()

    def _finish(self, code: int) -> None:
        self._record["ended"] = time.strftime("%Y-%m-%d %H:%M:%S")
        self._record["exit_code"] = code
        if code != 0:
            self._record["error"] = _error_of(self._log, self._begin, code)
        self._write()

    def _write(self) -> None:
        if self._rank == 0:
            path = _record_path(self._directory, self.run)
            replace_text(path, json.dumps(self._record, indent=2) + "\n")


def read_record(directory: Path, run: Run) -> dict[str, Any]:
    """How the last attempt at a run began and ended; empty if there was none."""
    return _read_json(_record_path(directory, run))


def state_of(directory: Path, run: Run, *, alive: bool = False) -> State:
    """Where a run stands; `alive`: something may be training it now."""
    summary = _read_json(directory / run.name / "summary.json")
    if summary.get("step", -1) >= run.steps:
        return State("finished", summary["step"])
    lines = read_metrics(directory / run.name)
    step = lines[-1]["step"] if lines else 0
    record = read_record(directory, run)
    if not record:
        return State("submitted" if alive else "waiting", step)
    code = record["exit_code"]
    if record["ended"] is None:
        return State("running" if alive else "stopped", step)
    if alive:
        return State("submitted", step)
    if code == 0 or code in _STOPPED:  # 0: finished with fewer steps than it has now
        return State("stopped", step, code)
    return State("failed", step, code, record["error"])


def _record_path(directory: Path, run: Run) -> Path:
    return directory / LOGS / f"{run.name}.json"


def _error_of(log: Path, begin: int, code: int) -> str:
    """The line of an attempt's log that says what went wrong."""
    with log.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(begin, end - _TAIL))
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in re.split("[\r\n]+", text) if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1].removeprefix("error: ")
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; perhaps the memory was full" if -code == signal.SIGKILL else ""
        return f"ended by {name}{hint}"
    return lines[-1] if lines else f"no output; see {log}"


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when the file is not there or no object."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
