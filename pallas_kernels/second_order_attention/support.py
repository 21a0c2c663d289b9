"""Which implementation of second_order_attention runs where: the declared support table."""

from dataclasses import dataclass

from pallas_kernels._core.compat import Target
from pallas_kernels._core.dispatch import Condition, Implementation
from pallas_kernels.second_order_attention.terms import feature_count

EVERYWHERE = ("cpu", "gpu", "tpu")
FOLDER = "pallas_kernels.second_order_attention"


@dataclass(frozen=True)
class Facts:
    """What the choice depends on. state: one is given, or asked for."""

    target: Target
    dtype: str
    T: int
    K: int
    state: bool


TABLE = (
    Implementation(
        "xla_rows",
        f"{FOLDER}.rows:second_order_attention",
        platforms=EVERYWHERE,
        conditions=(Condition("no initial and no final state", lambda f: not f.state),),
        advice=(
            # 4 T K operations a token against 4 P (V + 1) and those that make the features.
            Condition("T <= K (K + 1) / 2 tokens", lambda f: feature_count(f.K) >= f.T),
        ),
    ),
    Implementation("xla_chunks", f"{FOLDER}.chunks:second_order_attention", platforms=EVERYWHERE),
    Implementation(
        "xla_recurrent", f"{FOLDER}.recurrent:second_order_attention", platforms=EVERYWHERE
    ),
    Implementation("ref", f"{FOLDER}.ref:second_order_attention", platforms=EVERYWHERE),
)
