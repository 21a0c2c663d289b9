"""The delta rule with a decay a key feature on Hopper: its passes, written down, are the rule."""

import dataclasses

import hopper_vector_passes
import pytest
from hopper_passes import DECAYS, MANY_CHUNKS, found
from recurrence_cases import HOPPER_CASES, Case

from pallas_kernels._hopper import vector_rule
from pallas_kernels.gated_delta_rule import mosaic_gpu, ref

CASES = {
    **{name: HOPPER_CASES[name] for name in HOPPER_CASES if name.endswith("vector")},
    "many_chunks": dataclasses.replace(MANY_CHUNKS, decay="vector"),
    "equal_keys": Case(
        T=150, K=64, V=64, decay="vector", cosine=0.9, beta=0.95, initial_state=True,
        dtype="bfloat16",
    ),
}  # fmt: skip
del CASES["ten_chunks_vector"]  # large


@pytest.mark.parametrize(
    "name, decays",
    [(name, "as_is") for name in CASES] + [("many_chunks", decays) for decays in DECAYS],
)
def test_passes_are_the_rule(monkeypatch, name, decays):
    for pass_ in ("prepare", "scan", "reverse", "gradients"):
        monkeypatch.setattr(vector_rule, pass_, getattr(hopper_vector_passes, pass_))
    of = found(
        "gated_delta_rule", ref.gated_delta_rule, mosaic_gpu.gated_delta_rule, CASES, name, decays
    )
    assert max(of.values()) < 1e-2
