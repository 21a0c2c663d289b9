"""Grouped-query softmax attention (arXiv 2305.13245): full or sliding window, with a KV cache."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

import pallas_kernels
from efficient_lm import masks
from efficient_lm.config import ModelConfig
from efficient_lm.errors import ConfigError
from efficient_lm.model.context import Context
from efficient_lm.model.norm import RMSNorm
from efficient_lm.model.parameter import cast, constant, matrix
from efficient_lm.model.rope import RopeConfig, rotate
from pallas_kernels.attention.ring import ring_attention


@dataclass(frozen=True)
class AttentionOptions:
    """Fields of `config.model.mixers.attention`."""

    num_heads: int = 4
    num_key_value_heads: int | None = None  # None: num_heads; 1: multi-query
    head_dim: int | None = None  # None: embed_dim / num_heads
    window: int | None = None  # tokens a query sees, itself included; None: all
    rope: RopeConfig = field(default_factory=RopeConfig)
    qk_norm: bool = False  # RMSNorm of each head's queries and keys, before RoPE
    gate: Literal["none", "sigmoid"] = "none"  # of the output, elementwise (arXiv 2505.06708)
    soft_cap: float | None = None  # logits become soft_cap * tanh(logits / soft_cap)
    sink: bool = False  # a learned logit per head that takes probability and gives no value
    bias: bool = False  # of query, key and value
    output_bias: bool = False
    scale: float | None = None  # of the logits; None: head_dim ** -0.5
    implementation: str = "auto"
    op = "attention"  # of pallas_kernels, that `implementation` is of

    def sizes(self, model: ModelConfig) -> tuple[int, int, int]:
        """(query heads, key-value heads, head dim)."""
        head_dim, shared = self.head_dim, self.num_key_value_heads
        return (
            self.num_heads,
            self.num_heads if shared is None else shared,
            model.embed_dim // self.num_heads if head_dim is None else head_dim,
        )

    def check(self, model: ModelConfig) -> None:
        """ConfigError for values out of range and sizes that do not divide."""
        for name in ("num_heads", "num_key_value_heads", "head_dim", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}; it must be at least 1")
        if self.soft_cap is not None and self.soft_cap <= 0:
            raise ConfigError(f"soft_cap={self.soft_cap}; it must be above 0, or None for no cap")
        if self.head_dim is None and model.embed_dim % self.num_heads:
            raise ConfigError(
                f"embed_dim={model.embed_dim} is not divisible by num_heads={self.num_heads}; "
                "set head_dim or change one of them"
            )
        heads, key_value_heads, head_dim = self.sizes(model)
        if heads % key_value_heads:
            raise ConfigError(
                f"num_heads={heads} is not a multiple of num_key_value_heads={key_value_heads}"
            )
        self.rope.check(head_dim)


class Attention(nnx.Module):
    """project: q, k, v, gate; core: attention over tokens and cache; output: one matrix."""

    Options = AttentionOptions
    head_axes: ClassVar = {"query": "heads", "key": "key_value_heads", "value": "key_value_heads",
                           "gate": "heads"}  # fmt: skip
    core_reads = ("query", "key", "value")
    has_ring = True

    def __init__(self, model: ModelConfig, options: AttentionOptions, rngs: nnx.Rngs):
        self.options = options
        self.dtype = jnp.dtype(model.dtype)
        heads, key_value_heads, head_dim = self.sizes = options.sizes(model)
        embed = {"embed": model.embed_dim}
        query_sizes = {"heads": heads, "head_dim": head_dim}
        key_sizes = {"key_value_heads": key_value_heads, "head_dim": head_dim}

        def projection(sizes):
            return matrix(rngs, model, embed | sizes, inputs=["embed"], outputs=list(sizes))

        self.query = projection(query_sizes)
        self.key = projection(key_sizes)
        self.value = projection(key_sizes)
        self.out = matrix(
            rngs,
            model,
            query_sizes | embed,
            inputs=["heads", "head_dim"],
            outputs=["embed"],
            residual=True,
        )
        if options.gate == "sigmoid":
            self.gate = projection(query_sizes)
        if options.bias:
            self.query_bias = constant(0.0, query_sizes)
            self.key_bias = constant(0.0, key_sizes)
            self.value_bias = constant(0.0, key_sizes)
        if options.output_bias:
            self.out_bias = constant(0.0, embed)
        if options.qk_norm:
            self.query_norm = RMSNorm(model, head_dim, "head_dim")
            self.key_norm = RMSNorm(model, head_dim, "head_dim")
        if options.sink:
            self.sink = constant(0.0, {"heads": heads})

    def project(
        self, x: Float[Array, "B T D"], context: Context, names: Collection[str] | None = None
    ) -> dict[str, Array]:
        """Per token: query and (if gated) gate [B, T, N, H], key and value [B, T, K, H].

        names: which of them; None: all.
        """
        axes = {
            name: axis
            for name, axis in self.head_axes.items()
            if hasattr(self, name) and (names is None or name in names)
        }
        weights = [cast(getattr(self, name), self.dtype) for name in axes]
        if context.split.features == 1 and x.shape[0] * x.shape[1] >= 2 * x.shape[2]:
            # One product is faster than several where joining the weights costs less than it gains.
            joined = jnp.einsum("btd,dnh->btnh", x, jnp.concatenate(weights, axis=1))
            ends = np.cumsum([weight.shape[1] for weight in weights])
            products = jnp.split(joined, ends[:-1], axis=2)
        else:
            products = [jnp.einsum("btd,dnh->btnh", x, weight) for weight in weights]
        projected = {}
        for (name, heads), y in zip(axes.items(), products, strict=True):
            if hasattr(self, f"{name}_bias"):
                y = y + cast(getattr(self, f"{name}_bias"), self.dtype)[None, None]
            projected[name] = context.shard(y, "batch", "length", heads, "head_dim")
        for name in [name for name in ("query", "key") if name in axes]:
            y = projected[name]
            if self.options.qk_norm:
                y = getattr(self, f"{name}_norm")(y)
            projected[name] = rotate(y, context.positions, self.options.rope)
        return projected

    def core(
        self, projected: dict[str, Array], context: Context, state: Any = None
    ) -> tuple[Float[Array, "B T N H"], Any, dict]:
        """Attention of each head over the tokens given and, with `state`, those before them."""
        key, value = projected["key"], projected["value"]
        index, segments = context.index, context.segment_ids
        query_index, key_index, key_segments = None, None, segments
        if state is not None:
            old, new = state, new_entries(key, value, index, segments)
            state = write(state, new)
            if not context.fresh:
                query_index = index
                # A ring that T > 1 new tokens wrap would lose keys which the first of them see.
                whole = key.shape[1] == 1 or self.options.window is None
                entries = read(state)
                if not whole:
                    entries = {
                        name: jnp.concatenate([kept, new[name].astype(kept.dtype)], axis=1)
                        for name, kept in read(old).items()
                    }
                key, value, key_index, key_segments = (
                    entries[name] for name in ("key", "value", "index", "segment_ids")
                )
        mask = context.mask
        if self.options.window is not None:
            mask = mask & masks.SlidingWindow(self.options.window)
        if segments is not None:
            mask = mask & masks.Segments(segments, key_segments)

        attend, axis = pallas_kernels.attention, {}
        if context.split.ring is not None:
            attend, axis = ring_attention, {"axis_name": context.split.ring}
        attended = attend(
            projected["query"],
            key.astype(self.dtype),
            value.astype(self.dtype),
            mask=mask.lower(query_index=query_index, key_index=key_index),
            scale=self.options.scale,
            soft_cap=self.options.soft_cap,
            sinks=self.sink[...] if self.options.sink else None,
            implementation=self.options.implementation,
            **axis,
        )
        return attended, state, {}

    def output(
        self, attended: Float[Array, "B T N H"], projected: dict[str, Array], context: Context
    ) -> Float[Array, "B T D"]:
        """Per token: gate, then the output matrix."""
        if "gate" in projected:
            attended = attended * jax.nn.sigmoid(projected["gate"])
        # einsum contracts in alphabetical order: these letters keep the order of the axes, others
        # would have the matrix transposed (and so copied) in every step on some backends.
        y = jnp.einsum("bthk,hkd->btd", attended, cast(self.out, self.dtype))
        if self.options.output_bias:
            y = y + cast(self.out_bias, self.dtype)[None, None]
        return context.shard(y, "batch", "residual_length", "embed")

    @staticmethod
    def core_flops(model: ModelConfig, options: AttentionOptions, length: int) -> float:
        """Forward FLOPs of the core for one token among `length`: scores and weighted values."""
        heads, _, head_dim = options.sizes(model)
        return 4.0 * heads * head_dim * min(length, options.window or length)

    def init_state(self, batch: int, max_length: int, dtype) -> dict[str, Array]:
        """An empty KV cache: `max_length` slots, or a ring of `window` slots when that is less."""
        _, heads, head_dim = self.sizes
        slots = min(max_length, self.options.window or max_length)
        return {
            "key": jnp.zeros((batch, heads, slots, head_dim), dtype),
            "value": jnp.zeros((batch, heads, slots, head_dim), dtype),
            "index": jnp.full((batch, slots), -1, jnp.int32),
            "segment_ids": jnp.zeros((batch, slots), jnp.int32),
        }


def new_entries(key, value, index, segments):
    """What the cache keeps of tokens: key and value [B, T, K, H], index and segment_ids [B, T]."""
    segments = jnp.ones_like(index) if segments is None else segments
    return {"key": key, "value": value, "index": index, "segment_ids": segments}


def write(state, new):
    """The cache with new tokens at slot index % slots; padding and overwritten tokens dropped.

    Keys and values are kept as [B, K, S, H]: the products of attention are batched over heads, and
    any other order would have the whole cache transposed in every decode step.
    """
    index = new["index"]
    slots = state["index"].shape[1]
    last = jnp.max(index, axis=1, keepdims=True)
    keep = (index >= 0) & (index > last - slots)
    slot = jnp.where(keep, index % slots, slots)
    row = jnp.arange(index.shape[0])[:, None]

    def put(name):
        kept, values = state[name], new[name].astype(state[name].dtype)
        place = kept.at[row, :, slot] if kept.ndim == 4 else kept.at[row, slot]
        return place.set(values, mode="drop")

    return {name: put(name) for name in state}


def read(state):
    """The cache as entries of tokens: key and value [B, S, K, H], index and segment_ids [B, S]."""
    return {name: jnp.swapaxes(x, 1, 2) if x.ndim == 4 else x for name, x in state.items()}
