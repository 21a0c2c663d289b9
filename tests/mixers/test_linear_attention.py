"""Linear attention: kernel regression, convex weights, the softmax it estimates, its decays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.config import ModelConfig
from efficient_lm.errors import ConfigError
from efficient_lm.mixers import feature_maps
from efficient_lm.mixers.linear_attention import LinearAttention, LinearAttentionOptions
from efficient_lm.model.context import Context
from efficient_lm.model.rope import RopeConfig, rotate

MODEL = ModelConfig(embed_dim=16, num_layers=1, initializer="fan_in")
LENGTH, HEADS, KEY_DIM = 10, 2, 8
CONTEXT = Context(positions=jnp.arange(LENGTH, dtype=jnp.int32)[None])


def make(**options):
    return LinearAttention(MODEL, LinearAttentionOptions(num_heads=HEADS, **options), nnx.Rngs(0))


@pytest.fixture
def projected(rng):
    """Queries, keys and values of about norm one a feature, [1, T, N, H]."""
    return {
        name: jnp.asarray(rng.standard_normal((1, LENGTH, HEADS, KEY_DIM)), jnp.float32)
        for name in ("query", "key", "value")
    }


def smoothed(weights, projected, log_decay=None):
    """sum_s w_ts v_s / sum_s w_ts over s <= t; weights [N, T, S]."""
    weights = np.tril(np.asarray(weights, np.float64))
    if log_decay is not None:  # [T, N]
        total = np.cumsum(np.asarray(log_decay, np.float64), axis=0).T
        weights = weights * np.exp(np.tril(total[:, :, None] - total[:, None]))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return np.einsum("nts,snh->tnh", weights, np.asarray(projected["value"][0], np.float64))


@pytest.mark.parametrize("kind", ["elu", "squared_relu", "hedgehog"])
def test_it_is_kernel_regression(projected, kind):
    # Moved, so that no product of rectified features is zero.
    projected |= {name: projected[name] + 1.0 for name in ("query", "key")}
    mixer = make(feature_map=kind)
    q, k = (
        mixer.features(projected["query"], "query_map"),
        mixer.features(projected["key"], "key_map"),
    )
    assert np.min(q) >= 0 and np.min(k) >= 0
    kernel = np.einsum("tnf,snf->nts", q[0], k[0])
    found, _, _ = mixer.core(projected, CONTEXT)
    np.testing.assert_allclose(found[0], smoothed(kernel, projected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["elu", "hedgehog", "performer"])
def test_outputs_lie_among_the_values_seen(projected, kind):
    found, _, _ = make(feature_map=kind).core(projected, CONTEXT)
    values = np.asarray(projected["value"])
    low, high = np.minimum.accumulate(values, axis=1), np.maximum.accumulate(values, axis=1)
    assert np.all((found > low - 1e-5) & (found < high + 1e-5))
    np.testing.assert_allclose(found[:, 0], values[:, 0], rtol=1e-5)


def test_tokens_without_weights_give_zeros_and_finite_gradients(projected):
    projected |= {"query": -jnp.abs(projected["query"])}
    mixer = make(feature_map="relu")

    def total(projected):
        return jnp.sum(mixer.core(projected, CONTEXT)[0])

    assert total(projected) == 0
    gradients = jax.grad(total)(projected)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))


def test_random_features_approach_softmax_attention_as_their_number_grows(projected):
    projected |= {name: 0.4 * projected[name] for name in ("query", "key")}
    dots = jnp.einsum("btnh,bsnh->nts", projected["query"], projected["key"]) * KEY_DIM**-0.5
    expected = smoothed(np.exp(np.asarray(dots, np.float64)), projected)

    def error(features, seeds):
        errors = []
        for seed in range(seeds):
            mixer = make(feature_map="performer", num_features=features, feature_seed=seed)
            found, _, _ = mixer.core(projected, CONTEXT)
            errors.append(np.mean(np.square(found[0] - expected)))
        return np.sqrt(np.mean(errors))

    errors = [error(features, 12) for features in (64, 1024)]
    assert errors[1] < 0.03  # values have standard deviation 1
    assert 2.5 < errors[0] / errors[1] < 6.5  # sqrt(16) = 4 by the law of large numbers


def test_directions_are_orthogonal_and_as_long_as_gaussian_ones():
    rows = feature_maps.random_directions(2000, 8, seed=0)
    for block in rows[:64].reshape(8, 8, 8):
        gram = block @ block.T
        np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-5)
    np.testing.assert_allclose(np.mean(rows**2), 1.0, rtol=0.03)
    np.testing.assert_allclose(np.mean(rows, axis=0), 0.0, atol=0.08)  # no side is preferred
    assert not np.array_equal(rows, feature_maps.random_directions(2000, 8, seed=1))


def test_random_features_survive_long_keys_and_forget_those_of_other_documents(projected):
    mixer = make(feature_map="performer", num_features=32)
    segments = jnp.asarray([[1] * 4 + [0] + [2] * 5], jnp.int32)
    context = Context(positions=CONTEXT.positions, segment_ids=segments)
    loud = projected["key"].at[:, :4].multiply(30.0)  # exponents of hundreds
    found, _, _ = mixer.core(projected | {"key": loud}, context)
    alone, _, _ = mixer.core(projected, context)
    assert np.all(np.isfinite(found))
    np.testing.assert_allclose(found[:, 5:], alone[:, 5:], rtol=1e-4, atol=1e-5)
    # A key that is small beside one before it still counts for a query that looks its way.
    q, k, decay, largest = feature_maps.performer(loud, loud, mixer.directions, segments)
    assert np.max(q) <= 1 and np.max(k) <= 1 and np.max(decay) <= 0
    assert np.all(np.isfinite(largest))


def test_retention_is_a_decaying_sum_of_rotated_products(projected):
    options = {"feature_map": "identity", "decay": "retention", "normalize": "rms"}
    mixer = make(**options, rope=RopeConfig())
    found, _, _ = mixer.core(projected, CONTEXT)
    q, k = (rotate(projected[name], CONTEXT.positions, RopeConfig()) for name in ("query", "key"))
    scores = np.einsum("tnh,snh->nts", q[0], k[0]) * KEY_DIM**-0.5
    distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)[None]
    decay = 1 - 2.0 ** (-5.0 - np.arange(HEADS))
    scores = scores * np.tril(decay[:, None, None] ** np.maximum(distance, 0)[None])
    expected = np.einsum("nts,snh->tnh", scores, projected["value"][0])
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-4)


def test_decays(projected, rng):
    mixer = make(decay="retention")
    rate = np.log1p(-(2.0 ** (-5.0 - np.arange(HEADS))))
    np.testing.assert_allclose(-np.exp(mixer.log_rate[...]), rate, rtol=1e-5)
    q, k = (feature_maps.elu(projected[name])[0] for name in ("query", "key"))
    kernel = np.einsum("tnf,snf->nts", q, k)
    found, _, _ = mixer.core(projected, CONTEXT)
    decay = np.broadcast_to(rate[None], (LENGTH, HEADS))
    np.testing.assert_allclose(found[0], smoothed(kernel, projected, decay), rtol=1e-4, atol=1e-5)

    logits = jnp.asarray(rng.standard_normal((1, LENGTH, HEADS)), jnp.float32)
    found, _, _ = make(decay="scalar").core(projected | {"decay": logits}, CONTEXT)
    decay = jax.nn.log_sigmoid(logits)[0] / 16
    np.testing.assert_allclose(found[0], smoothed(kernel, projected, decay), rtol=1e-4, atol=1e-5)
    vector = jnp.repeat(logits[..., None], KEY_DIM, axis=-1)
    same, _, _ = make(decay="vector").core(projected | {"decay": vector}, CONTEXT)
    np.testing.assert_allclose(same, found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "embed_dim=16 is not divisible by num_heads=3"),
        ({"feature_map": "identity"}, "feature_map='identity' gives negative weights"),
        ({"feature_map": "performer", "normalize": "rms"}, "so normalize='rms' has no meaning"),
        ({"rope": RopeConfig()}, "rope.fraction=1.0 makes weights negative"),
        ({"num_features": 8}, "num_features=8 has no effect with feature_map='elu'"),
        ({"decay_rank": 0}, "decay_rank=0; it must be at least 1"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_say_so(options, message):
    with pytest.raises(ConfigError, match=message):
        LinearAttentionOptions(**options).check(MODEL)
