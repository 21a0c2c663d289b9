"""What programs ask of the compiler."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.compilation import LEVEL, compiler_options


def test_cpus_get_less_optimization_unless_flags_say_otherwise(monkeypatch):
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert compiler_options() == compiler_options({"a": one}) == {LEVEL: 2}
    monkeypatch.setenv("XLA_FLAGS", f"--{LEVEL}=3")
    assert compiler_options() is None


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_other_devices_get_what_they_had(monkeypatch, platform):
    """Also where the program is compiled on a CPU for them."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    there = SimpleNamespace(device_set=[SimpleNamespace(platform=platform)])
    assert compiler_options([there]) is None


def test_numbers_are_those_of_full_optimization(rng):
    x = jnp.asarray(rng.standard_normal((37, 64)), jnp.float32)

    def draw_and_normalise(x):
        y = jax.random.normal(jax.random.key(1), x.shape) + jnp.tanh(x)
        return jnp.exp(y) / jnp.sum(jnp.exp(y), axis=-1, keepdims=True)

    full, less = (
        jax.jit(draw_and_normalise, compiler_options={LEVEL: level})(x) for level in (3, 2)
    )
    np.testing.assert_array_equal(full, less)
