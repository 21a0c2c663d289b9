"""The TPU kernel: its numbers in interpret mode, its compilation ahead of time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm import masks
from pallas_kernels._core.testing import TPU_TOPOLOGIES, compile_for_tpu, errors_against
from pallas_kernels.attention import attention, ref, splash, splash_parts

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


@pytest.mark.parametrize("case", ["segments", "full"])
def test_parts_of_the_tokens_are_merged_to_the_whole(case):
    """Three parts of the queries and of the keys; empty rows in the last."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, d_out = (jax.random.normal(key, (1, 384, 2, 64)) for key in keys[:2])
    k, v = (jax.random.normal(key, (1, 384, 1, 64)) for key in keys[2:])
    mask = masks.Full()
    if case == "segments":
        segments = jnp.array([[1] * 60 + [2] * 300 + [0] * 24], jnp.int32)
        mask = masks.Causal() & masks.Segments(segments)
    options = {"mask": mask.lower(), "scale": 0.1, "soft_cap": 2.0}
    parts = functools.partial(splash_parts.attention, **options, sizes=(256, 128), interpret=True)
    errors = errors_against(
        functools.partial(ref.attention, **options), parts, {"q": q, "k": k, "v": v}, d_out
    )
    assert max(errors.values()) < 1e-4, errors
    expected = ref.attention(q, k, v, **options, return_log_sum_exp=True)
    _, lse = parts(q, k, v, return_log_sum_exp=True)
    np.testing.assert_allclose(lse, expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_million_tokens_compile_for_tpu():
    """In parts: the table of all blocks would not fit in the scalar memory of a core."""
    q, k = (jax.ShapeDtypeStruct((1, 2**20, heads, 128), jnp.bfloat16) for heads in (2, 1))

    def loss(q, k, v):
        return attention(q, k, v, mask=masks.Causal().lower()).astype(jnp.float32).sum()

    compiled = compile_for_tpu("v5p:2x2x1", jax.grad(loss, (0, 1, 2)), q, k, k)
    assert "splash" in compiled.as_text()


def test_auto_counts_the_blocks_that_the_kernel_lists():
    """The bound of the support table is that of the kernel's own tables."""
    shape = jax.ShapeDtypeStruct((1, 4096, 1, 64), jnp.bfloat16)
    for mask in (masks.Causal(), masks.SlidingWindow(1000), masks.Full()):
        term = mask.lower().terms[0]
        info = splash._kernel(term, shape, 4096, None, False).fwd_mask_info
        listed = info.data_next.size * 2 + info.block_mask.size
        assert listed <= splash.table_bytes(term, 4096, 4096) <= 1.5 * listed


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
