"""Which implementation of the loss runs where: the declared support table."""

from dataclasses import dataclass

from pallas_kernels._core.compat import Target
from pallas_kernels._core.dispatch import Condition, Implementation

EVERYWHERE = ("cpu", "gpu", "tpu")
GRADIENT_BYTES = 2**30  # of a float32 weight gradient that each device may hold whole


@dataclass(frozen=True)
class Facts:
    """What the choice depends on; sizes as in `linear_cross_entropy`."""

    target: Target
    dtype: str
    V: int
    D: int
    shards: int


TABLE = (
    Implementation(
        "xla_rows",
        "pallas_kernels.linear_cross_entropy.xla:by_rows",
        platforms=EVERYWHERE,
        advice=(
            Condition(
                "one shard, or a float32 weight gradient of at most 1 GiB",
                lambda f: f.shards == 1 or 4 * f.V * f.D <= GRADIENT_BYTES,
            ),
        ),
    ),
    Implementation(
        "xla_vocabulary",
        "pallas_kernels.linear_cross_entropy.xla:by_vocabulary",
        platforms=EVERYWHERE,
    ),
    Implementation(
        "ref", "pallas_kernels.linear_cross_entropy.ref:linear_cross_entropy", platforms=EVERYWHERE
    ),
)
