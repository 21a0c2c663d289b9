"""The JSON of an experiment, written again after every result so that nothing is lost."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "jax-cuda13-plugin", "nvidia-cudnn-cu13")
REPOSITORY = Path(__file__).parents[2]


class Record:
    """Facts about the run, and a list of results; a context manager that writes `path`."""

    def __init__(self, path: Path, arm: str, peer: Path | None):
        self.path = path
        self.began = time.perf_counter()
        self.values: dict[str, Any] = {
            "arm": arm,
            "command": " ".join(sys.argv),
            "device": device(),
            "versions": versions(),
            "peer_commit": None if peer is None else commit(peer),
            "results": [],
        }

    def __enter__(self) -> "Record":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.write()
        return self

    def __exit__(self, *exception) -> None:
        self.values["seconds"] = round(self.elapsed(), 1)
        self.write()

    def add(self, row: dict[str, Any]) -> None:
        """Keep a result and print it."""
        self.values["results"].append(row)
        self.write()
        print(f"[{self.elapsed():6.1f} s] {json.dumps(row)}", flush=True)

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.began

    def write(self) -> None:
        """Write all that is known."""
        self.path.write_text(json.dumps(self.values, indent=1) + "\n")


def environment_with_repository() -> dict[str, str]:
    """The environment of a child that imports this repository, installed or not."""
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in paths if path))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that are installed here."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device() -> str:
    """The first GPU with its driver, or the processor."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return lines.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        pass
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def commit(directory: Path) -> str | None:
    """The commit that a clone is at; None for a plain folder."""
    command = ["git", "-C", str(directory), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None
