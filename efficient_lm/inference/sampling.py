"""Choosing the next token: greedy, temperature, top-k, top-p and min-p, as pure functions."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from efficient_lm.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; filters apply in the order of the fields, None leaves one out.

    temperature: logits are divided by it; 0 is greedy (the argmax; filters play no part).
    top_k: keep the k most likely tokens (those equal to the k-th are ranked by id).
    top_p: of what is left, renormalised, keep the fewest most likely tokens whose probabilities
      sum to at least p (nucleus sampling, arXiv 1904.09751).
    min_p: keep tokens at least this fraction as likely as the most likely one (arXiv 2407.01082).

    A pytree: the numbers but top_k are leaves (floats, or what JAX puts in their place), so that
    changing them compiles nothing anew.
    """

    temperature: Any = 1.0
    top_k: int | None = None
    top_p: Any = None
    min_p: Any = None

    def checked(self) -> "Sampling":
        """The same in the form that `sample` takes (temperature None for greedy, no idle filter).

        Raises:
          UserError: a number out of range.
        """
        for name, allowed, fits in (
            ("temperature", "at least 0", lambda x: 0 <= x < math.inf),
            ("top_k", "an integer of at least 1", lambda x: int(x) == x >= 1),
            ("top_p", "above 0 and at most 1", lambda x: 0 < x <= 1),
            ("min_p", "from 0 to 1", lambda x: 0 <= x <= 1),
        ):
            value = getattr(self, name)
            if value is not None and not fits(value):
                raise UserError(f"{name}={value}; it must be {allowed}")
        if not self.temperature:
            return Sampling(temperature=None)
        return Sampling(
            float(self.temperature),
            None if self.top_k is None else int(self.top_k),
            None if self.top_p in (None, 1) else float(self.top_p),
            None if not self.min_p else float(self.min_p),
        )


jax.tree_util.register_dataclass(
    Sampling, data_fields=["temperature", "top_p", "min_p"], meta_fields=["top_k"]
)


def sample(
    logits: Float[Array, "B V"], keys: Key[Array, "B"], sampling: Sampling
) -> Int[Array, "B"]:
    """One token a row; row i depends on logits[i] and keys[i] alone.

    sampling: as `Sampling.checked` returns it.
    """
    if sampling.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    ranked = None  # token ids in the order of `logits`, None: 0, 1, 2, ...
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits, ranked = jax.lax.top_k(logits, sampling.top_k)
    elif sampling.top_p is not None:
        logits, ranked = jax.lax.top_k(logits, logits.shape[-1])  # a sort
    if sampling.top_p is not None:
        logits = jnp.where(in_nucleus(logits, sampling.top_p), logits, -jnp.inf)
    if sampling.min_p is not None:
        logits = jnp.where(likely(logits, sampling.min_p), logits, -jnp.inf)
    chosen = jax.vmap(jax.random.categorical)(keys, logits)
    if ranked is not None:
        chosen = jnp.take_along_axis(ranked, chosen[:, None], axis=-1)[:, 0]
    return chosen.astype(jnp.int32)


def in_nucleus(
    sorted_logits: Float[Array, "B V"], top_p: Float[Array, ""] | float
) -> Bool[Array, "B V"]:
    """True for the shortest prefix of each descending row with probability at least `top_p`."""
    probabilities = jax.nn.softmax(sorted_logits, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    first = jnp.arange(sorted_logits.shape[-1]) == 0  # kept whatever the rounding
    return (before < top_p) | first[None]


def likely(logits: Float[Array, "B V"], min_p: Float[Array, ""] | float) -> Bool[Array, "B V"]:
    """True where a token is at least `min_p` times as likely as the most likely of its row."""
    return logits >= jnp.max(logits, axis=-1, keepdims=True) + jnp.log(min_p)
