"""Named shapes of gated_linear_attention that are benchmarked: of models, and small ones."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclass(frozen=True)
class Case:
    """Sizes as in `gated_linear_attention`. decay: "none", "scalar" or "vector".

    retention: a decay that is the same at every token, 1 - 2 ** (-5 - head) (arXiv 2307.08621).
    """

    name: str
    B: int
    T: int
    H: int
    N: int
    K: int
    V: int
    decay: str = "scalar"
    dtype: str = "bfloat16"
    retention: bool = False
    tags: tuple[str, ...] = ()

    @property
    def flops(self) -> float:
        """Of the recurrence: two products of a token with the state, [K, V] a value head."""
        return 4.0 * self.B * self.T * self.N * self.K * self.V

    @property
    def bytes(self) -> int:
        """Of q, k, v, g and the output, each touched once."""
        gates = {"none": 0, "scalar": self.N, "vector": self.N * self.K}[self.decay]
        values = 2 * self.H * self.K + 2 * self.N * self.V
        return self.B * self.T * (jnp.dtype(self.dtype).itemsize * values + 4 * gates)

    def inputs(self) -> tuple[Float[Array, "B T heads *features"] | None, ...]:
        """q, k, v, g and a cotangent: standard normal, keys of norm 1, g from 0 to -0.2."""
        keys = jax.random.split(jax.random.key(0), 5)
        tokens, dtype = (self.B, self.T), jnp.dtype(self.dtype)
        q, k = (jax.random.normal(key, (*tokens, self.H, self.K)) for key in keys[:2])
        k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
        v, cotangent = (jax.random.normal(key, (*tokens, self.N, self.V)) for key in keys[2:4])
        g = None
        if self.retention:
            per_head = jnp.log1p(-(2.0 ** (-5 - jnp.arange(self.N, dtype=jnp.float32))))
            g = jnp.broadcast_to(per_head, (*tokens, self.N))
        elif self.decay != "none":
            features = (self.K,) if self.decay == "vector" else ()
            g = -0.2 * jax.random.uniform(keys[4], (*tokens, self.N, *features))
        return q.astype(dtype), k.astype(dtype), v.astype(dtype), g, cotangent.astype(dtype)


CASES = (
    Case("h128_4k", 8, 4096, 16, 16, 128, 128, tags=("train",)),
    Case("h128_4k_plain", 8, 4096, 16, 16, 128, 128, "none", tags=("train",)),
    Case("h128_4k_retention", 8, 4096, 16, 16, 128, 128, retention=True, tags=("train",)),
    Case("h128_4k_vector", 8, 4096, 16, 16, 128, 128, "vector", tags=("train",)),
    Case("h128_32k", 1, 32768, 16, 16, 128, 128, tags=("train",)),
    Case("h128_32k_plain", 1, 32768, 16, 16, 128, 128, "none", tags=("train",)),
    Case("mamba2_4k", 8, 4096, 1, 32, 128, 64, tags=("train",)),
    Case("two_mamba_2k", 1, 2048, 16, 16, 2080, 65, dtype="float32", tags=("train",)),
    Case("odd", 3, 777, 2, 6, 64, 64, tags=("train",)),
    Case("one_row_cpu", 1, 512, 2, 2, 64, 64, dtype="float32", tags=("cpu",)),
    Case("plain_cpu", 1, 512, 2, 2, 64, 64, "none", dtype="float32", tags=("cpu",)),
    Case("vector_cpu", 1, 512, 2, 2, 64, 64, "vector", dtype="float32", tags=("cpu",)),
)
