"""Second-order attention: its forms agree, and have the properties of 2Mamba."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import second_order_attention
from pallas_kernels._core.recurrence import documents
from pallas_kernels._core.testing import errors_against
from pallas_kernels.second_order_attention import chunks, explain, recurrent, ref, rows
from pallas_kernels.second_order_attention.terms import SMALLEST_SUM, feature_count, features

NAMES = ("xla_rows", "xla_chunks", "xla_recurrent")
FORMS = {
    "direct": ref.second_order_attention,
    "recurrent": recurrent.second_order_attention,
    "chunks_5": functools.partial(chunks.second_order_attention, chunk_size=5),
    "chunks_64": functools.partial(chunks.second_order_attention, chunk_size=64),
}


def make(rng, B=2, T=37, H=2, N=2, K=6, V=5, dtype=np.float32):
    """q, k, v, g: some heads forget nearly at once, others nearly nothing."""
    q, k = rng.normal(size=(2, B, T, H, K))
    v = rng.normal(size=(B, T, N, V))
    g = -np.exp(rng.uniform(-8, 3, size=(B, T, N)))
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v, g))


SEGMENTS = np.array([[0] * 3 + [1] * 20 + [2] * 4 + [0] * 4 + [3] * 6, [7] * 36 + [0]], np.int32)


def test_features_square_the_product(rng):
    with jax.enable_x64(True):
        x, y = jnp.asarray(rng.normal(size=(2, 3, 7)))
        np.testing.assert_allclose((features(x) * features(y)).sum(-1), (x * y).sum(-1) ** 2)
        assert features(x).shape[-1] == feature_count(7) == 28
        weight = jnp.asarray(rng.normal(size=(3, 28)))
        found = jax.grad(lambda x: jnp.sum(features(x) * weight))(x)
        step = 1e-6 * jnp.eye(7)
        plus, minus = (features(x[:, None] + s * step[None]) for s in (1, -1))
        np.testing.assert_allclose(found, ((plus - minus) @ weight[..., None])[..., 0] / 2e-6,
                                   rtol=1e-6, atol=1e-7)  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
def test_forms_agree_in_float64(rng, packed):
    with jax.enable_x64(True):
        arrays = make(rng, dtype=np.float64)
        state = jnp.asarray(rng.normal(size=(2, 2, 21, 6)) ** 2)
        given = {
            "scale": 0.4, "initial_state": state,
            "documents": documents(jnp.asarray(SEGMENTS)) if packed else None,
        }  # fmt: skip
        expected = ref.second_order_attention(*arrays, **given)
        for name, form in FORMS.items():
            for found, wanted in zip(form(*arrays, **given), expected, strict=True):
                np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-10, err_msg=name)
        given |= {"initial_state": None}
        found, _ = rows.second_order_attention(*arrays, **given)
        wanted, _ = ref.second_order_attention(*arrays, **given)
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_equal_the_reference(rng, name, dtype):
    q, k, v, g = make(rng, T=150, N=4)
    segments = jnp.asarray(np.repeat(SEGMENTS, 5, axis=1)[:, :150])
    arguments = {"q": q, "k": k, "v": v}
    arguments = {n: x.astype(dtype) for n, x in arguments.items()} | {"g": g}

    def function(implementation):
        def run(g, **given):
            given |= {"segment_ids": segments, "implementation": implementation}
            return second_order_attention(g=-jnp.abs(g), **given)[0]

        return run

    cotangent = jnp.asarray(rng.normal(size=v.shape), jnp.float32)
    errors = errors_against(function("ref"), function(name), arguments, cotangent)
    # Where all weights of a row are small, gradients divide rounding errors by their sum.
    limits = (1e-5, 1e-4) if dtype == "float32" else (5e-3, 1e-2)
    assert errors.pop("out") < limits[0] and max(errors.values()) < limits[1], errors


@pytest.mark.parametrize("name", ["xla_chunks", "xla_recurrent"])
def test_states_and_what_is_read_from_them_are_fp32_for_bf16_tokens(rng, name):
    *tokens, g = make(rng, T=150)
    q, k, v = (x.astype(jnp.bfloat16) for x in tokens)

    def run(name, *arrays, state=None):
        return second_order_attention(
            *arrays, initial_state=state, output_final_state=True, implementation=name
        )

    _, wanted = run("ref", q, k, v, g)
    _, state = run(name, q, k, v, g)
    np.testing.assert_allclose(state, wanted, rtol=1e-4, atol=1e-5)
    # Keys of zero leave the state alone, and its sums are rounded once, as o.
    silent = (q, jnp.zeros_like(k), v, 1e-3 * g)
    found, wanted = (run(one, *silent, state=wanted)[0] for one in (name, "ref"))
    assert np.mean(found != wanted) < 0.05
    # A chunk takes less than half a bf16 digit of a state, and all of them nine percent.
    zeros = jnp.zeros((1, 4096, 1, 2), jnp.bfloat16)
    g = jnp.full(zeros.shape[:3], -2.3e-5)
    _, state = run(name, zeros, zeros, zeros, g, state=jnp.ones((1, 1, 3, 3)))
    np.testing.assert_allclose(state, np.full(state.shape, np.exp(-2.3e-5 * 4096)), rtol=2e-4)


def test_small_decays_keep_their_digits_beside_large_ones(rng):
    """Half of the tokens forget everything; the others, nearly nothing."""
    q, k, v, g = make(rng, B=1, T=300, K=32)
    g = jnp.asarray(np.where(rng.random(g.shape) < 0.5, -100.0, -1e-3), jnp.float32)
    weight = jnp.cos(jnp.arange(v.size, dtype=jnp.float32)).reshape(v.shape)

    def outputs(name, *arrays):
        run = lambda g: second_order_attention(*arrays[:3], g, implementation=name)[0]  # noqa: E731
        out, pull = jax.vjp(run, arrays[3])
        return out, pull(weight.astype(out.dtype))[0]

    with jax.enable_x64(True):
        exact = outputs("ref", *(x.astype(jnp.float64) for x in (q, k, v, g)))
    for name in ("xla_rows", "xla_chunks"):
        for found, wanted in zip(outputs(name, q, k, v, g), exact, strict=True):
            error = np.linalg.norm(found - np.asarray(wanted)) / np.linalg.norm(wanted)
            assert error < 5e-6, (name, error)


def test_gradient_of_the_states(rng):
    q, k, v, g = make(rng)
    state = jnp.asarray(rng.normal(size=(2, 2, 21, 6)) ** 2, jnp.float32)
    weight = jnp.cos(jnp.arange(state.size, dtype=jnp.float32)).reshape(state.shape)

    def loss(name, state, k, g):
        _, final = second_order_attention(
            q, k, v, g, initial_state=state, output_final_state=True, implementation=name
        )
        return jnp.sum(final * weight)

    expected, *others = (
        jax.jit(jax.grad(functools.partial(loss, name), argnums=(0, 1, 2)))(state, k, g)
        for name in ("ref", "xla_chunks", "xla_recurrent")
    )
    for other in others:
        for found, wanted in zip(other, expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_rows_of_weights_are_averages(rng):
    q, k, v, g = make(rng)
    ones = second_order_attention(q, k, jnp.ones_like(v), g)[0]
    np.testing.assert_allclose(ones, 1.0, rtol=1e-5)
    out = second_order_attention(q, k, v, g)[0]
    assert np.all(out <= jax.lax.cummax(v, axis=1) + 1e-5)
    assert np.all(out >= jax.lax.cummin(v, axis=1) - 1e-5)


def test_scale_of_keys_cancels_and_scores_are_even(rng):
    q, k, v, g = make(rng)
    out = second_order_attention(q, k, v, g)[0]
    np.testing.assert_allclose(second_order_attention(q, 7.0 * k, v, g)[0], out, atol=2e-6)
    signs = jnp.asarray(rng.choice([-1.0, 1.0], size=(2, 37, 2, 1)), jnp.float32)
    np.testing.assert_allclose(second_order_attention(q * signs, k, v, g)[0], out, atol=1e-6)
    np.testing.assert_allclose(second_order_attention(q, k * signs, v, g)[0], out, atol=1e-6)


@pytest.mark.parametrize("name", ["ref", *NAMES])
def test_limits_of_the_decay(rng, name):
    q, k, v, g = make(rng)
    op = functools.partial(second_order_attention, implementation=name)
    for forgetting in (-1e4, -np.inf):
        out = op(q, k, v, jnp.full_like(g, forgetting))[0]
        np.testing.assert_allclose(out, v, rtol=1e-5, atol=1e-6)
    scores = jnp.square(jnp.einsum("bind,bjnd->bnij", q, k)) * jnp.tri(37)[None, None]
    weights = scores / jnp.sum(scores, axis=-1, keepdims=True)
    expected = jnp.einsum("bnij,bjnv->binv", weights, v)
    for without in (None, jnp.zeros_like(g)):
        np.testing.assert_allclose(op(q, k, v, without)[0], expected, rtol=1e-4, atol=1e-5)


def test_exponential_scores_without_decay_are_softmax_attention(rng):
    q, k, v, g = make(rng, T=140, V=6)
    attend = functools.partial(rows.decayed_attention, scale=0.5, documents=None)
    found = attend(q, k, v, None, score="exponential")
    np.testing.assert_allclose(
        found, jax.nn.dot_product_attention(q, k, v, scale=0.5, is_causal=True), atol=1e-5
    )
    # The sum of decays up to the query cancels, so the decay is a bias of the key.
    total = jnp.moveaxis(jnp.cumsum(g, axis=1), 1, 2)
    bias = total[..., None] - total[:, :, None]
    expected = jax.nn.dot_product_attention(q, k, v, bias, scale=0.5, is_causal=True)
    np.testing.assert_allclose(attend(q, k, v, g, score="exponential"), expected, atol=1e-4)


def test_gradient_of_the_decay_by_the_rows_of_weights(rng):
    """da = reverse cumsum of -(column sums of P (dP - delta)), whose row sums are 0."""
    with jax.enable_x64(True):
        q, k, v, g = make(rng, B=1, N=1, H=1, dtype=np.float64)
        cotangent = jnp.asarray(rng.normal(size=v.shape))
        found = jax.grad(lambda g: jnp.sum(second_order_attention(q, k, v, g)[0] * cotangent))(g)
        total = np.cumsum(np.asarray(g)[0, :, 0])
        scores = np.asarray(q[0, :, 0] @ k[0, :, 0].T) ** 2
        weights = np.tril(scores * np.exp(np.tril(total[:, None] - total[None])))
        weights /= weights.sum(1, keepdims=True)
        d_weights = np.asarray(cotangent[0, :, 0] @ v[0, :, 0].T)
        change = weights * (d_weights - (weights * d_weights).sum(1, keepdims=True))
        np.testing.assert_allclose(change.sum(1), 0.0, atol=1e-12)
        expected = np.cumsum(-change.sum(0)[::-1])[::-1]
        np.testing.assert_allclose(found[0, :, 0], expected, rtol=1e-8, atol=1e-10)


def test_keys_of_zero_give_zero_and_finite_gradients(rng):
    q, k, v, g = make(rng)
    for name in ("ref", *NAMES):
        op = functools.partial(second_order_attention, implementation=name)
        out, pull = jax.vjp(lambda k, op=op: op(q, k, v, g)[0], jnp.zeros_like(k))
        assert np.all(out == 0) and np.all(np.isfinite(pull(out + 1)[0]))


def test_sums_below_the_smallest_are_raised_to_it_in_every_form(rng):
    """A row of small weights fades to zero alike, and no form puts equal weights in its place."""
    q, k, v, g = make(rng)
    size = jnp.asarray(10.0 ** np.linspace(-5, -9, 37), jnp.float32)[None, :, None, None]
    scores = jnp.square(jnp.einsum("bind,bjnd->bnij", q, size * k) / 6**0.5)
    total = jnp.moveaxis(jnp.cumsum(g.astype(jnp.float32), axis=1), 1, 2)
    later = jnp.tri(37)[None, None] > 0
    gaps = jnp.where(later, total[..., None] - total[:, :, None], -jnp.inf)
    weights = scores * jnp.exp(gaps)
    sums = jnp.sum(weights, axis=-1, keepdims=True)
    expected = jnp.einsum("bnij,bjnv->binv", weights / jnp.maximum(sums, SMALLEST_SUM), v)
    assert np.mean(sums < 0.1 * SMALLEST_SUM) > 0.2 and np.mean(sums > SMALLEST_SUM) > 0.2
    for name in ("ref", *NAMES):
        found = second_order_attention(q, size * k, v, g, implementation=name)[0]
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4, err_msg=name)


def test_the_choice_is_by_length_and_states(rng):
    q, k, v, g = make(rng)
    assert explain(q, k, v, g).name == "xla_chunks"  # 37 tokens, 21 products
    assert explain(q[:, :21], k[:, :21], v[:, :21], g[:, :21]).name == "xla_rows"
    short = explain(q[:, :9], k[:, :9], v[:, :9], g[:, :9], output_final_state=True)
    assert short.name == "xla_chunks" and "no final state" in str(short)
    with pytest.raises(ValueError, match=r"must be \(2, 2, 21, 6\): a row for each product"):
        second_order_attention(q, k, v, g, initial_state=jnp.zeros((2, 2, 6, 5)))
    with pytest.raises(ValueError, match="at most 0"):
        second_order_attention(q, k, v, -g)
    with pytest.raises(ValueError, match=r"it must be \(2, 37, 2\)$"):  # no decay of each feature
        explain(q, k, v, jnp.zeros((2, 37, 2, 6)))
    with pytest.raises(ValueError, match="initial_state must be an array"):
        explain(q, k, v, g, initial_state=[0.0])


def test_no_pairs_of_all_tokens_are_kept():
    """Compiled temporaries of value and gradients grow linearly with T."""

    def temporaries(name, T):
        x = jax.ShapeDtypeStruct((1, T, 1, 8), jnp.float32)
        g = jax.ShapeDtypeStruct((1, T, 1), jnp.float32)
        op = functools.partial(second_order_attention, implementation=name)
        compiled = jax.jit(jax.grad(lambda *x: jnp.sum(op(*x)[0]))).lower(x, x, x, g).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    for name in ("xla_rows", "xla_chunks"):
        assert temporaries(name, 4096) < 2.3 * temporaries(name, 2048), name
