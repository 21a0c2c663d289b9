"""Learning-rate schedules: pure functions of the step, so that a resumed run needs no state."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Num

from efficient_lm.config import ScheduleConfig

Schedule = Callable[[Num[ArrayLike, ""]], Float[Array, ""]]


def make_schedule(config: ScheduleConfig, peak: float, total_steps: int) -> Schedule:
    """Schedule `step -> learning rate`, step counting finished updates from 0.

    rate(step) = peak * min(warm-up(step), decay(step)), which is continuous also where a short
    run makes the two overlap. Warm-up is (step + 1) / (N_w + 1): the first update is not wasted
    and step N_w is the first at the peak. Decay falls from 1 to `final_fraction` at `total_steps`:

    - constant: stays at 1.
    - linear, cosine: over all steps after the warm-up.
    - wsd (warm-up, stable, decay; MiniCPM, arXiv:2404.06395): over the last `decay_fraction` of
      all steps, in the shape `decay_shape`. Runs that differ only in `total_steps` are equal up
      to their decays, so one run can branch into several.
    """
    warmup, final = config.warmup_steps, config.final_fraction
    if config.name == "wsd":
        shape = config.decay_shape
        start = total_steps - round(config.decay_fraction * total_steps)
    else:
        shape, start = config.name, warmup
    length = max(total_steps - start, 1)

    def schedule(step: Num[ArrayLike, ""]) -> Float[Array, ""]:
        step = jnp.asarray(step, jnp.float32)
        rising = jnp.minimum((step + 1.0) / (warmup + 1), 1.0)
        progress = jnp.clip((step - start) / length, 0.0, 1.0)
        falling = final + (1.0 - final) * _remaining(shape, progress)
        return peak * jnp.minimum(rising, falling)

    return schedule


def _remaining(shape: str, progress: jax.Array) -> jax.Array:
    """Share of the fall that is still ahead, from 1 at progress 0 to 0 at progress 1."""
    if shape == "constant":
        return jnp.ones_like(progress)
    if shape == "linear":
        return 1.0 - progress
    if shape == "cosine":
        return jnp.square(jnp.cos(0.5 * math.pi * progress))
    if shape == "one_minus_sqrt":
        return 1.0 - jnp.sqrt(progress)
    raise ValueError(f"schedule shape {shape!r}; allowed: constant, linear, cosine, one_minus_sqrt")
