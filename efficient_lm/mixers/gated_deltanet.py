"""Gated DeltaNet (arXiv 2412.06464) as in Qwen3.5: a memory that decays and is overwritten."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

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
class GatedDeltaNetOptions:
    """Fields of `config.model.mixers.gated_deltanet`."""

    num_value_heads: int = 4
    num_key_heads: int | None = None  # of queries and keys; None: num_value_heads
    key_dim: int | None = None  # of a head; None: embed_dim / num_value_heads
    value_dim: int | None = None  # of a head; None: key_dim
    convolution_width: int = 4  # tokens that q, k and v are mixed of, before SiLU; 1: no mixing
    decay: bool = True  # False: DeltaNet (arXiv 2406.06484), which never forgets
    gate: bool = True  # of the normalised output, by SiLU
    negative_eigenvalues: bool = False  # write with strength 0 to 2, not 0 to 1 (arXiv 2411.12537)
    implementation: str = "auto"
    op = "gated_delta_rule"  # of pallas_kernels, that `implementation` is of

    def sizes(self, model: ModelConfig) -> tuple[int, int, int, int]:
        """(value heads, key heads, key dim, value dim)."""
        heads, key_heads, key_dim = self.num_value_heads, self.num_key_heads, self.key_dim
        key_dim = model.embed_dim // heads if key_dim is None else key_dim
        return (
            heads,
            heads if key_heads is None else key_heads,
            key_dim,
            key_dim if self.value_dim is None else self.value_dim,
        )

    def check(self, model: ModelConfig) -> None:
        """ConfigError for values out of range and sizes that do not divide."""
        for name in (
            "num_value_heads", "num_key_heads", "key_dim", "value_dim", "convolution_width"
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}; it must be at least 1")
        if self.key_dim is None and model.embed_dim % self.num_value_heads:
            raise ConfigError(
                f"embed_dim={model.embed_dim} is not divisible by num_value_heads="
                f"{self.num_value_heads}; set key_dim or change one of them"
            )
        heads, key_heads, _, _ = self.sizes(model)
        if heads % key_heads:
            raise ConfigError(
                f"num_value_heads={heads} is not a multiple of num_key_heads={key_heads}"
            )


class GatedDeltaNet(nnx.Module):
    """project: q, k, v, gate, beta, step; core: convolutions, delta rule; output: norm, gate."""

    Options = GatedDeltaNetOptions
    head_axes: ClassVar = {"query": "key_value_heads", "key": "key_value_heads", "value": "heads",
                           "gate": "heads", "beta": "heads", "step": "heads"}  # fmt: skip
    core_reads = ("query", "key", "value", "beta", "step")
    has_ring = False
    gate_activation = staticmethod(jax.nn.silu)

    def __init__(self, model: ModelConfig, options: GatedDeltaNetOptions, rngs: nnx.Rngs):
        self.options = options
        self.epsilon = model.norm_epsilon
        heads, key_heads, key_dim, value_dim = self.sizes = options.sizes(model)
        embed, each_head = {"embed": model.embed_dim}, {"heads": heads}
        keys = {"key_value_heads": key_heads, "head_dim": key_dim}
        values = each_head | {"head_dim": value_dim}

        def projection(sizes):
            return matrix(rngs, model, embed | sizes, inputs=["embed"], outputs=list(sizes))

        def convolution(sizes):
            return short_convolution.convolution_weight(rngs, sizes, options.convolution_width)

        self.query, self.key, self.value = map(projection, (keys, keys, values))
        self.query_convolution, self.key_convolution = convolution(keys), convolution(keys)
        self.value_convolution = convolution(values)
        self.beta = projection(each_head)
        self.make_gates(model, rngs)
        self.norm = constant(1.0, {"head_dim": value_dim})
        self.out = matrix(
            rngs, model, values | embed, inputs=list(values), outputs=["embed"], residual=True
        )

    def make_gates(self, model: ModelConfig, rngs: nnx.Rngs) -> None:
        """The parameters of the decay and of the output's gate."""
        heads, _, _, value_dim = self.sizes
        embed, each_head = {"embed": model.embed_dim}, {"heads": heads}
        if self.options.decay:
            self.step = matrix(rngs, model, embed | each_head, inputs=["embed"], outputs=["heads"])
            self.step_bias = recurrent.step_bias(rngs, each_head)
            # Above 0, of which the logarithm would have no end.
            self.log_rate = recurrent.log_rate(rngs, each_head, 0.01, 16.0)
        else:
            self.core_reads = tuple(name for name in self.core_reads if name != "step")
        if self.options.gate:
            values = each_head | {"head_dim": value_dim}
            self.gate = matrix(rngs, model, embed | values, inputs=["embed"], outputs=list(values))

    def project(
        self, x: Float[Array, "B T D"], context: Context, names: Collection[str] | None = None
    ) -> dict[str, Array]:
        """Per token: query and key [B, T, H, K], value and gate [B, T, N, V], the rest [B, T, N].

        names: which of them; None: all.
        """
        wanted = self.head_axes if names is None else names
        weights = {
            name: getattr(self, name)
            for name in self.head_axes
            if hasattr(self, name) and name in wanted
        }
        return recurrent.project(x, weights, context)

    def core(
        self, projected: dict[str, Array], context: Context, state: Any = None
    ) -> tuple[Float[Array, "B T N V"], Any, dict]:
        """Convolutions over time, keys of norm 1, then the gated delta rule of each head."""
        (query, key, value), new = recurrent.convolve(
            self, ("query", "key", "value"), projected, context, state, unit=("query", "key")
        )
        beta = jax.nn.sigmoid(projected["beta"].astype(jnp.float32))
        memory, segment = recurrent.memory_for(state, context.segment_ids)
        mixed, memory = pallas_kernels.gated_delta_rule(
            query,
            key,
            value,
            self.log_decay(projected["step"]) if self.options.decay else None,
            2.0 * beta if self.options.negative_eigenvalues else beta,
            initial_state=memory,
            output_final_state=state is not None,
            segment_ids=context.segment_ids,
            implementation=self.options.implementation,
        )
        mixed = checkpoint_name(mixed, "mixer")  # so that policies can keep it
        new |= {"memory": memory, "segment": segment}
        return mixed, None if state is None else new, {}

    def log_decay(self, step: Float[Array, "B T N"]) -> Float[Array, "B T N"]:
        """-A softplus(step + bias) of each head, in fp32."""
        # In fp32 also where a checkpoint stores them in bf16.
        bias, log_rate = cast(self.step_bias, jnp.float32), cast(self.log_rate, jnp.float32)
        step = step.astype(jnp.float32) + bias[None, None]
        return -jnp.exp(log_rate)[None, None] * jax.nn.softplus(step)

    def output(
        self, mixed: Float[Array, "B T N V"], projected: dict[str, Array], context: Context
    ) -> Float[Array, "B T D"]:
        """Per token: RMSNorm of each head, gate, then the output matrix."""
        mixed = recurrent.gated_norm(
            mixed, self.norm[...], projected.get("gate"), self.gate_activation, self.epsilon
        )
        # Letters in the order of the axes, as in `attention`.
        y = jnp.einsum("bthk,hkd->btd", mixed, cast(self.out, mixed.dtype))
        return context.shard(y, "batch", "residual_length", "embed")

    @staticmethod
    def core_flops(model: ModelConfig, options: GatedDeltaNetOptions, length: int) -> float:
        """Forward FLOPs of the core for one token: predict, write and read, and convolutions."""
        heads, key_heads, key_dim, value_dim = options.sizes(model)
        channels = 2 * key_heads * key_dim + heads * value_dim
        return 6.0 * heads * key_dim * value_dim + 2.0 * options.convolution_width * channels

    def init_state(self, batch: int, max_length: int, dtype) -> dict[str, Any]:
        """The last inputs of the convolutions, the fp32 memory, and the document that it is of."""
        heads, key_heads, key_dim, value_dim = self.sizes
        sizes = {"query": (key_heads, key_dim), "key": (key_heads, key_dim),
                 "value": (heads, value_dim)}  # fmt: skip
        width = self.options.convolution_width
        return recurrent.init_memory(batch, heads, key_dim, value_dim) | {
            name: short_convolution.init_state(batch, size, width, dtype)
            for name, size in sizes.items()
        }
