"""Attention beyond the suite of all mixers: limits of its options, and writes to the cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.config import layer
from efficient_lm.mixers.attention import new_entries, read, write
from tests.model.tiny import run, tiny

TOKENS = jnp.asarray(np.random.default_rng(0).integers(32, size=(2, 9)), jnp.int32)


def variant(arrays, **options):
    """(definition, arrays) of a one-layer model with these options; `arrays` where they exist."""
    definition, drawn = tiny(num_layers=1, layers=(layer(ffn="none", **options),))
    mixer = drawn["stack"]["rest"]["0"]["mixer"]
    if arrays is not None:
        drawn = jax.tree.map(lambda x: x, arrays)
        drawn["stack"]["rest"]["0"]["mixer"] = mixer | arrays["stack"]["rest"]["0"]["mixer"]
    return definition, drawn


def mixer_of(arrays):
    return arrays["stack"]["rest"]["0"]["mixer"]


def test_shared_heads_equal_repeated_heads():
    grouped, arrays = variant(None, num_heads=4, num_key_value_heads=2)
    full, _ = variant(None, num_heads=4)
    repeated = jax.tree.map(lambda x: x, arrays)
    for name in ("key", "value"):  # [D, K, H]; query head n reads head n // 2
        mixer_of(repeated)[name] = jnp.repeat(mixer_of(arrays)[name], 2, axis=1)
    np.testing.assert_allclose(
        run(grouped, arrays, TOKENS).hidden, run(full, repeated, TOKENS).hidden, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"soft_cap": 1e4}, {}),
        ({"sink": True}, {"sink": -1e9}),
        ({"scale": 8**-0.5}, {}),
        ({"bias": True, "output_bias": True}, dict.fromkeys(
            ("query_bias", "key_bias", "value_bias", "out_bias"), 0.0)),
        ({"gate": "sigmoid"}, {"gate": 0.0, "out": "doubled"}),
        ({"rope": {"fraction": 1.0, "scaling": "yarn", "factor": 1.0}}, {}),
        ({"window": 100}, {}),
    ],
    ids=lambda value: "-".join(value),
)  # fmt: skip
def test_options_have_a_limit_in_which_they_do_nothing(options, changes):
    plain, arrays = variant(None)
    definition, changed = variant(arrays, **options)
    for name, value in changes.items():
        old = mixer_of(changed)[name]
        mixer_of(changed)[name] = 2.0 * old if value == "doubled" else jnp.full_like(old, value)
    np.testing.assert_allclose(
        run(definition, changed, TOKENS).hidden,
        run(plain, arrays, TOKENS).hidden,
        rtol=1e-3,
        atol=1e-4,
    )


def test_qk_norm_forgets_the_length_of_queries_and_keys():
    definition, arrays = variant(None, qk_norm=True)
    scaled = jax.tree.map(lambda x: x, arrays)
    mixer_of(scaled)["query"] = 7.0 * mixer_of(arrays)["query"]
    mixer_of(scaled)["key"] = 0.1 * mixer_of(arrays)["key"]
    np.testing.assert_allclose(
        run(definition, scaled, TOKENS).hidden,
        run(definition, arrays, TOKENS).hidden,
        rtol=1e-3,
        atol=1e-3,
    )


def cache(slots=4):
    return {
        "key": jnp.zeros((2, 1, slots, 1)),
        "value": jnp.zeros((2, 1, slots, 1)),
        "index": jnp.full((2, slots), -1, jnp.int32),
        "segment_ids": jnp.zeros((2, slots), jnp.int32),
    }


def written(indices, state, segments=None):
    """The cache after tokens of these running indices, whose keys are 10 + index."""
    index = jnp.asarray(indices, jnp.int32)
    key = (10.0 + index.astype(jnp.float32))[..., None, None]
    return write(state, new_entries(key, -key, index, segments))


def test_the_ring_keeps_the_newest_tokens_in_whatever_order_they_come():
    for order in (slice(None), slice(None, None, -1)):
        indices = np.stack([np.arange(7), np.arange(7)])[:, order]
        state = written(indices, cache())
        np.testing.assert_array_equal(state["index"], [[4, 5, 6, 3]] * 2)
        np.testing.assert_array_equal(
            read(state)["key"][:, :, 0, 0], [[14.0, 15.0, 16.0, 13.0]] * 2
        )
        np.testing.assert_array_equal(state["value"], -state["key"])


def test_padding_is_not_written():
    state = written([[0, 1, 2], [0, 1, 2]], cache())
    same = written([[-1, -1], [-1, -1]], state)
    jax.tree.map(np.testing.assert_array_equal, same, state)
    ragged = written([[-1, 3, 4], [-1, -1, -1]], state, jnp.array([[0, 1, 1], [0, 0, 0]]))
    np.testing.assert_array_equal(ragged["index"], [[4, 1, 2, 3], [0, 1, 2, -1]])
    np.testing.assert_array_equal(ragged["segment_ids"], [[1, 1, 1, 1], [1, 1, 1, 0]])
