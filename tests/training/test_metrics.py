"""metrics.jsonl: one clean curve across kills and resumes."""

import json
import math

import pytest

from efficient_lm.errors import CheckpointError
from efficient_lm.training.metrics import MetricsWriter, read_metrics


def steps(workdir, split=None):
    return [line["step"] for line in read_metrics(workdir, split)]


def test_lines_are_plain_json_and_there_at_once(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, "train", {"loss": 2.5, "tokens_per_second": 10})
        writer.write(1, "valid", {"loss": math.nan})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {
        "step": 1, "split": "train", "loss": 2.5, "tokens_per_second": 10.0,
    }  # fmt: skip
    assert "NaN" not in lines[1]  # not JSON
    assert math.isnan(read_metrics(tmp_path, "valid")[0]["loss"])


def test_tensorboard_gets_no_values_that_it_complains_of(tmp_path, caplog):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, "train", {"loss": math.nan, "learning_rate": 1.0})
    assert not caplog.text


def test_resuming_gives_one_curve(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 6):
            writer.write(step, "train", {"loss": 1.0 / step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "split": "tr')  # killed while writing
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    with MetricsWriter(tmp_path, resume_step=3, tensorboard=False) as writer:
        assert steps(tmp_path) == [1, 2, 3]
        writer.write(4, "train", {"loss": 0.0})
    assert steps(tmp_path) == [1, 2, 3, 4]
    MetricsWriter(tmp_path, tensorboard=False).close()  # a run without a checkpoint starts anew
    assert steps(tmp_path) == []


def test_a_full_disk_is_told_once_and_leaves_no_half_line(tmp_path):
    told = []
    writer = MetricsWriter(tmp_path, tensorboard=False, warn=told.append)
    writer.write(1, "train", {"loss": 1.0})
    file = writer._file

    class FullDisk:
        def fileno(self):
            return file.fileno()

        def write(self, data):
            return file.write(data[:9])  # as the kernel does when nine bytes are left

    writer._file = FullDisk()
    writer.write(2, "train", {"loss": 1.0})
    writer.write(3, "train", {"loss": 1.0})
    writer._file = file
    writer.write(4, "train", {"loss": 1.0})
    writer.close()
    assert steps(tmp_path) == [1, 4]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert len(told) == 1
    assert "No space left" in told[0]


def test_tensorboard_files_hold_the_scalars(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(7, "train", {"loss": 2.5})
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_an_unwritable_directory_is_one_clear_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write .* give another --workdir"):
        MetricsWriter(tmp_path / "file" / "run")
