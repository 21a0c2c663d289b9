"""What `python -m pallas_kernels.bench --op=gated_delta_rule` measures: ours."""

import functools

from pallas_kernels._core import recurrence_bench
from pallas_kernels._core.recurrence_bench import passes
from pallas_kernels.gated_delta_rule import explain, gated_delta_rule, ref
from pallas_kernels.gated_delta_rule.cases import CASES

__all__ = ["CASES", "choice", "contestants", "expected", "passes"]

contestants = functools.partial(recurrence_bench.contestants, gated_delta_rule)
expected = functools.partial(recurrence_bench.expected, ref.gated_delta_rule)


def choice(case: recurrence_bench.Case):
    """What "auto" takes for the case here."""
    return explain(*case.inputs()[0])
