"""Linear attention with a decay: the chunk form against the recurrence, and what it reduces to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gated_linear_attention
from pallas_kernels._core import recurrence
from pallas_kernels._core.testing import relative_error
from pallas_kernels.gated_linear_attention import explain, xla
from tests.pallas_kernels.recurrence.recurrence_cases import CASES, Case, errors, lengths

MIDDLE = Case(T=100, N=4, decay="scalar", initial_state=True)


def arguments(case, **changes):
    """Those of the op, by name."""
    return {name: x for name, x in case.arguments().items() if name != "beta"} | changes


def op(case, implementation):
    """The op on (q, k, v, g, initial_state), with the case's segments."""
    function = functools.partial(
        gated_linear_attention,
        output_final_state=True,
        segment_ids=case.segment_ids,
        implementation=implementation,
    )
    return jax.jit(function)


@pytest.mark.parametrize("name", CASES)
def test_chunk_form_is_the_recurrence(name):
    """Output, final state and each gradient."""
    case = CASES[name]
    worst = errors(op(case, "ref"), op(case, "xla"), arguments(case))
    assert max(worst.values()) < 1e-5, worst


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_chunk_size_changes_nothing(decay):
    """Chunks of 16 and of 128 tokens, of 100 in two packed documents with padding."""
    case = Case(B=1, T=100, K=4, V=4, decay=decay, initial_state=True)
    segments = jnp.array([lengths((1, 30), (0, 20), (2, 50))], jnp.int32)
    documents = recurrence.documents(segments)
    run = functools.partial(xla.gated_linear_attention, scale=0.5, documents=documents)
    one, other = (functools.partial(run, chunk_size=size) for size in (16, 128))
    worst = errors(one, other, arguments(case))
    assert max(worst.values()) < 2e-6, worst


@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
def test_masked_quadratic_form(decay, rng):
    """o = ((q k^T) * exp(G_i - G_j)) v in float64, the definition without a state."""
    case = Case(B=1, T=70, H=1, N=2, K=5, V=3, decay=decay)
    given = arguments(case)
    o, _ = op(case, "xla")(**given)
    q, k, v = (np.asarray(given[name], np.float64)[0] for name in "qkv")
    g = np.zeros((70, 2, 1)) if decay == "none" else np.asarray(given["g"], np.float64)[0]
    total = np.cumsum(g.reshape(70, 2, -1), axis=0) + np.zeros((70, 2, 5))
    pair = np.exp(np.minimum(total[:, None] - total[None], 0.0))  # [i, j, N, K]
    scores = np.einsum("ik,jk,ijnk->nij", q[:, 0], k[:, 0], pair) * np.tri(70)
    assert relative_error(o[0], 5**-0.5 * np.einsum("nij,jnv->inv", scores, v)) < 1e-6


@pytest.mark.parametrize("implementation", ["ref", "xla"])
def test_reductions(implementation):
    """A decay equal over the features is one a head; of 0, none; heads of a group, copies."""
    given = arguments(MIDDLE)
    scalar = op(MIDDLE, implementation)(**given)
    wide = jnp.broadcast_to(given["g"][..., None], (*given["g"].shape, MIDDLE.K))
    vector = op(MIDDLE, implementation)(**given | {"g": wide})
    copies = {name: jnp.repeat(given[name], 2, axis=2) for name in "qk"}
    alone = op(MIDDLE, implementation)(**given | copies)
    for one, other in zip(scalar * 2, vector + alone, strict=True):
        assert relative_error(other, one) < 1e-6
    none = op(MIDDLE, implementation)(**given | {"g": None})
    zero = op(MIDDLE, implementation)(**given | {"g": jnp.zeros_like(given["g"])})
    assert max(map(relative_error, zero, none)) < 1e-6


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_state_is_handed_over(decay):
    """Any two parts, the second by one token or by many, are the whole."""
    case = Case(T=90, decay=decay, initial_state=True)
    given = arguments(case)
    whole, final = op(case, "auto")(**given)
    for at in (1, 37):
        cut = lambda x, part: x if x is None else x[:, part]  # noqa: E731
        state, parts = given["initial_state"], []
        for part in (slice(0, at), slice(at, None)):
            tokens = {name: cut(given[name], part) for name in "qkvg"}
            o, state = op(case, "auto")(**tokens, initial_state=state)
            parts.append(o)
        assert relative_error(jnp.concatenate(parts, axis=1), whole) < 1e-6
        assert relative_error(state, final) < 1e-6


@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
def test_packed_documents_are_separate_rows(decay):
    """With padding before, between and after."""
    case = Case(B=1, T=100, decay=decay)
    given = arguments(case)
    segments = jnp.array([lengths((0, 3), (7, 20), (3, 41), (0, 6), (9, 22), (0, 8))], jnp.int32)
    o, final = op(case, "xla")(**given, segment_ids=segments)
    for start, stop in ((3, 23), (23, 64), (70, 92)):
        tokens = {name: x if x is None else x[:, start:stop] for name, x in given.items()}
        alone, state = op(case, "ref")(**tokens)
        assert relative_error(o[:, start:stop], alone) < 1e-6
    assert relative_error(final, state) < 1e-6


def test_bf16_error_is_that_of_its_inputs():
    """Rounding operands of products doubles, at most, what rounding the results costs: 0.0017."""
    for decay in ("scalar", "vector"):
        case = Case(B=1, T=256, K=32, V=32, decay=decay, dtype="bfloat16")
        worst = errors(op(case, "ref"), op(case, "xla"), arguments(case))
        tokens = max(worst[name] for name in ("d_q", "d_k", "d_v"))
        assert worst["o"] < 0.003 and tokens < 0.0039 and max(worst.values()) < 0.007, worst


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_states_are_summed_and_decayed_in_fp32(decay):
    """Of bf16 tokens; a chunk takes less than half a bf16 digit, and all of them nine percent."""
    case = Case(B=1, T=4096, H=1, N=1, K=4, V=4, decay=decay, log_decay=-2.3e-5, constant=True,
                dtype="bfloat16")  # fmt: skip
    given = arguments(case, initial_state=jnp.ones((1, 1, 4, 4)))
    silent = given | {"q": jnp.ones_like(given["q"]), "k": jnp.zeros_like(given["k"])}
    o, state = op(case, "xla")(**silent)
    assert relative_error(state, np.exp(-2.3e-5 * 4096) * np.ones((1, 1, 4, 4))) < 1e-5
    assert relative_error(o[:, -1].astype(jnp.float32), 0.5 * 4 * state[:, :, 0]) < 0.005
    if decay == "scalar":  # without a decay no operand is rounded
        sums = given | {"g": None}
        _, state = op(case, "xla")(**sums)
        assert relative_error(state, op(case, "ref")(**sums)[1]) < 1e-5


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_long_rows(decay):
    """64k tokens: decays that sum to -650000, finite and right to the end."""
    case = Case(B=1, T=2**16, H=1, N=1, K=2, V=2, decay=decay, log_decay=-20.0)
    worst = errors(op(case, "ref"), op(case, "xla"), arguments(case))
    assert max(worst.values()) < 1e-5, worst


def test_order_two_features_of_two_mamba():
    """K = d (d + 1) / 2 features and V = d + 1 values in fp32, and one chunk more."""
    case = Case(B=1, T=130, H=1, N=1, K=300, V=25, initial_state=True)
    worst = errors(op(case, "ref"), op(case, "xla"), arguments(case))
    assert max(worst.values()) < 1e-5, worst


def test_large_decays_beside_small_ones_lose_no_digits():
    """Differences of cumulated decays are as exact as if the large ones were not there."""
    case = Case(B=1, T=128, H=1, N=1, log_decay=-0.01)
    given = arguments(case)
    given["g"] = given["g"].at[:, ::9].set(-90.0)
    worst = errors(op(case, "ref"), op(case, "xla"), given)
    assert max(worst.values()) < 3e-6, worst


def test_decays_of_minus_infinity_forget():
    """As does a new document; gradients stay finite."""
    case = Case(B=1, T=40)
    given = arguments(case)
    given["g"] = given["g"].at[:, 20].set(-jnp.inf)
    o, _ = op(case, "xla")(**given)
    segments = jnp.array([lengths((1, 20), (2, 20))], jnp.int32)
    packed, _ = op(case, "ref")(**given, segment_ids=segments)
    assert relative_error(o, packed) < 1e-6
    loss = jax.jit(lambda g: op(case, "xla")(**given | {"g": g})[0].sum())
    gradient = jax.grad(loss)(given["g"])
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_memory_is_linear_in_the_tokens(decay):
    """Forward and backward: twice the tokens, no more than twice the buffers; nothing [T, T]."""

    def temporary_bytes(T):
        case = Case(B=1, T=T, H=1, N=2, K=16, V=16, decay=decay)
        loss = lambda given: op(case, "xla")(**given)[0].sum()  # noqa: E731
        given = {name: x for name, x in arguments(case).items() if x is not None}
        given |= {"initial_state": jnp.zeros((1, 2, 16, 16))}
        shapes = jax.eval_shape(lambda: given)
        compiled = jax.jit(jax.grad(loss)).lower(shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(2048), temporary_bytes(4096)
    inputs = 4 * 4096 * 16 * (2 + 2)  # q, k and v
    assert long < 2.1 * short and long < 60 * inputs


def test_auto_takes_one_step_for_one_token():
    """Decoding is token by token, the rest in chunks."""
    assert explain(*(arguments(Case(T=1))[name] for name in "qkvg")).name == "ref"
    assert explain(*(arguments(Case(T=9))[name] for name in "qkvg")).name == "xla"


WRONG = {
    "no tokens": ({"T": 0}, {}, "no tokens"),
    "value heads": ({"H": 2, "N": 3}, {}, "3 value heads cannot share 2 key heads"),
    "gate": ({}, {"g": jnp.zeros((2, 40, 2, 3))}, r"must be \(2, 40, 2\), or \(2, 40, 2, 8\)"),
    "growth": ({}, {"g": jnp.full((2, 40, 2), 0.5)}, "has a value of 0.5; it must be at most 0"),
    "nan": ({}, {"g": jnp.full((2, 40, 2), jnp.nan)}, "value of nan; it must be at most 0"),
    "state": ({}, {"initial_state": jnp.zeros((2, 2, 8, 8))}, r"must be \(2, 2, 8, 12\)"),
    "segments": ({}, {"segment_ids": jnp.ones((2, 39), jnp.int32)}, r"must be \(2, 40\)"),
    "nan of numpy": ({}, {"g": np.full((2, 40, 2), np.nan, np.float32)}, "value of nan"),
    "no features": ({"K": 0}, {}, r"q \(2, 40, 2, 0\) and v .* must be at least 1"),
    "no heads": ({"N": 0}, {}, r"v \(2, 40, 0, 12\) are empty"),
    "axes": ({}, {"v": jnp.zeros((2, 40, 24))}, r"v \(2, 40, 24\) do not fit; .* \[B, T, N, V\]"),
    "dtypes": ({}, {"v": jnp.zeros((2, 40, 2, 12), jnp.bfloat16)}, "one floating-point dtype"),
    "integers": ({"dtype": "int32"}, {}, "int32 and int32; cast them to one floating-point dtype"),
    "platform": (
        {},
        {"implementation": "mosaic_tpu"},
        r"'mosaic_tpu' cannot run: it needs tpu \(this is cpu\); can run here: xla, ref",
    ),
    "name": ({}, {"implementation": "triton"}, "unknown implementation 'triton'; allowed: 'auto'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_one_clear_line(name):
    sizes, changes, message = WRONG[name]
    with pytest.raises(ValueError, match=message) as error:
        explain(**arguments(Case(**sizes)) | changes)
    assert "\n" not in str(error.value)


def test_decays_known_while_tracing_are_checked_too():
    given = arguments(Case())
    grows = jnp.full_like(given["g"], 0.5)

    def choose(g):
        return jax.jit(lambda q, k, v: explain(q, k, v, g).name and q)(*(given[x] for x in "qkv"))

    choose(given["g"])
    with pytest.raises(ValueError, match="must be at most 0"):
        choose(grows)
