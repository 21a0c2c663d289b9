"""Dense feed-forward layers against their equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.config import ModelConfig
from efficient_lm.ffn.dense import Dense, DenseOptions
from efficient_lm.model.context import Context

MODEL = ModelConfig(embed_dim=8, initializer="fan_in")
CONTEXT = Context(positions=jnp.zeros((2, 3), jnp.int32))


def features(rng):
    return jnp.asarray(rng.normal(size=(2, 3, 8)), jnp.float32)


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu", "relu_squared"])
@pytest.mark.parametrize("bias", [False, True])
def test_equation(activation, bias, rng):
    ffn = Dense(MODEL, DenseOptions(hidden_dim=5, activation=activation, bias=bias), nnx.Rngs(0))
    x = features(rng)
    up_bias, down_bias = np.zeros(5, np.float32), np.zeros(8, np.float32)
    if bias:
        up_bias, down_bias = (rng.normal(size=n).astype(np.float32) for n in (5, 8))
        ffn.up_bias[...], ffn.down_bias[...] = up_bias, down_bias
    up = np.asarray(x) @ np.asarray(ffn.up[...]) + up_bias
    functions = {
        "swiglu": lambda z: z / (1 + np.exp(-z)),
        "geglu": lambda z: np.asarray(jax.nn.gelu(z, approximate=True)),
        "gelu": lambda z: np.asarray(jax.nn.gelu(z, approximate=True)),
        "relu_squared": lambda z: np.maximum(z, 0) ** 2,
    }
    if activation in ("swiglu", "geglu"):
        hidden = functions[activation](np.asarray(x) @ np.asarray(ffn.gate[...])) * up
    else:
        assert not hasattr(ffn, "gate")
        hidden = functions[activation](up)
    found, aux = ffn(x, CONTEXT)
    expected = hidden @ np.asarray(ffn.down[...]) + down_bias
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert aux == {}


def test_tokens_are_independent(rng):
    ffn = Dense(MODEL, DenseOptions(), nnx.Rngs(0))
    x = features(rng)
    changed, _ = ffn(x.at[0, 1].add(1.0), CONTEXT)
    same = np.all(np.asarray(changed == ffn(x, CONTEXT)[0]), axis=-1)
    np.testing.assert_array_equal(same, [[True, False, True], [True, True, True]])


def test_default_sizes():
    model = ModelConfig(embed_dim=768)
    assert DenseOptions().size(model) == 2048
    assert DenseOptions(activation="gelu").size(model) == 3072
    assert DenseOptions(hidden_dim=7).size(model) == 7


def test_runs_in_the_dtype_of_the_model(rng):
    model = ModelConfig(embed_dim=8, initializer="fan_in", dtype="bfloat16")
    half = Dense(model, DenseOptions(), nnx.Rngs(0))
    full = Dense(MODEL, DenseOptions(), nnx.Rngs(0))
    x = features(rng)
    found, _ = half(x.astype(jnp.bfloat16), CONTEXT)
    expected, _ = full(x, CONTEXT)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=0.1, atol=0.03)
