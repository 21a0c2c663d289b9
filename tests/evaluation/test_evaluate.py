"""Whole evaluations: recall tasks by exact score, and the door with its table and JSON."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from efficient_lm.config import Config
from efficient_lm.data.evaluation import TaskBatches
from efficient_lm.errors import DataError
from efficient_lm.evaluation.recall import evaluate_recall, make_predictor
from efficient_lm.evaluation.run import evaluate_run
from efficient_lm.inference.load import load
from efficient_lm.parallel.mesh import make_mesh


@pytest.fixture(scope="module")
def task_config(run_config):
    """The tiny run on a copying task."""
    data = {"source": "copying", "sequence_length": 12, "batch_size": 4, "tokenizer": "bytes",
            "task": {"vocabulary_size": 8, "valid_rows": 10}}  # fmt: skip
    return Config.from_dict({"model": dataclasses.asdict(run_config.model), "data": data})


def batches_of(config):
    return TaskBatches(config.data, "valid", limit=None, local=4, process_index=0, process_count=1)


def test_recall_adds_up_over_batches(task_config):
    """Against a predictor that knows the answers but for some."""
    wrong = {1: (2,), 6: (0, 1)}  # row: answers that it gets wrong
    row = iter(range(100))

    def predict(batch):
        guesses = batch["labels"].copy()
        for b in range(len(guesses)):
            for answer in wrong.get(next(row), ()):
                guesses[b, np.flatnonzero(batch["weights"][b])[answer]] += 1
        guesses[batch["weights"] == 0] = -1  # elsewhere it does not matter
        return guesses

    scores = evaluate_recall(predict, batches_of(task_config))
    assert scores == {
        "accuracy": pytest.approx(57 / 60), "exact_match": pytest.approx(0.8),
        "queries": 60, "rows": 10,
    }  # fmt: skip
    with pytest.raises(DataError, match="no answer to score"):
        evaluate_recall(predict, [])


def test_the_predictor_is_the_argmax_of_the_model(task_config, workdir):
    model = load(workdir)[0]
    mesh = make_mesh(task_config.parallel, jax.devices()[:1])
    chunked = dataclasses.replace(
        task_config, objective=dataclasses.replace(task_config.objective, chunk_logits=12 * 256 * 3)
    )
    predict = jax.jit(make_predictor(chunked, model.definition, mesh))
    batch = next(iter(batches_of(task_config)))
    logits = model(
        batch["tokens"], segment_ids=batch["segment_ids"], positions=batch["positions"]
    ).logits
    np.testing.assert_array_equal(predict(model.arrays, batch), np.argmax(logits, axis=-1))


def test_a_run_on_a_task_is_scored_by_recall(task_config, tmp_path, save_run):
    save_run(tmp_path, task_config, {"parameters": np.ones}, steps=(3,))
    result = evaluate_run(tmp_path)
    assert result["step"] == 3 and result["weights"] == "parameters" and result["devices"] == 8
    assert result["metrics"]["recall"]["queries"] == 60 == result["metrics"]["tokens"]
    # All logits are equal, so the first token, which separates and is no symbol, is the choice.
    assert result["metrics"]["recall"]["accuracy"] == 0.0
    assert result["metrics"]["loss"] == pytest.approx(np.log(256), rel=1e-5)


def door(*arguments):
    """(exit code, stdout, stderr) of the evaluate door on one CPU device."""
    program = (
        "import jax; jax.config.update('jax_platforms', 'cpu'); import runpy; "
        "runpy.run_module('efficient_lm.evaluate', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


def test_the_door_prints_a_table_and_writes_json(workdir, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some text, " * 40)
    out = tmp_path / "out.json"
    code, printed, error = door(
        f"--workdir={workdir}", f"--paths={text}", f"--json={out}",
        "--config.evaluation.stride=10", "--config.data.sequence_length=48",
    )  # fmt: skip
    assert code == 0, error
    result = json.loads(out.read_text())
    assert result["metrics"]["tokens"] == 439 and len(result["metrics"]["position_loss"]) == 48
    assert result["data"]["stride"] == 10 and result["data"]["paths"] == [str(text)]
    assert result["step"] == 1 and result["versions"]["jax"] == jax.__version__
    assert "bits per byte" in printed and f"{result['metrics']['loss']:.4f}" in printed
    # Windows after the first score their last 10 tokens alone, so places differ in their tokens.
    losses, tokens = (result["metrics"][f"position_{name}"][32:] for name in ("loss", "tokens"))
    assert len(set(tokens)) > 1
    mean = np.average(losses, weights=tokens)
    assert [line.split()[-2] for line in printed.splitlines() if "position 32 to 47" in line] == [
        f"{mean:.4f}"
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--workdir=/nowhere/run"], 4, "no work directory"),
        (["--workdir=RUN", "--config.data.sequence_length=65"], 2, "exceeds config.model.max_leng"),
        (["--workdir=RUN", "--config.evaluation.strid=3"], 2, "did you mean 'stride'"),
        (["--workdir=RUN", "--batches=0"], 2, "flag --batches=0"),
    ],
)
def test_the_door_ends_with_one_line(workdir, arguments, code, words):
    returned, out, error = door(*(a.replace("RUN", str(workdir)) for a in arguments))
    assert (returned, out) == (code, "")
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
