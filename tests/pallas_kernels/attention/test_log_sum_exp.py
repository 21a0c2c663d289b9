"""The log-sum-exp as an output, and the backward pass over a part of the keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm import masks
from pallas_kernels._core import compat
from pallas_kernels._core.testing import relative_error
from pallas_kernels.attention import Mask, attention, cudnn, gradients, ref, splash, xla

SEGMENTS = jnp.array([[1] * 10 + [2] * 20 + [0] * 7, [1] * 5 + [0] * 3 + [2] * 29], jnp.int32)
CASES = {
    "causal": (masks.Causal().lower(), None),
    "segments_capped": ((masks.Causal() & masks.Segments(SEGMENTS)).lower(), 1.5),
    "nothing_allowed": (Mask(terms=()), None),
}
IMPLEMENTATIONS = {
    "ref": ref.attention,
    "panels": functools.partial(xla.attention, chunks=(16, None)),
    "tiles": functools.partial(xla.attention, chunks=(16, 8)),
}


def inputs(B=2, T=37, N=4, K=2, H=8):
    keys = jax.random.split(jax.random.key(0), 6)
    q, d_out = (jax.random.normal(key, (B, T, N, H)) for key in keys[:2])
    k, v = (jax.random.normal(key, (B, T, K, H)) for key in keys[2:4])
    return q, k, v, jax.random.normal(keys[4], (N,)), d_out, jax.random.normal(keys[5], (B, T, N))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_both_outputs_and_their_gradients(case, name):
    """Against a dense computation in which autodiff sees every step."""
    mask, soft_cap = CASES[case]
    *arrays, d_out, d_lse = inputs()
    allowed = jnp.broadcast_to(mask.dense(37, 37), (2, 37, 37))[:, None]

    def dense(q, k, v, sinks):
        k, v = (jnp.repeat(array, 2, axis=2) for array in (k, v))
        logits = 0.4 * jnp.einsum("btnh,bsnh->bnts", q, k)
        logits = logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
        weights = jnp.where(allowed, jnp.exp(logits), 0.0)
        total = weights.sum(axis=-1) + jnp.exp(sinks)[None, :, None]
        out = jnp.einsum("bnts,bsnh->btnh", weights / total[..., None], v)
        return out, jnp.swapaxes(jnp.log(total), 1, 2)

    def run(q, k, v, sinks):
        return IMPLEMENTATIONS[name](
            q, k, v, mask=mask, scale=0.4, soft_cap=soft_cap, sinks=sinks, return_log_sum_exp=True
        )

    @functools.partial(jax.jit, static_argnums=0)
    def both(function, arrays):
        outputs, pull = jax.vjp(function, *arrays)
        return *outputs, *pull((d_out, d_lse))

    for actual, expected in zip(both(run, arrays), both(dense, arrays), strict=True):
        assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("implementation", ["ref", "xla"])
def test_rows_without_keys(implementation):
    """-inf, and zeros for gradients although a cotangent of theirs is given."""
    mask = masks.Segments(jnp.array([[1] * 4 + [0] * 4], jnp.int32)).lower()
    q, k, v, _, d_out, d_lse = inputs(B=1, T=8)
    run = functools.partial(
        attention, mask=mask, return_log_sum_exp=True, implementation=implementation
    )
    (out, lse), pull = jax.vjp(run, q, k, v)
    assert (lse[:, 4:] == -jnp.inf).all() and jnp.isfinite(lse[:, :4]).all()
    np.testing.assert_array_equal(out[:, 4:], 0)
    of_part = gradients(q, k, v, out, lse, d_out, mask=mask, implementation=implementation)
    for gradient in (*pull((d_out, d_lse)), *of_part):
        np.testing.assert_array_equal(gradient[:, 4:], 0)
        assert jnp.isfinite(gradient).all()


def parts_of(function, mask, q, k, v, d_out, **options):
    """Gradients from two parts of the keys, which the reference's whole output joins."""
    out, lse = ref.attention(q, k, v, mask=mask, **options, return_log_sum_exp=True)
    split = k.shape[1] // 3
    dq, dk, dv = 0.0, [], []
    for cut in (slice(0, split), slice(split, None)):
        part = mask.with_indices(q.shape[1], k.shape[1])
        part = part.slice(lambda a: a, functools.partial(lambda cut, a: a[:, cut], cut))
        found = function(q, k[:, cut], v[:, cut], out, lse, d_out, mask=part, **options)
        dq, dk, dv = dq + found[0], [*dk, found[1]], [*dv, found[2]]
    return dq, jnp.concatenate(dk, axis=1), jnp.concatenate(dv, axis=1)


@pytest.mark.parametrize("function", [ref.gradients, xla.gradients])
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_parts_add_up(case, function):
    mask, soft_cap = CASES[case]
    q, k, v, _, d_out, _ = inputs()
    options = {"mask": mask, "scale": 0.4, "soft_cap": soft_cap}
    _, pull = jax.vjp(functools.partial(ref.attention, **options), q, k, v)
    found = parts_of(function, options.pop("mask"), q, k, v, d_out, **options)
    for actual, expected in zip(found, pull(d_out), strict=True):
        assert actual.dtype == jnp.float32
        assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("segments", [False, True])
def test_splash_in_interpret_mode(segments):
    """Odd length, grouped queries; a part whose rows are partly empty."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, d_out = (jax.random.normal(key, (1, 130, 2, 64)) for key in keys[:2])
    k, v = (jax.random.normal(key, (1, 130, 1, 64)) for key in keys[2:])
    mask = masks.Causal()
    if segments:
        mask = mask & masks.Segments(jnp.array([[1] * 60 + [2] * 60 + [0] * 10], jnp.int32))
    options = {"mask": mask.lower(), "scale": 0.1, "soft_cap": 3.0}
    expected = ref.attention(q, k, v, **options, return_log_sum_exp=True)
    actual = splash.attention(q, k, v, **options, return_log_sum_exp=True, interpret=True)
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-5, atol=1e-5)
    assert relative_error(actual[0], expected[0]) < 1e-5
    whole = (expected[0] * 0.5, expected[1] + jnp.log(2.0))  # as if other keys had half the weight
    found = splash.gradients(q, k, v, *whole, d_out, **options, interpret=True)
    for a, b in zip(found, ref.gradients(q, k, v, *whole, d_out, **options), strict=True):
        assert relative_error(a, b) < 1e-4


@pytest.mark.parametrize("mask", [masks.Causal(), masks.Segments(jnp.ones((2, 64), jnp.int32))])
def test_cudnn_backward_can_be_bound_in_this_version_of_jax(mask):
    """Shapes only: the kernel itself needs a GPU."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    q, k = shape((2, 64, 4, 64)), shape((2, 64, 2, 64))
    lse = jax.ShapeDtypeStruct((2, 64, 4), jnp.float32)
    run = functools.partial(cudnn.gradients, mask=mask.lower(), scale=0.1)
    dq, dk, dv = jax.eval_shape(run, q, k, k, q, lse, q)
    assert dq.shape == q.shape and dk.shape == dv.shape == k.shape and dq.dtype == jnp.float32


def test_the_log_sum_exp_of_cudnn_refuses_a_gradient(monkeypatch):
    """JAX's binding would drop it in silence."""

    def kernel(q, k, v, mask, scale, causal, window):
        return ref.attention(q, k, v, mask=Mask(), scale=scale, return_log_sum_exp=True)

    monkeypatch.setattr(compat, "cudnn_attention", kernel)
    q, k, v, *_ = inputs()
    run = functools.partial(cudnn.attention, mask=Mask(), scale=1.0, return_log_sum_exp=True)
    assert jnp.isfinite(jax.grad(lambda q: run(q, k, v)[0].sum())(q)).all()
    with pytest.raises(ValueError, match="'cudnn' has no gradient of the log-sum-exp"):
        jax.grad(lambda q: run(q, k, v)[1].sum())(q)
