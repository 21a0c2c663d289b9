"""Linear attention (arXiv 2006.16236): a feature map of queries and keys instead of a softmax."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

import pallas_kernels
from efficient_lm.config import ModelConfig
from efficient_lm.errors import ConfigError
from efficient_lm.mixers import feature_maps, recurrent, short_convolution
from efficient_lm.model.context import Context
from efficient_lm.model.parameter import cast, constant, matrix, parameter
from efficient_lm.model.rope import RopeConfig, rotate

SMALLEST_SUM = 1e-10  # of weights; below it a token has no weights to speak of


@dataclass(frozen=True)
class LinearAttentionOptions:
    """Fields of `config.model.mixers.linear_attention`.

    feature_map: identity; elu (+ 1); relu; squared_relu; hedgehog: softmax of [Ax, -Ax] with a
      learned A (arXiv 2402.04347); performer: random features that estimate the softmax's kernel
      exp(q.k / sqrt(key_dim)) (arXiv 2009.14794).
    decay: of what was written before. retention: one a head, constant over time, which starts as
      in RetNet (arXiv 2307.08621) and is learned; scalar and vector: sigmoid(.)^(1/16) of the
      token, one a head or one a feature (GLA, arXiv 2312.06635).
    normalize: sum: weights of a token sum to 1, for maps that are nowhere negative; rms: RMSNorm of
      each head's output, as a sum without weights that sum to 1 grows with its length.
    rope: rotates the features, so that weights depend on distances, and can be negative.
    """

    num_heads: int = 4
    key_dim: int | None = None  # of a head; None: embed_dim / num_heads
    value_dim: int | None = None  # of a head; None: key_dim
    feature_map: Literal["identity", "elu", "relu", "squared_relu", "hedgehog", "performer"] = "elu"
    num_features: int | None = None  # of performer; None: key_dim
    feature_seed: int = 0  # of performer's features, which all layers and heads share
    decay: Literal["none", "retention", "scalar", "vector"] = "none"
    decay_rank: int = 16  # of the matrix to a vector decay
    normalize: Literal["sum", "rms"] = "sum"
    gate: Literal["none", "silu"] = "none"  # of the output, elementwise
    convolution_width: int | None = None  # short convolution and SiLU of q, k and v; None: none
    rope: RopeConfig = field(default_factory=lambda: RopeConfig(fraction=0.0))
    implementation: str = "auto"
    op = "gated_linear_attention"  # of pallas_kernels, that `implementation` is of

    def sizes(self, model: ModelConfig) -> tuple[int, int, int, int]:
        """(heads, key dim, features of a key, value dim)."""
        key_dim = model.embed_dim // self.num_heads if self.key_dim is None else self.key_dim
        features = {
            "hedgehog": 2 * key_dim,
            "performer": key_dim if self.num_features is None else self.num_features,
        }
        return (
            self.num_heads,
            key_dim,
            features.get(self.feature_map, key_dim),
            key_dim if self.value_dim is None else self.value_dim,
        )

    def check(self, model: ModelConfig) -> None:
        """ConfigError for values out of range, or that do not go together."""
        for name in ("num_heads", "key_dim", "value_dim", "num_features", "decay_rank",
                     "convolution_width"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}; it must be at least 1")
        if self.feature_seed < 0:
            raise ConfigError(f"feature_seed={self.feature_seed}; it must be at least 0")
        if self.key_dim is None and model.embed_dim % self.num_heads:
            raise ConfigError(
                f"embed_dim={model.embed_dim} is not divisible by num_heads={self.num_heads}; "
                "set key_dim or change one of them"
            )
        if self.feature_map == "identity" and self.normalize == "sum":
            raise ConfigError(
                "feature_map='identity' gives negative weights, which cannot be divided by their "
                "sum; set normalize='rms' or another feature_map"
            )
        if self.feature_map == "performer" and self.normalize != "sum":
            raise ConfigError(
                f"feature_map='performer' estimates a softmax, so normalize={self.normalize!r} "
                "has no meaning; set normalize='sum'"
            )
        if self.feature_map != "performer" and self.num_features is not None:
            raise ConfigError(
                f"num_features={self.num_features} has no effect with feature_map="
                f"{self.feature_map!r}; only 'performer' has features to choose"
            )
        if self.rope.fraction > 0 and self.normalize == "sum":
            raise ConfigError(
                f"rope.fraction={self.rope.fraction} makes weights negative, which cannot be "
                "divided by their sum; set normalize='rms' or rope.fraction=0"
            )
        self.rope.check(self.sizes(model)[2])


class LinearAttention(nnx.Module):
    """project: q, k, v, gate, decay; core: features, their decaying sum; output: norm, gate."""

    Options = LinearAttentionOptions
    head_axes: ClassVar = dict.fromkeys(("query", "key", "value", "gate", "decay"), "heads")
    core_reads = ("query", "key", "value")  # and "decay" where it is of the token
    has_ring = False

    def __init__(self, model: ModelConfig, options: LinearAttentionOptions, rngs: nnx.Rngs):
        self.options = options
        self.epsilon = model.norm_epsilon
        heads, key_dim, features, value_dim = self.sizes = options.sizes(model)
        embed, each_head = {"embed": model.embed_dim}, {"heads": heads}
        keys = each_head | {"head_dim": key_dim}
        values = each_head | {"head_dim": value_dim}
        entries = {"query": keys, "key": keys, "value": values}

        def projection(sizes, source="embed"):
            width = {source: model.embed_dim if source == "embed" else options.decay_rank}
            return matrix(rngs, model, width | sizes, inputs=[source], outputs=list(sizes))

        for name, sizes in entries.items():
            setattr(self, name, projection(sizes))
            if options.convolution_width is not None:
                convolution = short_convolution.convolution_weight(
                    rngs, sizes, options.convolution_width
                )
                setattr(self, f"{name}_convolution", convolution)
        if options.feature_map == "hedgehog":
            for name in ("query_map", "key_map"):
                identity = jnp.broadcast_to(jnp.eye(key_dim)[None], (heads, key_dim, key_dim))
                setattr(self, name, parameter(identity, ("heads", "head_dim", "feature")))
        if options.decay == "retention":
            rates = -jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(heads, dtype=jnp.float32))))
            self.log_rate = parameter(jnp.log(rates), ("heads",))
        elif options.decay != "none":
            self.core_reads += ("decay",)
            sizes = each_head | ({"feature": features} if options.decay == "vector" else {})
            self.decay_bias = constant(0.0, sizes)
            if options.decay == "vector":
                self.decay_down = projection({"rank": options.decay_rank})
                self.decay_up = projection(sizes, "rank")
            else:
                self.decay = projection(sizes)
        if options.gate != "none":
            self.gate = projection(values)
        if options.normalize == "rms":
            self.norm = constant(1.0, {"head_dim": value_dim})
        self.out = matrix(
            rngs, model, values | embed, inputs=list(values), outputs=["embed"], residual=True
        )

    def project(
        self, x: Float[Array, "B T D"], context: Context, names: Collection[str] | None = None
    ) -> dict[str, Array]:
        """Per token: query and key [B, T, N, K], value and gate [B, T, N, V], decay [B, T, N, ...].

        names: which of them; None: all.
        """
        wanted = self.head_axes if names is None else names
        parts = {name: name for name in self.head_axes if name in wanted and hasattr(self, name)}
        if "decay" in wanted and hasattr(self, "decay_down"):
            parts["decay"] = "decay_down"
        weights = {name: getattr(self, part) for name, part in parts.items()}
        projected = recurrent.project(x, weights, context)
        if parts.get("decay") == "decay_down":
            up = cast(self.decay_up, x.dtype)
            decay = jnp.einsum("btr,rnf->btnf", projected["decay"], up)
            projected["decay"] = context.shard(decay, "batch", "length", "heads", "feature")
        return projected

    def core(
        self, projected: dict[str, Array], context: Context, state: Any = None
    ) -> tuple[Float[Array, "B T N V"], Any, dict]:
        """Features of queries and keys, then S_t = decay S_(t-1) + phi(k) v^T and o = phi(q) S."""
        names, new = ("query", "key", "value"), {}
        if self.options.convolution_width is None:
            query, key, value = (projected[name] for name in names)
        else:
            (query, key, value), new = recurrent.convolve(self, names, projected, context, state)
        decay = self.log_decay(projected.get("decay"), value)
        if self.options.feature_map == "performer":
            before = () if state is None else (state["largest"], state["segment"])
            query, key, shrink, largest = feature_maps.performer(
                query, key, self.directions, context.segment_ids, *before
            )
            if state is not None:
                new["largest"] = largest
            if decay is None:
                decay = shrink
            else:
                decay = decay + (shrink if decay.ndim == 3 else shrink[..., None])
        else:
            query, key = self.features(query, "query_map"), self.features(key, "key_map")
            query = rotate(query, context.positions, self.options.rope)
            key = rotate(key, context.positions, self.options.rope)

        by_sum = self.options.normalize == "sum"
        if by_sum:  # a last column of the memory gathers the sum of the weights
            value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)
        memory, segment = recurrent.memory_for(state, context.segment_ids)
        mixed, memory = pallas_kernels.gated_linear_attention(
            query,
            key,
            value,
            decay,
            scale=1.0 if by_sum else None,
            initial_state=memory,
            output_final_state=state is not None,
            segment_ids=context.segment_ids,
            implementation=self.options.implementation,
        )
        mixed = checkpoint_name(mixed, "mixer")  # so that policies can keep it
        if by_sum:
            weights = mixed[..., -1:].astype(jnp.float32)
            weights = jnp.where(weights < SMALLEST_SUM, 1.0, weights)
            mixed = (mixed[..., :-1].astype(jnp.float32) / weights).astype(mixed.dtype)
        new |= {"memory": memory, "segment": segment}
        return mixed, None if state is None else new, {}

    def features(self, x: Float[Array, "B T N K"], name: str) -> Float[Array, "B T N F"]:
        """phi(x), in the type of x; `name` is that of hedgehog's matrix."""
        kind = self.options.feature_map
        if kind == "identity":
            return x
        if kind == "hedgehog":
            return feature_maps.hedgehog(x, getattr(self, name)[...])
        return {
            "elu": feature_maps.elu,
            "relu": jax.nn.relu,
            "squared_relu": feature_maps.squared_relu,
        }[kind](x)

    @property
    def directions(self) -> np.ndarray:
        """Those of performer's features: made from the seed, as they are not trained."""
        _, key_dim, features, _ = self.sizes
        return feature_maps.random_directions(features, key_dim, self.options.feature_seed)

    def log_decay(
        self, decay: Float[Array, "B T N *F"] | None, value: Float[Array, "B T N V"]
    ) -> Float[Array, "B T N *F"] | None:
        """Logarithm of the decay of each token, fp32; None for no decay."""
        if self.options.decay == "retention":
            rate = jnp.exp(cast(self.log_rate, jnp.float32))[None, None]
            return jnp.broadcast_to(-rate, value.shape[:3])
        if self.options.decay == "none":
            return None
        bias = cast(self.decay_bias, jnp.float32)[None, None]
        return jax.nn.log_sigmoid(decay.astype(jnp.float32) + bias) / 16.0

    def output(
        self, mixed: Float[Array, "B T N V"], projected: dict[str, Array], context: Context
    ) -> Float[Array, "B T D"]:
        """Per token: norm and gate as configured, then the output matrix."""
        gate = projected.get("gate")
        if self.options.normalize == "rms":
            scale = self.norm[...]
            mixed = recurrent.gated_norm(mixed, scale, gate, jax.nn.silu, self.epsilon)
        elif gate is not None:
            mixed = mixed * jax.nn.silu(gate)
        # Letters in the order of the axes, as in `attention`.
        y = jnp.einsum("bthk,hkd->btd", mixed, cast(self.out, mixed.dtype))
        return context.shard(y, "batch", "residual_length", "embed")

    @staticmethod
    def core_flops(model: ModelConfig, options: LinearAttentionOptions, length: int) -> float:
        """Forward FLOPs of the core for one token: features, write and read, and convolutions."""
        heads, key_dim, features, value_dim = options.sizes(model)
        maps = {"hedgehog": 4.0 * key_dim**2, "performer": 4.0 * key_dim * features}
        convolutions = 2.0 * (options.convolution_width or 0) * (2 * key_dim + value_dim)
        columns = value_dim + (options.normalize == "sum")
        each = 4.0 * features * columns + maps.get(options.feature_map, 0.0) + convolutions
        return heads * each

    def init_state(self, batch: int, max_length: int, dtype) -> dict[str, Any]:
        """The fp32 memory and the document that it is of, and what features and mixing need."""
        heads, key_dim, features, value_dim = self.sizes
        columns = value_dim + (self.options.normalize == "sum")
        state = recurrent.init_memory(batch, heads, features, columns)
        if self.options.feature_map == "performer":
            state["largest"] = jnp.full((batch, heads), -jnp.inf, jnp.float32)
        width = self.options.convolution_width
        if width is not None:
            for name, size in {"query": key_dim, "key": key_dim, "value": value_dim}.items():
                state[name] = short_convolution.init_state(batch, (heads, size), width, dtype)
        return state
