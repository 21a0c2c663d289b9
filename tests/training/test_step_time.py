"""A step that is timed by itself is the step of training, on whole rows."""

import jax
import numpy as np

from efficient_lm.config import Config
from efficient_lm.training.step_time import compile_step, random_batch, time_step

CONFIG = Config.from_dict(
    {
        "model": {"embed_dim": 16, "num_layers": 2, "max_length": 16,
                  "mixers": {"attention": {"num_heads": 2}}},
        "data": {"sequence_length": 16, "batch_size": 2},
        "optimizer": {"name": "adamw", "learning_rate": 1e-2, "schedule": {"name": "constant"}},
        "parallel": {"data": 1},
    }
)  # fmt: skip


def test_steps_are_taken_and_timed():
    compiled = compile_step(CONFIG, jax.devices()[:1])
    few, more = (time_step(compiled, 1, repetitions) for repetitions in (1, 8))
    assert more["loss"] < few["loss"] < 6.5  # each starts anew and learns its one batch
    assert few["skipped"] == 0 and few["parameters"] > 0
    assert 0 < more["step_seconds_best"] <= more["step_seconds"]
    assert few["peak_memory_bytes"] >= few["temporary_bytes"] > 0


def test_random_rows_are_one_document_each():
    batch = random_batch(CONFIG)
    assert batch["tokens"].shape == (2, 16) and batch["tokens"].max() < 256
    assert (batch["weights"] == 1).all() and (batch["segment_ids"] == 1).all()
    assert (batch["positions"] == np.arange(16)).all()
    assert (batch["tokens"] != batch["labels"]).any()
