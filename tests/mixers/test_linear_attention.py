"""Linear attention: kernel regression, convex weights, the softmax it estimates, its decays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.config import ModelConfig, OptimizerConfig
from efficient_lm.errors import ConfigError
from efficient_lm.mixers import feature_maps
from efficient_lm.mixers.linear_attention import LinearAttention, LinearAttentionOptions
from efficient_lm.model.context import Context
from efficient_lm.model.rope import RopeConfig, rotate
from efficient_lm.training.optimizer import parameter_groups

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


def test_feature_maps_are_those_of_their_papers(projected):
    x = projected["query"]
    wide = np.asarray(x, np.float64)
    expected = np.where(wide > 0, wide + 1, np.exp(np.minimum(wide, 0)))
    np.testing.assert_allclose(feature_maps.elu(x), expected, rtol=1e-6)
    slopes = jax.grad(lambda x: jnp.sum(feature_maps.elu(x)))(x.at[0, 0].set(0.0))
    np.testing.assert_allclose(slopes[:, 1:], np.minimum(expected, 1.0)[:, 1:], rtol=1e-5)
    assert np.all(slopes[:, 0] == 1)
    expected = np.maximum(wide, 0) ** 2
    np.testing.assert_allclose(feature_maps.squared_relu(x), expected, rtol=1e-6)
    mixer = make(feature_map="hedgehog")
    for start in (True, False):
        matrix = np.broadcast_to(np.eye(KEY_DIM)[None], (HEADS, KEY_DIM, KEY_DIM))
        if not start:
            matrix = np.random.default_rng(1).standard_normal(matrix.shape)
            mixer.query_map[...] = jnp.asarray(matrix, jnp.float32)
        y = np.einsum("btnk,nkf->btnf", wide, matrix)
        both = np.exp(np.concatenate([y, -y], axis=-1))
        expected = both / both.sum(-1, keepdims=True)
        np.testing.assert_allclose(mixer.features(x, "query_map"), expected, rtol=1e-4)


def test_elu_keeps_its_digits_in_bf16():
    """As far as a weight is above 0, which it must be: keys far below 0 still have some."""
    x = jnp.linspace(-30.0, 9.0, 79).astype(jnp.bfloat16)[None, None, None]
    wide = np.asarray(x, np.float64)
    expected = np.where(wide > 0, wide + 1, np.exp(np.minimum(wide, 0)))
    found = np.asarray(feature_maps.elu(x), np.float64)
    assert np.abs(found / expected - 1).max() < 2**-8


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


def test_the_layer_is_gated_linear_attention(rng):
    """Short convolutions and SiLU, decays through few features, norm, gate: in float64."""
    options = {"value_dim": 3, "feature_map": "identity", "decay": "vector", "decay_rank": 3,
               "normalize": "rms", "gate": "silu", "convolution_width": 4}  # fmt: skip
    graph, state = nnx.split(make(**options))
    noise = lambda x: 0.3 * jnp.asarray(rng.standard_normal(x.shape), x.dtype)  # noqa: E731
    state = jax.tree.map(lambda x: x + noise(x), state)
    mixer = nnx.merge(graph, state)
    p = {k: np.asarray(v, np.float64) for k, v in nnx.to_pure_dict(state).items()}
    x = rng.standard_normal((LENGTH, MODEL.embed_dim))
    silu = lambda x: x / (1.0 + np.exp(-x))  # noqa: E731

    def convolved(name):
        y = np.einsum("td,dnh->tnh", x, p[name])
        padded = np.concatenate([np.zeros((3, *y.shape[1:])), y])
        weight = p[f"{name}_convolution"]
        return silu(sum(weight[..., i] * padded[i : i + LENGTH] for i in range(4)))

    q, k, v = map(convolved, ("query", "key", "value"))
    logits = np.einsum("td,dr,rnf->tnf", x, p["decay_down"], p["decay_up"]) + p["decay_bias"]
    keep = (1.0 / (1.0 + np.exp(-logits))) ** (1 / 16)
    memory, y = np.zeros((HEADS, KEY_DIM, 3)), np.zeros_like(v)
    for t in range(LENGTH):
        memory = keep[t][..., None] * memory + k[t][..., None] * v[t][:, None]
        y[t] = np.einsum("nk,nkv->nv", q[t], memory) / np.sqrt(KEY_DIM)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + MODEL.norm_epsilon) * p["norm"]
    y = y * silu(np.einsum("td,dnh->tnh", x, p["gate"]))

    @jax.jit
    def layer(x):
        given = mixer.project(x, CONTEXT)
        return mixer.output(mixer.core(given, CONTEXT)[0], given, CONTEXT)

    found = layer(jnp.asarray(x, jnp.float32)[None])[0]
    np.testing.assert_allclose(found, np.einsum("tnh,nhd->td", y, p["out"]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("decay", ["retention", "vector"])
def test_decays_norms_and_maps_of_features_have_no_weight_decay(decay):
    mixer = make(
        feature_map="hedgehog", decay=decay, normalize="rms", gate="silu", convolution_width=4
    )
    groups = parameter_groups(OptimizerConfig(), nnx.state(mixer))
    matrices = {"query", "key", "value", "gate", "out"}
    matrices |= {"decay_down", "decay_up"} if decay == "vector" else set()
    assert {name for name, group in groups.items() if group.decay} == matrices


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "embed_dim=16 is not divisible by num_heads=3"),
        ({"feature_map": "identity"}, "feature_map='identity' gives negative weights"),
        ({"feature_map": "performer", "normalize": "rms"}, "so normalize='rms' has no meaning"),
        ({"rope": RopeConfig()}, "rope.fraction=1.0 makes weights negative"),
        ({"num_features": 8}, "num_features=8 has no effect with feature_map='elu'"),
        ({"decay_rank": 0}, "decay_rank=0; it must be at least 1"),
        ({"feature_map": "performer", "feature_seed": -1}, "feature_seed=-1; it must be at least"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_say_so(options, message):
    with pytest.raises(ConfigError, match=message):
        LinearAttentionOptions(**options).check(MODEL)
