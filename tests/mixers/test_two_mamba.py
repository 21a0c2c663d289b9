"""2Mamba's own promises; the registry suite has those of every mixer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.config import Config, ModelConfig, layer
from efficient_lm.errors import ConfigError
from efficient_lm.mixers.two_mamba import TwoMamba, TwoMambaOptions
from tests.model.tiny import run, tiny


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
