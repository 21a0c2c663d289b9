"""The mask algebra against dense boolean algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.masks import (
    BlockCausal,
    BlockDiagonal,
    Causal,
    Full,
    PrefixLM,
    Segments,
    SlidingWindow,
)

T = 13
SEGMENTS = jnp.array([[1] * 4 + [2] * 6 + [0] * 3, [1] * 13], jnp.int32)
PREFIX = jnp.array([5, 0], jnp.int32)


def dense(name, size):
    """Independent definition of each primitive in numpy: bool [2, T, T]."""
    q, k = np.arange(T)[:, None], np.arange(T)[None, :]
    segments = np.asarray(SEGMENTS)
    same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, None, :] > 0)
    prefix = k[None] < np.asarray(PREFIX)[:, None, None]
    table = {
        "full": np.full((T, T), True),
        "causal": k <= q,
        "window": (k <= q) & (k > q - size),
        "segments": same,
        "prefix": (k <= q)[None] | prefix,
        "block_causal": k // size <= q // size,
        "block_diagonal": k // size == q // size,
    }
    return np.broadcast_to(table[name], (2, T, T))


def build(name, size):
    return {
        "full": Full,
        "causal": Causal,
        "window": lambda: SlidingWindow(size),
        "segments": lambda: Segments(SEGMENTS),
        "prefix": lambda: PrefixLM(PREFIX),
        "block_causal": lambda: BlockCausal(size),
        "block_diagonal": lambda: BlockDiagonal(size),
    }[name]()


NAMES = ("full", "causal", "window", "segments", "prefix", "block_causal", "block_diagonal")


@pytest.mark.parametrize("name", NAMES)
def test_primitive_is_its_definition(name):
    mask = build(name, 3).lower()
    np.testing.assert_array_equal(np.broadcast_to(mask.dense(T, T), (2, T, T)), dense(name, 3))


def test_random_expressions_are_boolean_algebra(rng):
    """Simplification never changes the set, whatever the nesting of & and |."""

    def expression(depth):
        if depth == 0:
            name, size = rng.choice(NAMES[1:]), int(rng.choice([1, 2, 3, 4, 6, 8]))
            return build(name, size), dense(name, size)
        (a, x), (b, y) = expression(depth - 1), expression(rng.integers(0, depth))
        return (a & b, x & y) if rng.random() < 0.5 else (a | b, x | y)

    for _ in range(60):
        mask, expected = expression(3)
        actual = np.broadcast_to(mask.lower().dense(T, T), (2, T, T))
        np.testing.assert_array_equal(actual, expected)


def test_simplification():
    causal, window = Causal(), SlidingWindow(4)
    assert (causal & window).lower().terms == window.lower().terms
    assert (causal | window).lower().terms == causal.lower().terms
    assert (causal & Full()).lower().terms == causal.lower().terms
    assert (causal | Full()).lower().terms == Full().lower().terms
    assert (window & SlidingWindow(9)).lower().terms == window.lower().terms
    assert (BlockDiagonal(2) & BlockCausal(6)).lower().terms == BlockDiagonal(2).lower().terms
    assert len((causal | causal | window).lower().terms) == 1


def test_indices_of_a_ring_buffer_are_honoured():
    """Keys at slots in any order, one slot empty, one query far along."""
    mask = SlidingWindow(3).lower(
        query_index=jnp.array([[5]], jnp.int32), key_index=jnp.array([[4, 5, -1, 3, 2]], jnp.int32)
    )
    np.testing.assert_array_equal(mask.dense(1, 5), [[[True, True, False, True, False]]])
    full = Full().lower(key_index=jnp.array([[0, -1]], jnp.int32))
    np.testing.assert_array_equal(full.dense(1, 2), [[[True, False]]])


def test_masks_pass_through_jit_with_static_terms():
    mask = (Causal() & Segments(SEGMENTS)).lower()
    jitted = jax.jit(lambda mask: mask.dense(T, T))
    np.testing.assert_array_equal(jitted(mask), mask.dense(T, T))
    assert len(jax.tree.leaves(mask)) == 2


def test_different_arrays_cannot_be_combined():
    with pytest.raises(ValueError, match="different query_segments"):
        Segments(SEGMENTS) & Segments(SEGMENTS + 1)


@pytest.mark.parametrize("primitive", [SlidingWindow, BlockCausal, BlockDiagonal])
def test_sizes_are_positive(primitive):
    with pytest.raises(ValueError, match="at least 1 token"):
        primitive(0)
