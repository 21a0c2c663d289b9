"""Runs of two processes: same losses as one, ends and restarts, resume with fewer processes."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from efficient_lm.errors import CheckpointError, ProcessError
from efficient_lm.training import storage
from efficient_lm.training.checkpoint import CheckpointReader
from efficient_lm.training.metrics import read_metrics

STEPS = 40
SECONDS = 60.0  # until a run of this file must have ended
PEER_TIMEOUT = 4.0
TIMES = ("step_seconds", "tokens_per_second", "mfu", "mfu_measured")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A config file of a small run on text of its own; fsdp over all devices."""
    directory = tmp_path_factory.mktemp("config")
    words = random.Random(0).choices(["alpha ", "beta ", "gamma\n", "delta, ", "epsilon. "], k=3000)
    (directory / "text.txt").write_text("".join(words))
    values = {
        "model": {"embed_dim": 16, "num_layers": 2, "max_length": 32, "dropout": 0.1,
                  "mixers": {"attention": {"num_heads": 2}}},
        "data": {"source": "text", "paths": (str(directory / "text.txt"),),
                 "sequence_length": 32, "batch_size": 8},
        "optimizer": {"schedule": {"warmup_steps": 4}},
        "parallel": {"data": 2, "fsdp": -1},
        "training": {"steps": STEPS, "log_every": 1, "sample_tokens": 0},
        "checkpointing": {"every": 6, "keep_last": 2},
        "evaluation": {"every": 10, "batches": 2},
    }  # fmt: skip
    path = directory / "config.py"
    path.write_text(
        "from efficient_lm.config import Config\n"
        f"def get_config():\n    return Config.from_dict({values!r}).to_config_dict()\n"
    )
    return path


class Runs:
    """Starts processes of the train door, each with its output in a file, and ends them."""

    def __init__(self, config: Path):
        self.config, self.processes = config, []

    def start(self, workdir: Path, count: int, *flags: str) -> list[subprocess.Popen]:
        """`count` processes that share four devices."""
        flags = (f"--config={self.config}", f"--workdir={workdir}", *flags)
        if count > 1:
            flags += (f"--coordinator=localhost:{free_port()}", f"--num_processes={count}",
                      "--join_timeout=30", f"--peer_timeout={PEER_TIMEOUT}")  # fmt: skip
        started = []
        for index in range(count):
            own = (f"--process_id={index}",) if count > 1 else ()
            output = open(workdir.parent / f"{workdir.name}.{index}", "w")  # noqa: SIM115
            process = subprocess.Popen(
                [sys.executable, "-m", "efficient_lm.train", *flags, *own],
                stdout=output, stderr=subprocess.STDOUT,
                env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(4 // count),
                                  "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
            output.close()
            process.output = Path(output.name)
            started.append(process)
        self.processes += started
        return started

    def finish(self, workdir: Path, count: int, *flags: str) -> None:
        """Start, and expect success."""
        for process in self.start(workdir, count, *flags):
            assert process.wait(SECONDS) == 0, process.output.read_text()


@pytest.fixture(scope="module")
def runs(config):
    made = Runs(config)
    yield made
    for process in made.processes:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory) -> Path:
    """The run of two processes that is never stopped."""
    workdir = tmp_path_factory.mktemp("whole") / "two"
    runs.finish(workdir, 2)
    return workdir


def free_port() -> int:
    """A port that is free, and the one before it too."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("", 0))
            port = one.getsockname()[1]
            try:
                other.bind(("", port - 1))
            except OSError:
                continue
            return port


def wait_for(process: subprocess.Popen, condition) -> None:
    """Until `condition` holds; the process must live until then."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None, process.output.read_text()
        assert time.monotonic() < end, process.output.read_text()
        time.sleep(0.002)


def saved(workdir: Path, step: int):
    return (workdir / "checkpoints" / str(step)).exists


def losses(workdir: Path, split: str) -> list[float]:
    return [row["loss"] for row in read_metrics(workdir, split)]


def rows(workdir: Path) -> list[dict]:
    """Metrics without the clock's."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(workdir)]


def last_state(workdir: Path) -> dict[str, np.ndarray]:
    reader = CheckpointReader(workdir)
    step = reader.steps()[-1]
    assert step == STEPS
    parts = reader.parts(step)
    return {
        path: np.asarray(array)
        for name in ("parameters", "optimizer")
        for path, array in reader.restore_part(name, parts[name], step).items()
    }


def assert_same_state(one: Path, other: Path) -> None:
    wanted = last_state(other)
    for path, array in last_state(one).items():
        np.testing.assert_array_equal(array, wanted[path], err_msg=path)


def test_two_processes_compute_what_one_does(runs, whole, tmp_path):
    runs.finish(tmp_path / "one", 1)
    for split, count in (("train", STEPS), ("valid", STEPS // 10)):
        one, two = losses(tmp_path / "one", split), losses(whole, split)
        assert len(one) == len(two) == count  # process 0 alone writes
        np.testing.assert_allclose(two, one, rtol=1e-5)
    tensorboard = list((whole / "tensorboard").iterdir())
    assert len(tensorboard) == 1
    assert "2 processes (from flags)" in (whole.parent / "two.0").read_text()
    assert "loss" not in (whole.parent / "two.1").read_text()


def test_a_killed_process_ends_the_other_and_the_restart_is_exact(runs, whole, tmp_path):
    workdir = tmp_path / "broken"
    first, second = runs.start(workdir, 2)
    wait_for(first, saved(workdir, 6))
    second.kill()
    began = time.monotonic()
    assert first.wait(PEER_TIMEOUT) == ProcessError.exit_code, first.output.read_text()
    assert time.monotonic() - began < 2.0
    last = first.output.read_text().splitlines()[-1]
    assert "error: process 1 on " in last and "the same command" in last
    runs.finish(workdir, 2)
    assert rows(workdir) == rows(whole)
    assert_same_state(workdir, whole)


def test_a_stopped_run_goes_on_with_one_process(runs, whole, tmp_path):
    workdir = tmp_path / "stopped"
    first, second = runs.start(workdir, 2)
    wait_for(first, saved(workdir, 6))
    second.send_signal(signal.SIGTERM)  # one alone is told
    for process in (first, second):
        assert process.wait(SECONDS) == 128 + signal.SIGTERM, process.output.read_text()
    reader = CheckpointReader(workdir)
    assert f"SIGTERM: saved step {reader.steps()[-1]}" in first.output.read_text()
    runs.finish(workdir, 1)
    np.testing.assert_allclose(losses(workdir, "train"), losses(whole, "train"), rtol=1e-5)


def test_a_coordinator_that_is_not_there(config, tmp_path):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "efficient_lm.train", f"--config={config}",
         f"--workdir={tmp_path}/run", "--coordinator=localhost:1234", "--num_processes=2",
         "--process_id=1", "--join_timeout=1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == ProcessError.exit_code
    (line,) = done.stderr.splitlines()
    assert "cannot reach process 0 at localhost:1233" in line and "tried for 1 s" in line
    assert time.monotonic() - began < 15
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_save_that_fails_in_one_process_fails_in_both(failing, tmp_path):
    port = str(free_port())
    program = Path(__file__).with_name("failing_saves.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), str(index), port, str(tmp_path), str(failing)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    for process in processes:
        output, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, output
        assert "failed: checkpoint 2 could not be saved" in output
        assert output.splitlines()[-1] == "[1, 3]"


def test_a_directory_in_use_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_LOCK_PATIENCE", 0.2)
    refused = pytest.raises(CheckpointError, match=r"is in use by process \d+ on .*; stop that run")
    with storage.locked(tmp_path / "run"), refused, storage.locked(tmp_path / "run"):
        pass
    with storage.locked(tmp_path / "run"):  # a lock file that is left does not lock
        pass
