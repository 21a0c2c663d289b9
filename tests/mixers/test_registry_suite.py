"""Properties that every registered sequence mixer must have, inside a model of one layer."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pallas_kernels
from efficient_lm import registry
from efficient_lm.config import ModelConfig, layer
from efficient_lm.model.context import Context
from efficient_lm.model.definition import define, initialize
from efficient_lm.model.rope import RopeConfig
from tests.mixers.cases import CASES, EMBED_DIM, LENGTH

BATCH = 2
FAST_COMPILE = {"xla_backend_optimization_level": 0}
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
ALL = [(mixer, case) for mixer, cases in CASES.items() for case in cases]
over_cases = pytest.mark.parametrize(("mixer", "case"), ALL, ids=["-".join(c) for c in ALL])


class Subject:
    """A one-layer model around a mixer, with every parameter away from its special start value."""

    def __init__(self, mixer: str, case: str, **overrides):
        options = CASES[mixer][case] | overrides.pop("options", {})
        config = ModelConfig(
            vocabulary_size=LENGTH * LENGTH,  # so that each token of a batch can be another one
            embed_dim=EMBED_DIM,
            num_layers=1,
            max_length=LENGTH,
            layers=(layer(mixer, ffn="none", **options),),
            initializer="fan_in",
            tie_embeddings=False,
            **overrides,
        )
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


OPS = ("gated_delta_rule", "gated_linear_attention", "second_order_attention")
RECURRENT = [(m, c) for m, c in ALL if m not in ("attention", "ttt") and c != "exponential"]


def options_of(mixer, case):
    """Those of a case as a mixer takes them."""
    options = CASES[mixer][case]
    if "rope" in options:
        options = options | {"rope": RopeConfig(**options["rope"])}
    return registry.mixer(mixer).Options(**options)


@pytest.mark.parametrize(("mixer", "case"), RECURRENT, ids=["-".join(c) for c in RECURRENT])
def test_decays_are_fp32_where_all_else_is_bf16(mixer, case, monkeypatch, rng):
    """Of bf16 parameters and projections they are what fp32 gives for the same numbers."""
    model = ModelConfig(embed_dim=EMBED_DIM, num_layers=1, initializer="fan_in", dtype="bfloat16")
    graph, arrays = nnx.split(registry.mixer(mixer)(model, options_of(mixer, case), nnx.Rngs(0)))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), arrays)
    x = jnp.asarray(rng.standard_normal((1, LENGTH, EMBED_DIM)), jnp.bfloat16)
    context = Context(positions=jnp.arange(LENGTH, dtype=jnp.int32)[None])
    projected = nnx.merge(graph, half).project(x, context)
    given = []

    def op(q, k, v, *gates, **options):
        given.append(gates)
        return v, None

    for name in OPS:
        monkeypatch.setattr(pallas_kernels, name, op)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (half, projected))
    for arrays, inputs in ((half, projected), wide):
        nnx.merge(graph, arrays).core(inputs, context)
    for found, expected in zip(*given, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            assert found.dtype == jnp.float32
            np.testing.assert_array_equal(found, expected)
            assert np.any(found != found.astype(jnp.bfloat16).astype(jnp.float32))


@over_cases
def test_states_keep_their_types_and_their_size(mixer, case):
    """Memories are fp32 also where all else is bf16; only caches and reads of all tokens grow."""
    half = Subject(mixer, case, dtype="bfloat16")
    tokens = jnp.zeros((BATCH, 3), jnp.int32)

    def shapes(length):
        def advance(arrays):
            model = half.definition.bind(arrays)
            state = model.init_state(BATCH, length)
            return state, model(tokens, state=state, logits=False).state

        return jax.eval_shape(advance, half.arrays)

    before, after = shapes(64)
    assert before == after
    for path, leaf in jax.tree_util.tree_leaves_with_path(before):
        names = {key.key for key in path if hasattr(key, "key")}
        if names & {"memory", "changes", "momentum", "largest", "rate", "share", "log_decay"}:
            assert leaf.dtype == jnp.float32, path
    options = CASES[mixer][case]
    reads_all = mixer == "attention" and "window" not in options
    reads_all = reads_all or options.get("score") == "exponential"
    assert (before != shapes(256)[0]) == reads_all
    flops = functools.partial(
        registry.mixer(mixer).core_flops, half.definition.config, options_of(mixer, case)
    )
    assert (flops(2**16) < flops(2**20)) == reads_all and flops(2**16) <= flops(2**20)


HEAD = {"key_dim": 6, "value_dim": 4}
STATES = [  # numbers of each of two heads, for K = 6 and V = 4
    ("gated_deltanet", {"num_value_heads": 2, **HEAD}, 6 * 4 + 3 * (2 * 6 + 4)),
    ("kda", {"num_value_heads": 2, **HEAD}, 6 * 4 + 3 * (2 * 6 + 4)),
    ("linear_attention", {"num_heads": 2, **HEAD}, 6 * 4 + 6),  # and the sum of weights
    (
        "linear_attention",
        {"num_heads": 2, **HEAD, "feature_map": "hedgehog", "normalize": "rms"},
        2 * 6 * 4,
    ),
    ("mamba2", {"head_dim": 16, "state_dim": 6, "num_groups": 2}, 6 * 16 + 3 * (2 * 6 + 16)),
    ("two_mamba", {"num_heads": 2, "score": "linear"}, 8 * 8 + 3 * 8),
]


@pytest.mark.parametrize(("mixer", "options", "numbers"), STATES, ids=lambda x: str(x)[:20])
def test_states_have_as_many_numbers_as_published(mixer, options, numbers):
    registered = registry.mixer(mixer)
    model = ModelConfig(embed_dim=EMBED_DIM, num_layers=1)
    one = registered(model, registered.Options(**options), nnx.Rngs(0))
    leaves = jax.tree.leaves(one.init_state(1, 64, jnp.float32))
    found = sum(leaf.size for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating))
    assert found == 2 * numbers


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


TRACE_ALL = """
import jax, jax.numpy as jnp
from efficient_lm.config import ModelConfig, layer
from efficient_lm.model.definition import define
from tests.mixers.cases import CASES, EMBED_DIM, LENGTH
layers = tuple(layer(mixer, **next(iter(cases.values()))) for mixer, cases in CASES.items())
model = define(ModelConfig(embed_dim=EMBED_DIM, num_layers=len(layers), layers=layers))
tokens = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)
hidden = lambda arrays, tokens: model.bind(arrays)(tokens, segment_ids=tokens, logits=False).hidden
print(jax.jit(hidden).lower(model.parameters, tokens).as_text())
"""


def test_processes_trace_the_same_programs():
    """Hosts must agree on them, and JAX's cache finds them again, whatever the order of sets."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TRACE_ALL],
            env=os.environ | {"PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    (first, _), (second, _) = (process.communicate() for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert len(first) > 10_000
    assert first == second
