"""What Hopper kernels need, and those of the recurrences can take."""

import jax

from pallas_kernels._core.dispatch import Condition

VERSION = tuple(int(part) for part in jax.__version__.split(".")[:2])

DEVICE = (
    Condition("JAX 0.11 or later", lambda f: VERSION >= (0, 11)),
    Condition(
        "a Hopper GPU",
        lambda f: f.target.compute_capability and 9 <= f.target.compute_capability < 10,
    ),
)
CONDITIONS = (
    *DEVICE,
    Condition("64 or 128 key features", lambda f: f.K in (64, 128)),
    Condition("64 or 128 value features", lambda f: f.V in (64, 128)),
)
