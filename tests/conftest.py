"""Strict mode: eight CPU devices, strict dtype promotion, no silent rank promotion."""

import os

# Tests compile far more than they compute: half of LLVM's work would be for nothing.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 " + os.environ.get("XLA_FLAGS", "")

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key():
    """A PRNG key, the same in every run."""
    return jax.random.key(0)


@pytest.fixture
def rng():
    """A NumPy generator, the same in every run."""
    return np.random.default_rng(0)
