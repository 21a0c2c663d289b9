"""Whether a config fits its mesh, said before anything is compiled."""

import math

from jax.sharding import Mesh

from efficient_lm import registry
from efficient_lm.config import Config, layer_options, layer_pattern
from efficient_lm.errors import ConfigError
from efficient_lm.model.definition import ModelDefinition
from efficient_lm.parallel.rules import ROWS, TOKENS
from efficient_lm.parallel.upipe import make_schedule


def check_mesh(config: Config, definition: ModelDefinition, mesh: Mesh) -> None:
    """ConfigError where rows, tokens, heads or features do not divide over the mesh axes."""
    _check_batch(config, mesh)
    devices, tensor = mesh.shape["sequence"], mesh.shape["tensor"]
    counts = _head_counts(definition)
    at_once = config.parallel.heads_at_once
    names = [part.mixer for part in layer_pattern(config.model)]
    no_ring = [name for name in names if not registry.mixer(name).has_ring]
    for path, (heads, key_value_heads) in counts.items():
        if heads % (devices * tensor):
            others = "fsdp" if no_ring else "ring"
            raise ConfigError(
                f"{path} has {heads} head{'s' * (heads > 1)}, which config.parallel.sequence="
                f"{devices} times tensor={tensor} does not divide; lower them, or give the rest of "
                f"the devices to config.parallel.{others}"
            )
        if at_once is not None and at_once != heads:
            make_schedule(heads, key_value_heads, tensor=tensor, devices=devices, at_once=at_once)
    for part, options, _ in layer_options(config.model):
        if at_once is not None and getattr(options, "joins_heads", False):
            raise ConfigError(
                f"the mixer {part.mixer!r} with these options normalises over all heads, of which "
                f"config.parallel.heads_at_once={at_once} gives it some; set it to None"
            )
    if mesh.shape["ring"] > 1 and no_ring:
        raise ConfigError(
            f"the mixer {no_ring[0]!r} does not go along a ring; "
            "set config.parallel.ring=1 and config.parallel.sequence instead"
        )
    for path, leaf in _parameters(definition.parameters):
        for axis, size in zip(leaf.axes, leaf.shape, strict=True):
            if axis == "ffn" and size % tensor:
                raise ConfigError(
                    f"{path} has {size} hidden features, which config.parallel.tensor={tensor} "
                    "does not divide; change the width or the axis"
                )


def _check_batch(config: Config, mesh: Mesh) -> None:
    """Rows of a microbatch over ROWS, tokens of a row over TOKENS."""
    over = math.prod(mesh.shape[axis] for axis in ROWS)
    rows = config.data.batch_size // config.optimizer.accumulation_steps
    if rows % over:
        raise ConfigError(
            f"config.data.batch_size / config.optimizer.accumulation_steps = {rows} rows cannot "
            f"be split over {over} devices ({_names(mesh, ROWS)}); make it a multiple of {over}"
        )
    # Each place on a ring holds two chunks, an early and a late one.
    pieces = math.prod(mesh.shape[axis] for axis in TOKENS) * (2 if mesh.shape["ring"] > 1 else 1)
    length = config.data.sequence_length
    if length % pieces:
        raise ConfigError(
            f"config.data.sequence_length={length} cannot be split into {pieces} pieces "
            f"({_names(mesh, TOKENS)}); make it a multiple of {pieces}"
        )


def _names(mesh: Mesh, axes: tuple[str, ...]) -> str:
    return ", ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)


def _parameters(tree: dict, prefix: str = "model"):
    """(dotted path, parameter) of a nested dict."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _parameters(value, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}", value


def _head_counts(definition: ModelDefinition) -> dict[str, tuple[int, int]]:
    """(heads, key-value heads) of every mixer, by its path."""
    counts: dict[str, dict[str, int]] = {}
    for path, leaf in _parameters(definition.parameters):
        for axis, size in zip(leaf.axes, leaf.shape, strict=True):
            if axis in ("heads", "key_value_heads"):
                counts.setdefault(path.rpartition(".")[0], {})[axis] = size
    return {
        path: (sizes["heads"], sizes.get("key_value_heads", sizes["heads"]))
        for path, sizes in counts.items()
        if "heads" in sizes
    }
