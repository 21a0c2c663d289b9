"""The training step: sharded = unsharded, accumulated = whole, and what it does with NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.config import Config
from efficient_lm.errors import ConfigError
from efficient_lm.model.definition import define
from efficient_lm.parallel.mesh import make_mesh
from efficient_lm.parallel.placement import place_batch
from efficient_lm.training.optimizer import make_optimizer
from efficient_lm.training.state import abstract_state, make_initializer
from efficient_lm.training.step import make_train_step

LENGTHS = np.ones(64, np.int32)


def make_config(**sections) -> Config:
    values = {
        "model": {
            "vocabulary_size": 64, "embed_dim": 32, "num_layers": 2, "max_length": 16,
            "mixers": {"attention": {"num_heads": 4, "num_key_value_heads": 2}},
        },
        "data": {"sequence_length": 16, "batch_size": 8},
        "optimizer": {"learning_rate": 1e-2, "schedule": {"warmup_steps": 1}},
        "training": {"steps": 10, "log_every": 2, "max_nonfinite_steps": 2},
    }  # fmt: skip
    for name, fields in sections.items():
        values[name] = values.get(name, {}) | fields
    return Config.from_dict(values)


def make_batch(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 64, (8, 17)).astype(np.int32)
    segments = np.sort(rng.integers(1, 3, (8, 16)), axis=1).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "weights": (rng.random((8, 16)) < 0.8).astype(np.float32),
        "segment_ids": segments,
        "positions": np.tile(np.arange(16, dtype=np.int32), (8, 1)),
    }


def run(config: Config, devices: int, batches) -> tuple[list[dict], dict]:
    """Metrics of each step and the last state."""
    mesh = make_mesh(config.parallel, jax.devices()[:devices])
    definition = define(config.model)
    optimizer = make_optimizer(config.optimizer, definition.parameters, config.training.steps)
    initial = make_initializer(config, definition, optimizer)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(initial, definition, mesh))
    state = jax.jit(initial, out_shardings=shardings)()
    step = jax.jit(make_train_step(config, definition, optimizer, mesh, LENGTHS), donate_argnums=0)
    metrics = []
    for batch in batches:
        state, values = step(state, place_batch(batch, mesh))
        metrics.append(jax.device_get(values))
    return metrics, state


@pytest.mark.parametrize(("optimizer", "fsdp"), [("adamw", 8), ("muon", 4)])
def test_eight_devices_give_the_losses_of_one(optimizer, fsdp):
    attention = {"num_heads": 4, "num_key_value_heads": 2, "sink": True}
    fields = {
        "model": make_config().to_dict()["model"] | {"mixers": {"attention": attention}},
        "optimizer": {"name": optimizer, "learning_rate": 1e-2, "ema_decay": 0.9},
    }
    batches = [make_batch(seed) for seed in range(3)]
    one, expected = run(make_config(**fields), 1, batches)
    many, state = run(make_config(**fields, parallel={"fsdp": fsdp}), 8, batches)
    for a, b in zip(one, many, strict=True):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-6, err_msg=name)
    sink = state.parameters["stack"]["period"]["0"]["mixer"]["sink"]
    np.testing.assert_allclose(sink, expected.parameters["stack"]["period"]["0"]["mixer"]["sink"],
                               rtol=1e-3, atol=1e-6)  # fmt: skip
    matrix = state.parameters["stack"]["period"]["0"]["mixer"]["query"]
    assert matrix.addressable_shards[0].data.shape[1] == 32 // fsdp
    moments = [x for x in jax.tree.leaves(state.optimizer) if x.shape == matrix.shape]
    assert moments and all(m.sharding == matrix.sharding for m in moments)


def test_microbatches_give_the_gradients_of_the_whole_batch():
    batches = [make_batch(seed) for seed in range(2)]
    whole, a = run(make_config(), 1, batches)
    split, b = run(make_config(optimizer={"learning_rate": 1e-2, "accumulation_steps": 4}), 1,
                   batches)  # fmt: skip
    np.testing.assert_allclose(whole[1]["loss_sum"], split[1]["loss_sum"], rtol=1e-5)
    np.testing.assert_allclose(whole[1]["gradient_norm"], split[1]["gradient_norm"], rtol=1e-4)
    assert jax.tree.structure(a) == jax.tree.structure(b)


def test_sums_restart_after_each_line_of_the_log():
    metrics, _ = run(make_config(), 1, [make_batch(seed) for seed in range(4)])
    weights = [make_batch(seed)["weights"].sum() for seed in range(4)]
    sums = [m["weight_sum"] for m in metrics]
    np.testing.assert_allclose(sums, [weights[0], weights[0] + weights[1], weights[2],
                                      weights[2] + weights[3]])  # fmt: skip


def test_a_batch_with_nan_changes_no_parameter():
    good, bad = make_batch(0), make_batch(1)
    bad["weights"] = np.full_like(bad["weights"], np.nan)
    metrics, after_bad = run(make_config(), 1, [good, bad])
    _, after_good = run(make_config(), 1, [good])
    jax.tree.map(
        np.testing.assert_array_equal,
        (after_bad.parameters, after_bad.optimizer),
        (after_good.parameters, after_good.optimizer),
    )
    assert metrics[1]["skipped"] == 1 and metrics[1]["skipped_in_a_row"] == 1
    assert np.isfinite(metrics[1]["loss_sum"])


def test_too_many_nan_in_a_row_halt_all_updates():
    good, bad = make_batch(0), make_batch(1)
    bad["weights"] = np.full_like(bad["weights"], np.nan)
    metrics, state = run(make_config(), 1, [good, bad, bad, good, good])
    _, after_good = run(make_config(), 1, [good])
    assert metrics[-1]["skipped_in_a_row"] == 2 and metrics[-1]["skipped"] == 2
    jax.tree.map(np.testing.assert_array_equal, state.parameters, after_good.parameters)
    metrics, _ = run(make_config(), 1, [good, bad, good, bad])
    assert metrics[2]["skipped_in_a_row"] == 0 and metrics[-1]["skipped"] == 2


def test_dropout_depends_on_the_step_and_not_on_history():
    config = make_config(model=make_config().to_dict()["model"] | {"dropout": 0.5})
    batch = make_batch(0)
    (first, second), _ = run(config, 1, [batch, batch])
    (again,), _ = run(config, 1, [batch])
    assert first["loss_sum"] == again["loss_sum"] and jnp.isfinite(second["loss_sum"])


def test_a_mesh_that_does_not_divide_the_devices_is_one_clear_line():
    with pytest.raises(ConfigError, match="cannot divide 8 devices"):
        make_mesh(make_config(parallel={"fsdp": 3}).parallel)
    with pytest.raises(ConfigError, match="asks for 4 devices, but there are 8"):
        make_mesh(make_config(parallel={"data": 2, "fsdp": 2}).parallel)
