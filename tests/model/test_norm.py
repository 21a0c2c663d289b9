"""RMSNorm: scale invariance, fp32 statistics, and the two ways to store the scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.config import ModelConfig
from efficient_lm.model.norm import RMSNorm


@pytest.mark.parametrize("kind", ["rms_norm", "zero_centered_rms_norm"])
def test_starts_with_unit_scale_and_forgets_the_length_of_its_input(kind, rng):
    norm = RMSNorm(ModelConfig(norm=kind), 64)
    x = jnp.asarray(rng.normal(size=(2, 3, 64)), jnp.float32)
    y = norm(x)
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(y**2, axis=-1)), np.ones((2, 3)), rtol=1e-4)
    np.testing.assert_allclose(norm(100.0 * x), y, rtol=1e-4)
    start = 0.0 if kind.startswith("zero") else 1.0
    np.testing.assert_array_equal(norm.scale[...], np.full(64, start, np.float32))


def test_both_kinds_are_one_function_with_shifted_scales(rng):
    plain = RMSNorm(ModelConfig(), 8)
    centred = RMSNorm(ModelConfig(norm="zero_centered_rms_norm"), 8)
    scale = jnp.asarray(rng.normal(size=8), jnp.float32)
    plain.scale[...] = scale
    centred.scale[...] = scale - 1.0
    x = jnp.asarray(rng.normal(size=(1, 5, 8)), jnp.float32)
    np.testing.assert_allclose(plain(x), centred(x), rtol=1e-5, atol=1e-6)
    values = np.asarray(x)
    rms = np.sqrt(np.mean(values**2, axis=-1, keepdims=True))
    expected = values / rms * np.asarray(scale)
    np.testing.assert_allclose(plain(x), expected, rtol=1e-4, atol=1e-5)


def test_statistics_are_fp32_in_bf16(rng):
    x = jnp.asarray(rng.normal(size=(1, 1, 4096)), jnp.bfloat16)
    norm = RMSNorm(ModelConfig(), 4096)
    y = norm(x)
    assert y.dtype == jnp.bfloat16
    # One rounding of the exact result, which a sum of 4096 squares in bf16 would miss by far.
    exact = norm(x.astype(jnp.float32))
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


def test_a_zero_vector_gives_zero_and_finite_gradients():
    norm = RMSNorm(ModelConfig(), 8)
    zero = jnp.zeros((1, 1, 8))
    assert np.all(np.asarray(norm(zero)) == 0)
    assert np.all(np.isfinite(jax.grad(lambda x: jnp.sum(norm(x)))(zero)))
