"""Dense feed-forward layers: SwiGLU and GeGLU (arXiv 2002.05202), GELU, squared ReLU."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from efficient_lm.config import ModelConfig
from efficient_lm.errors import ConfigError
from efficient_lm.model.context import Context
from efficient_lm.model.linear import linear
from efficient_lm.model.parameter import cast, constant, matrix

ACTIVATIONS = {
    "swiglu": jax.nn.silu,
    "geglu": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
}


@dataclass(frozen=True)
class DenseOptions:
    """Fields of `config.model.ffns.dense`."""

    hidden_dim: int | None = None  # None: 4 embed_dim, or 8/3 of it (rounded up to 64) when gated
    activation: Literal["swiglu", "geglu", "gelu", "relu_squared"] = "swiglu"
    bias: bool = False

    @property
    def gated(self) -> bool:
        """Whether a second input matrix gates the activation."""
        return self.activation in ("swiglu", "geglu")

    def size(self, model: ModelConfig) -> int:
        """Features of the hidden layer."""
        if self.hidden_dim is not None:
            return self.hidden_dim
        if self.gated:
            return -(-8 * model.embed_dim // 3 // 64) * 64
        return 4 * model.embed_dim

    def check(self, model: ModelConfig) -> None:
        """ConfigError for an empty hidden layer."""
        if self.size(model) < 1:
            raise ConfigError(f"hidden_dim={self.hidden_dim}; it must be at least 1")


class Dense(nnx.Module):
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) without a gate."""

    Options = DenseOptions

    def __init__(self, model: ModelConfig, options: DenseOptions, rngs: nnx.Rngs):
        self.options = options
        self.dtype = jnp.dtype(model.dtype)
        embed, hidden = {"embed": model.embed_dim}, {"ffn": options.size(model)}
        if options.gated:
            self.gate = matrix(rngs, model, embed | hidden, inputs=["embed"], outputs=["ffn"])
        self.up = matrix(rngs, model, embed | hidden, inputs=["embed"], outputs=["ffn"])
        self.down = matrix(
            rngs, model, hidden | embed, inputs=["ffn"], outputs=["embed"], residual=True
        )
        if options.bias:
            self.up_bias = constant(0.0, hidden)
            self.down_bias = constant(0.0, embed)

    def __call__(
        self, x: Float[Array, "B T D"], context: Context
    ) -> tuple[Float[Array, "B T D"], dict]:
        """(y, auxiliary values)."""
        hidden = linear(x, cast(self.up, self.dtype))
        if self.options.bias:
            hidden = hidden + cast(self.up_bias, self.dtype)[None, None]
        activation = ACTIVATIONS[self.options.activation]
        if self.options.gated:
            hidden = activation(linear(x, cast(self.gate, self.dtype))) * hidden
        else:
            hidden = activation(hidden)
        hidden = context.shard(hidden, "batch", "length", "ffn")
        y = linear(hidden, cast(self.down, self.dtype))
        if self.options.bias:
            y = y + cast(self.down_bias, self.dtype)[None, None]
        return context.shard(y, "batch", "residual_length", "embed"), {}


@dataclass(frozen=True)
class NoFeedForwardOptions:
    """No fields."""

    def check(self, model: ModelConfig) -> None:
        """Nothing can be wrong."""


class NoFeedForward(nnx.Module):
    """For layers that are a mixer alone; the block then adds nothing and holds no norm for it."""

    Options = NoFeedForwardOptions
