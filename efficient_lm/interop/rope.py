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


# Of positions in images; tokens of text have one position, whichever way it is split.
IMAGE_FIELDS = ("mrope_section", "mrope_interleaved")


def read(given: dict[str, Any], *, partial: bool = False) -> RopeConfig:
    """From config.json, either `rope_parameters` or the older `rope_theta` and `rope_scaling`.

    partial: whether the architecture can rotate a part of each head, as `write` takes it.
    """
    name = "rope_parameters" if given.get("rope_parameters") else "rope_scaling"
    values = {n: v for n, v in (given.get(name) or {}).items() if n not in IMAGE_FIELDS}
    theta = values.pop("rope_theta", None)
    theta = given.get("rope_theta") if theta is None else theta
    theta = 10_000.0 if theta is None else _number("rope_theta", theta)
    if not theta > 0:
        raise ConfigError(f"rope_theta={theta}; it must be above 0")
    fraction = values.pop("partial_rotary_factor", given.get("partial_rotary_factor"))
    fraction = 1.0 if fraction is None else _number("partial_rotary_factor", fraction)
    if fraction != 1 and not partial:
        raise ConfigError(f"partial_rotary_factor={fraction} is not supported; supported: 1")
    older = values.pop("type", "default")
    kind = values.pop("rope_type", older)
    if not isinstance(kind, str) or kind not in FIELDS:
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
    ours = {
        FIELDS[kind][n]: v if n == length else _number(n, v)
        for n, v in values.items()
        if n in FIELDS[kind] and v is not None
    }
    scaling = "none" if kind == "default" else kind
    return RopeConfig(fraction=fraction, theta=theta, scaling=scaling, **ours)


def _number(name: str, value: Any) -> float:
    """A number of config.json as a float; ConfigError for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name}={value!r}; it must be a number")
    return float(value)


def write(rope: RopeConfig, *, partial: bool = False) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, which older and newer readers of config.json know.

    partial: `rope_parameters` instead; architectures that have it are newer.
    """
    if partial:
        older = write(rope)
        scaling = older["rope_scaling"] or {"rope_type": "default"}
        shared = {"rope_theta": rope.theta, "partial_rotary_factor": rope.fraction}
        return {"rope_parameters": scaling | shared}
    if rope.scaling == "none":
        return {"rope_theta": rope.theta, "rope_scaling": None}
    scaling: dict[str, Any] = {"rope_type": rope.scaling}
    for theirs, ours in FIELDS[rope.scaling].items():
        value = getattr(rope, ours)
        # What only YaRN has may be left out.
        if rope.scaling != "yarn" or theirs in SHARED or value != getattr(RopeConfig, ours):
            scaling[theirs] = value
    return {"rope_theta": rope.theta, "rope_scaling": scaling}
