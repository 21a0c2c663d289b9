"""Named shapes of gated_delta_rule that are benchmarked: of models, and small ones."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclass(frozen=True)
class Case:
    """Sizes as in `gated_delta_rule`; decay: "none", "scalar" or "vector"."""

    name: str
    B: int
    T: int
    H: int
    N: int
    K: int
    V: int
    decay: str = "scalar"
    dtype: str = "bfloat16"
    tags: tuple[str, ...] = ()

    @property
    def flops(self) -> float:
        """Of the recurrence: three products of a token with the state, [K, V] a value head.

        Chunks of C tokens do C (3 K + 2 V) + C^2 / 3 more a token and head: at C = 64 and
        K = V = 128 half as much again.
        """
        return 6.0 * self.B * self.T * self.N * self.K * self.V

    @property
    def bytes(self) -> int:
        """Of q, k, v, the output, g and beta, each touched once."""
        gates = {"none": 0, "scalar": self.N, "vector": self.N * self.K}[self.decay] + self.N
        values = 2 * self.H * self.K + 2 * self.N * self.V
        return self.B * self.T * (jnp.dtype(self.dtype).itemsize * values + 4 * gates)

    def inputs(self) -> tuple[Float[Array, "B T heads *features"] | None, ...]:
        """q, k, v, g, beta and a cotangent: normal, keys of norm 1, g from 0 to -0.2."""
        keys = jax.random.split(jax.random.key(0), 6)
        tokens, dtype = (self.B, self.T), jnp.dtype(self.dtype)
        q, k = (jax.random.normal(key, (*tokens, self.H, self.K)) for key in keys[:2])
        k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
        v, cotangent = (jax.random.normal(key, (*tokens, self.N, self.V)) for key in keys[2:4])
        beta = jax.nn.sigmoid(jax.random.normal(keys[4], (*tokens, self.N)))
        g = None
        if self.decay != "none":
            features = (self.K,) if self.decay == "vector" else ()
            g = -0.2 * jax.random.uniform(keys[5], (*tokens, self.N, *features))
        return q.astype(dtype), k.astype(dtype), v.astype(dtype), g, beta, cotangent.astype(dtype)


CASES = (
    Case("h128_4k", 8, 4096, 16, 16, 128, 128, tags=("train",)),
    Case("h128_4k_none", 8, 4096, 16, 16, 128, 128, "none", tags=("train",)),
    Case("h128_4k_vector", 8, 4096, 16, 16, 128, 128, "vector", tags=("train",)),
    Case("h128_32k", 1, 32768, 16, 16, 128, 128, tags=("train",)),
    Case("qwen3_5_9b_8k", 1, 8192, 16, 32, 128, 128, tags=("train",)),
    Case("qwen3_5_9b_32k", 1, 32768, 16, 32, 128, 128, tags=("train",)),
    Case("qwen3_5_397b_8k", 1, 8192, 16, 64, 128, 128, tags=("train",)),
    Case("qwen3_5_397b_32k", 1, 32768, 16, 64, 128, 128, tags=("train",)),
    Case("odd", 3, 777, 2, 6, 64, 64, tags=("train",)),
    Case("one_row_cpu", 1, 512, 2, 2, 64, 64, dtype="float32", tags=("cpu",)),
    Case("grouped_cpu", 1, 512, 2, 4, 64, 64, dtype="float32", tags=("cpu",)),
    Case("vector_cpu", 1, 512, 2, 2, 64, 64, "vector", dtype="float32", tags=("cpu",)),
)
