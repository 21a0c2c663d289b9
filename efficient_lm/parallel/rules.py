"""Which mesh axes a logical axis is split over, as data, and the shardings that follow."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

ROWS = ("dcn", "data", "fsdp")  # the mesh axes that split the rows of a batch
TOKENS = ("ring", "sequence")  # and the tokens of a row


@dataclass(frozen=True)
class Rules:
    """Mesh axes by logical axis, for parameters and for activations."""

    parameters: Mapping[str, tuple[str, ...]]
    activations: Mapping[str, tuple[str, ...]]


_TENSOR = dict.fromkeys(("heads", "key_value_heads", "ffn", "vocabulary"), ("tensor",))
_ACTIVATIONS = _TENSOR | {"batch": ROWS, "length": TOKENS, "residual_length": TOKENS}

PRESETS = {
    # Every matrix is split along the model width over all devices that see other tokens of a
    # slice, and gathered layer by layer inside the scan (ZeRO-3, arXiv 1910.02054).
    "fsdp": Rules(_TENSOR | {"embed": ("fsdp", *TOKENS)}, _ACTIVATIONS),
    # Parameters whole on each device, but for tensor parallelism.
    "replicated": Rules(_TENSOR, _ACTIVATIONS),
    # As fsdp; between layers, tokens are split over the tensor axis too (arXiv 2205.05198).
    "megatron": Rules(
        _TENSOR | {"embed": ("fsdp", *TOKENS)},
        _ACTIVATIONS | {"residual_length": (*TOKENS, "tensor")},
    ),
}


def partition_spec(
    rules: Mapping[str, tuple[str, ...]],
    mesh: Mesh,
    axes: Sequence[str | None],
    shape: Sequence[int],
) -> PartitionSpec:
    """PartitionSpec of an array; an axis that its mesh axes do not divide stays whole."""
    used: set[str] = set()
    entries = []
    for axis, size in zip(axes, shape, strict=True):
        names = tuple(n for n in rules.get(axis, ()) if mesh.shape[n] > 1 and n not in used)
        split = 1
        for name in names:
            split *= mesh.shape[name]
        if names and size % split == 0:
            used.update(names)
            entries.append(names if len(names) > 1 else names[0])
        else:
            entries.append(None)
    return PartitionSpec(*entries)


def parameter_shardings(mesh: Mesh, parameters: Any, preset: str = "fsdp") -> Any:
    """Shardings for a tree of nnx.Param that carry `axes`, in the same structure."""
    return jax.tree.map(
        lambda leaf: NamedSharding(
            mesh, partition_spec(PRESETS[preset].parameters, mesh, leaf.axes, leaf.shape)
        ),
        parameters,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch, [B, T]."""
    return NamedSharding(mesh, PartitionSpec(ROWS, TOKENS))


def activation_sharder(mesh: Mesh, preset: str = "fsdp") -> Callable[..., jax.Array]:
    """The function that models call as `shard(x, *logical_axes)`."""

    def shard(x: jax.Array, *axes: str | None) -> jax.Array:
        spec = partition_spec(PRESETS[preset].activations, mesh, axes, x.shape)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return shard
