"""The runs of a sweep: checked before anything starts, named by their settings."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from efficient_lm.config import Config
from efficient_lm.errors import ConfigError
from efficient_lm.model.definition import define
from efficient_lm.sweeping import Sweep, over, product
from efficient_lm.sweeping.runs import labels, load_sweep, plan, read_index, write_index

ROOT = Path(__file__).parents[2]
RATE, SEED = "optimizer.learning_rate", "training.seed"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def runs_of(settings, config="configs/debug.py"):
    return plan(Sweep(config=config, runs=settings))


def test_names_depend_on_the_settings_alone():
    (one,) = runs_of(product(over(RATE, [1]), over(SEED, [0])))
    assert one.name.startswith("learning_rate=1.0,seed=0-") and one.settings[RATE] == 1.0
    for same in (
        product(over(SEED, [0]), over(RATE, [1.0])),
        product(over(RATE, [np.float64(1)]), over(SEED, [np.int32(0)])),
        product(over(RATE, [1, 1.0]), over(SEED, [0])),
    ):
        assert runs_of(same) == (one,)
    (late,) = runs_of(product(over(RATE, [1]), over(SEED, [0])), "./configs/../configs/debug.py")
    assert late == one
    names = {run.name for run in runs_of(product(over(RATE, [1, 1.00000001]), over(SEED, [0, 1])))}
    assert len(names) == 4 and one.name in names
    assert one.name not in {run.name for run in runs_of(one_settings(), "configs/quickstart.py")}


def one_settings():
    return product(over(RATE, [1]), over(SEED, [0]))


def test_labels_are_short_and_different():
    assert labels(["training.seed", "optimizer.learning_rate"]) == {
        "training.seed": "seed", "optimizer.learning_rate": "learning_rate"}  # fmt: skip
    assert labels(["training.seed", "data.seed"]) == {
        "training.seed": "training.seed", "data.seed": "data.seed"}  # fmt: skip


EVERY_KIND = {
    "model.layers": ("attention", ("attention", {"window": 8})),
    "model.mixers.attention.num_heads": 4,
    "model.mixers.attention.window": None,
    "model.tie_embeddings": False,
    "model.logits_soft_cap": 30,
    "data.paths": ("a b", "c,d"),
    "data.source": "text",
    "optimizer.learning_rate": 1e-5,
    "optimizer.schedule.name": "wsd",
    "training.sample_prompt": "def f(x): # 'quoted' \"twice\" = $HOME",
    "evaluation.batches": 3,
}


def test_the_door_reads_from_the_command_what_was_planned(tmp_path):
    (run,) = runs_of((EVERY_KIND,))
    done = subprocess.run(
        [*run.command(tmp_path), "--print_config"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == run.values
    assert run.values["training"]["sample_prompt"] == EVERY_KIND["training.sample_prompt"]
    assert "/" not in run.name and " " not in run.name and len(run.name) < 120


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("optimizer.learning_rat", 1.0,
         "unknown field config.optimizer.learning_rat; did you mean 'learning_rate'?"),
        ("optimizr.learning_rate", 1.0,
         "unknown field config.optimizr; did you mean 'optimizer'?"),
        ("training.steps.x", 1, "unknown field config.training.steps.x; steps is not a group"),
        ("training.steps", "many",
         "config.training.steps='many' is of type str; it must be int"),
        ("training.steps", 0, "config.training.steps=0; it must be at least 1"),
        ("data.task.pairs", 3, "config.data.task.pairs is not in the config"),
        ("evaluation.batches", None, "config.evaluation.batches=None: a flag cannot"),
    ],
)  # fmt: skip
def test_wrong_fields_are_named_as_by_the_config(field, value, message):
    with pytest.raises(ConfigError) as caught:
        runs_of(product(over(field, [value]), over(SEED, [0])))
    assert str(caught.value).startswith(message)


def test_every_sweep_of_the_repository_plans():
    files = sorted((ROOT / "configs/sweeps").glob("*.py"))
    assert {f.stem for f in files} >= {"debug", "learning_rate"}
    for file in files:
        sweep = load_sweep(str(file))
        runs = plan(sweep)
        assert len(runs) == len(sweep.runs)
        assert define(Config.from_dict(runs[0].values).model).count() > 0
        command = f"python -m efficient_lm.sweep --sweep=configs/sweeps/{file.name} --workdir=runs/"
        assert f"\nCommand: {command}" in file.read_text()


def test_bad_files_are_told(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "b.py").write_text("def get_sweep():\n    return 3\n")
    for path, words in (
        (tmp_path / "c.py", ["there is no file", "a.py", "b.py"]),
        (tmp_path / "a.py", ["no function get_sweep()"]),
        (tmp_path / "b.py", ["returned 3", "a Sweep"]),
    ):
        with pytest.raises(ConfigError) as caught:
            load_sweep(str(path))
        assert all(word in str(caught.value) for word in words)
    with pytest.raises(ConfigError, match=r"there is no file .*none\.py.*debug\.py"):
        runs_of(({},), "configs/none.py")


def test_the_index_keeps_old_runs(tmp_path):
    first, second = runs_of(over(SEED, [0])), runs_of(over(SEED, [1]))
    write_index(tmp_path, first)
    write_index(tmp_path, second)
    assert list(read_index(tmp_path).values()) == [*first, *second]
