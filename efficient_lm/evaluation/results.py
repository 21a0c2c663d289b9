"""Rows of an experiment, kept as JSON while it runs."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import date
from pathlib import Path
from typing import Any

import jax

from efficient_lm.training.manifest import versions

Row = dict[str, Any]


class Results:
    """A JSON file with facts about a run and its rows, written again after each row, so that a run
    that is cut off keeps those that it has.

    script: its path in the repository, for the command. facts: other things that readers need.
    """

    def __init__(self, path: Path, script: str, **facts: Any):
        self.path, self.began = path, time.perf_counter()
        self.values = {
            "command": " ".join([script, *sys.argv[1:]]),
            "date": date.today().isoformat(),
            "device": jax.devices()[0].device_kind,
            "versions": versions(),
            **facts,
            "rows": [],
        }

    def add(self, row: Row) -> None:
        """Keep a row and print it."""
        self.values["rows"].append(row)
        self.values["seconds"] = round(time.perf_counter() - self.began, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.values, indent=1) + "\n")
        print(json.dumps(row), flush=True)


def attempt(row: Row, measure: Callable[[], Row]) -> Row:
    """`row` with what `measure` gives, or with its error: a failure costs no more than a row."""
    try:
        return row | measure()
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error}"[:300]}


def allow_threads() -> None:
    """Call this before JAX has looked for devices where `attempt_all` is to run several jobs.

    A CUDA graph cannot be recorded while another thread compiles or loads a program: both fail.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_command_buffer="


def attempt_all(jobs: Iterable[tuple[Row, Callable[[], Row]]], at_once: int) -> Iterator[Row]:
    """The rows of `attempt` as they end; `at_once` jobs run at the same time, in threads.

    On a GPU more than one need `allow_threads`.
    """
    with ThreadPoolExecutor(at_once) as pool:
        for job in as_completed([pool.submit(attempt, *job) for job in jobs]):
            yield job.result()
