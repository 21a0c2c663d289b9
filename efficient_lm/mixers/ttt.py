"""Test-time training with key-value binding (LaCT, arXiv 2505.23884; arXiv 2602.21204)."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

import pallas_kernels
from efficient_lm import masks
from efficient_lm.config import ModelConfig
from efficient_lm.errors import ConfigError
from efficient_lm.mixers import fast_weights, recurrent
from efficient_lm.mixers.attention import new_entries, read, write
from efficient_lm.mixers.fast_weight_rows import read_documents, read_rows
from efficient_lm.mixers.fast_weights import Chunk, Learned, Rule
from efficient_lm.model.context import Context
from efficient_lm.model.parameter import cast, constant, matrix, parameter
from efficient_lm.model.rope import RopeConfig, rotate
from pallas_kernels.short_convolution.xla import of_norm_one

# The paper's ladder from LaCT to linear attention; each step keeps those before it.
LADDER = {
    "baseline": {},
    "last_layer": {"update": "last"},
    "no_weight_norm": {"weight_norm": False},
    "single_layer": {"features": "identity"},
    "rate_one": {"learned_rate": False},
    "no_momentum": {"momentum": False},
    "no_muon": {"orthogonalize": False},
}


def ladder(name: str) -> dict[str, Any]:
    """The options of a step of `LADDER` and those before it."""
    names = list(LADDER)
    options = {}
    for step in names[: names.index(name) + 1]:
        options |= LADDER[step]
    return options


@dataclass(frozen=True)
class TTTOptions(Rule):
    """Fields of `config.model.mixers.ttt`, after those of the learning `Rule`.

    Tokens of a chunk do not see each other through the fast weights, so the layer also has softmax
    attention over a window, whose output is added (LaCT).
    """

    num_heads: int = 4  # each with its own fast weights
    head_dim: int | None = None  # None: embed_dim / num_heads
    hidden_dim: int | None = None  # of the fast network; None: head_dim
    chunk_size: int = 64  # tokens of a document between updates
    base_rate: float = 1e-3  # of the updates at the start of training, where rates are learned
    read_with: Literal["query", "key"] = "query"  # "key": the paper's probe, without queries
    window: int | None = 64  # tokens that a query sees by attention, itself included; None: none
    window_head_dim: int | None = None  # of attention; divides head_dim; None: head_dim
    rope: RopeConfig = field(default_factory=RopeConfig)  # of attention
    form: Literal["auto", "sequential", "parallel"] = "auto"  # auto: parallel for linear rules
    implementation: str = "auto"
    op = "attention"  # of pallas_kernels, that `implementation` is of

    def sizes(self, model: ModelConfig) -> tuple[int, int, int]:
        """(heads, head dim, hidden dim)."""
        head_dim = model.embed_dim // self.num_heads if self.head_dim is None else self.head_dim
        return self.num_heads, head_dim, self.hidden_dim or head_dim

    def check(self, model: ModelConfig) -> None:
        """ConfigError for values out of range, sizes that do not divide, and rules at odds."""
        names = ("num_heads", "head_dim", "hidden_dim", "chunk_size", "window", "window_head_dim",
                 "inner_steps")  # fmt: skip
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}; it must be at least 1")
        if self.base_rate <= 0:
            raise ConfigError(f"base_rate={self.base_rate}; it must be above 0")
        if self.head_dim is None and model.embed_dim % self.num_heads:
            raise ConfigError(
                f"embed_dim={model.embed_dim} is not divisible by num_heads={self.num_heads}; "
                "set head_dim or change one of them"
            )
        head_dim = self.sizes(model)[1]
        if head_dim % (self.window_head_dim or head_dim):
            raise ConfigError(
                f"window_head_dim={self.window_head_dim} does not divide head_dim={head_dim}"
            )
        self.rope.check(self.window_head_dim or head_dim)
        if self.features == "identity" and (self.update == "all" or self.hidden_dim is not None):
            raise ConfigError(
                "features='identity' leaves one matrix of head_dim x head_dim; "
                "set update='last' and hidden_dim=None"
            )
        if self.form == "parallel" and not self.is_linear:
            raise ConfigError(
                f"form='parallel' needs a linear rule, and this one has update={self.update!r}, "
                f"weight_norm={self.weight_norm}, inner_steps={self.inner_steps}; set "
                "update='last', weight_norm=False and inner_steps=1, or form='auto'"
            )
        if self.read_with == "key" and self.window is None:
            raise ConfigError("read_with='key' and window=None leave queries without use; set one")


class TTT(nnx.Module):
    """project: q, k, v, rates; core: fast weights and a window of attention; output: a matrix."""

    Options = TTTOptions
    head_axes: ClassVar = dict.fromkeys(("query", "key", "value", "rate", "share", "gate"), "heads")
    core_reads = ("query", "key", "value", "rate", "share", "gate")
    has_ring = False

    def __init__(self, model: ModelConfig, options: TTTOptions, rngs: nnx.Rngs):
        self.options = options
        self.epsilon = model.norm_epsilon
        heads, head_dim, hidden_dim = self.sizes = options.sizes(model)
        embed, each_head = {"embed": model.embed_dim}, {"heads": heads}
        features = each_head | {"head_dim": head_dim}

        def projection(sizes):
            return matrix(rngs, model, embed | sizes, inputs=["embed"], outputs=list(sizes))

        self.query, self.key, self.value = (projection(features) for _ in range(3))
        self.gate = projection(each_head)
        if options.learned_rate:
            rates = {"rates": 3 if options.update == "all" else 1}
            self.rate = projection(each_head | rates)
            # softplus of it is the base rate, also where exp(base_rate) has no float
            start = options.base_rate + math.log(-math.expm1(-options.base_rate))
            self.rate_bias = constant(start, each_head | rates)
        if options.momentum:
            self.share = projection(each_head)
        self.core_reads = tuple(name for name in self.head_axes if hasattr(self, name))
        read_by = ["key"] if options.read_with == "key" else ["query", "key"]
        for name in read_by:
            setattr(self, f"{name}_scale", constant(1.0, features))
            setattr(self, f"{name}_offset", constant(0.0, features))

        def fast(inputs, outputs):
            """Drawn by fan-in for any `model.initializer`: keys have norm 1, whatever the model."""
            shape = (heads, *inputs.values(), *outputs.values())
            value = jax.random.normal(rngs.params(), shape, jnp.float32) * shape[1] ** -0.5
            axes = ("heads", *inputs, *outputs)
            return parameter(value, axes, inputs=tuple(inputs), outputs=tuple(outputs))

        inner = {"fast_hidden": head_dim}
        if options.features == "gated":
            inner = {"fast_hidden": hidden_dim}
            self.fast_in = fast({"head_dim": head_dim}, inner)
            self.fast_gate = fast({"head_dim": head_dim}, inner)
        self.fast_last = fast(inner, {"head_dim": head_dim})
        self.norm = constant(1.0, {"head_dim": head_dim})
        self.out = matrix(
            rngs, model, features | embed, inputs=list(features), outputs=["embed"], residual=True
        )

    def project(
        self, x: Float[Array, "B T D"], context: Context, names: Collection[str] | None = None
    ) -> dict[str, Array]:
        """Per token: query, key, value [B, T, N, H]; rate [B, T, N, R], share, gate [B, T, N].

        names: which of them; None: all. Rates and shares are in fp32.
        """
        wanted = [name for name in self.core_reads if names is None or name in names]
        wide = [name for name in wanted if name in ("rate", "share")]
        weights = {name: getattr(self, name) for name in wanted if name not in wide}
        projected = recurrent.project(x, weights, context) if weights else {}
        for name in wide:
            weight = getattr(self, name)[...].astype(jnp.float32)
            y = jnp.tensordot(x.astype(jnp.float32), weight, 1, precision="highest")
            projected[name] = context.shard(y, "batch", "length", "heads", *[None] * (y.ndim - 3))
        return projected

    def core(
        self, projected: dict[str, Array], context: Context, state: Any = None
    ) -> tuple[Float[Array, "B T N H"], Any, dict]:
        """RMSNorm(what the fast weights give to each query) * silu(gate), plus attention."""
        mixed, new = self._fast(projected, context, state)
        mixed = recurrent.gated_norm(mixed, self.norm[...], None, jax.nn.silu, self.epsilon)
        mixed = mixed * jax.nn.silu(projected["gate"])[..., None]
        if self.options.window is not None:
            attended, cache = self._attend(projected, context, state)
            mixed = mixed + attended
            new = None if state is None else new | {"window": cache}
        return mixed, new, {}

    def fast_inputs(
        self, projected: dict[str, Array]
    ) -> tuple[fast_weights.Weights, Float[Array, "B T N H"], Chunk]:
        """(the weights at the start of a document, queries, what the weights learn from)."""
        options = self.options

        def feature(name):
            scale, offset = (
                cast(getattr(self, f"{name}_{part}"), projected[name].dtype)[None, None]
                for part in ("scale", "offset")
            )
            return of_norm_one(jax.nn.silu(projected[name] * scale + offset))

        key = feature("key")
        query = key if options.read_with == "key" else feature("query")
        rate = share = None
        if options.learned_rate:
            rate = jax.nn.softplus(
                projected["rate"] + cast(self.rate_bias, jnp.float32)[None, None]
            )
        if options.momentum:
            share = jax.nn.sigmoid(projected["share"])
        names = ["last"] if options.features == "identity" else ["last", "in", "gate"]
        initial = {name: cast(getattr(self, f"fast_{name}"), jnp.float32) for name in names}
        return initial, query, Chunk(key, jax.nn.silu(projected["value"]), rate, share)

    def _fast(self, projected, context, state):
        """(what the fast weights give [B, T, N, H], new state or None)."""
        options, size = self.options, self.options.chunk_size
        initial, query, chunk = self.fast_inputs(projected)
        segments, batch, length = context.segment_ids, query.shape[0], query.shape[1]
        start = fast_weights.nothing_learned(options, initial, batch)
        if state is None and segments is None:
            return read_rows(options, options.form, size, initial, start, query, chunk), None
        segments = jnp.ones((batch, length), jnp.int32) if segments is None else segments
        if state is None:
            return read_documents(
                options, options.form, size, initial, None, query, chunk, segments
            )[0], None

        def remembered(x):
            return recurrent.memory_for(state | {"memory": x}, segments)

        start = jax.tree.map(
            lambda x: remembered(x)[0], Learned(state["changes"], state["momentum"])
        )
        last = remembered(jnp.zeros((batch, 1, 1, 1)))[1]
        # Tokens of the last chunk, which is not whole yet, come before the new ones.
        chunk = jax.tree.map(
            lambda old, new: jnp.concatenate([old.astype(new.dtype), new], axis=1),
            Chunk(**state["waiting"]), chunk,
        )  # fmt: skip
        place = jnp.arange(size - 1, dtype=jnp.int32)[None]
        theirs = jnp.where(place < state["count"][:, None], state["segment"][:, None], 0)
        segments = jnp.concatenate([theirs, segments], axis=1)
        out, learned, rest, count = read_documents(
            options, options.form, size, initial, start, query, chunk, segments
        )
        waiting = jax.tree.map(
            lambda new, old: new.astype(old.dtype), rest._asdict(), state["waiting"]
        )
        return out, {
            "changes": learned.changes,
            "momentum": learned.momentum,
            "waiting": waiting,
            "count": count,
            "segment": last,
        }

    def _attend(self, projected, context, state):
        """(attention over the window [B, T, N, H], new cache or None)."""
        options, mask, segments = self.options, context.mask, context.segment_ids
        shape = projected["query"].shape
        parts = (*shape[:2], -1, options.window_head_dim or shape[3])
        query, key, value = (projected[name].reshape(parts) for name in ("query", "key", "value"))
        query, key = (rotate(x, context.positions, options.rope) for x in (query, key))
        query_index, key_index, key_segments, cache = None, None, segments, None
        if state is not None:
            new = new_entries(key, value, context.index, segments)
            cache = write(state["window"], new)
            if not context.fresh:
                old = read(state["window"])
                entries = {n: jnp.concatenate([old[n], x.astype(old[n].dtype)], axis=1)
                           for n, x in new.items()}  # fmt: skip
                key, value, key_index, key_segments = (
                    entries[name] for name in ("key", "value", "index", "segment_ids")
                )
                query_index = context.index
        mask = mask & masks.SlidingWindow(options.window)
        if segments is not None:
            mask = mask & masks.Segments(segments, key_segments)
        attended = pallas_kernels.attention(
            query, key.astype(query.dtype), value.astype(query.dtype),
            mask=mask.lower(query_index=query_index, key_index=key_index),
            implementation=options.implementation,
        )  # fmt: skip
        return attended.reshape(shape), cache

    def output(
        self, mixed: Float[Array, "B T N H"], projected: dict[str, Array], context: Context
    ) -> Float[Array, "B T D"]:
        """Per token: the output matrix."""
        # Letters in the order of the axes, as in `attention`.
        y = jnp.einsum("bthk,hkd->btd", mixed, cast(self.out, mixed.dtype))
        return context.shard(y, "batch", "residual_length", "embed")

    @staticmethod
    def core_flops(model: ModelConfig, options: TTTOptions, length: int) -> float:
        """Forward FLOPs of the core for one token: updates, and attention over the window.

        Reading costs two a weight, which the count of the parameters has already.
        """
        heads, head_dim, hidden_dim = options.sizes(model)
        inner = 2.0 * head_dim * hidden_dim
        updates = {"all": 6.0, "last": 3.0}[options.update] if options.features == "gated" else 1.0
        attention = 4.0 * head_dim * min(length, options.window or 0)
        return heads * (options.inner_steps * updates * inner + attention)

    def init_state(self, batch: int, max_length: int, dtype) -> dict[str, Any]:
        """What was learned, tokens of a chunk that is not whole, and the cache of the window."""
        options = self.options
        heads, head_dim, hidden_dim = self.sizes
        names = {"last": (hidden_dim, head_dim)}
        if options.update == "all":
            names |= {"in": (head_dim, hidden_dim), "gate": (head_dim, hidden_dim)}
        zeros = {n: jnp.zeros((batch, heads, *sizes), jnp.float32) for n, sizes in names.items()}
        waiting = options.chunk_size - 1
        rates = 3 if options.update == "all" else 1
        rate = jnp.zeros((batch, waiting, heads, rates), jnp.float32)
        state = {
            "changes": zeros,
            "momentum": zeros if options.momentum else {},
            "waiting": {
                "key": jnp.zeros((batch, waiting, heads, head_dim), dtype),
                "value": jnp.zeros((batch, waiting, heads, head_dim), dtype),
                "rate": rate if options.learned_rate else None,
                "share": rate[..., 0] if options.momentum else None,
            },
            "count": jnp.zeros((batch,), jnp.int32),
            "segment": jnp.zeros((batch,), jnp.int32),
        }
        if options.window is None:
            return state
        size = options.window_head_dim or head_dim
        slots = min(max_length, options.window)
        kept = (batch, heads * head_dim // size, slots, size)
        return state | {
            "window": {
                "key": jnp.zeros(kept, dtype),
                "value": jnp.zeros(kept, dtype),
                "index": jnp.full((batch, slots), -1, jnp.int32),
                "segment_ids": jnp.zeros((batch, slots), jnp.int32),
            }
        }
