"""Mamba-2 (arXiv 2405.21060): a state-space model as linear attention with a decay per token."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

import pallas_kernels
from efficient_lm.config import ModelConfig
from efficient_lm.errors import ConfigError
from efficient_lm.mixers import recurrent, short_convolution
from efficient_lm.model.context import Context
from efficient_lm.model.parameter import cast, constant, matrix


@dataclass(frozen=True)
class Mamba2Options:
    """Fields of `config.model.mixers.mamba2`."""

    expand: int = 2  # all heads together have expand * embed_dim features
    head_dim: int = 64
    state_dim: int = 128  # features of B and C, the keys and queries
    num_groups: int = 1  # heads of a group share B and C
    convolution_width: int = 4  # tokens that x, B and C are mixed of, before SiLU; 1: no mixing
    norm: Literal["group", "head"] = "group"  # which features the output's RMSNorm is over
    implementation: str = "auto"
    op = "gated_linear_attention"  # of pallas_kernels, that `implementation` is of

    @property
    def joins_heads(self) -> bool:
        """Whether `output` needs all heads at once."""
        return self.norm == "group"

    def heads(self, model: ModelConfig) -> int:
        """Number of heads."""
        return self.expand * model.embed_dim // self.head_dim

    def check(self, model: ModelConfig) -> None:
        """ConfigError for values out of range and sizes that do not divide."""
        for name in ("expand", "head_dim", "state_dim", "num_groups", "convolution_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; it must be at least 1")
        if self.expand * model.embed_dim % self.head_dim:
            raise ConfigError(
                f"expand * embed_dim = {self.expand * model.embed_dim} is not divisible by "
                f"head_dim={self.head_dim}; change one of them"
            )
        if self.heads(model) % self.num_groups:
            raise ConfigError(
                f"num_groups={self.num_groups} does not divide the {self.heads(model)} heads "
                "(expand * embed_dim / head_dim)"
            )


class Mamba2(nnx.Module):
    """project: x, B, C, gate, step; core: convolutions, decaying sum, skip; output: gate, norm."""

    Options = Mamba2Options
    head_axes: ClassVar = {"query": "key_value_heads", "key": "key_value_heads", "value": "heads",
                           "gate": "heads", "step": "heads"}  # fmt: skip
    core_reads = ("query", "key", "value", "step")
    has_ring = False

    def __init__(self, model: ModelConfig, options: Mamba2Options, rngs: nnx.Rngs):
        self.options = options
        self.epsilon = model.norm_epsilon
        self.heads = options.heads(model)
        embed, each_head = {"embed": model.embed_dim}, {"heads": self.heads}
        values = each_head | {"head_dim": options.head_dim}
        keys = {"key_value_heads": options.num_groups, "head_dim": options.state_dim}
        for name, sizes in {"query": keys, "key": keys, "value": values}.items():
            convolution = short_convolution.convolution_weight(
                rngs, sizes, options.convolution_width
            )
            setattr(self, f"{name}_convolution", convolution)
            setattr(self, f"{name}_convolution_bias", constant(0.0, sizes))

        def projection(sizes):
            return matrix(rngs, model, embed | sizes, inputs=["embed"], outputs=list(sizes))

        self.query, self.key, self.value = map(projection, (keys, keys, values))
        self.gate, self.step = projection(values), projection(each_head)
        self.step_bias = recurrent.step_bias(rngs, each_head)
        self.log_rate = recurrent.log_rate(rngs, each_head, 1.0, 16.0)
        self.skip = constant(1.0, each_head)
        self.norm = constant(1.0, values)
        self.out = matrix(
            rngs, model, values | embed, inputs=list(values), outputs=["embed"], residual=True
        )

    def project(
        self, x: Float[Array, "B T D"], context: Context, names: Collection[str] | None = None
    ) -> dict[str, Array]:
        """Per token: query (C), key (B) [B, T, G, K], value and gate [B, T, N, V], step [B, T, N].

        names: which of them; None: all.
        """
        wanted = self.head_axes if names is None else names
        weights = {name: getattr(self, name) for name in self.head_axes if name in wanted}
        return recurrent.project(x, weights, context)

    def core(
        self, projected: dict[str, Array], context: Context, state: Any = None
    ) -> tuple[Float[Array, "B T N V"], Any, dict]:
        """Convolutions, then S_t = exp(-A dt) S_(t-1) + B (dt x)^T and y = C S + D x."""
        (query, key, value), new = recurrent.convolve(
            self, ("query", "key", "value"), projected, context, state
        )
        # In fp32 also where a checkpoint stores them in bf16.
        bias, log_rate = cast(self.step_bias, jnp.float32), cast(self.log_rate, jnp.float32)
        step = jax.nn.softplus(projected["step"].astype(jnp.float32) + bias[None, None])
        memory, segment = recurrent.memory_for(state, context.segment_ids)
        mixed, memory = pallas_kernels.gated_linear_attention(
            query,
            key,
            (value.astype(jnp.float32) * step[..., None]).astype(value.dtype),
            -jnp.exp(log_rate)[None, None] * step,
            scale=1.0,
            initial_state=memory,
            output_final_state=state is not None,
            segment_ids=context.segment_ids,
            implementation=self.options.implementation,
        )
        mixed = checkpoint_name(mixed, "mixer")  # so that policies can keep it
        mixed = mixed + cast(self.skip, value.dtype)[None, None, :, None] * value
        new |= {"memory": memory, "segment": segment}
        return mixed, None if state is None else new, {}

    def output(
        self, mixed: Float[Array, "B T N V"], projected: dict[str, Array], context: Context
    ) -> Float[Array, "B T D"]:
        """Per token: gate by SiLU, RMSNorm, then the output matrix."""
        groups = self.options.num_groups if self.options.joins_heads else mixed.shape[2]

        @recurrent.kept_inputs
        def gated(mixed, gate, scale):
            y = mixed.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))
            mean_square = jnp.mean(y * y, axis=-1)  # of each head, then of each group
            over = mean_square.reshape(*y.shape[:2], groups, -1)
            over = jnp.broadcast_to(jnp.mean(over, axis=-1, keepdims=True), over.shape)
            inverse_rms = jax.lax.rsqrt(over.reshape(mean_square.shape) + self.epsilon)
            return (y * inverse_rms[..., None] * scale[None, None]).astype(mixed.dtype)

        mixed = gated(mixed, projected["gate"], cast(self.norm, jnp.float32))
        # Letters in the order of the axes, as in `attention`.
        y = jnp.einsum("bthk,hkd->btd", mixed, cast(self.out, mixed.dtype))
        return context.shard(y, "batch", "residual_length", "embed")

    @staticmethod
    def core_flops(model: ModelConfig, options: Mamba2Options, length: int) -> float:
        """Forward FLOPs of the core for one token: write and read, and convolutions."""
        features = options.expand * model.embed_dim
        channels = features + 2 * options.num_groups * options.state_dim
        return 4.0 * features * options.state_dim + 2.0 * options.convolution_width * channels

    def init_state(self, batch: int, max_length: int, dtype) -> dict[str, Any]:
        """The last inputs of the convolutions, the fp32 memory, and the document that it is of."""
        options = self.options
        keys = (options.num_groups, options.state_dim)
        sizes = {"query": keys, "key": keys, "value": (self.heads, options.head_dim)}
        return recurrent.init_memory(batch, self.heads, options.state_dim, options.head_dim) | {
            name: short_convolution.init_state(batch, size, options.convolution_width, dtype)
            for name, size in sizes.items()
        }
