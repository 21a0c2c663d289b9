"""The TPU kernel: its numbers in interpret mode, its compilation ahead of time."""

import functools

import jax
import jax.numpy as jnp
import pytest

from efficient_lm import masks
from pallas_kernels._core.testing import TPU_TOPOLOGIES, compile_for_tpu, errors_against
from pallas_kernels.attention import attention, ref, splash

SEGMENTS = jnp.array([[1] * 60 + [2] * 60 + [0] * 10], jnp.int32)
CASES = {
    "window_capped_sinks": (masks.SlidingWindow(70).lower(), 2.0, True),
    "segments": ((masks.Causal() & masks.Segments(SEGMENTS)).lower(), None, False),
    "full": (masks.Full().lower(), None, False),
}


@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernel_is_the_reference(case):
    """Odd length (padded inside), grouped queries, values and every gradient."""
    mask, soft_cap, with_sinks = CASES[case]
    keys = jax.random.split(jax.random.key(0), 4)
    q, cotangent = (jax.random.normal(key, (1, 130, 2, 64)) for key in keys[:2])
    k, v = (jax.random.normal(key, (1, 130, 1, 64)) for key in keys[2:])
    sinks = jnp.array([0.5, 1.0]) if with_sinks else None
    options = {"mask": mask, "scale": 0.1, "soft_cap": soft_cap}
    errors = errors_against(
        functools.partial(ref.attention, **options),
        functools.partial(splash.attention, **options, interpret=True),
        {"q": q, "k": k, "v": v, "sinks": sinks},
        cotangent,
    )
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.parametrize("topology", TPU_TOPOLOGIES)
def test_compiles_for_tpu_forward_and_backward(topology):
    """ "auto" takes splash for a TPU that this host lacks, and Mosaic accepts it."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((2, 1024), jnp.int32)

    def loss(q, k, v, segments):
        mask = (masks.SlidingWindow(300) & masks.Segments(segments)).lower()
        return attention(q, k, v, mask=mask, soft_cap=30.0).astype(jnp.float32).sum()

    compiled = compile_for_tpu(
        topology,
        jax.grad(loss, (0, 1, 2)),
        shape((2, 1024, 4, 128)),
        shape((2, 1024, 2, 128)),
        shape((2, 1024, 2, 128)),
        segments,
    )
    assert "splash" in compiled.as_text()
