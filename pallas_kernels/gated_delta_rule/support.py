"""Which implementation of gated_delta_rule runs where: the declared support table."""

from pallas_kernels._core.dispatch import Condition, Implementation
from pallas_kernels._hopper import support as hopper

LARGEST_STATE = 2**17  # numbers of states that the TPU kernels can hold at once
DECODING = 8  # tokens, up to which steps one by one cost less than a chunk


def _padded(features: int) -> int:
    return -(-features // 128) * 128


MORE_THAN_A_FEW = Condition(f"more than {DECODING} tokens", lambda f: f.T > DECODING)

TABLE = (
    Implementation(
        "mosaic_gpu",
        "pallas_kernels.gated_delta_rule.mosaic_gpu:gated_delta_rule",
        platforms=("gpu",),
        dtypes=("bfloat16",),
        conditions=hopper.CONDITIONS,
        advice=(MORE_THAN_A_FEW,),
    ),
    Implementation(
        "mosaic_tpu",
        "pallas_kernels.gated_delta_rule.mosaic_tpu:gated_delta_rule",
        platforms=("tpu",),
        dtypes=("bfloat16", "float32"),
        conditions=(
            Condition(
                f"at most {LARGEST_STATE} numbers in the states of the value heads of a key head, "
                "key and value dimensions counted as multiples of 128",
                lambda f: f.N // f.H * _padded(f.K) * _padded(f.V) <= LARGEST_STATE,
            ),
        ),
        advice=(MORE_THAN_A_FEW,),
    ),
    Implementation(
        "xla",
        "pallas_kernels.gated_delta_rule.xla:gated_delta_rule",
        platforms=("cpu", "gpu", "tpu"),
        advice=(MORE_THAN_A_FEW,),
    ),
    Implementation(
        "ref",
        "pallas_kernels.gated_delta_rule.ref:gated_delta_rule",
        platforms=("cpu", "gpu", "tpu"),
    ),
)
