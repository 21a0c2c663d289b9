"""The layer of test-time training beside its fast weights: window, probes, and how it starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm import masks
from efficient_lm.config import ModelConfig, OptimizerConfig
from efficient_lm.mixers.ttt import LADDER, TTT, TTTOptions, ladder
from efficient_lm.model.context import Context
from efficient_lm.model.rope import RopeConfig, rotate
from efficient_lm.training.optimizer import parameter_groups

MODEL = ModelConfig(embed_dim=16, num_layers=1, initializer="fan_in")
LENGTH, WINDOW = 11, 3
CONTEXT = Context(positions=jnp.arange(LENGTH, dtype=jnp.int32)[None], mask=masks.Causal())


def make(seed=0, **options):
    """A mixer whose parameters are away from their special start values."""
    options = TTTOptions(num_heads=2, chunk_size=4, orthogonalize=False, **options)
    mixer = TTT(MODEL, options, nnx.Rngs(seed))
    graph, state = nnx.split(mixer)
    rng = np.random.default_rng(seed)
    noise = lambda x: 0.3 * jnp.asarray(rng.standard_normal(x.shape), x.dtype)  # noqa: E731
    return nnx.merge(graph, jax.tree.map(lambda x: x + noise(x), state))


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.standard_normal((1, LENGTH, MODEL.embed_dim)), jnp.float32)


def mixed(mixer, x):
    """What the core gives, [1, T, N, H]."""
    return jax.jit(lambda x: mixer.core(mixer.project(x, CONTEXT), CONTEXT)[0])(x)


def test_attention_over_a_window_is_added_to_what_fast_weights_give(x):
    """Of the same queries, keys and values, rotated and with heads of their own."""
    both = make(window=WINDOW, window_head_dim=4)
    fast = make(window=None)
    parts = both.project(x, CONTEXT)
    q, k, v = (parts[name].reshape(1, LENGTH, 4, 4) for name in ("query", "key", "value"))
    q, k = (rotate(y, CONTEXT.positions, RopeConfig()) for y in (q, k))
    distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)[None]
    sees = (distance >= 0) & (distance < WINDOW)
    scores = np.exp(np.einsum("tnh,snh->nts", q[0], k[0]) / 2.0) * sees
    scores = scores / scores.sum(-1, keepdims=True)
    attended = np.einsum("nts,snh->tnh", scores, v[0]).reshape(LENGTH, 2, 8)
    np.testing.assert_allclose(mixed(both, x)[0] - mixed(fast, x)[0], attended, atol=1e-4)


def test_keys_can_stand_for_queries(x):
    """The paper's probe: the fast weights are read with what they learn from; attention is not."""
    probe = make(window=None, read_with="key")
    usual = make(window=None)
    for name in nnx.to_pure_dict(nnx.state(probe)):  # where they differ, noise does too
        setattr(usual, name, getattr(probe, name))
    assert np.abs(mixed(usual, x) - mixed(probe, x)).max() > 0.1
    usual.query, usual.query_scale = probe.key, probe.key_scale
    usual.query_offset = probe.key_offset
    np.testing.assert_allclose(mixed(usual, x), mixed(probe, x), rtol=1e-5, atol=1e-6)
    probe.query[...] = 2.0 * probe.query[...]
    np.testing.assert_array_equal(mixed(usual, x), mixed(probe, x))


@pytest.mark.parametrize("step", LADDER)
def test_rates_start_at_the_base_rate_and_small_parameters_have_no_weight_decay(step):
    options = TTTOptions(num_heads=2, base_rate=1e-3, **ladder(step))
    mixer = TTT(MODEL, options, nnx.Rngs(0))
    matrices = {"query", "key", "value", "gate", "out", "fast_last"}
    if options.features == "gated":
        matrices |= {"fast_in", "fast_gate"}
    if options.learned_rate:
        rates = jax.nn.softplus(mixer.rate_bias[...])
        assert rates.shape == (2, 3 if options.update == "all" else 1)
        np.testing.assert_allclose(rates, np.full(rates.shape, 1e-3), rtol=1e-4)
        matrices |= {"rate"}
    if options.momentum:
        matrices |= {"share"}
    groups = parameter_groups(OptimizerConfig(), nnx.state(mixer))
    assert {name for name, group in groups.items() if group.decay} == matrices
