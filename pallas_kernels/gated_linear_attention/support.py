"""Which implementation of gated_linear_attention runs where: the declared support table."""

from pallas_kernels._core.dispatch import Condition, Implementation
from pallas_kernels._core.recurrence import Facts
from pallas_kernels._hopper import support as hopper

EVERYWHERE = ("cpu", "gpu", "tpu")
FEW_TOKENS = 8  # up to which token by token is less work than a chunk
VMEM_BYTES = 48 * 2**20  # of at least 64 MiB in all TPUs since v5
TPU_CHUNK, TPU_LANES = 128, 128

MANY_TOKENS = Condition(f"more than {FEW_TOKENS} tokens", lambda f: f.T > FEW_TOKENS)


def tpu_heads_side_by_side(heads: int, values: int, decay: str) -> int:
    """How many of the value heads of a key head share the lanes of a TPU register, if they can."""
    fit = TPU_LANES // values if TPU_LANES % values == 0 else 1
    return fit if heads % fit == 0 and decay != "vector" else 1


def tpu_bytes(f: Facts) -> int:
    """About what the backward pass of the TPU kernel, the larger one, needs of VMEM.

    Blocks of tokens and states are there twice, to be filled while others are used; so are the
    states of the value heads of a key head, before and after. The rest are fp32 values on the way.
    """
    K, V = (-(-size // TPU_LANES) * TPU_LANES for size in (f.K, f.V))
    tokens, state, size = TPU_CHUNK, K * V, 2 if f.dtype == "bfloat16" else 4
    heads = f.N // f.H // tpu_heads_side_by_side(f.N // f.H, f.V, f.decay)
    blocks = size * (tokens * (4 * K + 3 * V) + state) + 8 * heads * state
    values = 10 * tokens * K + 6 * tokens * V + 6 * state
    if f.decay == "vector":
        blocks, values = blocks + 8 * tokens * K, values + 8 * tokens * K
    return 2 * blocks + 4 * values


TABLE = (
    Implementation(
        "mosaic_gpu",
        "pallas_kernels.gated_linear_attention.mosaic_gpu:gated_linear_attention",
        platforms=("gpu",),
        dtypes=("bfloat16",),
        conditions=(
            *hopper.CONDITIONS,
            Condition("no decay, or one a head", lambda f: f.decay != "vector"),
        ),
        advice=(MANY_TOKENS,),
    ),
    Implementation(
        "mosaic_tpu",
        "pallas_kernels.gated_linear_attention.mosaic_tpu:gated_linear_attention",
        platforms=("tpu",),
        dtypes=("bfloat16", "float32"),
        conditions=(
            Condition(
                "states and chunks that fit in 48 MiB of VMEM (smaller key or value features, or "
                "fewer value heads a key head)",
                lambda f: tpu_bytes(f) <= VMEM_BYTES,
            ),
        ),
        advice=(MANY_TOKENS,),
    ),
    Implementation(
        "xla",
        "pallas_kernels.gated_linear_attention.xla:gated_linear_attention",
        platforms=EVERYWHERE,
        advice=(MANY_TOKENS,),
    ),
    Implementation(
        "ref",
        "pallas_kernels.gated_linear_attention.ref:gated_linear_attention",
        platforms=EVERYWHERE,
    ),
)
