"""Named shapes of the op: those that mixers of about a billion parameters have."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclass(frozen=True)
class Case:
    """B rows of T tokens, N heads of H features, W taps."""

    name: str
    B: int
    T: int
    N: int
    H: int
    W: int = 4
    unit_norm: bool = False
    tags: tuple[str, ...] = ()

    @property
    def flops(self) -> float:
        """Of the products with the weight."""
        return 2.0 * self.B * self.T * self.N * self.H * self.W

    @property
    def bytes(self) -> int:
        """Of x and y, each touched once, in bfloat16."""
        return 4 * self.B * self.T * self.N * self.H

    def inputs(self) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
        """x, weight and a cotangent of y, normal."""
        keys = jax.random.split(jax.random.key(0), 3)
        shape = (self.B, self.T, self.N, self.H)
        x, cotangent = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:2])
        return x, 0.5 * jax.random.normal(keys[2], (self.N, self.H, self.W)), cotangent


CASES = (
    Case("debug", 2, 64, 2, 16, unit_norm=True, tags=("debug",)),
    Case("gated_deltanet_key", 32, 2048, 8, 128, unit_norm=True),
    Case("gated_deltanet_value", 32, 2048, 16, 128),
    Case("mamba2_value", 32, 2048, 64, 64),
    Case("qwen3_5_value_64k", 1, 65_536, 32, 128),
)
