"""Tiny random models of the kinds that decoding must get right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope="session")
def make_model():
    """make_model(kind, **fields of ModelConfig) -> Model with weights that make distinct choices.

    Kinds: "full", "window" (5 tokens) and "mixed", all with grouped queries, and "hybrid", of a
    recurrent layer and a full one.
    """
    from flax import nnx

    from efficient_lm.config import ModelConfig, layer
    from efficient_lm.inference.model import Model
    from efficient_lm.model.definition import define

    window, full = layer(window=5), layer()
    patterns = {
        "full": (full,),
        "window": (window,),
        "mixed": (window, full),
        "hybrid": (layer("gated_deltanet"), full),
    }

    def make(kind, **fields):
        defaults = {"vocabulary_size": 256, "max_length": 64}
        config = ModelConfig(
            embed_dim=16,
            num_layers=2,
            layers=patterns[kind],
            mixers={"attention": {"num_heads": 4, "num_key_value_heads": 2}},
            **(defaults | fields),
        )
        definition = define(config, scan=False)
        rng = np.random.default_rng(1)

        def draw(leaf):  # in NumPy: compiling the initializers would take seconds
            scale = 0.3 * rng.standard_normal(leaf.shape) if len(leaf.shape) > 1 else 1.0
            if leaf.axes == ("heads",):
                scale = -2.0  # of decays: half is kept for 40 tokens
            return jnp.asarray(np.broadcast_to(scale, leaf.shape), jnp.float32)

        is_leaf = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
        return Model(definition, jax.tree.map(draw, definition.parameters, is_leaf=is_leaf))

    return make


@pytest.fixture(scope="session")
def models(make_model):
    """{kind: Model}; their compiled programs serve all tests of the session."""
    return {kind: make_model(kind) for kind in ("full", "window", "mixed", "hybrid")}
