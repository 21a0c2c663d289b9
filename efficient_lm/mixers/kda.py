"""Kimi delta attention (arXiv 2510.26692): a delta rule with a decay of each key feature."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from efficient_lm.config import ModelConfig
from efficient_lm.errors import ConfigError
from efficient_lm.mixers import recurrent
from efficient_lm.mixers.gated_deltanet import GatedDeltaNet, GatedDeltaNetOptions
from efficient_lm.model.context import Context
from efficient_lm.model.parameter import cast, matrix


@dataclass(frozen=True)
class KimiDeltaAttentionOptions(GatedDeltaNetOptions):
    """Fields of `config.model.mixers.kda`."""

    rank: int | None = None  # of the matrices to decay and gate; None: value_dim

    def check(self, model: ModelConfig) -> None:
        """ConfigError for values out of range and sizes that do not divide."""
        super().check(model)
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"rank={self.rank}; it must be at least 1, or None for value_dim")


class KimiDeltaAttention(GatedDeltaNet):
    """As Gated DeltaNet; decay [B, T, N, K] and gate come through few features of a token."""

    Options = KimiDeltaAttentionOptions
    gate_activation = staticmethod(jax.nn.sigmoid)
    low_rank: ClassVar = ("step", "gate")

    def make_gates(self, model: ModelConfig, rngs: nnx.Rngs) -> None:
        """The parameters of the decay and of the output's gate."""
        heads, _, key_dim, value_dim = self.sizes
        rank = {"rank": value_dim if self.options.rank is None else self.options.rank}

        def pair(name, head_dim):
            down, up = {"embed": model.embed_dim} | rank, {"heads": heads, "head_dim": head_dim}
            return (
                matrix(rngs, model, down, inputs=["embed"], outputs=["rank"]),
                matrix(rngs, model, rank | up, inputs=["rank"], outputs=list(up)),
            )

        if self.options.decay:
            self.step_down, self.step_up = pair("step", key_dim)
            self.step_bias = recurrent.step_bias(rngs, {"heads": heads, "head_dim": key_dim})
            self.log_rate = recurrent.log_rate(rngs, {"heads": heads}, 1.0, 16.0)
        else:
            self.core_reads = tuple(name for name in self.core_reads if name != "step")
        if self.options.gate:
            self.gate_down, self.gate_up = pair("gate", value_dim)

    def project(
        self, x: Float[Array, "B T D"], context: Context, names: Collection[str] | None = None
    ) -> dict[str, Array]:
        """Per token: query, key and step [B, T, ., K], value and gate [B, T, N, V], beta [B, T, N].

        names: which of them; None: all.
        """
        wanted = self.head_axes if names is None else names
        parts = {name: f"{name}_down" if name in self.low_rank else name for name in wanted}
        parts = {name: part for name, part in parts.items() if hasattr(self, part)}
        weights = {name: getattr(self, part) for name, part in parts.items()}
        projected = recurrent.project(x, weights, context)
        for name in self.low_rank:  # in this order, so that all processes compile one program
            if name not in projected:
                continue
            up = cast(getattr(self, f"{name}_up"), x.dtype)
            y = jnp.einsum("btr,rnh->btnh", projected[name], up)
            projected[name] = context.shard(y, "batch", "length", "heads", "head_dim")
        return projected

    def log_decay(self, step: Float[Array, "B T N K"]) -> Float[Array, "B T N K"]:
        """-A softplus(step + bias) of each key feature, in fp32."""
        bias, log_rate = cast(self.step_bias, jnp.float32), cast(self.log_rate, jnp.float32)
        step = step.astype(jnp.float32) + bias[None, None]
        return -jnp.exp(log_rate)[None, None, :, None] * jax.nn.softplus(step)
