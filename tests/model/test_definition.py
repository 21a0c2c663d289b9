"""Definitions: a model without arrays, its parameters' metadata, and how it is initialised."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.config import ModelConfig, layer
from efficient_lm.model.definition import arrays_of, define, initialize, unstack
from efficient_lm.model.parameter import parameter
from tests.model.tiny import SIZES, tiny

EVERYTHING = {
    "num_layers": 5,
    "layers": (
        layer(gate="sigmoid", bias=True, output_bias=True, sink=True, qk_norm=True),
        layer(num_key_value_heads=1, ffn_options={"activation": "gelu", "bias": True}),
    ),
    "tie_embeddings": False,
    "norm_placement": "sandwich",
}


def leaves(tree) -> dict:
    """Parameters by path."""
    is_parameter = lambda leaf: isinstance(leaf, nnx.Param)  # noqa: E731
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_parameter)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in found}


@pytest.mark.parametrize("scan", [True, False])
def test_every_parameter_names_its_axes(scan):
    definition = define(ModelConfig(**(SIZES | EVERYTHING)), scan=scan)
    found = leaves(definition.parameters)
    assert len(found) > 30
    for path, leaf in found.items():
        assert len(leaf.axes) == len(leaf.shape), path
        assert len(set(leaf.axes)) == len(leaf.axes), path
        assert set(leaf.inputs) | set(leaf.outputs) <= set(leaf.axes), path
        assert not set(leaf.inputs) & set(leaf.outputs), path
        assert bool(leaf.inputs) == bool(leaf.outputs), path
        assert ("layers" in leaf.axes) == (".period." in path), path
        assert "layers" not in (*leaf.inputs, *leaf.outputs), path
        assert leaf.dtype == jnp.float32, path
        name = path.split(".")[-1]
        is_matrix = name in {"query", "key", "value", "gate", "out", "up", "down"}
        assert bool(leaf.inputs) == is_matrix, path


def test_a_parameter_needs_a_name_for_each_axis():
    with pytest.raises(ValueError, match="1 axis names"):
        parameter(jnp.zeros((2, 3)), ("embed",))


def test_defining_allocates_nothing_and_counts():
    definition = define(ModelConfig(embed_dim=8192, num_layers=80, vocabulary_size=128_256))
    values = [leaf.get_value() for leaf in leaves(definition.parameters).values()]
    assert all(isinstance(value, jax.ShapeDtypeStruct) for value in values)
    assert definition.count() == sum(int(np.prod(value.shape)) for value in values) > 10**10


def test_binding_and_taking_apart_again_changes_nothing():
    definition, arrays = tiny(**EVERYTHING)
    again = arrays_of(definition.bind(arrays))
    assert jax.tree.structure(again) == jax.tree.structure(arrays)
    jax.tree.map(np.testing.assert_array_equal, again, arrays)
    state = nnx.split(definition.bind(arrays))[1]
    bound = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    for path, leaf in leaves(definition.parameters).items():
        assert (bound[path].axes, bound[path].inputs) == (leaf.axes, leaf.inputs)
    assert unstack(unstack(arrays)).keys() == arrays.keys()


@functools.cache
def wide(kind: str):
    """The definition of a wide model with a given initialiser."""
    return define(
        ModelConfig(
            vocabulary_size=256,
            embed_dim=96,
            num_layers=8,
            initializer=kind,
            mixers={"attention": {"num_heads": 4, "bias": True, "sink": True}},
            ffns={"dense": {"hidden_dim": 192}},
            tie_embeddings=False,
        )
    )


draw = jax.jit(initialize, static_argnums=0)


@pytest.mark.parametrize(
    ("kind", "embedding", "query", "out", "up", "down"),
    [
        ("normal", 0.02, 0.02, 0.02, 0.02, 0.02),
        ("depth_scaled_normal", 0.02, 0.02, 0.005, 0.02, 0.005),  # 1 / sqrt(2 * 8) = 1 / 4
        ("fan_in", 96**-0.5, 96**-0.5, 96**-0.5, 96**-0.5, 192**-0.5),
    ],
)
def test_spread_of_initial_values(kind, embedding, query, out, up, down):
    arrays = draw(wide(kind), jax.random.key(0))
    block = arrays["stack"]["period"]["0"]
    for values, spread in (
        (arrays["embedding"], embedding),
        (arrays["head"], embedding),
        (block["mixer"]["query"], query),
        (block["mixer"]["out"], out),
        (block["ffn"]["up"], up),
        (block["ffn"]["down"], down),
    ):
        values = np.asarray(values)
        np.testing.assert_allclose(values.std(), spread, rtol=0.02)
        assert abs(values.mean()) < 5 * spread / values.size**0.5
    for name in ("query_bias", "key_bias", "value_bias", "sink"):
        assert not np.any(block["mixer"][name]), name
    assert np.all(np.asarray(arrays["final_norm"]["scale"]) == 1.0)


def test_initial_values_depend_on_the_key_and_differ_between_parameters():
    arrays, again, other = (draw(wide("normal"), jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, arrays, again)
    assert np.mean(np.asarray(arrays["embedding"] != other["embedding"])) > 0.99
    mixer = arrays["stack"]["period"]["0"]["mixer"]
    assert np.mean(np.asarray(mixer["query"] != mixer["key"])) > 0.99
    layers = np.asarray(mixer["query"])
    assert len(np.unique(layers[:, 0, 0, 0])) == len(layers)
    assert np.mean(np.asarray(arrays["embedding"] != arrays["head"])) > 0.99
