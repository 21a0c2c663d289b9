"""The short convolution: a plain loop over tokens gives the same, with documents and padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.mixers.short_convolution import init_state, short_convolution

ROWS, LENGTH, HEADS, FEATURES, WIDTH = 2, 11, 2, 3, 4


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.standard_normal((ROWS, LENGTH, HEADS, FEATURES)), jnp.float32)


@pytest.fixture
def weight(rng):
    return jnp.asarray(rng.standard_normal((HEADS, FEATURES, WIDTH)), jnp.float32)


def loop(x, weight, segments, bias=0.0):
    """By definition: the last WIDTH - 1 real tokens of the same document, one after another."""
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    y = np.zeros_like(x)
    for row, ids in enumerate(np.asarray(segments)):
        for t in np.flatnonzero(ids):
            same = np.flatnonzero(ids[: t + 1] == ids[t])[-weight.shape[-1] :]
            for back, s in enumerate(same[::-1]):
                y[row, t] += weight[:, :, -1 - back] * x[row, s]
            y[row, t] += bias
    return y


def test_it_is_the_depthwise_convolution_of_xla_with_its_gradients(x, weight):
    def ours(x, weight):
        return short_convolution(x, weight)[0]

    def theirs(x, weight):
        flat = x.reshape(ROWS, LENGTH, -1)
        kernel = weight.reshape(1, -1, WIDTH).transpose(2, 0, 1)
        y = jax.lax.conv_general_dilated(
            flat, kernel, (1,), [(WIDTH - 1, 0)], dimension_numbers=("NTC", "TIO", "NTC"),
            feature_group_count=HEADS * FEATURES,
        )  # fmt: skip
        return y.reshape(x.shape)

    for f in (lambda g: g(x, weight), lambda g: jax.grad(
            lambda *given: jnp.sum(jnp.sin(g(*given))), argnums=(0, 1))(x, weight)):  # fmt: skip
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), f(ours), f(theirs)
        )


def test_documents_are_separate_and_padding_around_them_is_not_seen(x, weight):
    segments = jnp.asarray([[0, 1, 1, 1, 2, 0, 0, 3, 3, 3, 0], [1, 2, 2, 2, 2, 2, 2, 3, 4, 4, 4]])
    bias = jnp.arange(HEADS * FEATURES, dtype=jnp.float32).reshape(HEADS, FEATURES)
    y, state = short_convolution(x, weight, bias=bias, segment_ids=segments)
    assert state is None
    real = np.asarray(segments) > 0
    np.testing.assert_allclose(
        np.asarray(y)[real], loop(x, weight, segments, np.asarray(bias))[real], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("pieces", [(11,), (1,) * 11, (2, 5, 1, 3), (3, 1, 7)], ids=str)
def test_pieces_with_padding_anywhere_equal_the_loop(x, weight, pieces):
    segments = jnp.asarray([[0, 1, 0, 0, 1, 1, 0, 1, 2, 0, 2], [1, 1, 0, 0, 0, 0, 0, 0, 1, 0, 1]])
    state, start, found = init_state(ROWS, (HEADS, FEATURES), WIDTH, jnp.float32), 0, []
    for size in pieces:
        part = slice(start, start + size)
        y, state = short_convolution(x[:, part], weight, segment_ids=segments[:, part], state=state)
        found.append(np.asarray(y))
        start += size
    real = np.asarray(segments) > 0
    np.testing.assert_allclose(
        np.concatenate(found, axis=1)[real], loop(x, weight, segments)[real], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(state["segments"], [[1, 2, 2], [1, 1, 1]])
    np.testing.assert_array_equal(state["inputs"][0], x[0, jnp.array([7, 8, 10])])
    np.testing.assert_array_equal(state["inputs"][1], x[1, jnp.array([1, 8, 10])])


def test_without_segments_a_state_goes_on(x, weight):
    whole, _ = short_convolution(x, weight)
    for fresh in (True, False):
        state = init_state(ROWS, (HEADS, FEATURES), WIDTH, jnp.float32)
        first, state = short_convolution(x[:, :2], weight, state=state, fresh=fresh)
        second, _ = short_convolution(x[:, 2:], weight, state=state)
        np.testing.assert_allclose(
            np.concatenate([first, second], axis=1), whole, rtol=1e-5, atol=1e-6
        )


def test_a_width_of_one_scales_each_feature(x, weight):
    y, state = short_convolution(
        x, weight[:, :, :1], state=init_state(ROWS, (HEADS, FEATURES), 1, jnp.float32)
    )
    np.testing.assert_allclose(y, x * weight[None, None, :, :, 0], rtol=1e-6)
    assert state["inputs"].shape == (ROWS, 0, HEADS, FEATURES)


def test_only_the_inputs_are_kept_for_the_backward_pass(x, weight):
    half, segments = x.astype(jnp.bfloat16), jnp.ones((ROWS, LENGTH), jnp.int32)
    y, backward = jax.vjp(
        lambda x, weight: short_convolution(x, weight, silu=True, segment_ids=segments)[0],
        half,
        weight,
    )
    assert y.dtype == jnp.bfloat16
    kept = [leaf for leaf in jax.tree.leaves(backward) if getattr(leaf, "ndim", 0) == 4]
    assert [leaf.dtype for leaf in kept] == [jnp.bfloat16]
