"""The config schema: what is accepted, what is refused and in which words."""

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import ml_collections
import pytest
from absl import flags
from ml_collections import config_flags

from efficient_lm import registry
from efficient_lm.config import Config, ModelConfig, layer, layer_options, layer_pattern
from efficient_lm.errors import ConfigError
from efficient_lm.fields import build, with_placeholders
from efficient_lm.mixers.attention import AttentionOptions
from efficient_lm.model.rope import RopeConfig


def nested(path: str, value) -> dict:
    """{"a": {"b": value}} from "a.b"."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def with_flags(tmp_path, monkeypatch, *arguments: str) -> Config:
    """The Config that a door gets from a config file and `--config.a.b=c` arguments."""
    file = tmp_path / "config.py"
    file.write_text(
        "from efficient_lm.config import *\ndef get_config():\n  return Config().to_config_dict()\n"
    )
    argv = ["door", f"--config={file}", *arguments]
    monkeypatch.setattr(sys, "argv", argv)  # config_flags looks there for overrides
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    values(argv)
    return Config.from_config_dict(values.config)


# Unknown fields.


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("modle", {}, "unknown field config.modle; did you mean 'model'?"),
        ("model.embed_dims", 8, "config.model.embed_dims; did you mean 'embed_dim'?"),
        ("optimizer.schedule.warmup", 8, "schedule.warmup; did you mean 'warmup_steps'?"),
        ("model.mixers.atention", {}, "config.model.mixers.atention; did you mean 'attention'?"),
        ("model.mixers.attention.windw", 8, "attention.windw; did you mean 'window'?"),
        (
            "model.mixers.attention.rope.thta",
            1.0,
            "config.model.mixers.attention.rope.thta; did you mean 'theta'?",
        ),
        ("model.ffns.dense.hiden_dim", 8, "ffns.dense.hiden_dim; did you mean 'hidden_dim'?"),
        (
            "model.layers",
            (layer(), layer(windw=8)),
            "config.model.layers[1].options.windw; did you mean 'window'?",
        ),
        (
            "model.layers",
            (layer(rope={"thta": 8}),),
            "config.model.layers[0].options.rope.thta; did you mean 'theta'?",
        ),
        (
            "model.layers",
            (layer(ffn_options={"biass": True}),),
            "config.model.layers[0].ffn_options.biass; did you mean 'bias'?",
        ),
        (
            "model.layers",
            ("atention",),
            "config.model.layers[0].mixer='atention' is unknown; did you mean 'attention'?",
        ),
        (
            "model.layers",
            (layer(ffn="dence"),),
            "config.model.layers[0].ffn='dence' is unknown; did you mean 'dense'?",
        ),
        (
            "objective.name",
            "autoregresive",
            "config.objective.name='autoregresive' is unknown; did you mean 'autoregressive'?",
        ),
        ("training.zzz", 1, "unknown field config.training.zzz; known: "),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(path, value, message):
    with pytest.raises(ConfigError) as error:
        Config.from_dict(nested(path, value))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# Types and ranges.


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.embed_dim", "big", "config.model.embed_dim='big' is of type str; it must be int"),
        ("model.embed_dim", 8.0, "config.model.embed_dim=8.0 is of type float"),
        ("model.embed_dim", True, "config.model.embed_dim=True is of type bool"),
        ("model.embed_dim", None, "config.model.embed_dim=None is of type NoneType"),
        ("model.tie_embeddings", 1, "config.model.tie_embeddings=1 is of type int"),
        ("optimizer.learning_rate", "1e-3", "learning_rate='1e-3' is of type str"),
        ("optimizer.learning_rate", False, "learning_rate=False is of type bool"),
        ("optimizer.clip_norm", "no", "config.optimizer.clip_norm='no' is of type str"),
        ("model.norm", "layer_norm", "config.model.norm='layer_norm'; allowed: 'rms_norm', "),
        ("model", 3, "config.model must be a group of fields, given 3"),
        ("model.mixers", 3, "config.model.mixers=3; it must be a group of fields"),
        ("model.layers", 4, "config.model.layers=4; it must be a tuple"),
        ("data.paths", "a.txt", "paths='a.txt'; it must be a tuple, such as ('a.txt',)"),
        ("data.paths", ("a.txt", 3), "config.data.paths[1]=3 is of type int; it must be str"),
        ("model.mixers.attention.rope", "none", "attention.rope must be a group of fields"),
        ("model.mixers.attention.gate", "tanh", "attention.gate='tanh'; allowed: 'none'"),
        ("model.layers", (layer(window="8"),), "config.model.layers[0].options.window='8'"),
        ("model.layers", (("attention", {}, "dense", {}, 1),), "model.layers[0] has 5 parts"),
        ("model.layers", (), "config.model.layers is empty"),
        ("model.layers", (7,), "config.model.layers[0] must be a group of fields, given 7"),
        ("model.num_layers", 0, "config.model.num_layers=0; it must be at least 1"),
        ("optimizer.learning_rate", 0.0, "learning_rate=0.0; it must be above 0"),
        ("optimizer.learning_rate", float("nan"), "learning_rate=nan; it must be a finite number"),
        ("optimizer.clip_norm", float("inf"), "clip_norm=inf; it must be a finite number"),
        ("model.layers", (layer(soft_cap=float("inf")),), "options.soft_cap=inf; it must be a fin"),
        ("training.seed", 2**63, "seed=9223372036854775808; it must be a number of 64 bits"),
        ("optimizer.ema_decay", 1.0, "ema_decay=1.0; it must be in [0, 1)"),
        ("optimizer.schedule.warmup_steps", -1, "schedule.warmup_steps=-1; it must be at least 0"),
        ("model.dropout", 1.0, "config.model.dropout=1.0; it must be in [0, 1)"),
        ("data.valid_fraction", 1.0, "valid_fraction=1.0; it must be between 0 and 1"),
    ],
)  # fmt: skip
def test_wrong_types_and_ranges_name_the_field(path, value, message):
    with pytest.raises(ConfigError) as error:
        Config.from_dict(nested(path, value))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"data": {"sequence_length": 2048}},
            "config.data.sequence_length=2048 exceeds config.model.max_length=1024",
        ),
        (
            {"optimizer": {"accumulation_steps": 3}},
            "config.data.batch_size=16 is not divisible by config.optimizer.accumulation_steps=3",
        ),
        ({"parallel": {"data": -1, "fsdp": -1}}, "only one can take the rest"),
        ({"parallel": {"fsdp": 0}}, "config.parallel.fsdp=0; allowed: -1"),
        ({"evaluation": {"stride": 1000}}, "config.evaluation.stride=1000; allowed: 1 to"),
        (
            nested("model.mixers.attention", {"num_heads": 3}),
            "config.model.layers[0]: embed_dim=128 is not divisible by num_heads=3; set head_dim",
        ),
        (
            nested("model.mixers.attention", {"num_heads": 4, "num_key_value_heads": 3}),
            "num_heads=4 is not a multiple of num_key_value_heads=3",
        ),
        (nested("model.mixers.attention.num_heads", 0), "num_heads=0; it must be at least 1"),
        (
            nested("model.mixers.attention.num_key_value_heads", 0),
            "num_key_value_heads=0; it must be at least 1",
        ),
        (nested("model.mixers.attention.head_dim", 0), "head_dim=0; it must be at least 1"),
        (nested("model.layers", (layer(), layer(window=0))), "config.model.layers[1]: window=0"),
        (
            nested("model.mixers.attention.rope.fraction", 0.1),
            "rope.fraction=0.1 rotates 3 of 32 features",
        ),
        (
            nested("model.mixers.attention.rope.factor", 8.0),
            "rope.factor=8.0 has no effect with rope.scaling='none'; set scaling to",
        ),
        (
            nested("model.mixers.attention.rope.low_frequency_factor", 4.0),
            "rope.low_frequency_factor=4.0 must be below rope.high_frequency_factor=4.0",
        ),
        (nested("model.mixers.attention.soft_cap", 0.0), "soft_cap=0.0; it must be above 0"),
        (nested("model.ffns.dense.hidden_dim", 0), "hidden_dim=0; it must be at least 1"),
    ],
)
def test_impossible_combinations_say_what_would_be_possible(values, message):
    with pytest.raises(ConfigError) as error:
        Config.from_dict(values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_options_that_no_layer_uses_are_checked_for_names_and_types():
    unused = {"model": {"layers": (layer(ffn="none"),), "ffns": {"dense": {"bias": True}}}}
    Config.from_dict(unused)
    unused["model"]["ffns"]["dense"] = {"bais": True}
    with pytest.raises(ConfigError, match=r"ffns\.dense\.bais; did you mean 'bias'"):
        Config.from_dict(unused)


def test_ints_are_taken_for_floats_and_lists_for_tuples():
    config = Config.from_dict({"optimizer": {"clip_norm": 2}, "data": {"paths": ["a", "b"]}})
    assert type(config.optimizer.clip_norm) is float
    assert config.data.paths == ("a", "b")


# Layer patterns and merging.


def test_layer_entries_may_be_names_tuples_mappings_or_layers():
    entries = (
        "attention",
        ("attention", {"window": 8}),
        {"mixer": "attention", "ffn": "none"},
        layer(window=8, ffn_options={"bias": True}),
    )
    pattern = layer_pattern(ModelConfig(layers=entries))
    assert [l.mixer for l in pattern] == ["attention"] * 4
    assert [dict(l.options) for l in pattern] == [{}, {"window": 8}, {}, {"window": 8}]
    assert [l.ffn for l in pattern] == ["dense", "dense", "none", "dense"]
    assert layer_pattern(ModelConfig(layers=pattern)) == pattern


def test_overrides_of_a_layer_merge_with_the_options_of_the_model():
    model = ModelConfig(
        mixers={"attention": {"num_heads": 2, "rope": {"theta": 5e5, "fraction": 0.5}}},
        ffns={"dense": {"activation": "gelu"}},
        layers=(
            layer(window=8, rope={"theta": 100}),
            layer(num_heads=8, ffn_options={"bias": True}),
            layer(rope=RopeConfig(theta=7.0)),
        ),
    )
    (_, local, _), (_, wide, ffn), (_, whole, _) = layer_options(model)
    assert (local.window, local.num_heads) == (8, 2)
    assert local.rope == RopeConfig(theta=100.0, fraction=0.5)
    assert (wide.window, wide.num_heads) == (None, 8)
    assert wide.rope == RopeConfig(theta=5e5, fraction=0.5)
    assert (ffn.activation, ffn.bias) == ("gelu", True)
    assert whole.rope == RopeConfig(theta=7.0)  # a whole group replaces the group


def test_options_as_a_dataclass_are_the_same_as_a_mapping():
    options = AttentionOptions(num_heads=2, rope=RopeConfig(theta=3.0))
    as_object = ModelConfig(mixers={"attention": options}, layers=(layer(window=8),))
    as_mapping = ModelConfig(
        mixers={"attention": {"num_heads": 2, "rope": {"theta": 3.0}}}, layers=(layer(window=8),)
    )
    assert layer_options(as_object) == layer_options(as_mapping)


def test_a_method_without_shared_options_takes_those_of_its_layer():
    model = ModelConfig(mixers={}, layers=(layer(num_heads=8),))
    assert layer_options(model)[0][1].num_heads == 8


# Conversions.

FULL = Config(
    model=ModelConfig(
        embedding_scale=2.0,
        num_layers=5,
        mixers={"attention": {"num_heads": 2, "rope": {"theta": 5e5}}},
        layers=(layer(window=8, rope={"theta": 1e4}),) * 2 + ("attention",),
    ),
)


def test_json_round_trip_keeps_every_field():
    text = json.dumps(FULL.to_dict())
    config = Config.from_dict(json.loads(text))
    assert config.to_dict() == FULL.to_dict()
    assert json.dumps(config.to_dict()) == text
    assert layer_options(config.model) == layer_options(FULL.model)
    assert Config.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_config_dict_round_trip_keeps_every_field():
    values = FULL.to_config_dict()
    assert isinstance(values, ml_collections.ConfigDict)
    assert Config.from_config_dict(values).to_dict() == FULL.to_dict()


def test_to_dict_spells_out_the_options_of_used_methods():
    values = Config(model=ModelConfig(layers=(layer(ffn="none"),))).to_dict()["model"]
    assert set(values["mixers"]) == {"attention"} and set(values["ffns"]) == {"none"}
    assert values["mixers"]["attention"]["rope"]["theta"] == 10_000.0


# Flags.


@pytest.mark.parametrize(
    ("argument", "path", "value"),
    [
        ("model.embed_dim=64", "model.embed_dim", 64),
        ("model.embedding_scale=7", "model.embedding_scale", 7.0),
        ("model.tie_embeddings=false", "model.tie_embeddings", False),
        ("evaluation.batches=3", "evaluation.batches", 3),
        ("optimizer.learning_rate=1", "optimizer.learning_rate", 1.0),
        ("optimizer.schedule.name=wsd", "optimizer.schedule.name", "wsd"),
        ("data.paths=a.txt", "data.paths", ("a.txt",)),
        ("data.paths=('a.txt', 'b.txt')", "data.paths", ("a.txt", "b.txt")),
        ("model.mixers.attention.window=64", "model.mixers.attention.window", 64),
        ("model.mixers.attention.rope.theta=5", "model.mixers.attention.rope.theta", 5.0),
        ("model.ffns.dense.hidden_dim=96", "model.ffns.dense.hidden_dim", 96),
        ("data.task={'pairs': 4}", "data.task", {"pairs": 4}),
    ],
)
def test_flags_override_fields(tmp_path, monkeypatch, argument, path, value):
    found = with_flags(tmp_path, monkeypatch, f"--config.{argument}").to_dict()
    for name in path.split("."):
        found = found[name]
    assert found == value and type(found) is type(value)


def test_flags_override_the_layers_as_text(tmp_path, monkeypatch):
    text = "(('attention', {'window': 64, 'rope': {'theta': 5}}),)"
    config = with_flags(tmp_path, monkeypatch, f"--config.model.layers={text}")
    ((_, options, _),) = layer_options(config.model)
    assert options.window == 64 and options.rope.theta == 5.0
    config = with_flags(tmp_path, monkeypatch, "--config.model.layers=('attention', 'attention')")
    assert len(layer_options(config.model)) == 2


def test_flags_of_wrong_type_or_name_are_refused(tmp_path, monkeypatch):
    with pytest.raises(AttributeError, match='Did you mean "window"'):
        with_flags(tmp_path, monkeypatch, "--config.model.mixers.attention.windw=1")
    with pytest.raises(flags.IllegalFlagValueError, match=r"config\.training\.steps=abc"):
        with_flags(tmp_path, monkeypatch, "--config.training.steps=abc")
    with pytest.raises(ConfigError, match=r"config\.optimizer\.name='adam'; allowed: 'adamw'"):
        with_flags(tmp_path, monkeypatch, "--config.optimizer.name=adam")


def test_float_fields_given_as_ints_take_fractions_later():
    values = ml_collections.ConfigDict(
        with_placeholders(ModelConfig, {"embedding_scale": 2, "dropout": 0})
    )
    values.embedding_scale, values.dropout = 1.5, 0.5
    assert build(ModelConfig, values.to_dict(), "model").embedding_scale == 1.5


# The registry.


def test_registered_methods_have_documented_options_with_defaults():
    for table, get in (
        (registry.MIXERS, registry.mixer),
        (registry.FEED_FORWARDS, registry.feed_forward),
    ):
        for name in table:
            method = get(name)
            assert method.__doc__ and method.Options.__doc__
            method.Options().check(ModelConfig())  # defaults suit the default model


def test_options_with_optional_literals_can_be_set_by_flag():
    @dataclass(frozen=True)
    class Options:
        kind: Literal["a", "b"] | None = None
        names: tuple[str, ...] | None = None

    values = ml_collections.ConfigDict(with_placeholders(Options, {"kind": None, "names": None}))
    values.kind = "b"
    values.names = ("x",)
    assert build(Options, values.to_dict(), "options") == Options("b", ("x",))
    assert build(Options, {"kind": None}, "options") == Options()


def test_a_bad_config_fails_before_any_device_work():
    program = """
import jax
from jax._src import xla_bridge
from efficient_lm.config import Config, ConfigError, layer
for bad in ({"modl": {}}, {"model": {"layers": [["attention", {"num_heads": 3}]]}}):
    try:
        Config.from_dict(bad)
    except ConfigError as error:
        print(error)
Config.from_dict({}).to_config_dict()
assert not xla_bridge.backends_are_initialized()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
