"""The comparison of Gated DeltaNet with attention and Mamba-2 runs, and compares like with like."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from efficient_lm.inference.speed import state_bytes
from efficient_lm.model.definition import define

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments/gated_deltanet"
RECURRENT = ("gated_deltanet", "mamba2")


@pytest.fixture
def arms(monkeypatch):
    """The module with the settings."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import arms

    yield arms
    for name in ("arms", "decode", "quality", "shapes", "speed", "training"):
        sys.modules.pop(name)


def test_what_cannot_be_run_is_said_before_anything_runs(tmp_path):
    out = tmp_path / "x.json"
    command = [sys.executable, str(FOLDER / "run.py"), "--arm=cpu_small_state", f"--out={out}",
               "--part", "recall", "language"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and not out.exists()
    assert "--part=language has the arms" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_every_part_gives_its_rows(tmp_path):
    out = tmp_path / "x.json"
    command = [sys.executable, str(FOLDER / "run.py"), "--arm=smoke", f"--out={out}", "--part",
               "language", "recall", "speed", "decode", "--mixers", "gated_deltanet"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row.get("error") for row in rows] == [None] * 5
    assert [row["what"] for row in rows] == ["language", "recall", "speed"] + 2 * ["decode"]
    language, recall, speed, *decodes = rows
    assert 0 < language["bits_per_byte"] < 9
    assert set(recall["accuracy"]) == {"2", "4"}
    assert all(0 <= value <= 1 for value in recall["accuracy"].values())
    assert [len(seeds) for seeds in recall["accuracy_by_seed"].values()] == [2, 2]
    last = recall["mean_accuracy_by_steps"]["4"]  # after the smoke arm's four steps
    assert last == np.mean(list(recall["accuracy_by_seed"].values()), axis=0).round(4).tolist()
    assert speed["tokens_per_second"] > 0 and speed["skipped"] == 0
    assert len({row["state_bytes"] for row in decodes}) == 1  # whatever the context


@pytest.mark.parametrize("part, arm", [("language", "gpu"), ("recall", "gpu"), ("recall", "cpu")])
def test_mixers_have_the_same_parameters_and_memories(arms, part, arm):
    task = arms.QUALITY[part, arm]
    configs = [arms.quality.make_config(task, mixer) for mixer in arms.MIXERS]
    counts = [define(config.model).count() for config in configs]
    assert max(counts) < 1.02 * min(counts)
    memories = {}
    for mixer, config in zip(arms.MIXERS, configs, strict=True):
        same = state_bytes(config.model, 64) == state_bytes(config.model, 256)
        assert same == (mixer in RECURRENT)
        memories[mixer] = state_bytes(config.model, 64, "memory")
    assert memories["gated_deltanet"] == memories["mamba2"] > memories["hybrid"] > 0


def test_the_models_of_the_speed_part_have_the_same_parameters(arms):
    shape = arms.SPEED["gpu"][0]
    counts = {
        mixer: define(arms.speed.make_config(shape, mixer, "auto").model).count()
        for mixer in arms.MIXERS
    }
    assert 0.85e9 < counts["attention"] < 1.2e9
    assert max(counts.values()) < 1.01 * min(counts.values())


def test_a_batch_has_equal_shares_of_each_number_of_pairs(arms):
    task = replace(arms.QUALITY["recall", "smoke"], steps=30)
    stacks = arms.quality.recall_batches(task)
    assert [len(stack["tokens"]) for stack in stacks] == [15, 15]
    queries = stacks[0]["weights"].sum(axis=2)
    assert (queries == [[2, 2, 4, 4]]).all()


def test_what_is_committed_keeps_to_what_is_expected():
    expected = json.loads((FOLDER / "expected.json").read_text())
    for path in FOLDER.glob("results/*.json"):
        rows = [row for row in json.loads(path.read_text())["rows"] if "error" not in row]
        recall = {row["mixer"]: row["accuracy"] for row in rows if row["what"] == "recall"}
        means = [np.mean(list(recall[m].values())) for m in expected["recall_order"] if m in recall]
        assert (np.diff(means) <= expected["recall_tolerance"]).all(), path.name
        rates = {
            (row["what"], row["mixer"], row.get("length", row.get("context"))): rate
            for row in rows
            if (rate := row.get("tokens_per_second")) is not None
        }
        for length, least in expected["hybrid_tokens_per_second_over_attention"].items():
            pair = [rates.get(("speed", mixer, int(length))) for mixer in ("hybrid", "attention")]
            assert None in pair or pair[0] >= least * pair[1], path.name
        for mixer, least in expected["decode_tokens_per_second_at_64k_over_1k"].items():
            pair = [rates.get(("decode", mixer, context)) for context in (65_536, 1024)]
            assert None in pair or pair[0] >= least * pair[1], path.name
