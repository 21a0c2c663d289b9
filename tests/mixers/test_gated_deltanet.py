"""Gated DeltaNet and Kimi delta attention against the definition of the layer, token by token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.config import ModelConfig, OptimizerConfig
from efficient_lm.errors import ConfigError
from efficient_lm.mixers.gated_deltanet import GatedDeltaNet, GatedDeltaNetOptions
from efficient_lm.mixers.kda import KimiDeltaAttention, KimiDeltaAttentionOptions
from efficient_lm.model.context import Context
from efficient_lm.model.stack import REMAT_POLICIES
from efficient_lm.training.optimizer import parameter_groups
from pallas_kernels.short_convolution.xla import of_norm_one

MODEL = ModelConfig(embed_dim=12, num_layers=1, initializer="fan_in")
SIZES = {"num_value_heads": 4, "num_key_heads": 2, "key_dim": 4, "value_dim": 6}
LENGTH = 9
CONTEXT = Context(positions=jnp.zeros((1, LENGTH), jnp.int32))


def make(cls, options, seed=0):
    """A mixer whose parameters are away from their special start values."""
    mixer = cls(MODEL, options, nnx.Rngs(seed))
    graph, state = nnx.split(mixer)
    rng = np.random.default_rng(seed)
    state = jax.tree.map(
        lambda x: x + 0.3 * jnp.asarray(rng.standard_normal(x.shape), x.dtype), state
    )
    return nnx.merge(graph, state)


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.standard_normal((1, LENGTH, MODEL.embed_dim)), jnp.float32)


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def definition(mixer, x, log_decay, gate_activation):
    """The layer for one row, in float64; log_decay and gates [T, N, ...]."""
    options = mixer.options
    p = {k: np.asarray(v, np.float64) for k, v in nnx.to_pure_dict(nnx.state(mixer)).items()}
    x = np.asarray(x[0], np.float64)

    def convolved(name):
        y = np.einsum("td,dnh->tnh", x, p[name])
        w = p[f"{name}_convolution"]
        padded = np.concatenate([np.zeros((w.shape[-1] - 1, *y.shape[1:])), y])
        y = sum(w[..., i] * padded[i : i + len(x)] for i in range(w.shape[-1]))
        return y * sigmoid(y)

    q, k, v = map(convolved, ("query", "key", "value"))
    q, k = (y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
    q, k = (np.repeat(y, v.shape[1] // y.shape[1], axis=1) for y in (q, k))  # as Qwen3.5
    beta = sigmoid(x @ p["beta"]) * (2.0 if options.negative_eigenvalues else 1.0)
    state, o = np.zeros((v.shape[1], q.shape[2], v.shape[2])), np.zeros_like(v)
    for t in range(len(x)):
        for n in range(v.shape[1]):
            state[n] *= np.exp(np.broadcast_to(log_decay[t, n], q.shape[2]))[:, None]
            error = v[t, n] - state[n].T @ k[t, n]
            state[n] += beta[t, n] * np.outer(k[t, n], error)
            o[t, n] = state[n].T @ q[t, n] / np.sqrt(q.shape[2])
    o = o / np.sqrt((o**2).mean(-1, keepdims=True) + MODEL.norm_epsilon) * p["norm"]
    if gate_activation is not None:
        if "gate" not in p:
            p["gate"] = np.einsum("dr,rnh->dnh", p["gate_down"], p["gate_up"])
        o = o * gate_activation(np.einsum("td,dnh->tnh", x, p["gate"]))
    return np.einsum("tnh,nhd->td", o, p["out"])


@pytest.mark.parametrize(
    "changes",
    [{}, {"negative_eigenvalues": True}, {"decay": False}, {"gate": False},
     {"convolution_width": 1}],
    ids=str,
)  # fmt: skip
def test_the_layer_is_that_of_qwen(x, changes):
    mixer = make(GatedDeltaNet, GatedDeltaNetOptions(**SIZES, **changes))
    log_decay = np.zeros((LENGTH, 4))
    if mixer.options.decay:
        step = np.asarray(x[0] @ mixer.step[...] + mixer.step_bias[...][None], np.float64)
        log_decay = -np.exp(np.asarray(mixer.log_rate[...])) * np.log1p(np.exp(step))
    gate = (lambda z: z * sigmoid(z)) if mixer.options.gate else None
    expected = definition(mixer, x, log_decay, gate)
    y = mixer.output(*run_core(mixer, x), CONTEXT)
    np.testing.assert_allclose(y[0], expected, rtol=1e-3, atol=1e-4)


def run_core(mixer, x):
    projected = mixer.project(x, CONTEXT)
    return mixer.core(projected, CONTEXT)[0], projected


def test_kimi_delta_attention_decays_each_feature_and_gates_by_a_sigmoid(x):
    mixer = make(KimiDeltaAttention, KimiDeltaAttentionOptions(**SIZES, rank=3))
    step = jnp.einsum("td,dr,rnh->tnh", x[0], mixer.step_down[...], mixer.step_up[...])
    step = np.asarray(step + mixer.step_bias[...][None], np.float64)
    log_decay = -np.exp(np.asarray(mixer.log_rate[...]))[None, :, None] * np.log1p(np.exp(step))
    y = mixer.output(*run_core(mixer, x), CONTEXT)
    np.testing.assert_allclose(y[0], definition(mixer, x, log_decay, sigmoid), rtol=1e-3, atol=1e-4)


def test_with_one_decay_for_all_features_kimi_delta_attention_is_gated_deltanet(x):
    vector = make(KimiDeltaAttention, KimiDeltaAttentionOptions(**SIZES))
    scalar = make(GatedDeltaNet, GatedDeltaNetOptions(**SIZES))
    for name in ("query_convolution", "key_convolution", "value_convolution", "log_rate"):
        setattr(vector, name, getattr(scalar, name))
    vector.step_bias[...] = jnp.repeat(scalar.step_bias[...][:, None], 4, axis=1)
    projected = scalar.project(x, CONTEXT)
    expected, _, _ = scalar.core(projected, CONTEXT)
    step = jnp.repeat(projected["step"][..., None], 4, axis=-1)
    found, _, _ = vector.core(projected | {"step": step}, CONTEXT)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("cls", "slowest"), [(GatedDeltaNet, 0.01), (KimiDeltaAttention, 1.0)], ids=["gdn", "kda"]
)
def test_decays_start_as_published_and_small_parameters_have_no_weight_decay(cls, slowest):
    mixer = cls(MODEL, cls.Options(**SIZES), nnx.Rngs(0))
    steps = np.asarray(jax.nn.softplus(mixer.step_bias[...]))
    rates = np.exp(np.asarray(mixer.log_rate[...]))
    assert np.all((steps > 0.99e-3) & (steps < 0.101)) and len(np.unique(steps)) == steps.size
    assert np.all((rates > 0.99 * slowest) & (rates < 16.01))
    groups = parameter_groups(OptimizerConfig(), nnx.state(mixer))
    decayed = {name for name, group in groups.items() if group.decay}
    matrices = {"query", "key", "value", "beta", "out"}
    for name in ("step", "gate"):
        matrices |= {name} if cls is GatedDeltaNet else {f"{name}_down", f"{name}_up"}
    assert decayed == matrices


def test_gradients_are_finite_where_queries_and_keys_are_zero(x):
    mixer = make(GatedDeltaNet, GatedDeltaNetOptions(**SIZES))
    graph, state = nnx.split(mixer)

    def loss(state, x):
        mixer = nnx.merge(graph, state)
        return jnp.sum(jnp.sin(mixer.output(*run_core(mixer, x), CONTEXT)))

    gradients = jax.grad(loss, argnums=(0, 1))(state, x.at[:, :5].set(0.0))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))


def test_norms_of_keys_have_an_epsilon_beside_the_square_and_are_fp32_in_bf16(rng):
    """x / sqrt(|x|^2 + 1e-6)."""
    sizes = np.array([1.0, 1e-3, 1e-5])[:, None]
    x = sizes * rng.standard_normal((3, 64)) / 8
    expected = x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)
    found = of_norm_one(jnp.asarray(x, jnp.float32)[None, None])
    np.testing.assert_allclose(found[0, 0], expected, rtol=1e-5)
    half = jnp.asarray(x, jnp.bfloat16)[None, None]
    once = of_norm_one(half.astype(jnp.float32)).astype(jnp.bfloat16)  # rounded
    np.testing.assert_array_equal(of_norm_one(half), once)


def test_policies_can_keep_what_the_kernel_gave_and_little_else(x):
    mixer = make(GatedDeltaNet, GatedDeltaNetOptions(**SIZES))

    def layer(x):
        mixed, projected = run_core(mixer, x)
        return mixer.output(mixed, projected, CONTEXT)

    kept = {}
    for policy in ("full", "mixer"):
        run = jax.checkpoint(layer, policy=REMAT_POLICIES[policy])
        arrays = jax.tree.leaves(jax.vjp(run, x)[1])
        kept[policy] = sorted(a.shape for a in arrays if LENGTH in getattr(a, "shape", ()))
    assert kept["full"] == [x.shape]
    assert kept["mixer"] == [(1, LENGTH, 4, 6), x.shape]


def test_without_a_policy_nothing_in_fp32_is_kept_of_each_feature(x):
    model = dataclasses.replace(MODEL, dtype="bfloat16")
    mixer = GatedDeltaNet(model, GatedDeltaNetOptions(**SIZES), nnx.Rngs(0))

    def layer(x):
        mixed, projected = run_core(mixer, x)
        return mixer.output(mixed, projected, CONTEXT)

    arrays = jax.tree.leaves(jax.vjp(layer, x.astype(jnp.bfloat16))[1])
    kept = [a for a in arrays if getattr(a, "shape", ())[:2] == (1, LENGTH) and a.ndim == 4]
    # q, k, v and gate as projected, and what the kernel gave; it keeps its inputs in chunks.
    assert len({id(a) for a in kept}) == 5
    assert {a.dtype for a in kept} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_value_heads": 5}, "embed_dim=12 is not divisible by num_value_heads=5"),
        ({"num_key_heads": 3}, "num_value_heads=4 is not a multiple of num_key_heads=3"),
        ({"convolution_width": 0}, "convolution_width=0; it must be at least 1"),
        ({"rank": 0}, "rank=0; it must be at least 1"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_say_so(options, message):
    cls = KimiDeltaAttentionOptions if "rank" in options else GatedDeltaNetOptions
    with pytest.raises(ConfigError, match=message):
        cls(**options).check(MODEL)
    assert dataclasses.is_dataclass(cls)


@pytest.mark.parametrize("cls", [GatedDeltaNet, KimiDeltaAttention], ids=["gdn", "kda"])
def test_a_value_replaces_the_one_before_it_and_a_decay_forgets_all(cls, rng):
    """Orthogonal keys and full writes make the memory a table: the last value of each key."""
    options = {"num_value_heads": 1, "key_dim": 4, "value_dim": 6, "convolution_width": 1}
    mixer = cls(MODEL, cls.Options(**options), nnx.Rngs(0))
    for name in ("query", "key", "value"):
        weight = getattr(mixer, f"{name}_convolution")
        weight[...] = jnp.ones_like(weight[...])
    keys, queries = np.array([0, 1, 0, 2, 1, 3, 0, 0, 2]), np.array([0, 1, 0, 0, 1, 2, 1, 0, 1])
    forget = 7  # what this token finds has decayed away
    values = rng.uniform(1.0, 2.0, (LENGTH, 6))
    step = jnp.full((1, LENGTH, 1), -50.0).at[:, forget].set(50.0)

    def one_hot(places):  # SiLU leaves zeros as they are, and the norm makes the rest one
        return jnp.asarray(9.0 * np.eye(4)[places], jnp.float32)[None, :, None]

    mixer.log_rate[...] = jnp.full_like(mixer.log_rate[...], 2.0)
    projected = {
        "query": one_hot(queries), "key": one_hot(keys),
        "value": jnp.asarray(values, jnp.float32)[None, :, None],
        "beta": jnp.full((1, LENGTH, 1), 50.0),
        "step": jnp.repeat(step[..., None], 4, axis=-1) if cls is KimiDeltaAttention else step,
    }  # fmt: skip
    found, _, _ = mixer.core(projected, CONTEXT)
    table = np.zeros((4, 6))
    for t in range(LENGTH):
        table = table * (t != forget)
        table[keys[t]] = values[t] * sigmoid(values[t])
        np.testing.assert_allclose(found[0, t, 0], table[queries[t]] / 2, rtol=1e-4, atol=1e-4)
