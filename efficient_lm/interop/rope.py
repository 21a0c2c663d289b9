"""Rotary embedding fields: our RopeConfig and the rope fields of config.json."""

from typing import Any

from efficient_lm.errors import ConfigError
from efficient_lm.model.rope import RopeConfig

# Fields by kind of scaling: theirs -> ours. Each kind also has rope_theta and its own name.
SHARED = {"factor": "factor", "original_max_position_embeddings": "original_max_length"}
FIELDS = {
    "default": {},
    "llama3": SHARED
    | {"low_freq_factor": "low_frequency_factor", "high_freq_factor": "high_frequency_factor"},
    "yarn": SHARED | {name: name for name in ("beta_fast", "beta_slow", "attention_factor")},
}


def read(given: dict[str, Any]) -> RopeConfig:
    """From config.json, either `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    name = "rope_parameters" if given.get("rope_parameters") else "rope_scaling"
    values = dict(given.get(name) or {})
    theta = values.pop("rope_theta", None) or given.get("rope_theta") or 10_000.0
    fraction = values.pop("partial_rotary_factor", given.get("partial_rotary_factor"))
    if fraction not in (None, 1):
        raise ConfigError(f"partial_rotary_factor={fraction} is not supported; supported: 1")
    older = values.pop("type", "default")
    kind = values.pop("rope_type", older)
    if kind not in FIELDS:
        raise ConfigError(
            f"{name} of type {kind!r} is not supported; supported: {', '.join(FIELDS)}"
        )
    length = "original_max_position_embeddings"
    if length in FIELDS[kind] and values.get(length) is None:
        values[length] = given["max_position_embeddings"]
    unknown = [n for n, v in values.items() if n not in FIELDS[kind] and v is not None]
    if kind != "default" and unknown:
        raise ConfigError(
            f"{name} of type {kind!r} has fields that are not supported: {', '.join(unknown)}; "
            f"supported: {', '.join(FIELDS[kind])}"
        )
    ours = {FIELDS[kind][n]: v for n, v in values.items() if n in FIELDS[kind] and v is not None}
    ours = {n: v if n == "original_max_length" else float(v) for n, v in ours.items()}
    scaling = "none" if kind == "default" else kind
    return RopeConfig(theta=float(theta), scaling=scaling, **ours)


def write(rope: RopeConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, which older and newer readers of config.json know."""
    if rope.scaling == "none":
        return {"rope_theta": rope.theta, "rope_scaling": None}
    scaling: dict[str, Any] = {"rope_type": rope.scaling}
    for theirs, ours in FIELDS[rope.scaling].items():
        value = getattr(rope, ours)
        # What only YaRN has may be left out.
        if rope.scaling != "yarn" or theirs in SHARED or value != getattr(RopeConfig, ours):
            scaling[theirs] = value
    return {"rope_theta": rope.theta, "rope_scaling": scaling}
