"""Checkpoints: exact, atomic, and honest about damage."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.config import CheckpointingConfig
from efficient_lm.training.checkpoint import Checkpointer, open_for_reading


class Moments(NamedTuple):
    count: jax.Array
    mu: dict
    nothing: tuple


def make_state(seed=0, devices=8, rows=16):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("data",))
    rng = np.random.default_rng(seed)

    def put(array, *spec):
        return jax.device_put(array, jax.NamedSharding(mesh, jax.P(*spec)))

    kernel = rng.standard_normal((rows, 8)).astype(np.float32)
    parameters = {
        "layers": [{"kernel": put(kernel, "data")}, {"kernel": put(kernel.T + 1, None, "data")}],
        "scale": put(rng.standard_normal(5).astype(np.float32).astype(jnp.bfloat16)),
        "empty": put(np.zeros((0, 3), np.float32)),
    }
    optimizer = (Moments(put(np.int32(seed)), {"m": put(kernel * 2, None, "data")}, ()), ())
    return {
        "step": put(np.int32(seed)),
        "parameters": parameters,
        "optimizer": optimizer,
        "key": put(np.array([seed, 7], np.uint32)),
    }


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == other.dtype
        assert one.sharding == other.sharding
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def write(workdir, *steps, metrics=None, **options):
    with Checkpointer(workdir, CheckpointingConfig(**options)) as checkpointer:
        for step in steps:
            checkpointer.save(
                step, make_state(step), iterator={"at": step}, config={"a": (1, 2)},
                metrics=metrics and metrics[step], wait=True,
            )  # fmt: skip
    return Path(workdir) / "checkpoints"


def test_restores_every_bit_and_the_rest(tmp_path):
    write(tmp_path, 3, metrics={3: {"loss": np.float32(1.5)}})
    restored = open_for_reading(tmp_path).restore(abstract(make_state(0)))
    assert_same(restored.state, make_state(3))
    assert restored.step == 3
    assert restored.iterator == {"at": 3}
    assert restored.config == {"a": [1, 2]}
    assert restored.metrics == {"loss": 1.5}
    assert restored.versions["jax"] == jax.__version__


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_restores_onto_another_device_count(tmp_path, devices):
    write(tmp_path, 3)
    target = make_state(0, devices)
    restored = open_for_reading(tmp_path).restore(abstract(target))
    assert_same(restored.state, make_state(3, devices))
