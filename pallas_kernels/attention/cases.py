"""Named shapes of attention that are benchmarked: real models, odd sizes, decoding."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention.mask import Mask, Term


@dataclass(frozen=True)
class Case:
    """Sizes as in `attention`; causal. When decoding, the query is the last of the S tokens."""

    name: str
    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    dtype: str = "bfloat16"
    window: int | None = None
    segments: int = 0  # documents a row
    decode: bool = False
    tags: tuple[str, ...] = ()

    @property
    def mask(self) -> Mask:
        """Causal, with the case's window and segments; decoding gets its index arrays."""
        terms = (Term(causal=True, window=self.window, segments=self.segments > 0),)
        if self.decode:
            query = jnp.full((self.B, 1), self.S - 1, jnp.int32)
            keys = jnp.arange(self.S, dtype=jnp.int32)[None]
            return Mask(terms, query_index=query, key_index=keys)
        segments = None
        if self.segments:
            length = -(-self.T // self.segments)
            segments = jnp.arange(self.T, dtype=jnp.int32)[None] // length + 1
            segments = jnp.broadcast_to(segments, (self.B, self.T))
        return Mask(terms, query_segments=segments, key_segments=segments)

    @property
    def flops(self) -> float:
        """Of the forward pass: two products over the pairs that the mask allows."""
        allowed = self.mask.dense(self.T, self.S).mean(dtype=jnp.float32)
        return 4.0 * float(allowed) * self.B * self.T * self.S * self.N * self.H

    @property
    def bytes(self) -> int:
        """Of q, k, v and the output, each touched once."""
        size = jnp.dtype(self.dtype).itemsize
        return size * self.B * self.H * (2 * self.T * self.N + 2 * self.S * self.K)

    def inputs(self) -> tuple[Float[Array, "B T N H"], ...]:
        """q, k, v and a cotangent of the output, standard normal."""
        keys = jax.random.split(jax.random.key(0), 4)
        shapes = [(self.B, self.T, self.N, self.H)] + 2 * [(self.B, self.S, self.K, self.H)]
        shapes.append(shapes[0])
        pairs = zip(keys, shapes, strict=True)
        return tuple(jax.random.normal(key, shape, jnp.dtype(self.dtype)) for key, shape in pairs)


CASES = (
    Case("gpt2_124m", 16, 1024, 1024, 12, 12, 64, tags=("train",)),
    Case("gpt2_124m_packed", 16, 1024, 1024, 12, 12, 64, segments=4, tags=("train",)),
    Case("h128_4k", 8, 4096, 4096, 16, 16, 128, tags=("train",)),
    Case("h128_4k_window_512", 8, 4096, 4096, 16, 16, 128, window=512, tags=("train",)),
    Case("llama3_8b_4k", 1, 4096, 4096, 32, 8, 128, tags=("train",)),
    Case("llama3_8b_16k", 1, 16384, 16384, 32, 8, 128, tags=("train",)),
    Case("odd", 3, 777, 777, 6, 2, 64, tags=("train",)),
    Case("llama3_8b_decode_b1", 1, 1, 8192, 32, 8, 128, decode=True, tags=("decode",)),
    Case("llama3_8b_decode_b32", 32, 1, 8192, 32, 8, 128, decode=True, tags=("decode",)),
    Case("nanogpt_cpu", 12, 64, 64, 4, 4, 32, "float32", tags=("cpu",)),
    Case("quickstart_cpu", 8, 256, 256, 4, 4, 64, "float32", tags=("cpu",)),
    Case("long_cpu", 1, 2048, 2048, 4, 2, 64, "float32", tags=("cpu",)),
)
