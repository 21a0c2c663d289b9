"""The Hopper kernels, as far as a host without a GPU can tell: they lower, and are chosen."""

import jax
import jax.numpy as jnp
import pytest
from recurrence_cases import HOPPER_CASES, HOPPER_OPS, hopper_arguments

import pallas_kernels
from pallas_kernels._hopper.support import VERSION
from pallas_kernels.gated_delta_rule import explain as explain_delta
from pallas_kernels.gated_linear_attention import explain as explain_linear

needs_mosaic = pytest.mark.skipif(
    VERSION < (0, 11), reason="needs JAX 0.11, as CI on Python 3.12 has"
)


def on_hopper():
    """Code traced inside is for an H200."""
    device = jax.sharding.AbstractDevice("NVIDIA H200", None, "cuda")
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=auto, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def shapes(heads=2, value_heads=2, features=128, values=128, dtype=jnp.bfloat16, length=200):
    """q, k, v, g and beta."""
    key = jax.ShapeDtypeStruct((2, length, heads, features), dtype)
    value = jax.ShapeDtypeStruct((2, length, value_heads, values), dtype)
    gate = jax.ShapeDtypeStruct((2, length, value_heads), jnp.float32)
    return key, key, value, gate, gate


@needs_mosaic
@pytest.mark.parametrize(
    "op, name",
    [(op, name) for op in HOPPER_OPS for name in ("packed", "two_tiles_a_processor")]
    + [("gated_delta_rule", "packed_vector"), ("gated_delta_rule", "ten_chunks_vector")],
)
def test_forward_and_backward_lower(op, name):
    def loss(arguments, segments):
        o, state = getattr(pallas_kernels, op)(
            **arguments, segment_ids=segments, output_final_state=True, implementation="mosaic_gpu"
        )
        return jnp.sum(o.astype(jnp.float32)) + jnp.sum(state)

    with on_hopper():
        gradient = jax.value_and_grad(loss)
        given = jax.eval_shape(lambda: hopper_arguments(op, name))
        traced = jax.jit(gradient).trace(given, HOPPER_CASES[name].segment_ids)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # Forward: prepare and scan; backward: reverse and two passes of the delta rule, or of linear
    # attention a pass for each of d_q, d_k and d_v. Of linear attention where rows run in pieces,
    # one more pass forward and backward. With a decay a key feature, backward the states again,
    # reverse and gradients.
    pieces = (op, name) == ("gated_linear_attention", "packed")
    assert text.count("custom_call @mosaic_gpu") == 5 + 2 * pieces


@needs_mosaic
def test_hopper_takes_them_by_itself_and_says_why_not():
    with on_hopper():
        assert explain_delta(*shapes()).name == "mosaic_gpu"
        assert explain_linear(*shapes()[:4]).name == "mosaic_gpu"
        assert explain_linear(*shapes(value_heads=6, values=64)[:4]).name == "mosaic_gpu"
        single = explain_delta(*shapes(length=1))
        assert single.name == "ref" and "more than 8 tokens" in single.passed_over["mosaic_gpu"]
        wide = explain_delta(*shapes(features=256))
        assert wide.name == "xla" and "64 or 128 key features" in wide.passed_over["mosaic_gpu"]
        full = explain_delta(*shapes(dtype=jnp.float32))
        assert full.name == "xla" and "bfloat16" in full.passed_over["mosaic_gpu"]
        q, k, v, _, beta = shapes()
        vector = jax.ShapeDtypeStruct(v.shape, jnp.float32)
        assert explain_delta(q, k, v, vector, beta).name == "mosaic_gpu"
        with pytest.raises(ValueError, match="no decay, or one a head; can run here: xla, ref"):
            explain_linear(q, k, v, vector, implementation="mosaic_gpu")
