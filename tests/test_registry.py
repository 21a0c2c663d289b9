"""The registry: every name resolves, and a wrong one is answered with the nearest."""

import inspect

import pytest

from efficient_lm import registry
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
