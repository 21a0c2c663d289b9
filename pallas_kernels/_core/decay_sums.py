"""Cumulated log decays that keep their digits where strong decays stand beside weak ones."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

FLOOR = -128.0  # the least log decay: its exponential is already 0 in fp32
GRID = 2.0**-9  # sums of 128 multiples of it, each at most 128, are exact in fp32


class Sums(NamedTuple):
    """Cumulated log decays in two parts, whose differences lose no digits to far larger sums.

    Only `fine` has a gradient: `coarse` is of rounded numbers.
    """

    coarse: Float[Array, "..."]
    fine: Float[Array, "..."]

    def __getitem__(self, index) -> "Sums":
        return Sums(self.coarse[index], self.fine[index])

    def __sub__(self, other: "Sums") -> Float[Array, "..."]:
        return (self.coarse - other.coarse) + (self.fine - other.fine)

    def total(self) -> Float[Array, "..."]:
        return self.coarse + self.fine


def sums(g, axis: int) -> Sums:
    """Inclusive sums of log decays, at least FLOOR each, along the at most 128 tokens of `axis`."""
    g = jnp.maximum(g, FLOOR)
    coarse = jnp.round(g / GRID) * GRID
    return Sums(jnp.cumsum(coarse, axis=axis), jnp.cumsum(g - coarse, axis=axis))
