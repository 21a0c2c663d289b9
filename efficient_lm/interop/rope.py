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
    older = values.pop("type", "default")
    kind = values.pop("rope_type", older)
    if kind not in FIELDS:
        raise ConfigError(
            f"{name} of type {kind!r} is not supported; supported: {', '.join(FIELDS)}"
        )
    fraction = values.pop("partial_rotary_factor", given.get("partial_rotary_factor", 1.0))
    if "original_max_position_embeddings" in FIELDS[kind]:
        values.setdefault("original_max_position_embeddings", given["max_position_embeddings"])
    unknown = [n for n, v in values.items() if n not in FIELDS[kind] and v is not None]
    if kind != "default" and unknown:
        raise ConfigError(
            f"{name} of type {kind!r} has fields that are not supported: {', '.join(unknown)}; "
            f"supported: {', '.join(FIELDS[kind])}"
        )
    ours = {FIELDS[kind][n]: v for n, v in values.items() if n in FIELDS[kind] and v is not None}
    ours = {n: v if n == "original_max_length" else float(v) for n, v in ours.items()}
    scaling = "none" if kind == "default" else kind
    return RopeConfig(fraction=float(fraction), theta=float(theta), scaling=scaling, **ours)


def write(rope: RopeConfig) -> dict[str, Any]:
    """`rope_parameters` of config.json."""
    kind = "default" if rope.scaling == "none" else rope.scaling
    values: dict[str, Any] = {"rope_type": kind, "rope_theta": rope.theta}
    if rope.fraction != 1.0:
        values["partial_rotary_factor"] = rope.fraction
    for theirs, ours in FIELDS[kind].items():
        if getattr(rope, ours) is not None:
            values[theirs] = getattr(rope, ours)
    return values
