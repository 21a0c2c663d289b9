"""What the tests of interop share: the fixtures of transformers, and arrays for a model."""

from pathlib import Path

import jax
import numpy as np

from efficient_lm.config import ModelConfig
from efficient_lm.model.definition import define

FIXTURES = Path(__file__).parents[1] / "fixtures"
MODELS = FIXTURES / "hugging_face"
CASES = sorted(path.name for path in MODELS.iterdir() if path.is_dir())


def random_arrays(model: ModelConfig) -> dict:
    """Arrays for a model, without compiling anything."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
        define(model).parameters,
        is_leaf=lambda leaf: not isinstance(leaf, dict),
    )
