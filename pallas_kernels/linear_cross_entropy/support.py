"""Which implementation of the loss runs where: the declared support table."""

from dataclasses import dataclass

from pallas_kernels._core.compat import Target
from pallas_kernels._core.dispatch import Implementation

EVERYWHERE = ("cpu", "gpu", "tpu")


@dataclass(frozen=True)
class Facts:
    """What the choice depends on."""

    target: Target
    dtype: str


TABLE = (
    Implementation(
        "xla_rows", "pallas_kernels.linear_cross_entropy.xla:by_rows", platforms=EVERYWHERE
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
