"""The TPU kernels of the gated delta rule: numbers in interpret mode, compilation for chips."""

import functools

import jax
import jax.numpy as jnp
import pytest
from recurrence_cases import Case, errors, lengths

from pallas_kernels import gated_delta_rule
from pallas_kernels._core import recurrence
from pallas_kernels._core.compat import Target
from pallas_kernels._core.dispatch import choose
from pallas_kernels._core.testing import (
    TPU_TOPOLOGIES,
    compile_for_tpu,
    poisoned_interpret_params,
    relative_error,
)
from pallas_kernels.gated_delta_rule import mosaic_tpu, ref
from pallas_kernels.gated_delta_rule.mosaic_tpu_chunk import invert
from pallas_kernels.gated_delta_rule.support import TABLE

# Odd lengths, in chunks of 64; features that are padded to 128.
CASES = {
    "grouped": Case(B=1, T=130, H=1, N=2, initial_state=True),
    "equal_keys": Case(B=2, T=65, H=1, N=1, decay="none", cosine=0.999, beta=0.95),
    "vector": Case(
        B=1, T=100, H=2, N=2, decay="vector", log_decay=-20.0, initial_state=True,
        segments=lengths((1, 70), (2, 1), (3, 29)),
    ),
    "packed": Case(
        B=1, T=150, H=1, N=1, initial_state=True,
        segments=lengths((0, 3), (1, 50), (2, 11), (1, 60), (3, 20), (0, 6)),
    ),
    "bf16": Case(B=1, T=130, H=1, N=1, K=32, V=32, dtype="bfloat16", initial_state=True),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_are_the_reference(name, capfd):
    """With memory that is NaN until written, reads out of bounds as errors, and races found."""
    case = CASES[name]
    documents = None if case.segments is None else recurrence.documents(case.segment_ids)
    options = {"scale": 0.5, "documents": documents}
    found = errors(
        functools.partial(ref.gated_delta_rule, **options),
        functools.partial(
            mosaic_tpu.gated_delta_rule, **options, interpret=poisoned_interpret_params()
        ),
        case.arguments(),
    )
    exact = max(found["o"], found["final_state"])
    assert exact < (0.012 if name == "bf16" else 1e-5), found
    assert max(found.values()) < (0.02 if name == "bf16" else 2e-5), found
    assert "RACE" not in capfd.readouterr().out


def test_inverse_of_similar_keys_is_exact():
    """Where the doubling product has a relative error of 1e9."""
    keys = Case(B=1, T=64, H=1, K=64, cosine=0.999).arguments()["k"][0, :, 0]
    lower = jnp.tril(0.95 * jnp.einsum("ik,jk->ij", keys, keys, precision="highest"), -1)
    unit = lower + jnp.eye(64)
    inverse = invert(lower)
    assert relative_error(jnp.matmul(unit, inverse, precision="highest"), jnp.eye(64)) < 1e-5
    exact = jax.scipy.linalg.solve_triangular(unit, jnp.eye(64), lower=True)
    assert relative_error(inverse, exact) < 1e-6


# Key and value heads of Qwen3.5 27B everywhere, of 0.8B and of 9B; Kimi delta attention.
CHIPS = [(topology, 16, 48, "scalar") for topology in TPU_TOPOLOGIES]
CHIPS += [("v5e:2x2", 16, 16, "scalar"), ("tpu7x:2x2x1", 16, 32, "scalar")]
CHIPS += [("v5e:2x2", 16, 16, "vector")]


@pytest.mark.parametrize(("topology", "H", "N", "decay"), CHIPS)
def test_compiles_for_tpu_forward_and_backward(topology, H, N, decay):
    """ "auto" takes the kernels for a TPU that this host lacks, and Mosaic accepts them."""
    T, D = 4096, 128
    keys, values = (jax.ShapeDtypeStruct((1, T, n, D), jnp.bfloat16) for n in (H, N))
    gates = jax.ShapeDtypeStruct((1, T, N, D)[: 3 + (decay == "vector")], jnp.float32)
    beta = jax.ShapeDtypeStruct((1, T, N), jnp.float32)
    segments = jax.ShapeDtypeStruct((1, T), jnp.int32)

    def loss(q, k, v, g, beta, segments):
        o, _ = gated_delta_rule(q, k, v, g, beta, segment_ids=segments)
        return o.astype(jnp.float32).sum()

    gradients = jax.value_and_grad(loss, (0, 1, 2, 3, 4))
    compiled = compile_for_tpu(topology, gradients, keys, keys, values, gates, beta, segments)
    states = 2 * T // mosaic_tpu.CHUNK * N * D * D  # bytes of those before all chunks, in bf16
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * states


TPU = Target("tpu", "TPU v5e")
BASE = recurrence.Facts(TPU, "bfloat16", 1, 64, 16, 16, 128, 128, "scalar", True)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "mosaic_tpu"),
        ({"N": 48, "decay": "vector"}, "mosaic_tpu"),
        ({"K": 256, "V": 200}, "mosaic_tpu"),
        ({"T": 1}, "ref"),
        ({"dtype": "float16"}, "xla"),
        ({"K": 512, "V": 512}, "xla"),
        ({"H": 1}, "xla"),
        ({"target": Target("cpu", "cpu")}, "xla"),
    ],
)
def test_auto_takes_the_kernels_where_they_run(changes, name):
    facts = recurrence.Facts(**(vars(BASE) | changes))
    choice = choose("gated_delta_rule", TABLE, facts)
    assert choice.name == name


def test_kernel_asked_for_by_name_says_what_it_lacks():
    arguments = Case(K=512, V=512).arguments()
    with pytest.raises(
        ValueError, match=r"'mosaic_tpu' cannot run: it needs tpu .*can run here: xla"
    ):
        gated_delta_rule(**arguments, implementation="mosaic_tpu")
