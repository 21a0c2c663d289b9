"""Mamba-2 against the state-space recurrence, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.config import ModelConfig, OptimizerConfig
from efficient_lm.errors import ConfigError
from efficient_lm.mixers.mamba2 import Mamba2, Mamba2Options
from efficient_lm.model.context import Context
from efficient_lm.training.optimizer import parameter_groups
from tests.parallel import test_equality as meshes

MODEL = ModelConfig(embed_dim=8, num_layers=1, initializer="fan_in")
LENGTH = 9
CONTEXT = Context(positions=jnp.zeros((1, LENGTH), jnp.int32))


def silu(x):
    return x / (1.0 + np.exp(-x))


@pytest.mark.parametrize(
    ("groups", "norm"), [(1, "group"), (2, "group"), (2, "head")], ids=lambda x: str(x)
)
def test_the_layer_is_a_state_space_model(rng, groups, norm):
    options = Mamba2Options(head_dim=4, state_dim=3, num_groups=groups, norm=norm)
    graph, state = nnx.split(Mamba2(MODEL, options, nnx.Rngs(0)))
    state = jax.tree.map(
        lambda x: x + 0.3 * jnp.asarray(rng.standard_normal(x.shape), x.dtype), state
    )
    mixer = nnx.merge(graph, state)
    p = {k: np.asarray(v, np.float64) for k, v in nnx.to_pure_dict(state).items()}
    x = rng.standard_normal((LENGTH, MODEL.embed_dim))

    def convolved(name):
        y = np.einsum("td,dnh->tnh", x, p[name])
        padded = np.concatenate([np.zeros((3, *y.shape[1:])), y])
        y = sum(p[f"{name}_convolution"][..., i] * padded[i : i + LENGTH] for i in range(4))
        return silu(y + p[f"{name}_convolution_bias"])

    c, b, values = map(convolved, ("query", "key", "value"))
    step = np.log1p(np.exp(x @ p["step"] + p["step_bias"]))
    heads = values.shape[1]
    assert heads == 4
    memory, y = np.zeros((heads, 4, 3)), np.zeros_like(values)
    for t in range(LENGTH):
        for h in range(heads):
            g = h // (heads // groups)
            keep = np.exp(-np.exp(p["log_rate"][h]) * step[t, h])
            memory[h] = keep * memory[h] + step[t, h] * np.outer(values[t, h], b[t, g])
            y[t, h] = memory[h] @ c[t, g] + p["skip"][h] * values[t, h]
    y = y * silu(np.einsum("td,dnh->tnh", x, p["gate"]))
    over = y.reshape(LENGTH, heads if norm == "head" else groups, -1)
    over = over / np.sqrt((over**2).mean(-1, keepdims=True) + MODEL.norm_epsilon)
    expected = np.einsum("tnh,nhd->td", over.reshape(y.shape) * p["norm"], p["out"])

    projected = mixer.project(jnp.asarray(x, jnp.float32)[None], CONTEXT)
    found = mixer.output(mixer.core(projected, CONTEXT)[0], projected, CONTEXT)
    np.testing.assert_allclose(found[0], expected, rtol=1e-3, atol=1e-4)


def test_it_starts_as_published_and_decays_steps_and_skips_have_no_weight_decay():
    mixer = Mamba2(MODEL, Mamba2Options(head_dim=1), nnx.Rngs(0))  # of 16 heads
    rates, steps = np.exp(mixer.log_rate[...]), jax.nn.softplus(mixer.step_bias[...])
    assert np.all((rates > 0.99) & (rates < 16.01)) and rates.max() - rates.min() > 8
    assert np.all((steps > 0.99e-3) & (steps < 0.101)) and np.max(steps) > 10 * np.min(steps)
    assert np.all(mixer.skip[...] == 1) and np.all(mixer.norm[...] == 1)
    groups = parameter_groups(OptimizerConfig(), nnx.state(mixer))
    decayed = {name for name, group in groups.items() if group.decay}
    assert decayed == {"query", "key", "value", "gate", "step", "out"}


def test_a_norm_over_groups_of_heads_is_not_mixed_in_stages(monkeypatch):
    options = {"head_dim": 4, "state_dim": 6}
    monkeypatch.setitem(meshes.CASES["mamba2"], "one_group", options)
    config = meshes.make_config("mamba2", "one_group", {"sequence": 4, "heads_at_once": 4})
    with pytest.raises(ConfigError, match="'mamba2' with these options normalises over all heads"):
        meshes.loss_and_gradients(config, 4)


@pytest.mark.slow
def test_a_norm_over_all_heads_spans_devices(monkeypatch):
    monkeypatch.setitem(meshes.CASES["mamba2"], "one_group", {"head_dim": 4, "state_dim": 6})
    config = meshes.make_config("mamba2", "one_group", meshes.MESHES["tensor_ulysses"])
    alone = meshes.make_config("mamba2", "one_group", {})
    meshes.assert_same(meshes.loss_and_gradients(config, 8), meshes.loss_and_gradients(alone, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 3}, "expand \\* embed_dim = 16 is not divisible by head_dim=3"),
        ({"head_dim": 4, "num_groups": 3}, "num_groups=3 does not divide the 4 heads"),
        ({"state_dim": 0}, "state_dim=0; it must be at least 1"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_say_so(options, message):
    with pytest.raises(ConfigError, match=message):
        Mamba2Options(**options).check(MODEL)
