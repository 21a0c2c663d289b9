"""2Mamba's own promises; the registry suite has those of every mixer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.config import Config, ModelConfig, OptimizerConfig, layer
from efficient_lm.errors import ConfigError
from efficient_lm.mixers.two_mamba import TwoMamba, TwoMambaOptions
from efficient_lm.model.context import Context
from efficient_lm.training.optimizer import parameter_groups
from tests.model.tiny import run, tiny

MODEL = ModelConfig(embed_dim=8, num_layers=1, initializer="fan_in")
LENGTH = 9


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decay": "step"},
        {"score": "exponential"},
        {"score": "linear"},
        {"score": "linear", "decay": "step", "norm": "head"},
    ],
    ids=str,
)
def test_the_layer_is_that_of_the_paper(rng, options):
    """With a loop over pairs of tokens, in fp64."""
    options = TwoMambaOptions(num_heads=2, **options)
    graph, state = nnx.split(TwoMamba(MODEL, options, nnx.Rngs(0)))
    state = jax.tree.map(
        lambda x: x + 0.3 * jnp.asarray(rng.standard_normal(x.shape), x.dtype), state
    )
    mixer = nnx.merge(graph, state)
    p = {k: np.asarray(v, np.float64) for k, v in nnx.to_pure_dict(state).items()}
    x = rng.standard_normal((LENGTH, 8))

    def convolved(name):
        y = np.einsum("td,dnh->tnh", x, p[name])
        before = np.concatenate([np.zeros_like(y[:1]), y[:-1]])
        weight = p[f"{name}_convolution"]
        return weight[..., 0] * before + weight[..., 1] * y + p[f"{name}_bias"]

    q, k, v = map(convolved, ("query", "key", "value"))
    if options.decay == "step":
        step = np.log1p(np.exp(x @ p["step"] + p["step_bias"]))
        decay = np.cumsum(-np.exp(p["log_rate"]) * step, axis=0)
    else:  # read from the layer's input, not from what was convolved
        decay = np.cumsum(-np.log1p(np.exp(x @ p["decay"])), axis=0)
    score = {"square": np.square, "exponential": np.exp, "linear": lambda r: r}[options.score]
    if options.score == "linear":
        v = v * np.log1p(np.exp(x @ p["step"] + p.get("step_bias", 0.0)))[..., None]
    y = np.zeros_like(v)
    for n in range(2):
        for i in range(LENGTH):
            weights = [
                score(q[i, n] @ k[j, n] / 2.0) * np.exp(decay[i, n] - decay[j, n])
                for j in range(i + 1)
            ]
            y[i, n] = weights @ v[: i + 1, n]
            if options.score != "linear":
                y[i, n] /= np.sum(weights)
    if options.score == "linear":
        axes = (1, 2) if options.norm == "all" else 2
        y = y / np.sqrt((y**2).mean(axes, keepdims=True) + MODEL.norm_epsilon) * p["norm"]
    context = Context(positions=jnp.zeros((1, LENGTH), jnp.int32))
    projected = mixer.project(jnp.asarray(x, jnp.float32)[None], context)
    found = mixer.output(mixer.core(projected, context)[0], projected, context)[0]
    np.testing.assert_allclose(found, np.einsum("tnh,nhd->td", y, p["out"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decay", ["softplus", "step"])
def test_a_decay_starts_as_published_and_small_parameters_have_no_weight_decay(decay):
    options = TwoMambaOptions(num_heads=8, score="linear", decay=decay)
    mixer = TwoMamba(MODEL, options, nnx.Rngs(0))
    if decay == "step":
        rates, steps = np.exp(mixer.log_rate[...]), jax.nn.softplus(mixer.step_bias[...])
        assert np.all((rates > 0.99) & (rates < 16.01)) and rates.max() - rates.min() > 5
        assert np.all((steps > 0.99e-3) & (steps < 0.101))
    groups = parameter_groups(OptimizerConfig(), nnx.state(mixer))
    # A decay by softplus has neither a bias nor a rate.
    own = {"log_rate", "step_bias"} if decay == "step" else {"decay"}
    convolutions = {f"{name}_convolution" for name in ("query", "key", "value")}
    biases = {f"{name}_bias" for name in ("query", "key", "value")}
    matrices = {"query", "key", "value", "out", "step"} | (own & {"decay"})
    assert set(groups) == matrices | own | convolutions | biases | {"norm"}
    assert {name for name, group in groups.items() if group.decay} == matrices


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "embed_dim=16 is not divisible by num_heads=3; set head_dim"),
        ({"convolution_width": 0}, "convolution_width=0; it must be at least 1"),
        ({"score": "cubic"}, "cubic"),
    ],
)
def test_options_at_odds_are_said_in_one_line(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        Config.from_dict({"model": {"embed_dim": 16, "layers": (layer("two_mamba", **options),)}})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("score", ["square", "exponential"])
def test_outputs_are_averages_of_convolved_values(score):
    layers = (layer("two_mamba", ffn="none", num_heads=1, score=score, convolution_width=1),)
    definition, arrays = tiny(layers=layers, num_layers=1, scan_layers=False)
    tokens = jnp.arange(10, dtype=jnp.int32)[None]

    def change(path, leaf):
        fixed = {"value": 0.0, "value_bias": 2.0}
        name = path[-1].key
        return jnp.full_like(leaf, fixed[name]) if name in fixed else leaf

    arrays = jax.tree_util.tree_map_with_path(change, arrays)
    first = run(definition, arrays, tokens).hidden
    # All values are 2, and so are their averages, whatever the weights are.
    scaled = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 3.0 * leaf if path[-1].key in ("key", "query") else leaf, arrays
    )
    second = run(definition, scaled, tokens).hidden
    np.testing.assert_allclose(first, second, atol=1e-5)


def test_flops_grow_with_length_until_a_memory_is_cheaper():
    model = ModelConfig(embed_dim=64)
    count = lambda length, **options: TwoMamba.core_flops(  # noqa: E731
        model, TwoMambaOptions(num_heads=4, **options), length
    )
    assert count(64) < count(128) and count(1024) == count(2**20)
    assert count(2**20, score="linear") < count(2**20) < count(2**20, score="exponential")
