"""The TPU kernels of linear attention: numbers in interpret mode, compilation ahead of time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import gated_linear_attention
from pallas_kernels._core import recurrence
from pallas_kernels._core.testing import (
    TPU_TOPOLOGIES,
    compile_for_tpu,
    poisoned_interpret_params,
)
from pallas_kernels.gated_linear_attention import explain, mosaic_tpu, ref
from tests.pallas_kernels.recurrence.recurrence_cases import Case, errors, lengths

PACKED = lengths((0, 5), (1, 100), (2, 60), (0, 5), (3, 40))
CASES = {
    "none_packed": Case(B=1, T=210, H=1, N=2, decay="none", segments=PACKED),
    "scalar_forgets": Case(B=1, T=130, H=2, N=2, K=130, log_decay=-20.0, initial_state=True),
    "scalar_heads_side_by_side": Case(
        B=2, T=210, H=1, N=4, V=64, segments=PACKED, initial_state=True
    ),
    "vector_packed": Case(
        B=1, T=210, H=1, N=2, decay="vector", segments=PACKED, initial_state=True
    ),
    "vector_forgets": Case(B=1, T=130, H=1, N=1, decay="vector", log_decay=-20.0),
}


def op_arguments(case):
    """Those of the op, by name."""
    return {name: x for name, x in case.arguments().items() if name != "beta"}


def options(case):
    """What the functions of the implementations take beside."""
    ids = case.segment_ids
    return {"scale": 0.3, "documents": None if ids is None else recurrence.documents(ids)}


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_are_the_recurrence(name, capfd):
    """Output, final state and each gradient; unwritten memory is NaN, two cores do not race."""
    case = CASES[name]
    interpret = dataclasses.replace(poisoned_interpret_params(), num_cores_or_threads=2)
    worst = errors(
        functools.partial(ref.gated_linear_attention, **options(case)),
        functools.partial(mosaic_tpu.gated_linear_attention, **options(case), interpret=interpret),
        op_arguments(case),
    )
    assert max(worst.values()) < 1e-5, worst
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_bf16(decay):
    """Rounded operands of the products, fp32 sums, decays and states."""
    case = Case(B=1, T=256, H=1, N=1, K=64, V=64, decay=decay, dtype="bfloat16")
    worst = errors(
        functools.partial(ref.gated_linear_attention, **options(case)),
        functools.partial(mosaic_tpu.gated_linear_attention, **options(case), interpret=True),
        op_arguments(case),
    )
    assert worst["o"] < 0.004 and max(worst.values()) < 0.012, worst


SHAPES = {  # B, T, H, N, K, V, decay
    "heads_of_128": (2, 4096, 16, 16, 128, 128, "scalar"),
    "decay_of_features": (2, 4096, 16, 16, 128, 128, "vector"),
    "mamba2": (2, 4096, 1, 32, 128, 64, "scalar"),
}


def shapes(B, T, H, N, K, V, decay, dtype=jnp.bfloat16):
    """Shapes of q, k, v, g, a state and segments."""
    of = jax.ShapeDtypeStruct
    g = {"none": None, "scalar": of((B, T, N), jnp.float32),
         "vector": of((B, T, N, K), jnp.float32)}[decay]  # fmt: skip
    keys, values = of((B, T, H, K), dtype), of((B, T, N, V), dtype)
    return keys, keys, values, g, of((B, N, K, V), jnp.float32), of((B, T), jnp.int32)


@pytest.mark.parametrize("topology", TPU_TOPOLOGIES)
def test_compiles_for_tpu_forward_and_backward(topology):
    """ "auto" takes the kernels for a TPU that this host lacks, and Mosaic accepts them."""

    def both(q, k, v, g, state, segments):
        def run(q, k, v, g, state):
            return gated_linear_attention(
                q, k, v, g, initial_state=state, segment_ids=segments, output_final_state=True
            )

        out, pull = jax.vjp(run, q, k, v, g, state)
        return out, pull(out)

    every = [shapes(*sizes) for sizes in SHAPES.values()]
    compiled = compile_for_tpu(topology, lambda cases: [both(*case) for case in cases], every)
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * 2**30  # a [T, T] has more


def test_what_the_kernels_take_is_declared():
    """States too large for VMEM are left to XLA, with the reason."""
    mesh = jax.sharding.AbstractMesh(
        (1,), ("device",), axis_types=(jax.sharding.AxisType.Auto,),
        abstract_device=jax.sharding.AbstractDevice("TPU v5e", None, "tpu"),
    )  # fmt: skip
    with jax.sharding.use_abstract_mesh(mesh):
        two_mamba = shapes(1, 2048, 16, 16, 2080, 65, "scalar", jnp.float32)
        for given in (two_mamba, *(shapes(*sizes) for sizes in SHAPES.values())):
            assert explain(*given[:4]).name == "mosaic_tpu"
        choice = explain(*shapes(1, 2048, 1, 1, 4096, 4096, "scalar")[:4])
    assert choice.name == "xla"
    assert "fit in 48 MiB of VMEM" in choice.passed_over["mosaic_tpu"]
