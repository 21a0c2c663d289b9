"""Dataclasses from nested mappings, each value checked against the annotation of its field."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from ml_collections import config_dict

from efficient_lm import registry
from efficient_lm.errors import ConfigError


def build(cls, values, path: str, base=None):
    """Dataclass `cls` from a mapping; fields not in it come from `base`, or are the defaults.

    Groups merge: `{"rope": {"theta": 1e6}}` on a base changes one field of its `rope`. ConfigError
    names the field, below `path`, that is unknown or ill-typed.
    """
    if isinstance(values, cls):
        return values
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} must be a group of fields, given {values!r}")
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise ConfigError(f"unknown field {path}.{name}; {registry.suggest(str(name), hints)}")
    given = {
        name: coerce(hints[name], value, f"{path}.{name}", getattr(base, name, None))
        for name, value in values.items()
    }
    return cls(**given) if base is None else dataclasses.replace(base, **given)


def coerce(hint, value, path: str, base=None):
    """`value` as `hint` says, ints taken for floats and lists for tuples; ConfigError otherwise."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, path, base)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return coerce(_not_none(arguments), value, path, base)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{path}={value!r}; allowed: {', '.join(map(repr, arguments))}")
        return value
    if hint is tuple or origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise ConfigError(f"{path}={value!r}; it must be a tuple, such as ({value!r},)")
        element = arguments[0] if arguments else Any
        return tuple(coerce(element, v, f"{path}[{i}]") for i, v in enumerate(value))
    if hint is Mapping or origin is Mapping:
        if isinstance(value, Mapping):
            return {name: _tuples(inner) for name, inner in value.items()}
        raise ConfigError(f"{path}={value!r}; it must be a group of fields")
    if hint is Any:
        return _tuples(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        if hint is float and not math.isfinite(value):
            raise ConfigError(f"{path}={value}; it must be a finite number")
        return value
    raise ConfigError(
        f"{path}={value!r} is of type {type(value).__name__}; it must be {hint.__name__}"
    )


def with_placeholders(cls, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` of dataclass `cls` for a ConfigDict whose every field can be set by a flag.

    None becomes a typed placeholder, and ints in float fields become floats, because a ConfigDict
    keeps the types that it starts with.
    """
    hints = typing.get_type_hints(cls)
    result = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            value = with_placeholders(hint, value)
        elif value is None:
            kind = _not_none(typing.get_args(hint))
            if typing.get_origin(kind) is Literal:
                kind = type(typing.get_args(kind)[0])
            value = config_dict.placeholder(typing.get_origin(kind) or kind)
        elif type(value) is int:
            value = coerce(hint, value, name)
        result[name] = value
    return result


def _not_none(arguments):
    """The one type of an optional annotation that is not None."""
    return next(a for a in arguments if a is not type(None))


def _tuples(value):
    """Lists (JSON) as tuples, also inside mappings, so that configs compare equal."""
    if isinstance(value, (tuple, list)):
        return tuple(_tuples(v) for v in value)
    if isinstance(value, Mapping):
        return {name: _tuples(inner) for name, inner in value.items()}
    return value
