"""Sampling against plain NumPy specifications, and by the frequencies of many draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.errors import UserError
from efficient_lm.inference.sampling import Sampling, sample

draw = jax.jit(sample)


def distribution(logits, *, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """The probabilities of one row [V] that the documented order of filters gives."""
    logits = logits.astype(np.float64) / temperature
    probabilities = np.exp(logits - logits.max())
    order = np.argsort(-probabilities, kind="stable")
    keep = np.ones(len(order), bool)
    if top_k is not None:
        keep[order[top_k:]] = False
    probabilities = np.where(keep, probabilities, 0)
    probabilities /= probabilities.sum()
    if top_p is not None:
        total = 0.0
        for index in order:
            if total >= top_p:
                keep[index] = False
            total += probabilities[index]
    keep &= probabilities >= (0 if min_p is None else min_p * probabilities.max())
    probabilities = np.where(keep, probabilities, 0)
    return probabilities / probabilities.sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 2.0, "top_k": 6, "top_p": 0.8, "min_p": 0.3},
    ],
)
def test_frequencies_follow_the_specification(options, rng):
    logits = (2 * rng.standard_normal(12)).astype(np.float32)
    expected = distribution(logits, **options)
    draws = 20_000
    keys = jax.random.split(jax.random.key(1), draws)
    rows = jnp.broadcast_to(jnp.asarray(logits)[None], (draws, 12))
    counts = np.bincount(np.asarray(draw(rows, keys, Sampling(**options).checked())), minlength=12)
    assert (counts[expected == 0] == 0).all()
    inside = expected > 0
    chi_square = ((counts - draws * expected)[inside] ** 2 / (draws * expected[inside])).sum()
    # Mean n - 1 and variance 2 (n - 1) for n outcomes; the draws are fixed, so no luck is needed.
    degrees = inside.sum() - 1
    assert chi_square < degrees + 4 * np.sqrt(2 * degrees + 1)


def test_greedy_is_the_argmax_and_ignores_keys_and_filters(rng):
    logits = jnp.asarray(rng.standard_normal((5, 9)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 5)
    chosen = draw(logits, keys, Sampling(temperature=0, top_p=0.5).checked())
    np.testing.assert_array_equal(chosen, np.argmax(logits, axis=-1))


def test_top_p_keeps_the_most_likely_token_and_top_k_breaks_ties_by_id():
    keys = jax.random.split(jax.random.key(0), 50)
    flat = jnp.zeros((50, 4), jnp.float32)
    for options in ({"top_p": 1e-6}, {"top_k": 1}):
        assert set(np.asarray(draw(flat, keys, Sampling(**options).checked()))) == {0}


def test_a_row_depends_on_its_own_logits_and_key_alone(rng):
    logits = jnp.asarray(rng.standard_normal((6, 30)), jnp.float32)
    keys = jax.random.split(jax.random.key(3), 6)
    sampling = Sampling(0.9, top_k=20, top_p=0.9).checked()
    together = np.asarray(draw(logits, keys, sampling))
    alone = [int(draw(logits[i : i + 1], keys[i : i + 1], sampling)[0]) for i in range(6)]
    np.testing.assert_array_equal(together, alone)


def test_other_numbers_compile_nothing_anew():
    keys = jax.random.split(jax.random.key(0), 2)
    logits = jnp.zeros((2, 7), jnp.float32)
    function = jax.jit(lambda *arguments: sample(*arguments))
    for temperature, top_p in ((0.5, 0.9), (1.5, 0.3)):
        function(logits, keys, Sampling(temperature, top_p=top_p).checked())
    assert function._cache_size() == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1.0}, "temperature=-1.0; it must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0; it must be an integer of at least 1"),
        ({"top_p": 0.0}, "top_p=0.0; it must be above 0 and at most 1"),
        ({"min_p": 1.5}, "min_p=1.5; it must be from 0 to 1"),
    ],
)
def test_numbers_out_of_range_are_named(options, words):
    with pytest.raises(UserError, match=words):
        Sampling(**options).checked()
