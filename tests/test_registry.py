"""The registry: every name resolves, and a wrong one is answered with the nearest."""

import inspect
import re

import pytest

from efficient_lm import registry
from efficient_lm.config import Config, layer
from efficient_lm.errors import ConfigError

TABLES = {
    "mixer": (registry.MIXERS, registry.mixer),
    "feed-forward": (registry.FEED_FORWARDS, registry.feed_forward),
    "objective": (registry.OBJECTIVES, registry.objective),
}


@pytest.mark.parametrize("what", TABLES)
def test_every_name_resolves(what):
    table, get = TABLES[what]
    for name, target in table.items():
        assert get(name).__name__ == target.split(":")[1]


@pytest.mark.parametrize("what", TABLES)
def test_a_wrong_name_is_answered_with_the_nearest(what):
    table, get = TABLES[what]
    name = next(iter(table))
    with pytest.raises(ConfigError, match=f"unknown {what} '{name}e'; did you mean '{name}'"):
        get(name + "e")
    with pytest.raises(ConfigError, match="known: "):
        get("qqqqqqqq")


def test_mixers_keep_the_contract_of_signatures():
    for name in registry.MIXERS:
        mixer = registry.mixer(name)
        for method, parameters in {
            "project": ["self", "x", "context", "names"],
            "core": ["self", "projected", "context", "state"],
            "output": ["self", "attended", "projected", "context"],
            "init_state": ["self", "batch", "max_length", "dtype"],
        }.items():
            found = list(inspect.signature(getattr(mixer, method)).parameters)
            assert len(found) == len(parameters), f"{name}.{method} takes {found}"
        assert set(mixer.core_reads) <= set(mixer.head_axes), name
        assert set(mixer.head_axes.values()) <= {"heads", "key_value_heads"}, name
        assert isinstance(mixer.has_ring, bool), name


@pytest.mark.parametrize("name", registry.MIXERS)
def test_an_unknown_implementation_is_refused_with_the_config(name):
    shared = {"mixers": {name: {"implementation": "autto"}}}
    own = {"layers": (layer(), layer(name, implementation="autto"))}
    for model, place in (
        (shared, f"mixers.{name}"),
        (shared | {"layers": (layer(name),)}, f"mixers.{name}"),
        (own, "layers[1].options"),
    ):
        line = f"config.model.{place}.implementation='autto' is unknown; allowed: 'auto', "
        with pytest.raises(ConfigError, match=f"^{re.escape(line)}.*; did you mean 'auto'\\?$"):
            Config.from_dict({"model": model})


def test_an_implementation_is_of_the_op_that_the_options_ask_for():
    def check(score, implementation):
        entry = layer("two_mamba", score=score, implementation=implementation)
        Config.from_dict({"model": {"layers": (entry,)}})

    check("square", "xla_rows")
    check("linear", "xla")
    check("exponential", "auto")
    for score, wrong in (("square", "xla"), ("linear", "xla_rows"), ("exponential", "xla")):
        with pytest.raises(ConfigError, match=f"implementation='{wrong}' is unknown; allowed: "):
            check(score, wrong)
    shared = {"two_mamba": {"implementation": "mosaic_gpu"}}
    layers = (layer("two_mamba", score="linear"),)
    Config.from_dict({"model": {"mixers": shared, "layers": layers}})
    with pytest.raises(ConfigError, match=r"objective\.implementation='xla_row' .* 'xla_rows'\?$"):
        Config.from_dict({"objective": {"implementation": "xla_row"}})
