"""Rotary embedding: what depends on what, and the limits of its scalings."""

import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.model.rope import RopeConfig, frequencies, rotate

HEAD_DIM = 16
SCALINGS = [
    RopeConfig(),
    RopeConfig(fraction=0.5),
    RopeConfig(theta=5e5, scaling="llama3", factor=8.0, original_max_length=64),
    RopeConfig(scaling="yarn", factor=4.0, original_max_length=64),
]


def positions(*values):
    return jnp.asarray([values], jnp.int32)


def features(rng, count):
    return jnp.asarray(rng.normal(size=(1, count, 3, HEAD_DIM)), jnp.float32)


@pytest.mark.parametrize("config", SCALINGS, ids=lambda c: f"{c.scaling}-{c.fraction}")
def test_products_depend_on_the_distance_alone(config, rng):
    q, k = features(rng, 1), features(rng, 1)
    products = [
        jnp.sum(
            rotate(q, positions(start + 5), config) * rotate(k, positions(start), config), axis=-1
        )
        for start in (0, 1, 17, 1000)
    ]
    for found in products[1:]:
        np.testing.assert_allclose(found, products[0], rtol=1e-3, atol=1e-3)
    further = jnp.sum(rotate(q, positions(6), config) * rotate(k, positions(0), config), axis=-1)
    assert np.abs(further - products[0]).max() > 1e-2


def test_position_zero_is_the_identity_and_norms_are_kept(rng):
    x = features(rng, 4)
    np.testing.assert_array_equal(rotate(x, positions(0, 0, 0, 0), RopeConfig()), x)
    turned = rotate(x, positions(1, 7, 100, 5000), RopeConfig())
    np.testing.assert_allclose(
        jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5
    )


def test_equation_of_the_paper(rng):
    x, place = np.asarray(features(rng, 1))[0, 0, 0], 3.0
    found = rotate(jnp.asarray(x)[None, None, None], positions(3), RopeConfig(theta=100.0))
    for i in range(HEAD_DIM // 2):  # pairs are (i, i + H / 2)
        angle = place * 100.0 ** (-2 * i / HEAD_DIM)
        z = complex(x[i], x[i + HEAD_DIM // 2]) * np.exp(1j * angle)
        np.testing.assert_allclose(
            found[0, 0, 0, [i, i + HEAD_DIM // 2]], [z.real, z.imag], atol=1e-5
        )


def test_a_fraction_leaves_the_other_features(rng):
    x = features(rng, 2)
    turned = rotate(x, positions(3, 9), RopeConfig(fraction=0.25))
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    assert np.all(np.abs(turned[..., :4] - x[..., :4]).max(axis=-1) > 1e-3)
    np.testing.assert_array_equal(rotate(x, positions(3, 9), RopeConfig(fraction=0.0)), x)
    with pytest.raises(ConfigError, match=r"fraction=0\.3 rotates 3 of 10"):
        RopeConfig(fraction=0.3).rotated_dim(10)


@pytest.mark.parametrize("scaling", ["llama3", "yarn"])
def test_a_factor_of_one_changes_nothing(scaling):
    plain, _ = frequencies(RopeConfig(), 64)
    scaled, scale = frequencies(RopeConfig(scaling=scaling, factor=1.0), 64)
    np.testing.assert_allclose(scaled, plain, rtol=1e-6)
    assert scale == 1.0


@pytest.mark.parametrize("scaling", ["llama3", "yarn"])
def test_scaling_keeps_high_frequencies_and_stretches_low_ones(scaling):
    config = RopeConfig(theta=1e6, scaling=scaling, factor=8.0, original_max_length=1024)
    plain, _ = frequencies(RopeConfig(theta=1e6), 128)
    ratio = plain / frequencies(config, 128)[0]
    assert np.all(np.diff(ratio) >= -1e-4)
    np.testing.assert_allclose([ratio[0], ratio[-1]], [1.0, 8.0], rtol=1e-5)
    assert np.any((ratio > 1.1) & (ratio < 7.9))


def test_yarn_scales_the_logits():
    _, scale = frequencies(RopeConfig(scaling="yarn", factor=8.0), 64)
    np.testing.assert_allclose(scale, 0.1 * np.log(8.0) + 1.0)
    _, scale = frequencies(RopeConfig(scaling="yarn", factor=8.0, attention_factor=1.5), 64)
    assert scale == 1.5


def test_angles_are_fp32_for_bf16_features(rng):
    x = features(rng, 1).astype(jnp.bfloat16)
    far = positions(30_001)  # not a bfloat16
    exact = rotate(x.astype(jnp.float32), far, RopeConfig())
    found = rotate(x, far, RopeConfig())
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=1e-2, atol=1e-2)
