"""Which implementation of gated_linear_attention runs where: the declared support table."""

from pallas_kernels._core.dispatch import Implementation

TABLE = (
    Implementation(
        "ref",
        "pallas_kernels.gated_linear_attention.ref:gated_linear_attention",
        platforms=("cpu", "gpu", "tpu"),
    ),
)
