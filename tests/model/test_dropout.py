"""Dropout: off without a key, one key one result, unbiased, and fresh in every layer."""

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.config import layer
from efficient_lm.model.block import dropout
from efficient_lm.model.context import Context
from tests.model.tiny import FAST_COMPILE, run, tiny

TOKENS = jnp.asarray(np.random.default_rng(0).integers(32, size=(2, 9)), jnp.int32)


def test_keeps_the_mean_and_zeroes_its_share(key):
    x = jnp.ones((4, 64, 64))
    y = np.asarray(dropout(x, 0.25, key))
    np.testing.assert_allclose(np.unique(y), [0.0, 1 / 0.75], rtol=1e-6)
    assert abs((y == 0).mean() - 0.25) < 0.02
    assert abs(y.mean() - 1.0) < 0.02
    assert dropout(x.astype(jnp.bfloat16), 0.25, key).dtype == jnp.bfloat16


def test_is_off_without_a_key_or_a_rate(key):
    x = jnp.ones((1, 2, 3))
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, key) is x
    plain, arrays = tiny()
    dropping, _ = tiny(dropout=0.5)
    expected = run(plain, arrays, TOKENS).logits
    np.testing.assert_array_equal(run(dropping, arrays, TOKENS).logits, expected)


def test_one_key_gives_one_result():
    definition, arrays = tiny(dropout=0.5, num_layers=3)
    first, again, other = (
        run(definition, arrays, TOKENS, dropout_key=jax.random.key(seed)).logits
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-2


def test_every_layer_drops_other_features(key):
    rate, num_layers = 0.5, 7
    definition, arrays = tiny(
        dropout=rate,
        num_layers=num_layers,  # two stacked places, three repeats and a single layer
        layers=(layer(ffn="none", output_bias=True), layer(ffn="none", output_bias=True)),
    )
    # Mixers that give 1 everywhere: the stream then counts in how many layers a feature was kept.
    arrays = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.full_like(x, "out_bias" in jax.tree_util.keystr(path)), arrays
    )
    shape = (4, 16, 16)
    context = Context(positions=jnp.zeros(shape[:2], jnp.int32))
    stream, _, _ = jax.jit(
        lambda x: definition.bind(arrays).stack(x, context, None, key),
        compiler_options=FAST_COMPILE,
    )(jnp.zeros(shape))
    kept = np.asarray(stream) * (1 - rate)
    assert abs(kept.mean() - num_layers * (1 - rate)) < 0.15
    independent = num_layers * rate * (1 - rate)  # variance of a binomial count
    assert abs(kept.var() - independent) < 0.15 * independent
