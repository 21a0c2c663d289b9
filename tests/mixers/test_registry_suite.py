"""Properties that every registered sequence mixer must have, inside a model of one layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm import registry
from efficient_lm.model.definition import define, initialize
from tests.mixers.cases import CASES, EMBED_DIM, LENGTH, one_layer

BATCH = 2
FAST_COMPILE = {"xla_backend_optimization_level": 0}
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
ALL = [(mixer, case) for mixer, cases in CASES.items() for case in cases]
over_cases = pytest.mark.parametrize(("mixer", "case"), ALL, ids=["-".join(c) for c in ALL])


class Subject:
    """A one-layer model around a mixer, with every parameter away from its special start value."""

    def __init__(self, mixer: str, case: str, **overrides):
        options = CASES[mixer][case] | overrides.pop("options", {})
        config = one_layer(mixer, options, **overrides)
        self.definition = define(config)
        arrays = initialize(self.definition, jax.random.key(0))
        leaves, structure = jax.tree.flatten(arrays)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        noise = [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        self.arrays = jax.tree.unflatten(
            structure, [x + n for x, n in zip(leaves, noise, strict=True)]
        )
        self.has_implementations = "implementation" in {
            f.name for f in dataclasses.fields(registry.mixer(mixer).Options)
        }

    def hidden(self, arrays, tokens, segments=None, positions=None):
        """The parallel form: final hidden features [B, T, D]."""
        model = self.definition.bind(arrays)
        return model(tokens, segment_ids=segments, positions=positions, logits=False).hidden

    @functools.cached_property
    def parallel(self):
        """`hidden`, compiled, with this subject's arrays."""
        function = jax.jit(self.hidden, compiler_options=FAST_COMPILE)
        return lambda *given: np.asarray(function(self.arrays, *given), np.float32)

    @functools.cached_property
    def gradient(self):
        """(arrays, tokens, segments, weights [B, T]) -> (gradient of a weighted sum, hidden)."""

        def loss(arrays, tokens, segments, weights):
            hidden = self.hidden(arrays, tokens, segments)
            feature_weights = jnp.cos(jnp.arange(EMBED_DIM, dtype=jnp.float32))
            return jnp.sum((hidden.astype(jnp.float32) @ feature_weights) * weights), hidden

        return jax.jit(jax.grad(loss, has_aux=True), compiler_options=FAST_COMPILE)

    @functools.cached_property
    def _advance(self):
        def advance(arrays, state, tokens, segments, fresh):
            model = self.definition.bind(arrays)
            output = model(tokens, segment_ids=segments, state=state, fresh=fresh, logits=False)
            return output.hidden, output.state

        return jax.jit(advance, static_argnames="fresh", compiler_options=FAST_COMPILE)

    def in_pieces(self, tokens, pieces, segments=None, fresh=False, max_length=LENGTH):
        """Hidden features from consecutive pieces of these lengths with a handed-over state."""
        state = self.definition.bind(self.arrays).init_state(tokens.shape[0], max_length)
        outputs, start = [], 0
        for place, size in enumerate(pieces):
            part = slice(start, start + size)
            hidden, state = self._advance(
                self.arrays,
                state,
                tokens[:, part],
                None if segments is None else segments[:, part],
                fresh=fresh and place == 0,
            )
            outputs.append(np.asarray(hidden))
            start += size
        assert start == tokens.shape[1]
        return np.concatenate(outputs, axis=1)


@functools.cache
def subject(mixer: str, case: str) -> Subject:
    """One subject a case, so that its compiled functions serve several tests."""
    return Subject(mixer, case)


@pytest.fixture
def tokens(rng):
    """Different tokens, int32 [B, T]."""
    return jnp.asarray(rng.permutation(BATCH * LENGTH).reshape(BATCH, LENGTH), jnp.int32)


@pytest.fixture
def square():
    """Different tokens, int32 [T, T]."""
    return jnp.arange(LENGTH * LENGTH, dtype=jnp.int32).reshape(LENGTH, LENGTH)


@pytest.fixture
def ones():
    """Segment ids of one document a row, int32 [T, T]."""
    return jnp.ones((LENGTH, LENGTH), jnp.int32)


def test_every_registered_mixer_has_cases():
    assert set(CASES) == set(registry.MIXERS), "give each registered mixer cases in cases.py"
    assert all(CASES.values())


@over_cases
def test_gradients_reach_no_later_token(mixer, case, square, ones):
    one = subject(mixer, case)
    # Row t asks for token t, and no token is in two places: one gradient gives every influence.
    gradient, _ = one.gradient(one.arrays, square, ones, jnp.eye(LENGTH))
    influence = np.linalg.norm(np.asarray(gradient["embedding"])[square], axis=-1)  # [T, T]
    assert np.all(influence[np.triu_indices(LENGTH, 1)] == 0.0)
    assert np.all(np.diag(influence) > 1e-4)
    if CASES[mixer][case].get("window") != 1:
        assert np.all(np.diag(influence, -1) > 1e-6)


@over_cases
def test_a_changed_token_changes_nothing_before_it(mixer, case, tokens):
    one = subject(mixer, case)
    whole = one.parallel(tokens)
    for place in (0, 5, LENGTH - 1):
        changed = one.parallel(tokens.at[:, place].set(tokens[::-1, place]))
        np.testing.assert_array_equal(changed[:, :place], whole[:, :place])
        assert np.all(np.abs(changed[:, place] - whole[:, place]).max(axis=-1) > 1e-3)


@over_cases
def test_prefill_and_single_steps_equal_the_parallel_form(mixer, case, tokens):
    one = subject(mixer, case)
    whole = one.parallel(tokens)
    pieces = one.in_pieces(tokens, (7,) + (1,) * (LENGTH - 7), fresh=True)
    np.testing.assert_allclose(pieces, whole, **TOLERANCE)


@over_cases
@pytest.mark.parametrize("pieces", [(1,) * LENGTH, (4, 1, 7), (7, 4, 1), (1, 7, 4)], ids=str)
def test_pieces_with_a_handed_over_state_equal_one_pass(mixer, case, pieces, tokens):
    one = subject(mixer, case)
    whole = one.parallel(tokens)
    found = one.in_pieces(tokens, pieces, jnp.ones_like(tokens))
    np.testing.assert_allclose(found, whole, **TOLERANCE)


def packed(lengths, slots=LENGTH):
    """(segment ids, positions) of a row of documents of these lengths; negative: padding."""
    segments, positions, document = [], [], 0
    for length in lengths:
        document += length > 0
        segments += [document if length > 0 else 0] * abs(length)
        positions += list(range(length)) if length > 0 else [0] * -length
    rest = [0] * (slots - len(segments))
    return np.array(segments + rest, np.int32), np.array(positions + rest, np.int32)


@over_cases
def test_packed_documents_equal_separate_sequences(mixer, case, tokens):
    one = subject(mixer, case)
    rows = [(5, 1, 6), (3, 7)]
    segments, positions = (jnp.stack(x) for x in zip(*map(packed, rows), strict=True))
    whole = one.parallel(tokens, segments, positions)
    stated = one.in_pieces(tokens, (4, 1, 7), segments)
    for row, lengths in enumerate(rows):
        start = 0
        for length in lengths:
            part = slice(start, start + length)
            alone = jnp.zeros_like(tokens).at[:, :length].set(tokens[row, part][None])
            alone_segments = jnp.broadcast_to(packed((length,))[0][None], tokens.shape)
            alone_positions = jnp.broadcast_to(packed((length,))[1][None], tokens.shape)
            expected = one.parallel(alone, alone_segments, alone_positions)[0, :length]
            np.testing.assert_allclose(whole[row, part], expected, **TOLERANCE)
            np.testing.assert_allclose(stated[row, part], expected, **TOLERANCE)
            start += length


@over_cases
def test_padding_around_documents_changes_nothing(mixer, case, tokens):
    one = subject(mixer, case)
    tight = (4, 3)
    for loose in ((-2, 4, 3, -3), (4, -4, 3), (-3, 4, -1, 3)):
        outputs = []
        for layout in (tight, loose):
            segments = packed(layout)[0]
            real = np.flatnonzero(segments)
            given = jnp.full_like(tokens, 1).at[:, real].set(tokens[:, : len(real)])
            segments = jnp.broadcast_to(segments[None], tokens.shape)
            positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), tokens.shape)
            outputs.append(one.parallel(given, segments, positions)[:, real])
        np.testing.assert_allclose(outputs[1], outputs[0], **TOLERANCE)


@over_cases
def test_padding_anywhere_changes_nothing_with_a_state(mixer, case, tokens, rng):
    one = subject(mixer, case)
    whole = one.parallel(tokens)
    slots, pieces = 23, (7, 1, 4, 7, 4)  # rows of different padding, and a piece of padding alone
    segments = np.zeros((BATCH, slots), np.int32)
    for row in segments:
        row[np.sort(rng.permutation(np.r_[0:7, 8:slots])[:LENGTH])] = 1
    segments[0, 8:12], segments[0, 12:] = 0, 1
    segments[0, : np.flatnonzero(segments[0])[-LENGTH]] = 0
    given = np.full((BATCH, slots), 3, np.int32)
    given[segments > 0] = np.asarray(tokens).reshape(-1)
    hidden = one.in_pieces(jnp.asarray(given), pieces, jnp.asarray(segments))
    found = hidden[segments > 0].reshape(BATCH, LENGTH, EMBED_DIM)
    np.testing.assert_allclose(found, whole, **TOLERANCE)
    assert np.all(np.isfinite(hidden))


@over_cases
def test_odd_lengths_give_the_beginning_of_longer_ones(mixer, case, tokens):
    one = subject(mixer, case)
    short = one.parallel(tokens[:, :5])
    np.testing.assert_allclose(short, one.parallel(tokens)[:, :5], **TOLERANCE)


@over_cases
def test_gradients_equal_those_of_the_reference(mixer, case, square, ones):
    one = subject(mixer, case)
    if not one.has_implementations:
        return
    segments = jnp.asarray([packed((5, 6))[0]] * LENGTH)
    weights = jnp.sin(square.astype(jnp.float32))
    found, _ = one.gradient(one.arrays, square, segments, weights)
    reference = Subject(mixer, case, options={"implementation": "ref"})
    expected, _ = reference.gradient(one.arrays, square, segments, weights)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected
    )


@over_cases
def test_gradients_reach_every_parameter_and_are_deterministic(mixer, case, square, ones):
    one = subject(mixer, case)
    weights = jnp.sin(square.astype(jnp.float32))
    first, second = (one.gradient(one.arrays, square, ones, weights) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    for path, leaf in jax.tree_util.tree_leaves_with_path(first[0]):
        if jax.tree_util.keystr(path[:1], simple=True) != "head":
            assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


@over_cases
def test_bfloat16_stays_close_to_float32(mixer, case, square, ones):
    one, half = subject(mixer, case), Subject(mixer, case, dtype="bfloat16")
    weights = jnp.sin(square.astype(jnp.float32))
    (exact, expected), (rounded, found) = (
        x.gradient(one.arrays, square, ones, weights) for x in (one, half)
    )
    assert found.dtype == jnp.bfloat16
    found = found.astype(jnp.float32)
    assert 0 < np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)
    largest = max(np.linalg.norm(leaf) for leaf in jax.tree.leaves(exact))
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(rounded), strict=True):
        assert b.dtype == jnp.float32
        assert np.linalg.norm(a - b) <= 0.1 * np.linalg.norm(a) + 0.01 * largest


@over_cases
def test_sharded_rows_equal_unsharded_rows(mixer, case, rng):
    one = subject(mixer, case)
    rows = jnp.asarray(rng.integers(LENGTH * LENGTH, size=(8, LENGTH)), jnp.int32)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    expected = np.concatenate([one.parallel(rows[i : i + BATCH]) for i in range(0, 8, BATCH)])
    hidden = jax.jit(one.hidden, out_shardings=sharding, compiler_options=FAST_COMPILE)(
        jax.device_put(one.arrays, jax.NamedSharding(mesh, jax.P())),
        jax.device_put(rows, sharding),
    )
    assert len(hidden.sharding.device_set) == 8
    np.testing.assert_allclose(np.asarray(hidden), expected, **TOLERANCE)
