"""Which implementation of gated_delta_rule runs where: the declared support table."""

from pallas_kernels._core.dispatch import Condition, Implementation
from pallas_kernels._hopper import support as hopper

DECODING = 8  # tokens, up to which steps one by one cost less than a chunk

TABLE = (
    Implementation(
        "mosaic_gpu",
        "pallas_kernels.gated_delta_rule.mosaic_gpu:gated_delta_rule",
        platforms=("gpu",),
        dtypes=("bfloat16",),
        conditions=hopper.CONDITIONS,
        advice=(Condition(f"more than {DECODING} tokens", lambda f: f.T > DECODING),),
    ),
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
