"""The language model: embedding, layers, final norm and unembedding."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from efficient_lm import masks
from efficient_lm.config import ModelConfig
from efficient_lm.model.block import dropout
from efficient_lm.model.context import Context, Split, all_tokens, no_sharding, run_mixer
from efficient_lm.model.norm import RMSNorm
from efficient_lm.model.parameter import parameter
from efficient_lm.model.stack import Stack


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
    """What a forward pass gives.

    logits: fp32 [B, T, V], or None when not asked for.
    hidden: [B, T, D] after the final norm; times `unembedding()` they are the logits.
    state: decode state after these tokens, or None when none was given.
    aux: `layers` holds what layers returned beside their output; entries of it whose names end in
      "_loss" are summed over the layers under their own names, for objectives to add.
    """

    logits: Float[Array, "B T V"] | None
    hidden: Float[Array, "B T D"]
    state: Any
    aux: Any


class LanguageModel(nnx.Module):
    """A decoder as `ModelConfig` describes it. Holds parameters only; every call is pure."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, scan: bool = True):
        self.config = config
        self.shard = no_sharding
        self.mix = run_mixer
        self.split = Split()
        self.over_tokens = all_tokens
        shape, axes = (config.vocabulary_size, config.embed_dim), ("vocabulary", "embed")

        def table():
            scale = config.initializer_scale
            if config.initializer == "fan_in":
                scale = config.embed_dim**-0.5
            return parameter(scale * jax.random.normal(rngs.params(), shape, jnp.float32), axes)

        self.embedding = table()
        self.stack = Stack(config, rngs, scan=scan)
        self.final_norm = RMSNorm(config, config.embed_dim)
        if not config.tie_embeddings:
            self.head = table()

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        state: Any = None,
        fresh: bool = False,
        mask: masks.MaskExpression | None = None,
        dropout_key: Key[Array, ""] | None = None,
        logits: bool = True,
    ) -> Output:
        """One pass over `tokens`, which follow those that `state` has seen.

        segment_ids: document of each token, 0 = padding, which changes nothing around documents;
            inside of one only with `state`, because without it windows count slots of the row.
        positions: for position embeddings; default: the running index in the sequence.
        state: from `init_state` or an earlier Output; None: the tokens are the whole sequence.
        fresh: `state` is known to be empty, which lets prefill use the training kernels. As in
            training, indices are then slots of the row: padding may stand around documents, and
            not in front of them when `mask` speaks of blocks or a prefix.
        mask: which tokens may see which; default causal.
        dropout_key: None turns dropout off.
        logits: False leaves them out, for losses that never hold all of them.
        """
        batch, length = tokens.shape
        index = None
        if state is not None:
            valid = jnp.ones_like(tokens) if segment_ids is None else jnp.minimum(segment_ids, 1)
            index = state["length"][:, None] + jnp.cumsum(valid, axis=1) - 1
            index = jnp.where(valid > 0, index, -1).astype(jnp.int32)
        if positions is None:
            positions = jnp.arange(length, dtype=jnp.int32)[None] if index is None else index
            positions = jnp.broadcast_to(jnp.maximum(positions, 0), (batch, length))
        context = Context(
            positions=positions,
            segment_ids=segment_ids,
            index=index,
            mask=masks.Causal() if mask is None else mask,
            fresh=fresh,
            shard=self.shard,
            mix=self.mix,
            split=self.split,
        )
        dtype = jnp.dtype(self.config.dtype)

        def embed(table, tokens):
            return jnp.take(table, tokens, axis=0).astype(dtype)

        table = self.embedding[...]
        x = self.over_tokens(embed, table, tokens, dtype=table.dtype, summed=False)
        if self.config.embedding_scale is not None:
            x = x * jnp.asarray(self.config.embedding_scale, dtype)
        x = self.shard(x, "batch", "residual_length", "embed")
        stack_key = None
        if dropout_key is not None and self.config.dropout > 0:
            embedding_key, stack_key = jax.random.split(dropout_key)
            x = dropout(x, self.config.dropout, embedding_key)
        x, layers_state, aux = self.stack(
            x, context, None if state is None else state["layers"], stack_key
        )
        hidden = self.shard(self.final_norm(x), "batch", "length", "embed")
        new_state = None
        if state is not None:
            # From the index, so that rows of padding alone leave the length as it was.
            new_length = jnp.maximum(state["length"], jnp.max(index, axis=1) + 1)
            new_state = {"length": new_length, "layers": layers_state}
        aux = {"layers": aux} | _sum_losses(aux)
        return Output(self.logits(hidden) if logits else None, hidden, new_state, aux)

    def unembedding(self) -> Float[Array, "V D"]:
        """The matrix from hidden features to logits: the embedding when tied, else the head."""
        return (self.embedding if self.config.tie_embeddings else self.head)[...]

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """fp32 logits, soft-capped as configured."""
        logits = jnp.einsum(
            "btd,vd->btv",
            hidden,
            self.unembedding().astype(hidden.dtype),
            preferred_element_type=jnp.float32,
        )
        cap = self.config.logits_soft_cap
        if cap is not None:
            logits = cap * jnp.tanh(logits / cap)
        return self.shard(logits, "batch", "length", "vocabulary")

    def init_state(self, batch: int, max_length: int, dtype: Any = None) -> dict[str, Any]:
        """Empty decode state for `batch` sequences of up to `max_length` tokens.

        More tokens overwrite the oldest without an error, so callers check the length.
        """
        dtype = jnp.dtype(self.config.dtype if dtype is None else dtype)
        return {
            "length": jnp.zeros((batch,), jnp.int32),
            "layers": self.stack.init_state(batch, max_length, dtype),
        }


def _sum_losses(aux: Any) -> dict[str, Float[Array, ""]]:
    """Auxiliary losses by name, summed over the layers."""
    losses: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(aux):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if name.endswith("_loss"):
            losses[name] = losses.get(name, 0.0) + jnp.sum(leaf)
    return losses
