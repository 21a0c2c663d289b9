"""The gated delta rule: the chunk form against the recurrence, and what the rule promises."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrence_cases import CASES, Case, errors, lengths

from pallas_kernels import gated_delta_rule, gated_linear_attention
from pallas_kernels._core import recurrence
from pallas_kernels._core.testing import relative_error
from pallas_kernels.gated_delta_rule import bench, explain, ref, xla


def inner(function, case: Case, **options):
    """An implementation with what the API would hand it for `case`."""
    documents = None if case.segments is None else recurrence.documents(case.segment_ids)
    return functools.partial(function, scale=0.5, documents=documents, **options)


@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
def test_masked_quadratic_form(decay):
    """o = (q k^T) U and U = (1 + strictly lower(beta k k^T))^-1 beta (v - k S), in float64."""
    case = Case(T=37, H=1, N=2, K=5, V=3, decay=decay, cosine=0.5, initial_state=True)
    arguments = case.arguments()
    o, state = run(arguments)
    given = {n: None if x is None else np.asarray(x, np.float64) for n, x in arguments.items()}
    B, T, N, K = case.B, case.T, case.N, case.K
    g = np.zeros((B, T, N, 1)) if decay == "none" else given["g"].reshape(B, T, N, -1)
    total = np.cumsum(g, axis=1) + np.zeros((B, T, N, K))
    q, k = given["q"][:, :, 0], given["k"][:, :, 0]  # one head, which both value heads share
    for b, n in np.ndindex(B, N):
        G, beta = total[b, :, n], given["beta"][b, :, n, None]
        pair = np.exp(np.minimum(G[:, None] - G[None], 0.0))  # [i, j, K]
        on_keys = np.tril(np.einsum("ik,jk,ijk->ij", k[b], k[b], pair), -1)
        on_queries = np.tril(np.einsum("ik,jk,ijk->ij", q[b], k[b], pair))
        start = given["initial_state"][b, n]
        error = beta * (given["v"][b, :, n] - (np.exp(G) * k[b]) @ start)
        written = np.linalg.solve(np.eye(T) + beta * on_keys, error)
        expected = (on_queries @ written + (np.exp(G) * q[b]) @ start) / np.sqrt(K)
        assert relative_error(o[b, :, n], expected) < 1e-5
        end = np.exp(G[-1])[:, None] * start + (np.exp(G[-1] - G) * k[b]).T @ written
        assert relative_error(state[b, n], end) < 1e-5


# What these ask for, others of the cases ask for along with something else.
PLAIN = {"scalar", "vector", "none", "packed", "hardly_forgets", "equal_keys_no_decay"}


@pytest.mark.parametrize("name", [name for name in CASES if name not in PLAIN])
def test_chunks_are_the_recurrence(name):
    case = CASES[name]
    found = errors(
        inner(ref.gated_delta_rule, case),
        inner(xla.gated_delta_rule, case, chunk_size=16 if case.T > 16 else 64),
        case.arguments(),
    )
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize(("decay", "size"), [("scalar", 32), ("scalar", 128), ("vector", 64)])
def test_chunks_of_any_size_are_the_recurrence(decay, size):
    """Also where weak decays stand after strong ones, whose sum takes no digits from theirs."""
    case = Case(B=1, T=150, H=1, N=1, K=16, decay=decay, initial_state=True)
    arguments = case.arguments()
    strong = jnp.arange(case.T).reshape(1, -1, *[1] * (arguments["g"].ndim - 2)) % 30 < 20
    arguments["g"] = jnp.where(strong, -50.0, 0.1 * arguments["g"])
    found = errors(
        inner(ref.gated_delta_rule, case),
        inner(xla.gated_delta_rule, case, chunk_size=size),
        arguments,
    )
    assert max(found.values()) < 1e-5, found


def test_decay_of_zero_forgets_all():
    """A logarithm of minus infinity, whose differences would be no numbers."""
    case = Case(B=1, T=48, H=1, N=1, initial_state=True)
    arguments = case.arguments()
    arguments["g"] = jnp.where(jnp.arange(48)[None, :, None] % 9 == 4, -jnp.inf, arguments["g"])
    found = errors(inner(ref.gated_delta_rule, case), inner(xla.gated_delta_rule, case), arguments)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
def test_bf16_errs_as_much_as_its_inputs_are_rounded(decay):
    """Against fp32 of the same inputs: in values about the unit roundoff, 2^-8."""
    case = Case(T=100, K=32, V=32, decay=decay, dtype="bfloat16", initial_state=True)
    found = errors(
        inner(ref.gated_delta_rule, case), inner(xla.gated_delta_rule, case), case.arguments()
    )
    assert max(found["o"], found["final_state"]) < 0.005, found
    assert max(found.values()) < 0.008, found


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_states_decay_in_fp32(decay):
    """Of bf16 tokens; a chunk takes less than half a bf16 digit, and all of them nine percent."""
    case = Case(B=1, T=4096, H=1, N=1, K=4, V=4, decay=decay, log_decay=-2.3e-5, constant=True,
                beta=0.0, dtype="bfloat16")  # fmt: skip
    arguments = case.arguments() | {"initial_state": jnp.ones((1, 1, 4, 4))}
    o, state = run(arguments | {"q": jnp.ones_like(arguments["q"])})
    assert relative_error(state, np.exp(-2.3e-5 * 4096) * np.ones((1, 1, 4, 4))) < 1e-5
    assert relative_error(o[:, -1].astype(jnp.float32), 0.5 * 4 * state[:, :, 0]) < 0.005


@functools.partial(jax.jit, static_argnames="implementation")
def run(arguments: dict, implementation="xla", segment_ids=None):
    """(o, final state) of the public function."""
    return gated_delta_rule(
        **arguments,
        segment_ids=segment_ids,
        output_final_state=True,
        implementation=implementation,
    )


def cut(arguments: dict, start: int, stop: int | None, state) -> dict:
    """The arguments of some of the tokens, after `state`."""
    part = {name: x[:, start:stop] for name, x in arguments.items() if name != "initial_state"}
    return part | {"initial_state": state}


@pytest.mark.parametrize("implementation", ["ref", "xla"])
def test_halves_with_the_state_handed_over_are_the_whole(implementation):
    arguments = Case(T=30, decay="vector", initial_state=True).arguments()
    o, state = run(arguments, implementation)
    first, between = run(cut(arguments, 0, 13, arguments["initial_state"]), implementation)
    second, end = run(cut(arguments, 13, None, between), implementation)
    assert relative_error(jnp.concatenate([first, second], axis=1), o) < 1e-5
    assert relative_error(end, state) < 1e-5


def test_decoding_token_by_token_is_the_whole():
    """By "auto", which takes chunks for the prompt and single steps after it."""
    arguments = Case(T=24, initial_state=True).arguments()
    o, state = run(arguments)
    prompt, carried = run(cut(arguments, 0, 20, arguments["initial_state"]), "auto")
    outputs = [prompt]
    for token in range(20, 24):
        out, carried = run(cut(arguments, token, token + 1, carried), "auto")
        outputs.append(out)
    assert relative_error(jnp.concatenate(outputs, axis=1), o) < 1e-5
    assert relative_error(carried, state) < 1e-5


@pytest.mark.parametrize("implementation", ["ref", "xla"])
def test_packed_documents_are_separate_ones(implementation):
    case = Case(B=1, T=40, segments=lengths((0, 3), (1, 14), (2, 1), (1, 19), (0, 3)))
    arguments = case.arguments()
    o, state = run(arguments, implementation, case.segment_ids)
    for start, stop in ((3, 17), (17, 18), (18, 37)):
        alone, end = run(cut(arguments, start, stop, None), implementation)
        assert relative_error(o[:, start:stop], alone) < 1e-5
    assert relative_error(state, end) < 1e-5


class TestReductions:
    """Decays of each key feature, of each head and none are one rule."""

    case = Case(T=40, decay="scalar", initial_state=True)

    def test_vector_of_equal_decays_is_scalar(self):
        arguments = self.case.arguments()
        vector = jnp.broadcast_to(arguments["g"][..., None], (*arguments["g"].shape, self.case.K))
        for left, right in zip(run(arguments), run(arguments | {"g": vector}), strict=True):
            assert relative_error(left, right) < 1e-5

    def test_decay_of_one_is_none(self):
        arguments = self.case.arguments()
        none = run(arguments | {"g": None})
        for left, right in zip(run(arguments | {"g": 0 * arguments["g"]}), none, strict=True):
            assert relative_error(left, right) < 1e-6

    @pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
    def test_orthogonal_keys_make_it_linear_attention(self, decay):
        """Nothing is stored under a key before it comes, so that there is nothing to replace."""
        arguments = Case(B=1, T=8, K=8, decay=decay).arguments()
        arguments["k"] = jnp.broadcast_to(jnp.eye(8)[None, :, None], (1, 8, 2, 8))
        found = run(arguments)
        beta = arguments.pop("beta")
        arguments["v"] = beta[..., None] * arguments["v"]
        expected = gated_linear_attention(**arguments, output_final_state=True)
        for left, right in zip(found, expected, strict=True):
            assert relative_error(left, right) < 1e-5


def test_each_token_is_a_step_down_the_error_of_its_value():
    """S - beta d/dS |S^T k - v|^2 / 2 after the decay; beta = 1 / |k|^2 leaves no error."""
    arguments = Case(B=1, T=9, H=1, N=1, decay="scalar", initial_state=True).arguments()
    size = jnp.linspace(0.5, 2.0, 9)[None, :, None]
    arguments |= {"k": size[..., None] * arguments["k"], "beta": arguments["beta"] / size**2}
    arguments["beta"] = arguments["beta"].at[:, 8].set(1.0 / size[:, 8] ** 2)
    _, found = run(arguments)

    def half_square(state, k, v):
        return 0.5 * jnp.sum((k @ state - v) ** 2)

    state = arguments["initial_state"][0, 0]
    for t in range(9):
        k, v, g, beta = (arguments[name][0, t, 0] for name in ("k", "v", "g", "beta"))
        state = jnp.exp(g) * state
        state = state - beta * jax.grad(half_square)(state, k, v)
    assert relative_error(found[0, 0], state) < 1e-5
    assert half_square(state, k, v) < 1e-10


def test_last_value_of_each_key_is_looked_up():
    """With beta = 1 and no decay, a write replaces what the key had: a dictionary."""
    places = jnp.array([3, 1, 3, 0, 1, 3, 2, 0, 0, 1, 3, 1] * 4)
    keys = jnp.eye(4)[places][None, :, None]
    values = jax.random.normal(jax.random.key(0), (1, 48, 1, 5))
    o, state = gated_delta_rule(
        keys, keys, values, None, jnp.ones((1, 48, 1)), scale=1.0, output_final_state=True,
        implementation="xla",
    )  # fmt: skip
    assert relative_error(o, values) < 1e-5
    last = [int(jnp.max(jnp.where(places == key, jnp.arange(48), -1))) for key in range(4)]
    assert relative_error(state[0, 0], values[0, jnp.array(last), 0]) < 1e-5


def test_what_is_written_is_read_and_what_is_stored_never_grows():
    """At strength 1 a key gives its value whatever was stored; at 2, writing 0 reflects states."""
    arguments = Case(B=2, T=40, H=1, N=1, cosine=0.3, initial_state=True).arguments()
    strength = jnp.array([1.0, 2.0])[:, None, None]
    o, state = run(
        arguments
        | {
            "q": arguments["k"],
            "v": arguments["v"] * (2.0 - strength[..., None]),
            "g": arguments["g"] * (2.0 - strength),
            "beta": jnp.broadcast_to(strength, arguments["beta"].shape),
        }
    )
    assert relative_error(o[0] * 8**0.5, arguments["v"][0]) < 1e-5
    norm = jnp.linalg.norm(arguments["initial_state"][1])
    assert abs(jnp.linalg.norm(state[1]) / norm - 1) < 1e-5


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_long_rows_stay_finite(decay):
    """64k tokens, with all decays from 1 to exp(-30)."""
    case = Case(B=1, T=2**16, H=1, N=1, K=4, V=4, decay=decay, log_decay=-30.0)
    arguments = case.arguments()
    odd = jnp.arange(case.T).reshape(1, -1, *[1] * (arguments["g"].ndim - 2)) % 3 == 1
    arguments["g"] = jnp.where(odd, 0.0, arguments["g"])

    def loss(given):
        o, state = run(given)
        return jnp.sum(o**2) + jnp.sum(state)

    given = {name: x for name, x in arguments.items() if x is not None}
    gradients = jax.jit(jax.grad(loss))(given | {"initial_state": jnp.ones((1, 1, 4, 4))})
    for name, x in gradients.items():
        assert jnp.isfinite(x).all(), name


def test_memory_is_linear_in_length():
    """No array of the program, forward and backward, grows faster than the inputs."""

    def largest(T):
        shapes = Case(B=1, T=T, H=1, N=1, K=16, V=16, initial_state=True).arguments()
        grad = jax.grad(lambda given: jnp.sum(run(given)[0]))
        compiled = jax.jit(grad).lower(shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert largest(8192) < 2.05 * largest(4096)


def test_vmap_is_a_loop():
    arguments = Case(T=20).arguments()
    del arguments["initial_state"]
    function = lambda given: gated_delta_rule(**given, implementation="xla")[0]  # noqa: E731
    stacked = {name: jnp.stack([x, x[::-1]]) for name, x in arguments.items()}
    mapped = jax.jit(jax.vmap(function))(stacked)
    alone = jax.jit(function)(arguments)
    assert relative_error(mapped[0], alone) < 1e-6
    assert relative_error(mapped[1], alone[::-1]) < 1e-6


def test_heads_on_several_devices_are_those_of_one():
    arguments = Case(T=20, H=4, N=8, initial_state=True).arguments()
    mesh = jax.make_mesh((4,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    heads = {name: jax.P(None, None, "heads") for name in arguments}
    heads["initial_state"] = jax.P(None, "heads")
    spread = jax.shard_map(
        run, mesh=mesh, in_specs=(heads,), check_vma=False,
        out_specs=(jax.P(None, None, "heads"), jax.P(None, "heads")),
    )  # fmt: skip
    for several, one in zip(spread(arguments), run(arguments), strict=True):
        assert relative_error(several, one) < 1e-6


BAD = {
    "T = 0": ({"T": 0}, {}, "no tokens"),
    "state": ({}, {"initial_state": jnp.zeros((2, 2, 12, 8))}, r"must be \(2, 2, 8, 12\)"),
    "positive decay": ({}, {"g": jnp.full((2, 40, 2), 0.5)}, "must be at most 0"),
    "NaN decay": ({}, {"g": jnp.full((2, 40, 2), jnp.nan)}, "not NaN"),
    "decay of the keys' heads": ({"N": 4}, {"g": jnp.zeros((2, 40, 2))}, "log decay g has shape"),
    "beta": ({}, {"beta": jnp.zeros((2, 40))}, "beta has shape"),
    "heads": ({"H": 4, "N": 6}, {}, "cannot share 4 key heads"),
    "dtypes": ({}, {"v": jnp.zeros((2, 40, 2, 12), jnp.bfloat16)}, "one floating-point dtype"),
    "a list": ({}, {"g": [[[-1.0]]]}, r"g must be an array, .* it is \[\[\[-1.0\]\]\]"),
    "no beta": ({}, {"beta": None}, "beta must be an array, as of jnp.asarray; it is None"),
    "no query": ({}, {"q": None}, "q must be an array"),
    "complex decay": ({}, {"g": jnp.zeros((2, 40, 2), complex)}, "g has dtype complex64; cast it"),
    "integer state": ({}, {"initial_state": jnp.zeros((2, 2, 8, 12), int)}, "dtype int32; cast it"),
    "fractions": ({}, {"segment_ids": jnp.ones((2, 40))}, "float32; cast it to integers"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told(name):
    sizes, changes, message = BAD[name]
    arguments = Case(**sizes).arguments() | changes
    with pytest.raises(ValueError, match=message) as error:
        jax.block_until_ready(explain(**arguments))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scale", ["x", jnp.ones((2, 2)), float("nan"), "traced"])
def test_scale_is_a_number_that_is_known(scale):
    assert recurrence.number("op", None, 4) == recurrence.number("op", np.float32(0.5), 3) == 0.5
    with pytest.raises(ValueError, match=r"scale must be one finite .* multiply q") as error:
        if isinstance(scale, str) and scale == "traced":
            jax.jit(lambda scale: recurrence.number("op", scale, 4))(1.0)
        recurrence.number("op", scale, 4)
    assert "\n" not in str(error.value)


def test_arrays_of_numpy_are_taken_in_a_dtype_that_jax_has(recwarn):
    """Also as "auto" sees them: float64 is float32 where it is not enabled."""
    given = Case(T=12).arguments()
    wide = given | {name: np.asarray(given[name], np.float64) for name in "qkv"}
    o, _ = inspect.unwrap(gated_delta_rule)(**wide)  # tests alone insist on arrays of JAX
    assert relative_error(o, gated_delta_rule(**given)[0]) < 1e-6 and not recwarn.list
    q, v, g = (wide[name] for name in "qvg")
    assert recurrence.facts(q, v, g, None).dtype == "float32"


def test_auto_takes_single_steps_for_a_token_and_chunks_for_many():
    name = lambda T: explain(**Case(T=T).arguments()).name  # noqa: E731
    assert (name(1), name(8), name(9), name(40)) == ("ref", "ref", "xla", "xla")


def test_benchmark_compares_with_the_reference():
    case = next(case for case in bench.CASES if case.name == "one_row_cpu")
    passes, expected = (
        bench.passes(case, bench.contestants(case)["ours:auto"]),
        bench.expected(case),
    )
    for label, one in passes.items():
        actual = jax.tree.leaves(one.compared(*one.arguments))
        for left, right in zip(actual, jax.tree.leaves(expected[label]), strict=True):
            assert relative_error(left, right) < 1e-5
