"""The Hopper kernels against the recurrence in fp32 on a Hopper GPU: pytest --accelerator."""

import functools

import jax
import pytest
from recurrence_cases import (
    HOPPER_CASES,
    HOPPER_LONG,
    HOPPER_LONG_RUNS,
    HOPPER_OPS,
    HOPPER_RUNS,
    errors,
    hopper_arguments,
)

import pallas_kernels


def worst_error(op: str, name: str, implementation: str, reference: str = "ref") -> float:
    """Of output, final state and each gradient, from cotangents of both results."""
    run = functools.partial(
        getattr(pallas_kernels, op),
        segment_ids=(HOPPER_CASES | HOPPER_LONG)[name].segment_ids,
        output_final_state=True,
    )
    found = errors(
        functools.partial(run, implementation=reference),
        functools.partial(run, implementation=implementation),
        hopper_arguments(op, name),
    )
    print(op, name, {key: f"{value:.1e}" for key, value in found.items()})
    return max(found.values())


@pytest.fixture
def hopper():
    if not getattr(jax.devices()[0], "compute_capability", "").startswith("9."):
        pytest.skip("needs a Hopper GPU")


@pytest.mark.accelerator
@pytest.mark.parametrize("op, name", HOPPER_RUNS)
def test_kernels_are_the_recurrence(hopper, op, name):
    assert worst_error(op, name, "mosaic_gpu") < 1e-2


@pytest.mark.accelerator
@pytest.mark.parametrize("op, name", HOPPER_LONG_RUNS)
def test_rows_of_64k_tokens_are_those_of_portable_chunks(hopper, op, name):
    assert worst_error(op, name, "mosaic_gpu", reference="xla") < 1e-2


@pytest.mark.parametrize("op", HOPPER_OPS)
def test_the_bound_is_what_portable_chunks_meet(op):
    assert worst_error(op, "packed", "xla") < 1e-2
