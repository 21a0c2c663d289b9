"""Small models for tests."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_lm.config import ModelConfig
from efficient_lm.model.definition import ModelDefinition, define

FAST_COMPILE = {"xla_backend_optimization_level": 0}
SIZES = {
    "vocabulary_size": 32,
    "embed_dim": 16,
    "num_layers": 2,
    "max_length": 32,
    "mixers": {"attention": {"num_heads": 2}},
    "ffns": {"dense": {"hidden_dim": 24}},
}


def draw(definition: ModelDefinition) -> dict:
    """Random arrays without compilation: matrices by fan-in, the rest around 0.5."""
    rng = np.random.default_rng(0)

    def array(leaf):
        fan_in = math.prod(leaf.shape[leaf.axes.index(name)] for name in leaf.inputs)
        spread, centre = (fan_in**-0.5, 0.0) if leaf.inputs else (0.3, 0.5)
        return jnp.asarray(centre + spread * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree.map(
        array, definition.parameters, is_leaf=lambda leaf: isinstance(leaf, nnx.Param)
    )


def tiny(*, scan: bool = True, **overrides) -> tuple[ModelDefinition, dict]:
    """(definition, arrays) of a model of `SIZES`, changed as given."""
    definition = define(ModelConfig(**(SIZES | overrides)), scan=scan)
    return definition, draw(definition)


def run(definition: ModelDefinition, arrays: dict, tokens, **given):
    """The Output of one compiled pass."""

    def forward(arrays, tokens, given):
        return definition.bind(arrays)(tokens, **given)

    return jax.jit(forward, compiler_options=FAST_COMPILE)(arrays, tokens, given)


def loss_and_gradient(definition: ModelDefinition, arrays: dict, tokens, dropout_key=None):
    """A scalar of all logits and its gradient, compiled."""

    def loss(arrays):
        logits = definition.bind(arrays)(tokens, dropout_key=dropout_key).logits
        return jnp.mean(jnp.sin(logits))

    return jax.jit(jax.value_and_grad(loss), compiler_options=FAST_COMPILE)(arrays)
