"""Fast weights: the identities of arXiv 2602.21204 between them and linear attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.config import Config, ModelConfig, layer
from efficient_lm.errors import ConfigError
from efficient_lm.mixers import fast_weight_rows, fast_weights
from efficient_lm.mixers.document_chunks import make_layout
from efficient_lm.mixers.fast_weight_rows import read_rows
from efficient_lm.mixers.fast_weights import Chunk, Rule, Steps, apply, hidden
from efficient_lm.mixers.ttt import LADDER, TTT, TTTOptions, ladder
from efficient_lm.model.context import Context
from pallas_kernels._core.recurrence import documents

B, M, C, N, K, H = 2, 4, 6, 2, 3, 5


def rule_of(step: str, **changes) -> Rule:
    names = {field.name for field in dataclasses.fields(Rule)}
    return Rule(**({n: x for n, x in ladder(step).items() if n in names} | changes))


def make(rng, rule, dtype=np.float32):
    """(initial weights, Steps): each chunk is read with the queries of the next."""
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    inner = H if rule.features == "gated" else K
    initial = {"last": draw(N, inner, K)}
    if rule.features == "gated":
        initial |= {"in": draw(N, K, H), "gate": draw(N, K, H)}
    rates = 3 if rule.update == "all" else 1
    chunk = Chunk(
        draw(B, M, C, N, K),
        draw(B, M, C, N, K),
        jnp.abs(draw(B, M, C, N, rates)) if rule.learned_rate else None,
        jax.nn.sigmoid(draw(B, M, C, N)) if rule.momentum else None,
    )
    queries = draw(B, M, C, N, K)
    return initial, Steps(chunk, queries, jnp.ones((B, M), bool), jnp.zeros((B, M), bool))


def run(rule, initial, steps, form=fast_weights.one_by_one):
    start = fast_weights.nothing_learned(rule, initial, B)
    return jax.jit(functools.partial(form, rule))(initial, start, steps)


def test_updates_are_the_gradient_of_the_inner_loss(rng):
    rule = Rule()
    with jax.enable_x64(True):
        initial, steps = make(rng, rule, np.float64)
        chunk = jax.tree.map(lambda x: x[:, 0], steps.chunks)
        weights = {n: jnp.broadcast_to(x[None], (B, *x.shape)) for n, x in initial.items()}
        found = fast_weights.gradients(rule, weights, chunk)
        for place, name in enumerate(("in", "last", "gate")):

            def loss(weight, name=name, place=place):
                out = apply(weights | {name: weight}, chunk.key)
                return -jnp.sum(chunk.rate[..., place, None] * out * chunk.value)

            expected = -jax.grad(loss)(weights[name])
            np.testing.assert_allclose(found[name], expected, rtol=1e-10, atol=1e-10)


def test_the_last_matrix_is_a_sum_over_keys_with_features_that_change(rng):
    """Theorem 5.3: W_last = W_0 + sum_i phi_i(k_i)^T vhat_i, with all matrices trained."""
    rule = Rule(weight_norm=False, orthogonalize=False)
    with jax.enable_x64(True):
        initial, steps = make(rng, rule, np.float64)
        weights = {n: jnp.broadcast_to(x[None], (B, *x.shape)) for n, x in initial.items()}
        momentum = fast_weights.nothing_learned(rule, initial, B).momentum
        keys, shares = [], []
        for m in range(M):
            chunk = jax.tree.map(lambda x, m=m: x[:, m], steps.chunks)
            keys.append(hidden(weights, chunk.key))  # by the weights that the chunk finds
            shares.append(jnp.mean(chunk.share, axis=1))
            weights, momentum = fast_weights.learn(rule, initial, weights, momentum, chunk)
        total = initial["last"][None]
        for i in range(M):
            # sum over j >= i of the product of the shares after i, up to j
            factor = sum(np.prod([shares[s] for s in range(i + 1, j + 1)] or [np.ones((B, N))],
                                 axis=0) for j in range(i, M))  # fmt: skip
            value = steps.chunks.rate[:, i, :, :, 1, None] * steps.chunks.value[:, i]
            value = factor[:, None, :, None] * value
            total = total + jnp.einsum("bcnh,bcnv->bnhv", keys[i], value)
        np.testing.assert_allclose(weights["last"], total, rtol=1e-10, atol=1e-10)


def test_the_layer_is_that_of_the_paper(rng):
    """LaCT with all that the ladder takes away, chunk by chunk, in fp64; 7 tokens, chunks of 3."""
    model = ModelConfig(embed_dim=8, num_layers=1, initializer="fan_in")
    options = TTTOptions(num_heads=2, hidden_dim=5, chunk_size=3, window=None, base_rate=0.3)
    graph, state = nnx.split(TTT(model, options, nnx.Rngs(0)))
    noise = lambda x: 0.3 * jnp.asarray(rng.standard_normal(x.shape), x.dtype)  # noqa: E731
    state = jax.tree.map(lambda x: x + noise(x), state)
    mixer = nnx.merge(graph, state)
    p = {k: np.asarray(v, np.float64) for k, v in nnx.to_pure_dict(state).items()}
    x = rng.standard_normal((7, 8))
    sigmoid = lambda x: 1.0 / (1.0 + np.exp(-x))  # noqa: E731
    silu = lambda x: x * sigmoid(x)  # noqa: E731

    def projected(name):
        return np.tensordot(x, p[name], 1)  # [T, N, ...]

    def feature(name):
        y = silu(projected(name) * p[f"{name}_scale"] + p[f"{name}_offset"])
        return y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-6)

    def orthogonal(x):
        y = x / np.linalg.norm(x)
        for a, b, c in fast_weights.MUON:
            y = a * y + b * y @ y.T @ y + c * y @ y.T @ y @ y.T @ y
        return y

    q, k, v = feature("query"), feature("key"), silu(projected("value"))
    rate, share = np.log1p(np.exp(projected("rate") + p["rate_bias"])), sigmoid(projected("share"))
    mixed = np.zeros((7, 2, 4))
    for n in range(2):
        w0, w1, w2 = start = [p[f"fast_{name}"][n] for name in ("in", "last", "gate")]
        remembered = [0.0 * w for w in start]
        for m in range(0, 7, 3):
            at = slice(m, m + 3)
            mixed[at, n] = silu(q[at, n] @ w0) * (q[at, n] @ w2) @ w1
            key, value, eta = k[at, n], v[at, n], rate[at, n].T[..., None]
            z, u, dh = key @ w0, key @ w2, value @ w1.T
            slope = sigmoid(z) * (1 + z * (1 - sigmoid(z)))
            updates = [
                (eta[0] * key).T @ (dh * u * slope),
                (eta[1] * silu(z) * u).T @ value,
                (eta[2] * key).T @ (dh * silu(z)),
            ]
            alpha = share[at, n].mean()
            remembered = [d + alpha * old for d, old in zip(updates, remembered, strict=True)]
            moved = [w + orthogonal(d) for w, d in zip((w0, w1, w2), remembered, strict=True)]
            norm = functools.partial(np.linalg.norm, axis=0)
            w0, w1, w2 = (
                w / (norm(w) + 1e-5) * norm(first) for w, first in zip(moved, start, strict=True)
            )
    mixed = mixed / np.sqrt((mixed**2).mean(-1, keepdims=True) + model.norm_epsilon) * p["norm"]
    mixed = mixed * silu(projected("gate"))[..., None]
    context = Context(positions=jnp.arange(7, dtype=jnp.int32)[None])
    given = mixer.project(jnp.asarray(x, jnp.float32)[None], context)
    found = mixer.output(mixer.core(given, context)[0], given, context)[0]
    np.testing.assert_allclose(
        found, np.einsum("tnh,nhd->td", mixed, p["out"]), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("step", list(LADDER)[2:])
def test_linear_rules_are_the_same_in_both_forms(rng, step):
    rule = rule_of(step)
    assert rule.is_linear
    initial, steps = make(rng, rule)
    start = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype),
        fast_weights.nothing_learned(rule, initial, B),
    )
    steps = steps._replace(
        valid=jnp.asarray([[True] * 4, [True] * 3 + [False]]),
        fresh=jnp.asarray([[False, False, True, False], [True, False, True, False]]),
    )
    forms = (fast_weights.one_by_one, fast_weights.all_at_once)
    wanted, found = (
        jax.jit(functools.partial(form, rule))(initial, start, steps) for form in forms
    )
    outputs = jnp.where(steps.valid[:, :, None, None, None], wanted[0] - found[0], 0.0)
    scale = 1.0 if not rule.orthogonalize else 50.0  # Newton-Schulz steps amplify rounding
    assert np.abs(outputs).max() < 1e-5 * scale * np.abs(wanted[0]).max()
    for a, b in zip(*map(jax.tree.leaves, (wanted[1], found[1])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5 * scale, atol=1e-5 * scale)


@pytest.mark.parametrize("step", ["no_weight_norm", "single_layer", "rate_one", "no_momentum"])
def test_rules_without_muon_are_masked_linear_attention(rng, step):
    """O = Phi(Q) W_0 + ((Phi(Q) Phi(K)^T) * kron(C, 1)) (eta V)."""
    rule = rule_of(step, orthogonalize=False)
    initial, steps = make(rng, rule)
    found, _ = run(rule, initial, steps)
    flat = lambda x: x.reshape(B, M * C, *x.shape[3:])  # noqa: E731
    query, key = (hidden(initial, flat(x)) for x in (steps.queries, steps.chunks.key))
    value = flat(steps.chunks.value)
    if rule.learned_rate:
        value = flat(steps.chunks.rate)[..., :1] * value
    share = np.zeros((B, M, N)) if not rule.momentum else np.mean(steps.chunks.share, axis=2)
    matrix = np.zeros((B, N, M, M))
    for t in range(M):  # the queries of step t are read after its update
        for i in range(t + 1):
            products = [np.prod(share[:, i + 1 : j + 1], axis=1) for j in range(i, t + 1)]
            matrix[:, :, t, i] = np.sum(products, axis=0)
    mask = jnp.asarray(np.kron(matrix, np.ones((C, C))), jnp.float32)
    scores = jnp.einsum("binh,bjnh->bnij", query, key) * mask
    expected = jnp.einsum("bnij,bjnv->binv", scores, value)
    expected = expected + jnp.einsum("binh,nhv->binv", query, initial["last"])
    assert np.abs(flat(found) - expected).max() < 1e-5 * np.abs(expected).max()


def test_the_last_step_is_linear_attention_over_chunks_and_so_are_its_gradients(rng):
    rule = rule_of("no_muon")
    initial, steps = make(rng, rule)
    initial = {"last": jnp.zeros_like(initial["last"])}
    mask = jnp.asarray(np.kron(np.tri(M), np.ones((C, C))), jnp.float32)[None, None]
    flat = lambda x: x.reshape(B, M * C, *x.shape[3:])  # noqa: E731

    def linear(query, key, value):
        scores = jnp.einsum("binh,bjnh->bnij", flat(query), flat(key)) * mask
        return jnp.einsum("bnij,bjnv->binv", scores, flat(value))

    def fast(form, query, key, value):
        chunks = steps.chunks._replace(key=key, value=value)
        return flat(run(rule, initial, steps._replace(chunks=chunks, queries=query), form)[0])

    arrays = (steps.queries, *steps.chunks[:2])
    expected, pull = jax.vjp(linear, *arrays)
    cotangent = jnp.asarray(rng.normal(size=expected.shape), jnp.float32)
    for form in (fast_weights.one_by_one, fast_weights.all_at_once):
        found, other = jax.vjp(functools.partial(fast, form), *arrays)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
        for a, b in zip(other(cotangent), pull(cotangent), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_momentum_of_many_chunks_is_as_exact_as_of_few(rng):
    """Shares of a half: a product of them over 100 chunks is 1e-30, and over 200 no number."""
    rule = Rule(update="last", weight_norm=False, orthogonalize=False)
    initial, steps = make(rng, rule)
    many = lambda x: jnp.concatenate([x] * 50, axis=1)  # noqa: E731
    steps = jax.tree.map(many, steps)
    steps = steps._replace(chunks=steps.chunks._replace(share=0.5 + 0 * steps.chunks.share))
    wanted, found = (
        run(rule, initial, steps, form)[1]
        for form in (fast_weights.one_by_one, fast_weights.all_at_once)
    )
    for a, b in zip(*map(jax.tree.leaves, (wanted, found)), strict=True):
        assert np.abs(a - b).max() < 1e-5 * np.abs(a).max()


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)], ids=str)
def test_muon_keeps_directions_and_makes_their_sizes_one(rng, shape):
    left, _, right = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    sizes = np.geomspace(30.0, 0.5, min(shape))  # of no matter
    x = jnp.asarray(np.stack([left * sizes @ right, np.zeros(shape)]), jnp.float32)
    found = fast_weights.orthogonal(x, jnp.float32)
    np.testing.assert_allclose(found[0], left @ right, atol=0.03)
    assert np.all(found[1] == 0)
    half = fast_weights.orthogonal(x, jnp.bfloat16)
    assert half.dtype == jnp.float32 and 1e-4 < np.abs(half - found).max() < 0.1


@pytest.mark.parametrize("step", ["baseline", "no_weight_norm"])
def test_ascent_is_descent_on_values_of_the_other_sign(rng, step):
    rule = rule_of(step)
    initial, steps = make(rng, rule)
    ascent = run(dataclasses.replace(rule, direction="ascent"), initial, steps)[0]
    other = steps._replace(chunks=steps.chunks._replace(value=-steps.chunks.value))
    np.testing.assert_allclose(ascent, run(rule, initial, other)[0], rtol=1e-4, atol=1e-4)
    assert np.abs(ascent - run(rule, initial, steps)[0]).max() > 0.1


def test_a_share_of_zero_is_no_momentum(rng):
    rule = Rule()
    initial, steps = make(rng, rule)
    zero = steps.chunks._replace(share=jnp.zeros_like(steps.chunks.share))
    found = run(rule, initial, steps._replace(chunks=zero))[0]
    without = steps.chunks._replace(share=None)
    rule = dataclasses.replace(rule, momentum=False)
    expected = run(rule, initial, steps._replace(chunks=without))[0]
    np.testing.assert_array_equal(found, expected)


def test_weight_norm_keeps_the_norms_of_output_units(rng):
    rule = Rule()
    initial, steps = make(rng, rule)
    _, learned = run(rule, initial, steps)
    for name, change in learned.changes.items():
        norms = fast_weights.unit_norms(initial[name][None] + change)
        wanted = fast_weights.unit_norms(initial[name])[None]
        np.testing.assert_allclose(norms, jnp.broadcast_to(wanted, norms.shape), rtol=1e-4)


def test_more_inner_steps_lower_the_inner_loss(rng):
    losses = []
    for inner_steps in (1, 4):
        rule = Rule(momentum=False, orthogonalize=False, inner_steps=inner_steps)
        initial, steps = make(rng, rule)
        small = steps.chunks._replace(rate=0.01 * steps.chunks.rate, share=None)
        chunk = jax.tree.map(lambda x: x[:, 0], small)
        weights = {n: jnp.broadcast_to(x[None], (B, *x.shape)) for n, x in initial.items()}
        weights, _ = fast_weights.learn(rule, initial, weights, {}, chunk)
        losses.append(-float(jnp.sum(apply(weights, chunk.key) * chunk.value)))
        rng = np.random.default_rng(0)
    assert losses[1] < losses[0]


def test_a_chunk_is_read_with_what_the_chunks_before_it_left(rng):
    rule = rule_of("no_muon")
    initial, steps = make(rng, rule)
    start = fast_weights.nothing_learned(rule, initial, B)
    query, key, value = (x.reshape(B, M * C, N, K) for x in (steps.queries, *steps.chunks[:2]))

    @jax.jit
    def read(value):
        chunk = Chunk(key, value, None, None)
        return read_rows(rule, "auto", C, initial, start, query, chunk)

    before = read(value)
    after = read(value.at[:, C + 1].add(1.0))  # a token of the second chunk
    np.testing.assert_array_equal(after[:, : 2 * C], before[:, : 2 * C])
    assert np.all(np.abs(after[:, 2 * C :] - before[:, 2 * C :]).max(axis=(2, 3)) > 1e-3)


@pytest.mark.parametrize(("length", "updates"), [(C, 0), (C + 1, 1), (2 * C, 1), (2 * C + 1, 2)])
def test_nothing_is_learned_that_no_query_reads(length, updates, monkeypatch):
    taken = []

    def run(rule, form, initial, start, steps):
        taken.append(steps.valid.shape[1])
        return steps.queries, start

    monkeypatch.setattr(fast_weight_rows, "run", run)
    x = jnp.ones((B, length, N, K))
    rule, initial = rule_of("no_muon"), {"last": jnp.ones((N, K, K))}
    start = fast_weights.nothing_learned(rule, initial, B)
    read_rows(rule, "auto", C, initial, start, x, Chunk(x, x, None, None))
    assert sum(taken) == updates


def test_chunks_are_counted_from_the_start_of_each_document():
    segments = np.array([[0, 1, 1, 0, 1, 1, 1, 2, 2, 2, 0, 3], [5] * 12])
    layout = make_layout(*documents(jnp.asarray(segments, jnp.int32)), 2)
    T = 12
    chunks = [[1, 2], [4, 5], [7, 8], [T, T], [T, T], [T, T]]
    np.testing.assert_array_equal(layout.chunks[0], chunks)
    following = [[4, 5], [6, T], [9, T], [T, T], [T, T], [T, T]]
    np.testing.assert_array_equal(layout.following[0], following)
    np.testing.assert_array_equal(layout.valid[0], [True] * 3 + [False] * 3)
    np.testing.assert_array_equal(layout.fresh[0], [False, False, True, False, False, False])
    np.testing.assert_array_equal(layout.place[0], [-1, -1, -1, -1, 0, 1, 2, -1, -1, 4, -1, -1])
    np.testing.assert_array_equal(layout.rest[0], [11])
    assert layout.ends_fresh.tolist() == [True, False]
    np.testing.assert_array_equal(layout.chunks[1], np.arange(12).reshape(6, 2))
    np.testing.assert_array_equal(layout.rest[1], [T])


def test_the_parallel_form_keeps_a_state_for_each_chunk_and_the_sequential_one_does_not():
    rule = rule_of("no_muon")
    sizes = []
    for form in (fast_weights.one_by_one, fast_weights.all_at_once):
        draw = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
        chunk = Chunk(draw(1, 64, 2, 1, 32), draw(1, 64, 2, 1, 32), None, None)
        flags = jax.ShapeDtypeStruct((1, 64), bool)
        steps = Steps(chunk, draw(1, 64, 2, 1, 32), flags, flags)
        initial = {"last": draw(1, 32, 32)}
        start = fast_weights.Learned({"last": draw(1, 1, 32, 32)}, {})
        compiled = jax.jit(functools.partial(form, rule)).lower(initial, start, steps).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    states = 4 * 64 * 32 * 32
    assert sizes[0] < states < sizes[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "parallel"}, "set update='last', weight_norm=False and inner_steps=1"),
        ({"form": "parallel", "update": "last"}, "update='last', weight_norm=True, inner_steps=1"),
        ({"features": "identity"}, "set update='last' and hidden_dim=None"),
        ({"read_with": "key", "window": None}, "leave queries without use"),
        ({"window_head_dim": 3}, "window_head_dim=3 does not divide head_dim=4"),
        ({"chunk_size": 0}, "chunk_size=0; it must be at least 1"),
        ({"base_rate": 0.0}, "base_rate=0.0; it must be above 0"),
        ({"num_heads": 3}, "embed_dim=16 is not divisible by num_heads=3"),
    ],
)
def test_options_at_odds_are_said_in_one_line(options, message):
    model = {"embed_dim": 16, "layers": (layer("ttt", **options),)}
    with pytest.raises(ConfigError, match=message) as error:
        Config.from_dict({"model": model})
    assert "\n" not in str(error.value)


def test_rates_start_at_the_base_rate_whatever_its_size():
    for rate in (1e-3, 1.0, 1e3):
        options = TTTOptions(base_rate=rate)
        mixer = TTT(ModelConfig(embed_dim=16), options, nnx.Rngs(0))
        np.testing.assert_allclose(jax.nn.softplus(mixer.rate_bias[...]), rate, rtol=1e-4)


def test_each_step_of_the_ladder_is_a_mixer():
    for step in LADDER:
        TTTOptions(**ladder(step)).check(ModelConfig(embed_dim=16))
    assert [TTTOptions(**ladder(step)).is_linear for step in LADDER] == [False] * 2 + [True] * 5
