"""Runs without a work directory."""

import dataclasses

import jax
import numpy as np

from efficient_lm.training import in_memory


def test_a_run_learns_and_calls_of_any_number_of_steps_give_it(run_config, tmp_path, monkeypatch):
    (tmp_path / "text").write_text("to be, or not to be: that is the question\n" * 200)
    config = dataclasses.replace(
        run_config,
        data=dataclasses.replace(run_config.data, source="text", paths=(str(tmp_path / "text"),)),
        training=dataclasses.replace(run_config.training, steps=4),
        evaluation=dataclasses.replace(run_config.evaluation, batches=2),
        optimizer=dataclasses.replace(
            run_config.optimizer,
            schedule=dataclasses.replace(run_config.optimizer.schedule, warmup_steps=1),
        ),
        parallel=dataclasses.replace(run_config.parallel, data=1),
    )
    train, valid = in_memory.load_batches(config)
    assert len(train) == 4 and len(valid) == 2
    first = in_memory.prepare_training(config, train)()
    monkeypatch.setattr(in_memory, "STEPS_AT_ONCE", 3)  # and then the one that is left
    second = in_memory.prepare_training(config, train)()
    assert len(first.losses) == 4 and first.losses[-1] < first.losses[0]
    np.testing.assert_allclose(second.losses, first.losses, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
        first.parameters,
        second.parameters,
    )
    score = in_memory.prepare_evaluator(config, valid[0])(first.parameters, valid)
    assert abs(score["loss"] - first.losses[-1]) < 0.5 and score["bits_per_byte"] < 9
