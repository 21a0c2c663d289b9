"""Which implementation of gated_delta_rule runs where: the declared support table."""

from pallas_kernels._core.dispatch import Implementation

TABLE = (
    Implementation(
        "ref",
        "pallas_kernels.gated_delta_rule.ref:gated_delta_rule",
        platforms=("cpu", "gpu", "tpu"),
    ),
)
