"""What `python -m pallas_kernels.bench --op=gated_linear_attention` measures: ours."""

import functools

from pallas_kernels._core import recurrence_bench
from pallas_kernels._core.recurrence_bench import passes
from pallas_kernels.gated_linear_attention import explain, gated_linear_attention, ref
from pallas_kernels.gated_linear_attention.cases import CASES

__all__ = ["CASES", "choice", "contestants", "expected", "passes"]

contestants = functools.partial(recurrence_bench.contestants, gated_linear_attention)
expected = functools.partial(recurrence_bench.expected, ref.gated_linear_attention)


def choice(case: recurrence_bench.Case):
    """What "auto" takes for the case here."""
    return explain(*case.inputs()[0])
