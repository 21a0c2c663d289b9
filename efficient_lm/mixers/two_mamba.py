"""2Mamba (arXiv 2602.17363): squared scores with a decay, so a memory of products of features."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

import pallas_kernels
from efficient_lm.config import ModelConfig
from efficient_lm.errors import ConfigError
from efficient_lm.mixers import recurrent, short_convolution
from efficient_lm.mixers.attention import new_entries, read, write
from efficient_lm.model.context import Context
from efficient_lm.model.parameter import cast, constant, matrix
from pallas_kernels._core.recurrence import documents
from pallas_kernels.second_order_attention.chunks import default_chunk
from pallas_kernels.second_order_attention.rows import decayed_attention
from pallas_kernels.second_order_attention.terms import feature_count, normalized, with_ones


@dataclass(frozen=True)
class TwoMambaOptions:
    """Fields of `config.model.mixers.two_mamba`.

    score: of a query and a key, before the decay. "square": 2Mamba; "exponential": 2Mamba-E, which
    needs a cache of keys and values; "linear": Mamba-2S, whose values are scaled by a step
    softplus(W x) and whose output has an RMSNorm; the others divide by the sum of their weights.
    """

    num_heads: int = 4
    head_dim: int | None = None  # None: embed_dim / num_heads; a memory has head_dim^3 / 2 numbers
    score: Literal["square", "exponential", "linear"] = "square"
    # Log decay of a token: -softplus(W x), or Mamba-2's -A softplus(W x + b) with A learned.
    decay: Literal["softplus", "step"] = "softplus"
    convolution_width: int = 2  # tokens that q, k and v are mixed of; 1: no mixing
    norm: Literal["all", "head"] = "all"  # for "linear" scores: heads that the RMSNorm is over
    implementation: str = "auto"

    @property
    def op(self) -> str | None:
        """Of pallas_kernels, that `implementation` is of; None: there is no choice."""
        ops = {"square": "second_order_attention", "linear": "gated_linear_attention"}
        return ops.get(self.score)

    @property
    def joins_heads(self) -> bool:
        """Whether `output` needs all heads at once."""
        return self.score == "linear" and self.norm == "all"

    def sizes(self, model: ModelConfig) -> tuple[int, int]:
        """(heads, head dim)."""
        head_dim = model.embed_dim // self.num_heads if self.head_dim is None else self.head_dim
        return self.num_heads, head_dim

    def check(self, model: ModelConfig) -> None:
        """ConfigError for values out of range and sizes that do not divide."""
        for name in ("num_heads", "head_dim", "convolution_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}; it must be at least 1")
        if self.head_dim is None and model.embed_dim % self.num_heads:
            raise ConfigError(
                f"embed_dim={model.embed_dim} is not divisible by num_heads={self.num_heads}; "
                "set head_dim or change one of them"
            )


class TwoMamba(nnx.Module):
    """project: q, k, v, decay; core: convolutions, decayed attention; output: one matrix."""

    Options = TwoMambaOptions
    head_axes: ClassVar = dict.fromkeys(("query", "key", "value", "decay", "step"), "heads")
    core_reads = ("query", "key", "value", "decay", "step")
    has_ring = False

    def __init__(self, model: ModelConfig, options: TwoMambaOptions, rngs: nnx.Rngs):
        self.options = options
        self.dtype = jnp.dtype(model.dtype)
        self.epsilon = model.norm_epsilon
        heads, head_dim = self.sizes = options.sizes(model)
        embed, each_head = {"embed": model.embed_dim}, {"heads": heads}
        features = each_head | {"head_dim": head_dim}

        def projection(sizes):
            return matrix(rngs, model, embed | sizes, inputs=["embed"], outputs=list(sizes))

        for name in ("query", "key", "value"):
            setattr(self, name, projection(features))
            convolution = short_convolution.convolution_weight(
                rngs, features, options.convolution_width
            )
            setattr(self, f"{name}_convolution", convolution)
            setattr(self, f"{name}_bias", constant(0.0, features))
        if options.decay == "softplus":
            self.decay = projection(each_head)
        else:
            self.log_rate = recurrent.log_rate(rngs, each_head, 1.0, 16.0)
        if options.decay == "step" or options.score == "linear":
            self.step = projection(each_head)
        if options.decay == "step":
            self.step_bias = recurrent.step_bias(rngs, each_head)
        if options.score == "linear":
            self.norm = constant(1.0, features)
        self.core_reads = tuple(name for name in self.head_axes if hasattr(self, name))
        self.out = matrix(
            rngs, model, features | embed, inputs=list(features), outputs=["embed"], residual=True
        )

    def project(
        self, x: Float[Array, "B T D"], context: Context, names: Collection[str] | None = None
    ) -> dict[str, Array]:
        """Per token: query, key and value [B, T, N, H]; decay and step [B, T, N] in fp32.

        names: which of them; None: all.
        """
        wanted = [name for name in self.core_reads if names is None or name in names]
        wide = [name for name in wanted if name in ("decay", "step")]
        weights = {name: getattr(self, name) for name in wanted if name not in wide}
        projected = recurrent.project(x, weights, context) if weights else {}
        for name in wide:
            weight = getattr(self, name)[...].astype(jnp.float32)
            y = jnp.einsum("btd,dn->btn", x.astype(jnp.float32), weight, precision="highest")
            projected[name] = context.shard(y, "batch", "length", "heads")
        return projected

    def core(
        self, projected: dict[str, Array], context: Context, state: Any = None
    ) -> tuple[Float[Array, "B T N H"], Any, dict]:
        """Convolutions over time, then attention with scores and decays as the options say."""
        segments, new = context.segment_ids, None if state is None else {}
        convolved = []
        for name in ("query", "key", "value"):
            y, kept = short_convolution.short_convolution(
                projected[name],
                getattr(self, f"{name}_convolution")[...],
                bias=getattr(self, f"{name}_bias")[...],
                segment_ids=segments,
                state=None if state is None else state[name],
                fresh=context.fresh,
            )
            convolved.append(y)
            if state is not None:
                new[name] = kept
        query, key, value = convolved
        if hasattr(self, "step"):
            step = projected["step"]
            if self.options.decay == "step":
                step = step + cast(self.step_bias, jnp.float32)[None, None]
            step = jax.nn.softplus(step)
        if self.options.decay == "softplus":
            log_decay = -jax.nn.softplus(projected["decay"])
        else:
            log_decay = -jnp.exp(cast(self.log_rate, jnp.float32))[None, None] * step
        if self.options.score == "exponential":
            mixed, cache = self._exponential(query, key, value, log_decay, context, state)
            return mixed, None if state is None else new | cache, {}
        if self.options.score == "linear":
            attend = pallas_kernels.gated_linear_attention
            value = (value.astype(jnp.float32) * step[..., None]).astype(value.dtype)
        else:
            attend = pallas_kernels.second_order_attention
        memory = None
        if state is not None:
            memory, new["segment"] = recurrent.memory_for(state, segments)
        mixed, memory = attend(
            query, key, value, log_decay,
            initial_state=memory,
            output_final_state=state is not None,
            segment_ids=segments,
            implementation=self.options.implementation,
        )  # fmt: skip
        if state is not None:
            new["memory"] = memory
        return mixed, new, {}

    def _exponential(self, query, key, value, log_decay, context, state):
        """(softmax attention with a decay, the new cache or None)."""
        scale, segments = query.shape[-1] ** -0.5, context.segment_ids
        if state is None or context.fresh:
            mixed = decayed_attention(
                query, key, value, log_decay,
                scale=scale,
                documents=None if segments is None else documents(segments),
                score="exponential",
            )  # fmt: skip
        if state is None:
            return mixed, None
        real = (context.index >= 0)[:, :, None]
        total = jnp.cumsum(jnp.where(real, log_decay, 0.0), axis=1)  # [B, T, N]
        # The log decay of an entry is that from its token to the newest one.
        names = ("keys", "values", "index", "segment_ids", "log_decay")
        old = {name: state[name] for name in names}
        old["log_decay"] = old["log_decay"] + total[:, -1:]
        new = new_entries(key, value, context.index, segments)
        new = {"keys": new.pop("key"), "values": new.pop("value"), **new}
        cache = write(old, new | {"log_decay": total[:, -1:] - total})
        if context.fresh:
            return mixed, cache
        entries = read(cache)
        gaps = jnp.moveaxis(entries["log_decay"], 1, 2)[:, :, None]  # [B, N, 1, S]
        gaps = gaps - jnp.moveaxis(total[:, -1:] - total, 1, 2)[..., None]
        index, own = entries["index"], new["segment_ids"]
        sees = (index[:, None] >= 0) & (index[:, None] <= context.index[:, :, None])
        sees = sees & (entries["segment_ids"][:, None] == own[:, :, None])
        keys, values = (entries[name].astype(query.dtype) for name in ("keys", "values"))
        scores = scale * jnp.einsum(
            "btnh,bsnh->bnts", query, keys, preferred_element_type=jnp.float32
        )
        logits = jnp.where(sees[:, None], scores + gaps, jnp.finfo(jnp.float32).min)
        weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)).astype(query.dtype)
        sums = jnp.einsum(
            "bnts,bsnh->btnh", weights, with_ones(values), preferred_element_type=jnp.float32
        )
        return normalized(sums, query.shape[3]).astype(query.dtype), cache

    def output(
        self, mixed: Float[Array, "B T N H"], projected: dict[str, Array], context: Context
    ) -> Float[Array, "B T D"]:
        """Per token: RMSNorm for linear scores, then the output matrix."""
        if self.options.score == "linear":
            axes = (2, 3) if self.options.joins_heads else (3,)

            @recurrent.kept_inputs
            def norm(x, scale):
                wide = x.astype(jnp.float32)
                mean_square = jnp.mean(wide * wide, axis=axes, keepdims=True)
                wide = wide * jax.lax.rsqrt(mean_square + self.epsilon)
                return (wide * scale[None, None]).astype(x.dtype)

            mixed = norm(mixed, cast(self.norm, jnp.float32))
        # Letters in the order of the axes, as in `attention`.
        y = jnp.einsum("bthk,hkd->btd", mixed, cast(self.out, mixed.dtype))
        return context.shard(y, "batch", "residual_length", "embed")

    @staticmethod
    def core_flops(model: ModelConfig, options: TwoMambaOptions, length: int) -> float:
        """Forward FLOPs of the core for one token: convolutions, and the cheaper form of scores."""
        heads, head_dim = options.sizes(model)
        pairs = 4.0 * length * head_dim
        if options.score == "linear":
            pairs = 4.0 * head_dim * head_dim
        elif options.score == "square" and length > feature_count(head_dim):
            pairs = 4.0 * feature_count(head_dim) * (head_dim + 1)
            pairs += 4.0 * default_chunk(head_dim) * head_dim
        return heads * (pairs + 6.0 * options.convolution_width * head_dim)

    def init_state(self, batch: int, max_length: int, dtype) -> dict[str, Any]:
        """The last inputs of the convolutions, and a memory of constant size or a cache."""
        heads, head_dim = self.sizes
        state = {
            name: short_convolution.init_state(
                batch, self.sizes, self.options.convolution_width, dtype
            )
            for name in ("query", "key", "value")
        }
        if self.options.score == "exponential":
            return state | {
                "keys": jnp.zeros((batch, heads, max_length, head_dim), dtype),
                "values": jnp.zeros((batch, heads, max_length, head_dim), dtype),
                "index": jnp.full((batch, max_length), -1, jnp.int32),
                "segment_ids": jnp.zeros((batch, max_length), jnp.int32),
                "log_decay": jnp.zeros((batch, max_length, heads), jnp.float32),
            }
        sizes = (head_dim, head_dim)
        if self.options.score == "square":
            sizes = (feature_count(head_dim), head_dim + 1)
        return state | recurrent.init_memory(batch, heads, *sizes)
