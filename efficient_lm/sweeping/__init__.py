"""Many runs of one config: what a sweep file in `configs/sweeps/` imports."""

from efficient_lm.sweeping.expressions import (
    Sweep,
    chain,
    choice,
    log_uniform,
    over,
    product,
    sample,
    uniform,
    zipped,
)

__all__ = [
    "Sweep",
    "chain",
    "choice",
    "log_uniform",
    "over",
    "product",
    "sample",
    "uniform",
    "zipped",
]
