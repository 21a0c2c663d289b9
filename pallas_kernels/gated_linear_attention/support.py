"""Which implementation of gated_linear_attention runs where: the declared support table."""

from pallas_kernels._core.dispatch import Condition, Implementation
from pallas_kernels._hopper import support as hopper

EVERYWHERE = ("cpu", "gpu", "tpu")
FEW_TOKENS = 8  # up to which token by token is less work than a chunk

TABLE = (
    Implementation(
        "mosaic_gpu",
        "pallas_kernels.gated_linear_attention.mosaic_gpu:gated_linear_attention",
        platforms=("gpu",),
        dtypes=("bfloat16",),
        conditions=hopper.CONDITIONS,
        advice=(Condition(f"more than {FEW_TOKENS} tokens", lambda f: f.T > FEW_TOKENS),),
    ),
    Implementation(
        "xla",
        "pallas_kernels.gated_linear_attention.xla:gated_linear_attention",
        platforms=EVERYWHERE,
        advice=(Condition(f"more than {FEW_TOKENS} tokens", lambda f: f.T > FEW_TOKENS),),
    ),
    Implementation(
        "ref",
        "pallas_kernels.gated_linear_attention.ref:gated_linear_attention",
        platforms=EVERYWHERE,
    ),
)
