"""Whole runs: killed and resumed = never stopped, stopping by signal, NaN, full disk, profile."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from efficient_lm.config import Config
from efficient_lm.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from efficient_lm.training import loop, manifest, setup
from efficient_lm.training.checkpoint import CheckpointReader
from efficient_lm.training.metrics import read_metrics

TIMES = ("step_seconds", "tokens_per_second", "mfu", "mfu_measured")


@pytest.fixture
def values(tmp_path) -> dict:
    """Fields of a run of 40 small steps on text of its own."""
    words = random.Random(0).choices(["alpha ", "beta ", "gamma\n", "delta, ", "epsilon. "], k=4000)
    (tmp_path / "text.txt").write_text("".join(words))
    return {
        "model": {"embed_dim": 16, "num_layers": 2, "max_length": 32, "dropout": 0.1,
                  "mixers": {"attention": {"num_heads": 2}}},
        "data": {"source": "text", "paths": (str(tmp_path / "text.txt"),),
                 "sequence_length": 32, "batch_size": 8},
        "optimizer": {"name": "muon", "ema_decay": 0.9, "schedule": {"warmup_steps": 4}},
        "training": {"steps": 40, "log_every": 4, "sample_tokens": 0},
        "checkpointing": {"every": 6, "keep_last": 2},
        "evaluation": {"every": 10, "batches": 2},
    }  # fmt: skip


def start(values: dict, directory: Path, workdir: Path, *flags: str) -> subprocess.Popen:
    """The train door in a process of its own."""
    config = directory / "config.py"
    config.write_text(
        "from efficient_lm.config import Config\n"
        f"def get_config():\n    return Config.from_dict({values!r}).to_config_dict()\n"
    )
    return subprocess.Popen(
        [sys.executable, "-m", "efficient_lm.train", f"--config={config}", f"--workdir={workdir}",
         *flags],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


def wait_for(process: subprocess.Popen, condition) -> None:
    """Until `condition` holds or the process ends."""
    while process.poll() is None and not condition():
        time.sleep(0.001)


def rows(workdir: Path) -> list[dict]:
    """Metrics without the clock's."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(workdir)]


def last_state(workdir: Path) -> dict[str, np.ndarray]:
    reader = CheckpointReader(workdir)
    step = reader.steps()[-1]
    parts = reader.parts(step)
    return {
        path: np.asarray(array)
        for name in ("parameters", "optimizer", "average")
        for path, array in reader.restore_part(name, parts[name], step).items()
    }


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(values, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = start(values, tmp_path, whole, "--profile")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert list((whole / "profile").rglob("*.xplane.pb"))

    def saving() -> bool:
        return any((broken / "checkpoints").glob("*.saving"))

    def reached(step: int) -> bool:
        file = broken / "metrics.jsonl"
        lines = file.read_text().splitlines()[:-1] if file.exists() else []
        return any(json.loads(line)["step"] >= step for line in lines)

    later = random.randrange(12, 30)
    for condition, number in (
        (saving, signal.SIGKILL),
        (lambda: reached(later), signal.SIGKILL),
        (lambda: reached(later), signal.SIGTERM),
    ):
        process = start(values, tmp_path, broken)
        wait_for(process, condition)
        process.send_signal(number)
        output, _ = process.communicate(timeout=300)
        assert process.returncode in (-number, 128 + number, 0), output
    if process.returncode == 128 + signal.SIGTERM:
        assert "SIGTERM: saved step" in output
    process = start(values, tmp_path, broken)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "resuming" in output or "is finished" in output
    assert rows(broken) == rows(whole), f"killed after step {later}"
    expected, got = last_state(whole), last_state(broken)
    assert expected.keys() == got.keys()
    for path in expected:
        np.testing.assert_array_equal(got[path], expected[path], err_msg=path)


def test_a_finished_run_says_so_and_is_left_alone(values, tmp_path, capsys):
    values["training"]["steps"] = 8
    config = Config.from_dict(values)
    summary = loop.train(config, tmp_path / "run")
    before = rows(tmp_path / "run")
    capsys.readouterr()
    again = loop.train(config, tmp_path / "run")
    assert again["valid"]["loss"] == summary["valid"]["loss"]
    assert "is finished at step 8" in capsys.readouterr().out
    assert rows(tmp_path / "run") == before


def test_an_evaluation_that_a_signal_left_out_is_made_up(values, tmp_path, monkeypatch):
    values["model"]["num_layers"], values["optimizer"] = 1, {}
    values["training"] |= {"steps": 6, "log_every": 1}
    values["checkpointing"]["every"] = values["evaluation"]["every"] = 3
    run, stops = tmp_path / "run", lambda done, received: signal.SIGTERM if done == 3 else 0
    with monkeypatch.context() as patched, pytest.raises(SystemExit, match="143"):
        patched.setattr(loop.watch, "stops", stops)
        loop.train(Config.from_dict(values), run)
    assert read_metrics(run, "valid") == []
    loop.train(Config.from_dict(values), run)
    assert [(row["step"], row["split"]) for row in rows(run)] == [
        (1, "train"), (2, "train"), (3, "train"), (3, "valid"),
        (4, "train"), (5, "train"), (6, "train"), (6, "valid"),
    ]  # fmt: skip
    saved = [manifest.read(run / "checkpoints" / step) for step in "36"]
    places = [content["iterators"][0]["position"]["next_index"] for content in saved]
    assert saved[0]["metrics"]["loss"] == rows(run)[3]["loss"] and places == [3, 6]


def test_persistent_nan_stops_the_run_with_its_state_saved(values, tmp_path, monkeypatch):
    values["optimizer"] |= {"name": "adamw", "clip_norm": None}
    values["training"] |= {"max_nonfinite_steps": 3}

    class Poisoned:
        """An iterator whose batches have NaN weights from the tenth on."""

        def __init__(self, iterator, *arguments):
            self.iterator, self.count = real(iterator, *arguments), 0

        def __next__(self):
            self.count += 1
            batch = next(self.iterator)
            return batch | {"weights": batch["weights"] * np.nan} if self.count > 9 else batch

        def get_state(self):
            return self.iterator.get_state()

    real = loop.prefetch_to_device
    monkeypatch.setattr(loop, "prefetch_to_device", Poisoned)
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        loop.train(Config.from_dict(values), tmp_path / "run")
    assert all(np.isfinite(array).all() for array in last_state(tmp_path / "run").values())


def test_a_save_that_fails_midway_does_not_end_the_run(values, tmp_path, monkeypatch, capsys):
    values["training"]["steps"] = 14
    save = loop.Run.__annotations__["checkpointer"].save

    def failing(self, step, *arguments, **options):
        if step == 6:
            raise CheckpointError("the disk is full")
        return save(self, step, *arguments, **options)

    monkeypatch.setattr(loop.Run.__annotations__["checkpointer"], "save", failing)
    loop.train(Config.from_dict(values), tmp_path / "run")
    assert "warning: the disk is full" in capsys.readouterr().out
    assert CheckpointReader(tmp_path / "run").steps() == [12, 14]


def test_a_run_keeps_its_tokenizer(values, tmp_path, capsys):
    config = Config.from_dict(values)
    setup._tokenizer(config, tmp_path)
    setup._write_config(config, tmp_path)
    values["data"]["tokenizer"] = "characters"
    with pytest.raises(ConfigError, match=r"'characters', but the run in .* of 'bytes'; give that"):
        setup._tokenizer(Config.from_dict(values), tmp_path)
    shutil.rmtree(tmp_path / "tokenizer")
    (tmp_path / "checkpoints/4").mkdir(parents=True)
    setup._tokenizer(config, tmp_path)
    assert "tokenizer is missing and made again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "fields", "error", "message"),
    [
        ("data", {"batch_size": 12}, ConfigError, "12 rows cannot be split over 8 devices"),
        ("data", {"paths": ("/nowhere.txt",)}, DataError, "nowhere.txt"),
        ("model", {"vocabulary_size": 100}, DataError, "256"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(values, tmp_path, section, fields, error, message):
    values[section] |= fields
    with pytest.raises(error, match=message) as raised:
        loop.train(Config.from_dict(values), tmp_path / "run")
    assert "\n" not in str(raised.value)
