"""Every implementation of attention that a CPU can run, against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm import masks
from pallas_kernels._core.testing import errors_against, relative_error, value_and_gradients
from pallas_kernels.attention import Mask, Term, api, attention, explain, ref, schedule, xla

FORMS = {"panels": (16, None), "tiles": (16, 8)}


def inputs(B=2, T=37, S=37, N=4, K=2, H=8, dtype=jnp.float32, sinks=False, seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    q = jax.random.normal(keys[0], (B, T, N, H), dtype)
    k = jax.random.normal(keys[1], (B, S, K, H), dtype)
    v = jax.random.normal(keys[2], (B, S, K, H), dtype)
    arguments = {"q": q, "k": k, "v": v, "sinks": None}
    if sinks:
        arguments["sinks"] = 2 * jax.random.normal(keys[3], (N,), dtype)
    return arguments, jax.random.normal(keys[4], q.shape)


SEGMENTS = jnp.array([[1] * 10 + [2] * 20 + [0] * 7, [1] * 5 + [0] * 3 + [2] * 29], jnp.int32)
PREFIX = jnp.array([9, 0], jnp.int32)
CACHE = jnp.array([list(range(20, 37)) + list(range(20))] * 2, jnp.int32)  # a ring buffer
CACHE = CACHE.at[1, ::3].set(-1)
QUERIES = jnp.array([[30, 31, 36], [0, 3, 36]], jnp.int32)

# name: (mask, sizes and options of the inputs, soft-cap)
CASES = {
    "full": (masks.Full().lower(), {}, None),
    "causal": (masks.Causal().lower(), {}, None),
    "causal_capped_sinks": (masks.Causal().lower(), {"sinks": True}, 1.5),
    "multi_query": (masks.Causal().lower(), {"K": 1}, None),
    "multi_head_even": (masks.Causal().lower(), {"K": 4, "T": 32, "S": 32}, None),
    "window": (masks.SlidingWindow(5).lower(), {}, None),
    "segments_sinks": ((masks.Causal() & masks.Segments(SEGMENTS)).lower(), {"sinks": True}, None),
    "prefix": (masks.PrefixLM(PREFIX).lower(), {}, None),
    "block_causal": (masks.BlockCausal(7).lower(), {}, None),
    "block_diagonal": ((masks.BlockDiagonal(6) & masks.Causal()).lower(), {}, 3.0),
    "longer_keys": (masks.Full().lower(), {"S": 53}, None),
    "empty_rows": (masks.SlidingWindow(3).lower(), {"S": 11, "sinks": True}, None),
    "nothing_allowed": (Mask(terms=()), {"sinks": True}, None),
    "cache": (
        masks.SlidingWindow(12).lower(query_index=QUERIES, key_index=CACHE),
        {"T": 3, "sinks": True},
        None,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_xla_is_the_reference(case):
    """Values and each gradient in both forms, whose chunks do not divide the odd lengths."""
    mask, sizes, soft_cap = CASES[case]
    arguments, cotangent = inputs(**sizes)
    options = {"mask": mask, "scale": 0.4, "soft_cap": soft_cap}
    expected = value_and_gradients(
        functools.partial(ref.attention, **options), arguments, cotangent
    )
    for chunks in FORMS.values():
        function = functools.partial(xla.attention, **options, chunks=chunks)
        actual = value_and_gradients(function, arguments, cotangent)
        errors = {name: relative_error(actual[name], expected[name]) for name in expected}
        assert max(errors.values()) < 1e-5, (chunks, errors)


def test_chunk_sizes_do_not_matter():
    arguments, cotangent = inputs(sinks=True)
    options = {"mask": CASES["segments_sinks"][0], "scale": 0.4, "soft_cap": 2.0}
    for chunks in (None, (8, 32)):
        errors = errors_against(
            functools.partial(xla.attention, **options, chunks=(5, None)),
            functools.partial(xla.attention, **options, chunks=chunks),
            arguments,
            cotangent,
        )
        assert max(errors.values()) < 2e-6, (chunks, errors)


@pytest.mark.parametrize("form", ["panels", "tiles"])
def test_bfloat16_is_near_the_fp32_reference(form):
    arguments, cotangent = inputs(T=64, S=64, H=32, dtype=jnp.bfloat16, sinks=True)
    options = {"mask": masks.Causal().lower(), "scale": 0.2}
    errors = errors_against(
        functools.partial(ref.attention, **options),
        functools.partial(xla.attention, **options, chunks=FORMS[form]),
        arguments,
        cotangent,
    )
    assert max(errors.values()) < 1e-2, errors


@pytest.mark.parametrize("implementation", ["ref", "xla"])
def test_rows_without_keys_are_zero_and_give_no_gradient(implementation):
    segments = jnp.array([[1] * 4 + [0] * 4], jnp.int32)
    arguments, _ = inputs(B=1, T=8, S=8)
    q, k, v = arguments["q"], arguments["k"], arguments["v"].at[:, 4:].set(1e30)
    mask = masks.Segments(segments).lower()

    def loss(q, k, v):
        return attention(q, k, v, mask=mask, implementation=implementation).sum()

    out = attention(q, k, v, mask=mask, implementation=implementation)
    np.testing.assert_array_equal(out[:, 4:], 0)
    for gradient in jax.grad(loss, (0, 1, 2))(q, k, v):
        np.testing.assert_array_equal(gradient[:, 4:], 0)
        assert jnp.isfinite(gradient).all()


def test_definition_against_a_loop():
    """The reference itself, written out for one row at a time."""
    arguments, _ = inputs(B=1, T=5, S=5, N=2, K=1, sinks=True)
    q, k, v, sinks = (np.asarray(arguments[n], np.float64) for n in ("q", "k", "v", "sinks"))
    out = ref.attention(**arguments, mask=masks.Causal().lower(), scale=0.7, soft_cap=2.0)
    for t in range(5):
        for n in range(2):
            logits = 2.0 * np.tanh(0.7 * k[0, : t + 1, 0] @ q[0, t, n] / 2.0)
            weights = np.exp(logits) / (np.exp(logits).sum() + np.exp(sinks[n]))
            np.testing.assert_allclose(out[0, t, n], weights @ v[0, : t + 1, 0], rtol=1e-5)


def test_causality():
    """A key's gradient reaches only queries at or after it, by perturbation of one token."""
    arguments, _ = inputs(B=1, T=24, S=24)
    mask = masks.Causal().lower()
    run = functools.partial(xla.attention, mask=mask, scale=1.0, chunks=(8, 8))
    before = run(**arguments)
    arguments["k"] = arguments["k"].at[:, 11].add(3.0)
    arguments["v"] = arguments["v"].at[:, 11].add(3.0)
    after = run(**arguments)
    np.testing.assert_array_equal(before[:, :11], after[:, :11])
    assert (jnp.abs(before - after)[:, 11:].max(axis=(0, 2, 3)) > 0).all()


def test_packed_segments_are_separate_sequences():
    arguments, _ = inputs(B=1, T=24, S=24)
    segments = jnp.array([[1] * 9 + [2] * 15], jnp.int32)
    mask = (masks.Causal() & masks.Segments(segments)).lower()
    packed = attention(**arguments, mask=mask)
    for span in (slice(0, 9), slice(9, 24)):
        alone = {n: None if a is None else a[:, span] for n, a in arguments.items()}
        out = attention(**alone, mask=masks.Causal().lower())
        assert relative_error(packed[:, span], out) < 1e-6


def test_decoding_from_a_cache_is_the_parallel_form():
    """One query at a time, over a cache of which the rest is empty."""
    arguments, _ = inputs(B=2, T=9, S=9)
    parallel = attention(**arguments, mask=masks.SlidingWindow(4).lower())

    @jax.jit
    def decode(q, position):
        slots = jnp.arange(9, dtype=jnp.int32)
        index = jnp.where(slots <= position, slots, -1)[None]
        mask = masks.SlidingWindow(4).lower(query_index=position[None, None], key_index=index)
        return attention(q, arguments["k"], arguments["v"], mask=mask)

    for t in range(9):
        out = decode(arguments["q"][:, t : t + 1], jnp.int32(t))
        assert relative_error(out, parallel[:, t : t + 1]) < 1e-6


def test_determinism():
    arguments, _ = inputs(T=64, S=64)
    run = jax.jit(functools.partial(xla.attention, mask=masks.Causal().lower(), scale=1.0))
    np.testing.assert_array_equal(run(**arguments), run(**arguments))


def test_vmap():
    arguments, _ = inputs(T=16, S=16)
    run = functools.partial(attention, mask=masks.Causal().lower())
    stacked = {n: None if a is None else jnp.stack([a, 2 * a]) for n, a in arguments.items()}
    both = jax.jit(jax.vmap(lambda q, k, v: run(q, k, v)))
    out = both(stacked["q"], stacked["k"], stacked["v"])
    assert relative_error(out[0], run(**arguments)) < 1e-6


@pytest.mark.parametrize("gradient", [False, True])
def test_memory_is_linear_in_length(gradient):
    def temporary_bytes(T):
        shape = jax.ShapeDtypeStruct((1, T, 4, 16), jnp.float32)

        def run(q, k, v):
            return attention(q, k, v, mask=masks.Causal().lower(), implementation="xla").sum()

        function = jax.grad(run, (0, 1, 2)) if gradient else run
        compiled = jax.jit(function).lower(shape, shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    sizes = [temporary_bytes(T) for T in (4096, 8192, 16384)]
    assert sizes[1] / sizes[0] < 2.2, sizes
    assert sizes[2] / sizes[1] < 2.2, sizes


def test_excluded_tiles_are_not_visited():
    """Causal costs about half of full attention, a window a constant number of tiles a row."""
    count = functools.partial(schedule.visits, T=1024, S=1024, query_chunk=64, key_chunk=64)
    assert len(count(masks.Full().lower())) == 256
    assert len(count(masks.Causal().lower())) == 136
    assert len(count(masks.SlidingWindow(64).lower())) == 31
    assert len(count(masks.BlockDiagonal(64).lower())) == 16
    assert len(count(masks.BlockCausal(128).lower())) == 144
    assert len(count(Mask(terms=()))) == 0
    assert len(count(Mask((Term(causal=True),), key_index=jnp.zeros((1, 1024), jnp.int32)))) == 256


def test_the_list_of_tiles_stays_small_for_millions_of_tokens():
    for length in (2**12, 2**19, 2**20, 5 * 2**20):
        assert length // xla.tile_sizes(length, length)[0] <= 1024


def test_tile_states_agree_with_the_dense_mask(rng):
    """EMPTY tiles hold no allowed pair and FULL ones only such, for random static masks."""
    for _ in range(200):
        term = Term(
            causal=bool(rng.integers(2)),
            window=[None, 3, 8][rng.integers(3)],
            block_causal=[(), (4,), (6,)][rng.integers(3)],
            block_diagonal=[(), (4,), (10,)][rng.integers(3)],
        )
        mask = Mask((term,))
        dense = np.asarray(mask.dense(20, 20))[0]
        q, k = sorted(rng.choice(21, 2, False)), sorted(rng.choice(21, 2, False))
        state = schedule.tile_state(mask, range(*q), range(*k))
        tile = dense[q[0] : q[1], k[0] : k[1]]
        if state == schedule.EMPTY:
            assert not tile.any()
        if state == schedule.FULL:
            assert tile.all()


def test_users_errors_are_one_line():
    arguments, _ = inputs(B=1, T=4, S=4)
    q, k, v = arguments["q"], arguments["k"], arguments["v"]
    causal = masks.Causal().lower()
    with pytest.raises(ValueError, match="must divide the number of query heads"):
        attention(q[:, :, :3], k, v, mask=causal)
    with pytest.raises(ValueError, match="cast them to one dtype"):
        attention(q.astype(jnp.bfloat16), k, v, mask=causal)
    with pytest.raises(ValueError, match=r"key_segments has shape \(1, 3\)"):
        attention(q, k, v, mask=Mask((), key_segments=jnp.ones((1, 3), jnp.int32)))
    with pytest.raises(ValueError, match="give query_segments"):
        attention(q, k, v, mask=Mask((Term(segments=True),)))
    with pytest.raises(ValueError, match=r"of type \w+; it must be a pallas_kernels.Mask"):
        api._check(q, k, v, masks.Causal(), None)
    for wrong in ((q[0], k[0], v[0]), (q, k, v[:, :3]), (q, k[..., :2], v[..., :2])):
        with pytest.raises(ValueError, match=r"k and v \[B, S, K, H\]"):
            explain(*wrong, mask=causal)
    with pytest.raises(ValueError, match="is empty; give at least one token"):
        explain(q[:, :0], k, v, mask=causal)
    with pytest.raises(ValueError, match="sinks has shape"):
        explain(q, k, v, mask=causal, sinks=jnp.ones(3))
