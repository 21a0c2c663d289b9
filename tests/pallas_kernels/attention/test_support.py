"""The support table of attention: what runs where, and that auto never takes what cannot."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from efficient_lm import masks
from pallas_kernels._core.compat import Target
from pallas_kernels._core.dispatch import choose
from pallas_kernels.attention import attention, explain
from pallas_kernels.attention.support import TABLE, Facts

TARGETS = {
    "cpu": Target("cpu", "cpu"),
    "h200": Target("gpu", "NVIDIA H200", 9.0),
    "a100": Target("gpu", "NVIDIA A100", 8.0),
    "mi300": Target("gpu", "AMD Instinct MI300X"),
    "tpu": Target("tpu", "TPU v5e"),
}
CAUSAL = masks.Causal().lower()
PACKED = (masks.Causal() & masks.Segments(jnp.ones((2, 64), jnp.int32))).lower()
BASE = Facts(TARGETS["cpu"], "bfloat16", 2, 64, 64, 4, 2, 64, CAUSAL, False, False)

# target, changes to the causal base case, what auto takes
CHOICES = [
    ("cpu", {}, "xla"),
    ("h200", {}, "cudnn"),
    ("h200", {"mask": PACKED}, "cudnn"),
    ("h200", {"mask": PACKED, "T": 63, "S": 63}, "xla"),
    ("h200", {"T": 63, "S": 63}, "xla"),  # cuDNN has no backward pass for odd lengths
    ("h200", {"mask": PACKED, "T": 2**16, "S": 2**16}, "xla"),
    ("h200", {"T": 1}, "xla"),
    ("h200", {"dtype": "float32"}, "xla"),
    ("h200", {"soft_cap": True}, "xla"),
    ("h200", {"sinks": True}, "xla"),
    ("h200", {"H": 256}, "cudnn"),
    ("a100", {"H": 256}, "xla"),
    ("mi300", {}, "xla"),
    ("tpu", {}, "splash"),
    ("tpu", {"mask": PACKED, "soft_cap": True, "sinks": True}, "splash"),
    ("tpu", {"mask": masks.SlidingWindow(8).lower()}, "splash"),
    ("tpu", {"T": 2**18, "S": 2**18}, "splash"),
    ("tpu", {"mask": masks.SlidingWindow(4096).lower(), "T": 2**20, "S": 2**20}, "splash"),
    ("tpu", {"T": 2**20, "S": 2**20}, "splash_parts"),
    ("tpu", {"mask": PACKED, "T": 2**20, "S": 2**20}, "splash_parts"),
    ("tpu", {"sinks": True, "T": 2**20, "S": 2**20}, "xla"),
    ("tpu", {"T": 10**6, "S": 10**6}, "xla"),  # no multiple of 8192
    ("tpu", {"mask": masks.BlockCausal(8).lower()}, "xla"),
    ("tpu", {"mask": masks.Causal().lower(key_index=jnp.zeros((1, 64), jnp.int32))}, "xla"),
    ("tpu", {"H": 80}, "xla"),
    ("tpu", {"T": 1}, "xla"),
]


@pytest.mark.parametrize(("target", "changes", "name"), CHOICES)
def test_auto(target, changes, name):
    facts = dataclasses.replace(BASE, target=TARGETS[target], **changes)
    choice = choose("attention", TABLE, facts)
    assert choice.name == name
    assert not choice.implementation.obstacles(facts)
    rows = [row.name for row in TABLE]
    assert list(choice.passed_over) == rows[: rows.index(name)]


def test_every_row_says_what_it_needs_and_loads():
    for row in TABLE:
        assert callable(row.load())
        for condition in row.conditions + row.advice:
            assert condition.needs and isinstance(condition.holds(BASE), bool)


def test_every_declared_implementation_of_this_device_runs():
    shape = {"q": (2, 64, 4, 64), "k": (2, 64, 2, 64), "v": (2, 64, 2, 64)}
    arguments = {name: jnp.ones(size, jnp.bfloat16) for name, size in shape.items()}
    for row in TABLE:
        if row.obstacles(BASE):
            with pytest.raises(ValueError, match=f"'{row.name}' cannot run: it needs"):
                attention(**arguments, mask=PACKED, implementation=row.name)
        else:
            out = attention(**arguments, mask=PACKED, implementation=row.name)
            assert (jnp.abs(out - 1) < 0.01).all()


def test_explain_takes_shapes_alone():
    shape = jax.ShapeDtypeStruct((2, 64, 4, 64), jnp.bfloat16)
    assert explain(shape, shape, shape, mask=CAUSAL).name == "xla"
    assert "not cudnn: it needs gpu (this is cpu)" in str(explain(shape, shape, shape, mask=CAUSAL))
