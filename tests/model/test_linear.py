"""The matrix product with its own gradient rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.model.linear import linear


@pytest.mark.parametrize("tokens", [(), (5,), (2, 3)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_gradients_are_those_of_the_product(rng, tokens, dtype):
    x = jnp.asarray(rng.normal(size=(*tokens, 7)), dtype)
    weight = jnp.asarray(rng.normal(size=(7, 4)), dtype)

    def gradients(product):
        return jax.grad(lambda x, w: jnp.sum(jnp.sin(product(x, w))), argnums=(0, 1))(x, weight)

    np.testing.assert_array_equal(linear(x, weight), x @ weight)
    tolerance = 1e-5 if dtype == jnp.float32 else 3e-2
    for ours, plain in zip(gradients(linear), gradients(jnp.matmul), strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(
            ours.astype(jnp.float32), plain.astype(jnp.float32), rtol=tolerance, atol=tolerance
        )


def test_the_weight_gradient_comes_straight_from_a_product():
    x, weight = jnp.ones((2, 3, 7)), jnp.ones((7, 4))
    _, vjp = jax.vjp(linear, x, weight)
    jaxpr = jax.make_jaxpr(vjp)(jnp.ones((2, 3, 4))).jaxpr
    (source,) = [e for e in jaxpr.eqns if jaxpr.outvars[1] in e.outvars]
    assert source.primitive.name == "dot_general", "a transposed result is copied on CPUs"
