"""RMSNorm, standard and zero-centred (arXiv 1910.07467)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from efficient_lm.config import ModelConfig
from efficient_lm.model.parameter import constant


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in fp32; zero-centred stores scale - 1 (Gemma)."""

    def __init__(self, model: ModelConfig, size: int, axis: str = "embed"):
        self.zero_centered = model.norm == "zero_centered_rms_norm"
        self.epsilon = model.norm_epsilon
        self.scale = constant(0.0 if self.zero_centered else 1.0, {axis: size})

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        scale = self.scale[...].astype(jnp.float32)
        scale = scale + 1.0 if self.zero_centered else scale
        scale = jnp.expand_dims(scale, tuple(range(x.ndim - 1)))
        return (x32 * inverse_rms * scale).astype(x.dtype)
