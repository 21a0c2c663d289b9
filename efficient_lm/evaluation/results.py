"""Rows of an experiment, kept as JSON while it runs."""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
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


def positive(text: str) -> int:
    """A number on the command line, at least 1: the `type` of an argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def above_zero(text: str) -> float:
    """A number on the command line above 0: the `type` of an argument."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def new_file(text: str) -> Path:
    """A file on the command line, to be written: the `type` of an argument."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a directory; give the name of a file")
    return path


def attempt(row: Row, measure: Callable[[], Row]) -> Row:
    """`row` with what `measure` gives, or with its error: a failure costs no more than a row."""
    try:
        return row | measure()
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error}"[:300]}


def attempt_prepared(
    jobs: Iterable[tuple[Row, Callable[[], Callable[[], Row]]]], at_once: int
) -> Iterator[Row]:
    """The rows of jobs (row, prepare), whose `prepare()` compiles and gives what measures.

    `at_once` of them compile together, in threads, then each is measured by itself: beside others
    times mean nothing, and a GPU can fail at what it runs while another program is loaded.
    """
    jobs = iter(jobs)
    with ThreadPoolExecutor(at_once) as pool:
        while wave := [(row, pool.submit(make)) for row, make in itertools.islice(jobs, at_once)]:
            wait(job for _, job in wave)
            for row, job in wave:
                yield attempt(row, lambda job=job: job.result()())
