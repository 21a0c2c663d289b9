"""The matrix product with its own gradient rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.model.linear import linear


@pytest.mark.parametrize("tokens", [(), (5,), (2, 3)])
@pytest.mark.parametrize("outputs", [4, 9])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_gradients_are_those_of_the_product(rng, tokens, outputs, dtype):
    x = jnp.asarray(rng.normal(size=(*tokens, 7)), dtype)
    weight = jnp.asarray(rng.normal(size=(7, outputs)), dtype)

    def gradients(product):
        return jax.grad(lambda x, w: jnp.sum(jnp.sin(product(x, w))), argnums=(0, 1))(x, weight)

    np.testing.assert_array_equal(linear(x, weight), x @ weight)
    tolerance = 1e-5 if dtype == jnp.float32 else 3e-2
    for ours, plain in zip(gradients(linear), gradients(jnp.matmul), strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(
            ours.astype(jnp.float32), plain.astype(jnp.float32), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize(("inputs", "outputs"), [(4, 7), (7, 4)])
def test_the_narrower_operand_is_to_the_left(inputs, outputs):
    x, weight = jnp.ones((2, 3, inputs)), jnp.ones((inputs, outputs))
    jaxpr = jax.make_jaxpr(jax.vjp(linear, x, weight)[1])(jnp.ones((2, 3, outputs))).jaxpr
    products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    over_tokens = [e for e in products if e.outvars[0].aval.ndim == 2]
    assert [e.invars[0].aval.shape for e in over_tokens] == [(2, 3, min(inputs, outputs))]
