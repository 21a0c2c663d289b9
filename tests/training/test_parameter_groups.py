"""Which optimizer each parameter of a model gets: a golden table, and metadata that is refused."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from efficient_lm.config import ModelConfig, OptimizerConfig
from efficient_lm.model.definition import define
from efficient_lm.training.optimizer import format_groups, make_optimizer, parameter_groups

GOLDEN = """\
embedding                                    adamw  no decay
final_norm/scale                             adamw  no decay
head                                         adamw  no decay
stack/period/0/ffn/down                      muon   decay     (1,) -> (2,)
stack/period/0/ffn/gate                      muon   decay     (1,) -> (2,)
stack/period/0/ffn/up                        muon   decay     (1,) -> (2,)
stack/period/0/ffn_residual/norm_in/scale    adamw  no decay
stack/period/0/mixer/gate                    muon   decay     (1,) -> (2, 3)
stack/period/0/mixer/key                     muon   decay     (1,) -> (2, 3)
stack/period/0/mixer/key_bias                adamw  no decay
stack/period/0/mixer/key_norm/scale          adamw  no decay
stack/period/0/mixer/out                     muon   decay     (1, 2) -> (3,)
stack/period/0/mixer/out_bias                adamw  no decay
stack/period/0/mixer/query                   muon   decay     (1,) -> (2, 3)
stack/period/0/mixer/query_bias              adamw  no decay
stack/period/0/mixer/query_norm/scale        adamw  no decay
stack/period/0/mixer/sink                    adamw  no decay
stack/period/0/mixer/value                   muon   decay     (1,) -> (2, 3)
stack/period/0/mixer/value_bias              adamw  no decay
stack/period/0/mixer_residual/norm_in/scale  adamw  no decay
stack/period/1/ffn/down                      muon   decay     (1,) -> (2,)
stack/period/1/ffn/down_bias                 adamw  no decay
stack/period/1/ffn/gate                      muon   decay     (1,) -> (2,)
stack/period/1/ffn/up                        muon   decay     (1,) -> (2,)
stack/period/1/ffn/up_bias                   adamw  no decay
stack/period/1/ffn_residual/norm_in/scale    adamw  no decay
stack/period/1/mixer/key                     muon   decay     (1,) -> (2, 3)
stack/period/1/mixer/out                     muon   decay     (1, 2) -> (3,)
stack/period/1/mixer/query                   muon   decay     (1,) -> (2, 3)
stack/period/1/mixer/value                   muon   decay     (1,) -> (2, 3)
stack/period/1/mixer_residual/norm_in/scale  adamw  no decay
stack/rest/0/ffn/down                        muon   decay     (0,) -> (1,)
stack/rest/0/ffn/gate                        muon   decay     (0,) -> (1,)
stack/rest/0/ffn/up                          muon   decay     (0,) -> (1,)
stack/rest/0/ffn_residual/norm_in/scale      adamw  no decay
stack/rest/0/mixer/gate                      muon   decay     (0,) -> (1, 2)
stack/rest/0/mixer/key                       muon   decay     (0,) -> (1, 2)
stack/rest/0/mixer/key_bias                  adamw  no decay
stack/rest/0/mixer/key_norm/scale            adamw  no decay
stack/rest/0/mixer/out                       muon   decay     (0, 1) -> (2,)
stack/rest/0/mixer/out_bias                  adamw  no decay
stack/rest/0/mixer/query                     muon   decay     (0,) -> (1, 2)
stack/rest/0/mixer/query_bias                adamw  no decay
stack/rest/0/mixer/query_norm/scale          adamw  no decay
stack/rest/0/mixer/sink                      adamw  no decay
stack/rest/0/mixer/value                     muon   decay     (0,) -> (1, 2)
stack/rest/0/mixer/value_bias                adamw  no decay
stack/rest/0/mixer_residual/norm_in/scale    adamw  no decay
"""


def test_groups_of_the_language_model():
    """Every parameter of a model with all optional parts is in exactly one, expected, group."""
    everything = {"qk_norm": True, "gate": "sigmoid", "sink": True, "bias": True}
    config = ModelConfig(
        num_layers=5,
        embed_dim=16,
        tie_embeddings=False,
        layers=(
            ("attention", everything | {"output_bias": True, "num_key_value_heads": 2}),
            ("attention", {}, "dense", {"bias": True}),
        ),
    )
    definition = define(config)
    groups = parameter_groups(OptimizerConfig(name="muon"), definition.parameters)
    assert format_groups(groups) == GOLDEN.rstrip("\n")
    adamw = parameter_groups(OptimizerConfig(name="adamw"), definition.parameters)
    assert {group.optimizer for group in adamw.values()} == {"adamw"}
    assert {p: g.decay for p, g in adamw.items()} == {p: g.decay for p, g in groups.items()}
    # Each array of the optimizer's state belongs to one group alone.
    optimizer = make_optimizer(OptimizerConfig(name="muon"), definition.parameters, 10)
    shapes = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32),
        definition.parameters,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
    state = jax.eval_shape(optimizer.init, shapes)
    sizes = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim > 1)
    muon = sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
        if groups[jax.tree_util.keystr(path, simple=True, separator="/")].optimizer == "muon"
    )
    vectors = sum(leaf.size for leaf in jax.tree.leaves(shapes) if leaf.ndim == 1)
    assert sizes == muon + 2 * (definition.count() - muon - vectors)


def shaped(shape, axes, inputs, outputs):
    return nnx.Param(jnp.zeros(shape), axes=axes, inputs=inputs, outputs=outputs)


def test_metadata_that_cannot_be_grouped_is_refused():
    config = OptimizerConfig()
    for axes, inputs, outputs, message in (
        (("embed", "mlp"), ("embed",), (), "give both or neither"),
        (("embed", "mlp"), ("embed",), ("heads",), "each axis once"),
        (("embed", "mlp"), ("embed", "mlp"), ("mlp",), "disjoint"),
        (("embed",), ("embed",), ("mlp",), "each of the 2 dimensions"),
    ):
        with pytest.raises(ValueError, match=message):
            parameter_groups(config, {"w": shaped((4, 8), axes, inputs, outputs)})
