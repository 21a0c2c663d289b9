"""Timing, roofs and the record of the environment."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._core import timing


def test_measure_counts_the_time_of_a_call():
    """A function that sleeps is seen to sleep."""

    def sleepy(x):
        time.sleep(0.02)
        return x

    measured = timing.measure(sleepy, jnp.ones(3), repeats=3)
    assert 20 <= measured.minimum <= measured.median < 200


def test_loop_does_the_work_every_time():
    """Time grows with the steps, and the first argument comes back unchanged."""
    x = jax.random.normal(jax.random.key(0), (256, 256))
    few, many = timing.loop(jnp.matmul, 2), timing.loop(jnp.matmul, 100)
    np.testing.assert_array_equal(few(x, x), x)
    fast, slow = (timing.measure(f, x, x, repeats=5, seconds=0.001).minimum for f in (few, many))
    assert slow > 5 * fast


def test_matmul_rate_is_plausible():
    assert 1e8 < timing.matmul_flops("float32") < 1e16


def test_environment_names_device_and_versions():
    environment = timing.environment()
    assert environment["device"]["platform"] == "cpu"
    assert environment["versions"]["jax"] == jax.__version__
