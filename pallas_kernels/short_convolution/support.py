"""Which implementation of short_convolution runs where: the declared support table."""

from dataclasses import dataclass

from pallas_kernels._core.compat import Target
from pallas_kernels._core.dispatch import Condition, Implementation
from pallas_kernels._hopper import support as hopper

EVERYWHERE = ("cpu", "gpu", "tpu")
TOKENS = 64  # of a chunk of the Hopper kernel


@dataclass(frozen=True)
class Facts:
    """What the choice depends on: T tokens, N heads of H features, W taps."""

    target: Target
    dtype: str
    T: int
    N: int
    H: int
    W: int
    unit_norm: bool


def features_together(f: Facts) -> int | None:
    """Features that a Hopper kernel takes at once: those of a head, or any 128 or 64; None: no."""
    if f.unit_norm:
        return f.H if f.H in (64, 128) else None
    return next((size for size in (128, 64) if f.N * f.H % size == 0), None)


TABLE = (
    Implementation(
        "mosaic_gpu",
        "pallas_kernels.short_convolution.mosaic_gpu:short_convolution",
        platforms=("gpu",),
        dtypes=("bfloat16",),
        conditions=(
            *hopper.DEVICE,
            Condition("a convolution of 2 to 4 tokens", lambda f: 2 <= f.W <= 4),
            Condition(
                "heads of 64 or 128 features, or without unit_norm a multiple of 64 in all",
                lambda f: features_together(f) is not None,
            ),
        ),
        advice=(Condition(f"at least {TOKENS} tokens", lambda f: f.T >= TOKENS),),
    ),
    Implementation(
        "xla", "pallas_kernels.short_convolution.xla:short_convolution", platforms=EVERYWHERE
    ),
    Implementation(
        "ref", "pallas_kernels.short_convolution.ref:short_convolution", platforms=EVERYWHERE
    ),
)
