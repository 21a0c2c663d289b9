"""Which implementation of gated_delta_rule runs where: the declared support table."""

from pallas_kernels._core.dispatch import Condition, Implementation

DECODING = 8  # tokens, up to which steps one by one cost less than a chunk

TABLE = (
    Implementation(
        "xla",
        "pallas_kernels.gated_delta_rule.xla:gated_delta_rule",
        platforms=("cpu", "gpu", "tpu"),
        advice=(Condition(f"more than {DECODING} tokens", lambda f: f.T > DECODING),),
    ),
    Implementation(
        "ref",
        "pallas_kernels.gated_delta_rule.ref:gated_delta_rule",
        platforms=("cpu", "gpu", "tpu"),
    ),
)
